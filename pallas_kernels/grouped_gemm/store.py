"""How a warpgroup finishes its columns of a tile and stores them beside its neighbours'."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.activation import ACTIVATIONS
from pallas_kernels.grouped_gemm.tiles import BLOCK, Tile, TileConfig, has_whole_blocks

EDGE_LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 64), (2, 64), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
"""How a warpgroup holds eight rows of 64: each warp two rows, each lane four neighbours."""
UPRIGHT = 64
"""Rows of a warpgroup where rows stand upright."""
LINE = 64
"""Neighbouring columns that the swizzle keeps together."""


def swizzle(dtype: jnp.dtype) -> tuple[Any, ...]:
    """How shared memory holds what wgmma reads: in blocks of rows by 128 bytes, whose chunks of 16
    are permuted from row to row."""
    return (
        plgpu.TilingTransform((BLOCK, 128 // jnp.dtype(dtype).itemsize)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(128),  # pyright: ignore[reportAbstractUsage]
    )


def tiled(shape: tuple[int, ...], dtype: jnp.dtype) -> Any:
    """Shared memory in the swizzled tiles that wgmma reads and TMA fills without bank conflicts."""
    return plgpu.SMEM(shape, dtype, transforms=swizzle(dtype))


def store_memory(
    config: TileConfig, parts: int, dtype: jnp.dtype, row_alignment: int
) -> dict[str, Any]:
    """The shared memory that storing needs; of two parts, one gates the other."""
    rows, width = config.store_rows * parts, config.width // parts
    shape, edges = (config.warpgroups, 2, rows, width), 1
    if config.upright:
        shape, edges = (config.warpgroups, UPRIGHT, width), width // LINE
    memory: dict[str, Any] = dict(out_smem=tiled(shape, dtype))
    if not has_whole_blocks(row_alignment):
        memory["edge_smem"] = plgpu.SMEM((config.warpgroups, edges, BLOCK, LINE), dtype)
    return memory


def add_bias(
    sums: list[Array], columns: list[Array], bias_ref: list, tile: Tile, *, axis: int
) -> list[Array]:
    """Adds the bias, if there is one, to sums whose columns, along `axis`, begin at these."""
    for ref in bias_ref:
        for index, (values, column) in enumerate(zip(sums, columns, strict=True)):
            bias = plgpu.load(
                ref.at[tile.weights, pl.ds(pl.multiple_of(column, 64), values.shape[axis])],
                layout=plgpu.Layout.WGMMA.reduce(1 - axis),
                optimized=False,
            ).astype(jnp.float32)
            values = plgpu.layout_cast(values, plgpu.Layout.WGMMA)
            sums[index] = values + lax.broadcast_in_dim(bias, values.shape, (axis,))
    return sums


def activate(sums: list[Array], activation: str | None) -> list[Array]:
    """Applies the activation, if there is one, to a gate and what it gates."""
    return sums if activation is None else [ACTIVATIONS[activation](*sums)]


def store_tile(results: list[Array], out_smem, edge_smem, out_ref, tile: Tile) -> None:
    """Stores this warpgroup's neighbouring columns, some rows at a time through shared memory."""
    warpgroup = lax.axis_index("warpgroup")
    rows, at_once = results[0].shape[1], out_smem.shape[2]
    results = [
        plgpu.layout_cast(part.astype(out_ref.dtype), plgpu.Layout.WGMMA) for part in results
    ]
    for index, begin in enumerate(range(0, rows, at_once)):
        count = min(at_once, rows - begin)
        staged = out_smem.at[warpgroup, index % 2, pl.ds(0, count)]
        # Two halves alternate within a tile; a tile begins with both free.
        plgpu.wait_smem_to_gmem(min(index, 1), wait_read_only=True)
        for number, part in enumerate(results):
            columns = pl.ds(number * part.shape[0], part.shape[0])
            staged.at[:, columns].transpose((1, 0))[...] = part[:, begin : begin + count]
        plgpu.commit_smem()
        column = tile.column + warpgroup * staged.shape[1]
        store_rows(staged, edge_smem, out_ref, tile, tile.row + begin, column)
        plgpu.commit_smem_to_gmem_group()


def store_upright(results: list[Array], out_smem, edge_smem, out_ref, tile: Tile) -> None:
    """Stores this warpgroup's rows, all columns at once: it waits for no copy of the same tile."""
    warpgroup = lax.axis_index("warpgroup")
    staged = out_smem.at[warpgroup]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for unit, values in enumerate(results):
        values = plgpu.layout_cast(values.astype(out_ref.dtype), plgpu.Layout.WGMMA)
        staged.at[:, pl.ds(unit * LINE, LINE)][...] = values
    plgpu.commit_smem()
    row = tile.row + warpgroup * UPRIGHT
    store_rows(staged, edge_smem, out_ref, tile, row, tile.column, edges_are_free=True)
    plgpu.commit_smem_to_gmem_group()


def store_rows(
    staged, edge_smem, out_ref, tile: Tile, row: Array, column: Array,
    *, edges_are_free: bool = False,
) -> None:  # fmt: skip
    """Copies staged rows out to `row` on, leaving alone those of neighbouring groups.

    Columns past the last are dropped. There is no memory for edges where no two groups share a
    block; with `edges_are_free`, no earlier tile's rows are still leaving through it.
    """
    count, width = staged.shape
    row, column = pl.multiple_of(row, BLOCK), pl.multiple_of(column, LINE)
    columns = pl.ds(column, width)
    whole = (tile.begin <= row) & (row + count <= tile.end)

    @pl.when(whole)
    def _():
        target = out_ref.at[pl.ds(row, count), columns]
        plgpu.copy_smem_to_gmem(staged, target, commit_group=False)

    def one_block(block, _):
        block_row = pl.multiple_of(row + block * BLOCK, BLOCK)
        block_rows = staged.at[pl.ds(pl.multiple_of(block * BLOCK, BLOCK), BLOCK)]
        begin = lax.max(tile.begin, block_row)
        end = lax.min(tile.end, block_row + BLOCK)

        @pl.when(end - begin == BLOCK)
        def _():
            target = out_ref.at[pl.ds(block_row, BLOCK), columns]
            plgpu.copy_smem_to_gmem(block_rows, target, commit_group=False)

        if edge_smem is None:
            return
        edges = edge_smem.at[lax.axis_index("warpgroup")]
        # A group's first rows may be leaving through the memory that its last ones need.
        in_use = (row < tile.begin) & (tile.begin < begin) if edges_are_free else True

        @pl.when(end - begin < BLOCK)
        def _():
            at_once = edges.shape[0] * LINE
            for first in range(0, width, at_once):
                pl.when(in_use)(_wait_for_copies)
                part = block_rows.at[:, pl.ds(first, min(at_once, width))]
                _store_edge(part, edges, out_ref, block_row, begin, end, column + first)

    @pl.when(jnp.logical_not(whole))
    def _():
        first = lax.div(lax.max(tile.begin - row, 0), BLOCK)
        last = lax.div(lax.clamp(0, tile.end - row, count) + BLOCK - 1, BLOCK)
        lax.fori_loop(first, last, one_block, None)


def _store_edge(
    block_rows, edges, out_ref, block_row: Array, begin: Array, end: Array, column: Array
) -> None:
    """Copies rows from `begin` to `end` of a block's eight."""
    parts = range(0, block_rows.shape[1], LINE)
    # The swizzle ties eight rows together; single rows leave from a copy of their own.
    for index, part in enumerate(parts):
        source = block_rows.at[:, pl.ds(part, LINE)]
        edges.at[index][...] = plgpu.load(source, layout=EDGE_LAYOUT, optimized=False)
    plgpu.commit_smem()

    def one_row(row, _):
        for index, part in enumerate(parts):
            source = edges.at[index, pl.ds(row - block_row, 1)]
            target = out_ref.at[pl.ds(row, 1), pl.ds(column + part, LINE)]
            plgpu.copy_smem_to_gmem(source, target, commit_group=False)

    lax.fori_loop(begin, end, one_row, None)


def _wait_for_copies() -> None:
    plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
