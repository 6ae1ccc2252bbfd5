"""Grouped GEMM of float8 operands with scales in blocks, at the shapes of `grouped_gemm`.

Outputs are compared with the product of the same quantised operands in float32. The share of the
roofline takes the rate of XLA's float8 product of the same run.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import grouped_gemm, timing
from benchmarks.grouped_gemm import rates
from benchmarks.timing import compile_all
from pallas_kernels import QuantizedMatrices, QuantizedRows, quantize_matrices, quantize_rows
from pallas_kernels.grouped_gemm import configs, quantized_sm90
from pallas_kernels.grouped_gemm.quantize import SCALE_BLOCK
from pallas_kernels.groups import room_for

__all__ = ["SHAPES", "compile_all", "lower", "measure", "rates"]

MATRICES_AT_ONCE = 8
"""How many are drawn and quantised together: in float32 all would not fit."""


class QuantizedShape(grouped_gemm.Shape):
    """One product of a model's expert layer, its operands in float8."""

    def bytes(self, group_sizes: np.ndarray) -> float:
        used = int((group_sizes > 0).sum())
        matrix = self.k * self.n * (1 + 4 / SCALE_BLOCK**2)
        return used * matrix + self.rows * (self.k * (1 + 4 / SCALE_BLOCK) + 2 * self.n)

    def floor_us(self, group_sizes: np.ndarray, limits: dict[str, float]) -> float:
        return super().floor_us(group_sizes, {**limits, "tflops": limits["float8_tflops"]})

    def arguments(self, row_alignment: int = 1) -> list[Any]:
        room = dataclasses.replace(self, rows=room_for(self.rows, self.groups, row_alignment))
        key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
        sizes = jax.ShapeDtypeStruct((self.groups,), jnp.int32)
        return [*jax.tree.leaves(jax.eval_shape(room.operands, key)), sizes]

    def operands(self, key: jax.Array) -> tuple[QuantizedRows, QuantizedMatrices]:
        keys = jax.random.split(key, 2)
        lhs = jax.random.normal(keys[0], (self.rows, self.k), jnp.bfloat16)

        def some_matrices(key):
            shape = (1, MATRICES_AT_ONCE, self.k, self.n)
            return quantize_matrices(jax.random.normal(key, shape, jnp.bfloat16) * self.k**-0.5)

        each = jax.lax.map(
            some_matrices, jax.random.split(keys[1], self.groups // MATRICES_AT_ONCE)
        )
        return quantize_rows(lhs), jax.tree.map(
            lambda x: x.reshape(1, self.groups, *x.shape[3:]), each
        )

    @staticmethod
    def exact_row(
        lhs: QuantizedRows, rhs: QuantizedMatrices, row: jax.Array, group: jax.Array
    ) -> jax.Array:
        scales = jnp.repeat(lhs.scales[:, row], SCALE_BLOCK)
        vector = lhs.values[row].astype(jnp.float32) * scales
        weights = rhs.values[0, group].astype(jnp.float32)
        scales = jnp.repeat(jnp.repeat(rhs.scales[0, group], SCALE_BLOCK, 0), SCALE_BLOCK, 1)
        return jnp.dot(weights * scales, vector, precision="highest")


SHAPES = tuple(QuantizedShape(**dataclasses.asdict(shape)) for shape in grouped_gemm.SHAPES)


def programs(shape: QuantizedShape, *, tune: bool, num_sms: int) -> Iterator[tuple[str, Callable]]:
    """Name and function of our configurations; `llmjax` is what ships. JAX has no other."""
    shipped = configs.quantized_config_for(
        rows=shape.rows, groups=shape.groups, k=shape.k, n=shape.n, num_sms=num_sms
    )
    for name, config in configs.QUANTIZED.items():
        plausible = config.max_rows <= 64 or shape.rows > 24 * shape.groups
        plausible &= config.upright or shape.n % config.columns == 0
        if config == shipped or (tune and plausible):
            run = functools.partial(multiply, config=config, num_sms=num_sms)
            tiles = "" if config == shipped else f", {name} tiles"
            yield from grouped_gemm.with_alignment(shape, tiles, run)


def multiply(
    values, scales, matrices, matrix_scales, sizes, *, config, num_sms: int, row_alignment: int = 1
) -> jax.Array:
    """The kernel on arrays: a stored program knows no other arguments."""
    return quantized_sm90.grouped_gemm(
        QuantizedRows(values, scales), QuantizedMatrices(matrices, matrix_scales), sizes, 0,
        row_alignment=row_alignment, config=config, num_sms=num_sms,
    )  # fmt: skip


def lower(folder: Path, *, tune: bool, num_sms: int) -> None:
    """Writes every JAX program of the benchmark into a folder."""
    grouped_gemm.lower(folder, tune=tune, num_sms=num_sms, shapes=SHAPES, programs=programs)


def measure(compiled: dict, limits: dict[str, float], *, seconds: float) -> Iterator[dict]:
    """A row for every program on every distribution, while time is left; adds the float8 rate."""
    limits["float8_tflops"] = float8_tflops()
    yield from grouped_gemm.measure(compiled, limits, seconds=seconds, shapes=SHAPES)


def float8_tflops() -> float:
    """XLA's rate for a float8 product whose operands both have k as their last axis."""
    keys = jax.random.split(jax.random.key(0), 2)
    a, b = (jax.random.normal(key, (8192, 8192)).astype(jnp.float8_e4m3fn) for key in keys)

    def product(a, b):
        dimensions = (((1,), (1,)), ((), ()))
        return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.bfloat16)

    compiled = jax.jit(product).lower(a, b).compile()
    return 2 * 8192**3 / timing.kernel_microseconds(compiled, a, b, repeats=50) / 1e6
