"""How a warp holds rows whose values are compared with each other, and stores what comes of it."""

from typing import Any

from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

BY_LANE = plgpu.CompilerParams(
    unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
)
"""How kernels are compiled whose layouts are all given."""
WARPS, LANES = 4, 32
AT_ONCE = 8
"""Rows that a warp scatters at once."""


def lanes_of(columns: int) -> int:
    """Lanes over which a row lies: the largest power of two that divides its columns."""
    return min(LANES, columns & -columns)


def rows_of(columns: int) -> int:
    """Rows that a warpgroup holds at least."""
    return WARPS * LANES // lanes_of(columns)


def row_layout(columns: int) -> Any:
    """How a warpgroup holds [rows, columns], where a row lies in lanes of one warp."""
    lanes = lanes_of(columns)
    if lanes == LANES:
        return plgpu.Layout.TILED(
            plgpu.Tiling(((WARPS, LANES), (1,))),
            warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1,
        )  # fmt: skip
    rows = LANES // lanes
    return plgpu.Layout.TILED(
        plgpu.Tiling(((WARPS * rows, lanes), (rows, lanes), (1,))),
        warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1,
    )  # fmt: skip


def check_columns(columns: int, what: str) -> None:
    """Raises NotImplementedError where columns do not lie over lanes."""
    if lanes_of(columns) == 1:
        raise NotImplementedError(f"needs an even number of {what}, got {columns}")


def scatter(places, row_ref, first) -> None:
    """Stores at each place, which shared memory holds, its row; the rows begin at `first`."""
    count = places.shape[0] // WARPS
    at_once = min(count, AT_ONCE)

    def share(warp):
        def some(step, _):
            for offset in range(at_once):
                index = warp * count + step * at_once + offset
                row_ref[places[index]] = first + index

        lax.fori_loop(0, count // at_once, some, None)

    plgpu.warp_map(share)
