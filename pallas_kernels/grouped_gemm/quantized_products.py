"""The product of one tile of float8 operands, in either orientation.

Tensor cores add float8 products with 14 bits or so, and scales change every 128 elements of k. So
each step of that depth is a product of its own, whose sums are scaled and added in float32.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.grouped_gemm.quantize import SCALE_BLOCK
from pallas_kernels.grouped_gemm.scattered_rows import ScatteredRows
from pallas_kernels.grouped_gemm.tiles import Tile, TileConfig

UNIT = 64
"""What one side of wgmma is fixed at; so many neighbouring columns share a scale."""


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The ring of stages that a tile's operands come through, and the scales of the matrices."""

    lhs: Any
    """[stages, rows, k] of one step."""
    rhs: Any
    """[stages, columns, k]; of two parts, one after the other."""
    lhs_scales: Any
    """[stages, rows]"""
    rhs_scales: Any
    """[matrices, n_blocks, k_blocks] in global memory."""
    filled: Any
    released: Any
    scattered: ScatteredRows | None
    """How rows get there if not by the copy engine."""

    def wait(self, step: Array, slot: Array) -> None:
        """Waits for what a step needs."""
        plgpu.barrier_wait(self.filled.at[slot])
        if self.scattered is not None:
            self.scattered.wait(step, slot)


def unit_columns(tile: Tile, n: int, parts: int, config: TileConfig) -> list[Array]:
    """First columns of the units that this warpgroup multiplies; those past n count as the last."""
    width = config.width // parts
    first = tile.column
    if not config.upright:
        first += lax.axis_index("warpgroup") * width
    return [
        lax.min(part * (n // parts) + first + unit, n - UNIT)
        for part in range(parts)
        for unit in range(0, width, UNIT)
    ]


def multiply_across(
    stages: Stages, columns: list[Array], parts: int, config: TileConfig, rows: int,
    tile: Tile, step: Array,
) -> list[Array]:  # fmt: skip
    """Sums [columns, rows] of each of this warpgroup's units, with columns on the fixed side."""
    width = config.width // parts
    first = lax.axis_index("warpgroup") * width
    units = len(columns)

    def one_step(slot, matrix_scales, totals, *sums):
        for unit in range(units):
            part, offset = divmod(unit * UNIT, width)
            begin = pl.multiple_of(part * (config.columns // parts) + first + offset, UNIT)
            lhs = stages.lhs.at[slot, pl.ds(0, rows)]
            plgpu.wgmma(sums[unit], stages.rhs.at[slot, pl.ds(begin, UNIT)], lhs.transpose((1, 0)))
        row_scales = plgpu.load(
            stages.lhs_scales.at[slot, pl.ds(0, rows)],
            layout=plgpu.Layout.WGMMA.reduce(0),
            optimized=False,
        )
        scales = [row_scales * matrix_scale for matrix_scale in matrix_scales]
        new_totals = []
        for unit in range(units):
            # The units after this one may still be multiplying.
            product = plgpu.wgmma_accumulator_load(sums[unit], wait_n=units - 1 - unit)
            if unit == units - 1:
                plgpu.barrier_arrive(stages.released.at[slot])
            product = plgpu.layout_cast(product, plgpu.Layout.WGMMA)
            scale = lax.broadcast_in_dim(scales[unit], product.shape, (1,))
            new_totals.append(totals[unit] + product * scale)
        return tuple(new_totals)

    accumulator = plgpu.WGMMAAccumulatorRef((UNIT, rows), jnp.float32)
    zeros = _zeros((UNIT, rows), units)
    return _accumulate(stages, columns, tile, step, one_step, [accumulator] * units, zeros)


def multiply_upright(
    stages: Stages, columns: list[Array], config: TileConfig, tile: Tile, step: Array
) -> list[Array]:
    """Sums [rows, columns] of each unit of columns, with this warpgroup's rows on the fixed side.

    That wastes up to 63 rows of a group, but a thread needs the scales of two rows only, where it
    needs a quarter of all rows' with columns there: reading them took a sixth of the time.
    """
    rows = pl.ds(pl.multiple_of(lax.axis_index("warpgroup") * UNIT, UNIT), UNIT)

    def one_step(slot, matrix_scales, totals, sums):
        plgpu.wgmma(sums, stages.lhs.at[slot, rows], stages.rhs.at[slot].transpose((1, 0)))
        row_scales = plgpu.load(
            stages.lhs_scales.at[slot, rows], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False
        )
        product = plgpu.layout_cast(sums[...], plgpu.Layout.WGMMA)
        plgpu.barrier_arrive(stages.released.at[slot])
        new_totals = []
        for unit, (matrix_scale, total) in enumerate(zip(matrix_scales, totals, strict=True)):
            part = product[:, unit * UNIT : (unit + 1) * UNIT]
            scale = lax.broadcast_in_dim(row_scales * matrix_scale, part.shape, (0,))
            new_totals.append(total + part * scale)
        return tuple(new_totals)

    accumulator = plgpu.WGMMAAccumulatorRef((UNIT, config.width), jnp.float32)
    zeros = _zeros((UNIT, UNIT), len(columns))
    return _accumulate(stages, columns, tile, step, one_step, [accumulator], zeros)


def skip_tile(stages: Stages, step: Array) -> None:
    """Releases a tile's stages unread: this warpgroup has no rows of it."""

    def one_step(k_step, _):
        slot = lax.rem(step + k_step, stages.filled.shape[0])
        stages.wait(step + k_step, slot)
        plgpu.barrier_arrive(stages.released.at[slot])

    lax.fori_loop(0, stages.rhs_scales.shape[2], one_step, None)


def _accumulate(
    stages: Stages, columns: list[Array], tile: Tile, step: Array,
    multiply_step, accumulators: list, zeros: tuple[Array, ...],
) -> list[Array]:  # fmt: skip
    """Adds up `multiply_step(slot, matrix_scales, totals, *accumulators)` over all of k."""
    k_steps = stages.rhs_scales.shape[2]

    def read_matrix_scales(k_step):
        return tuple(
            stages.rhs_scales[tile.weights, lax.div(column, SCALE_BLOCK), k_step]
            for column in columns
        )

    def one_step(k_step, carry):
        matrix_scales, totals = carry
        slot = lax.rem(step + k_step, stages.filled.shape[0])
        # Read a step ahead, and before the wait: ptxas has the product wait for them otherwise.
        next_scales = read_matrix_scales(lax.min(k_step + 1, k_steps - 1))
        stages.wait(step + k_step, slot)

        def multiply(*sums):
            return multiply_step(slot, matrix_scales, totals, *sums)

        return next_scales, pl.run_scoped(multiply, *accumulators)

    carry = (read_matrix_scales(0), zeros)
    return list(lax.fori_loop(0, k_steps, one_step, carry)[1])


def _zeros(shape: tuple[int, int], count: int) -> tuple[Array, ...]:
    zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
    return (zeros,) * count
