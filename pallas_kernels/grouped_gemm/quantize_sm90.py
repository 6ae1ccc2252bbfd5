"""Quantising rows on Hopper in one pass: XLA takes three kernels and reads the rows twice."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.grouped_gemm.quantize import (
    LARGEST,
    SCALE_BLOCK,
    SMALLEST_MAXIMUM,
    QuantizedRows,
)

BLOCK_ROWS = 32
"""Rows that a warpgroup holds."""
LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((BLOCK_ROWS, SCALE_BLOCK), (8, 32), (8,))),
    warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1,
)  # fmt: skip
"""Each warp holds eight rows and each lane four times eight neighbours of one, so that loads and
stores of values and scales fill whole sectors of 32 bytes."""


def quantize_rows(
    x: Float[Array, "rows k"],
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> QuantizedRows:
    """Rounds rows to float8. Raises NotImplementedError for what the kernel does not cover."""
    check_covered(x)
    rows, k = x.shape
    kernel = plgpu.kernel(
        _kernel,
        out_type=(
            jax.ShapeDtypeStruct((rows, k), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((k // SCALE_BLOCK, rows), jnp.float32),
        ),
        grid=(rows // BLOCK_ROWS, k // SCALE_BLOCK),
        grid_names=("row_block", "column_block"),
        scratch_types=(),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name="quantize_rows",
        interpret=interpret,
    )
    return QuantizedRows(*kernel(x))


def check_covered(x: Array) -> None:
    """Raises NotImplementedError, with the reason, for what the kernel does not cover."""
    if x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"needs bfloat16, got {x.dtype}")
    if not x.size or x.shape[0] % BLOCK_ROWS or x.shape[1] % SCALE_BLOCK:
        raise NotImplementedError(
            f"needs a multiple of {BLOCK_ROWS} rows of a multiple of {SCALE_BLOCK}, got {x.shape}"
        )


def _kernel(x_ref, values_ref, scales_ref):
    row = lax.axis_index("row_block") * BLOCK_ROWS
    block = lax.axis_index("column_block")
    here = (pl.ds(row, BLOCK_ROWS), pl.ds(block * SCALE_BLOCK, SCALE_BLOCK))
    x = plgpu.load(x_ref.at[here], layout=LAYOUT, optimized=False).astype(jnp.float32)
    maximum = jnp.max(jnp.abs(x), axis=1)
    scale = jnp.maximum(maximum, SMALLEST_MAXIMUM) * (1 / LARGEST)
    inverse = lax.broadcast_in_dim(1 / scale, x.shape, (0,))
    values_ref.at[here][...] = (x * inverse).astype(jnp.float8_e4m3fn)
    scales_ref.at[block, pl.ds(row, BLOCK_ROWS)][...] = scale
