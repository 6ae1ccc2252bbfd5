"""Eight-bit operands with scales in blocks: the format of DeepSeek-V3 (2024, section 3.3.2)."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float8e4m3fn, Int

SCALE_BLOCK = 128
"""Elements of a row, and rows and columns of a matrix, that share a scale."""
LARGEST = 448.0
"""The largest float8 e4m3 value."""
SMALLEST_MAXIMUM = 1e-4
"""Blocks of smaller values count as this large, so that no scale is zero."""


class QuantizedRows(NamedTuple):
    """Rows of float8, with a scale for every `SCALE_BLOCK` features of each row."""

    values: Float8e4m3fn[Array, "rows k"]
    scales: Float[Array, "blocks rows"]
    """What values are multiplied with, block by block: the kernel reads many rows of one block."""


def take_rows(rows: Any, index: Int[Array, "rows"]) -> Any:
    """Rows of an array, or of `QuantizedRows` with scales, at an index of rows that exist."""
    if isinstance(rows, QuantizedRows):
        scales = rows.scales.at[:, index].get(mode="promise_in_bounds")
        return QuantizedRows(take_rows(rows.values, index), scales)
    return rows.at[index].get(mode="promise_in_bounds")


class QuantizedMatrices(NamedTuple):
    """Matrices of float8, with a scale for every square of `SCALE_BLOCK` rows and columns."""

    values: Float8e4m3fn[Array, "layers groups n k"]
    """Transposed, as checkpoints hold them: tensor cores read eight-bit operands along k only."""
    scales: Float[Array, "layers groups n_blocks k_blocks"]


def values_of(operand: Any) -> Any:
    """The numbers of an array, or of quantised rows or matrices without their scales."""
    quantized = isinstance(operand, QuantizedRows | QuantizedMatrices)
    return operand.values if quantized else operand


def quantize_rows_by_xla(x: Float[Array, "rows k"]) -> QuantizedRows:
    """Rounds rows to float8; k is a multiple of `SCALE_BLOCK`."""
    rows, k = x.shape
    blocks = x.astype(jnp.float32).reshape(rows, k // SCALE_BLOCK, SCALE_BLOCK)
    scales = _scales(jnp.max(jnp.abs(blocks), axis=2))
    values = (blocks / scales[..., None]).astype(jnp.float8_e4m3fn)
    return QuantizedRows(values.reshape(x.shape), scales.T)


def quantize_matrices(weights: Float[Array, "layers groups k n"]) -> QuantizedMatrices:
    """Rounds matrices to float8, with a scale for each 128 by 128 of them.

    Raises ValueError if 128 does not divide k and n.
    """
    layers, groups, k, n = weights.shape
    check_divides("k", k)
    check_divides("n", n)
    blocks = weights.astype(jnp.float32).swapaxes(2, 3)
    blocks = blocks.reshape(
        layers, groups, n // SCALE_BLOCK, SCALE_BLOCK, k // SCALE_BLOCK, SCALE_BLOCK
    )
    scales = _scales(jnp.max(jnp.abs(blocks), axis=(3, 5)))
    values = (blocks / scales[:, :, :, None, :, None]).astype(jnp.float8_e4m3fn)
    return QuantizedMatrices(values.reshape(layers, groups, n, k), scales)


def _scales(maximum: Array) -> Array:
    return jnp.maximum(maximum, SMALLEST_MAXIMUM) / LARGEST


def check_divides(name: str, size: int) -> None:
    if size % SCALE_BLOCK:
        nearest = round(size / SCALE_BLOCK) * SCALE_BLOCK or SCALE_BLOCK
        raise ValueError(
            f"{name}={size} does not divide into blocks of {SCALE_BLOCK}; the nearest size that "
            f"does is {nearest}"
        )
