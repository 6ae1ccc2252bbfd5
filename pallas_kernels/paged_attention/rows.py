"""Registers of a warpgroup that holds rows of 64: arrays are [rows, columns] or [rows]."""

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.registers import store_registers


def in_rows(value: Array) -> Array:
    """States the register layout, which is otherwise searched for, at length."""
    layout = plgpu.Layout.WGMMA if value.ndim == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(value, layout)


def along(vector: Array, columns: int) -> Array:
    """Repeats a value of each row, [rows], as [rows, columns]."""
    return in_rows(lax.broadcast_in_dim(vector, (vector.shape[0], columns), [0]))


def full(shape: tuple[int, ...], value: float, dtype: Any = jnp.float32) -> Array:
    return in_rows(jnp.full(shape, value, dtype))


def load(ref: Any) -> Array:
    """Loads from memory without tiles."""
    layout = plgpu.Layout.WGMMA if len(ref.shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.load(ref, layout=layout, optimized=False)


def store(ref: Any, value: Array) -> None:
    """Stores registers in the layout of rows."""
    store_registers(ref, in_rows(value))
