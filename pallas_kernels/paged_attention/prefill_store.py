"""Stores of the prefill kernel on Hopper, which keep off the tokens of other rows."""

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.paged_attention.prefill_plan import Tile
from pallas_kernels.paged_attention.prefill_shape import (
    TOKEN_ALIGNMENT,
    WARPGROUP_ROWS,
    PrefillRefs,
    PrefillShape,
)
from pallas_kernels.paged_attention.prefill_walk import Item
from pallas_kernels.registers import store_registers


def eight_rows(features: int) -> Any:
    """How a warpgroup holds eight rows: each warp two of them, each lane a few neighbours."""
    tiling = plgpu.Tiling(((8, features), (2, features), (features // 16,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def store_log_sum_exp(
    refs: PrefillRefs, tile: Tile, token: Array, head: Array, values: Array
) -> None:
    """Stores what belongs to the queries from `token` on, in the tile's own place."""
    rows = pl.ds(pl.multiple_of(token - tile.token, WARPGROUP_ROWS), WARPGROUP_ROWS)
    store_registers(refs.lse.at[tile.index, head, rows], values)


def store_out(
    shape: PrefillShape,
    refs: PrefillRefs,
    item: Item,
    token: Array,
    head: Array,
    warpgroup: Array,
    out: Array,
) -> None:
    """Stores the outputs of a warpgroup's queries, the first of which is `token`."""
    tile = item.tile
    out = out.astype(refs.out.dtype)
    if shape.shares_queries:
        staged = refs.q_shared.at[item.place(shape), warpgroup]
        staged[...] = plgpu.layout_cast(out, plgpu.Layout.WGMMA)
        plgpu.commit_smem()
        _store_rows(shape, staged, refs.edge_shared.at[warpgroup], refs.out, tile, token, head, 0)
        plgpu.commit_smem_to_gmem_group()
        return
    for index, column in enumerate(range(0, shape.dv, shape.chunk)):
        staged = refs.out_shared.at[warpgroup, index % shape.out_stages]
        # Stages alternate within an item; an item begins with all of them free.
        plgpu.wait_smem_to_gmem(min(index, shape.out_stages - 1), wait_read_only=True)
        part = out[:, column : column + shape.chunk]
        staged[...] = plgpu.layout_cast(part, plgpu.Layout.WGMMA)
        plgpu.commit_smem()
        _store_rows(
            shape, staged, refs.edge_shared.at[warpgroup], refs.out, tile, token, head, column
        )
        plgpu.commit_smem_to_gmem_group()


def _columns_of(shape: PrefillShape, head: Array, first: int, features: int) -> Any:
    """Columns of the outputs that hold these features of a head."""
    return pl.ds(pl.multiple_of(head * shape.dv + first, shape.chunk), features)


def _store_rows(
    shape: PrefillShape,
    staged: Any,
    edge: Any,
    target: Any,
    tile: Tile,
    token: Array,
    head: Array,
    column: int,
) -> None:
    """Copies staged rows out from `token` on, those within the tile's own tokens."""
    token = pl.multiple_of(token, TOKEN_ALIGNMENT)
    columns = _columns_of(shape, head, column, staged.shape[1])
    whole = (tile.begin <= token) & (token + WARPGROUP_ROWS <= tile.end)

    @pl.when(whole)
    def _():
        rows = target.at[pl.ds(token, WARPGROUP_ROWS), columns]
        plgpu.copy_smem_to_gmem(staged, rows, commit_group=False)

    def store_eight(index: Array, _: None) -> None:
        row = pl.multiple_of(index * TOKEN_ALIGNMENT, TOKEN_ALIGNMENT)
        first = pl.multiple_of(token + row, TOKEN_ALIGNMENT)
        eight = staged.at[pl.ds(row, TOKEN_ALIGNMENT)]
        begin = lax.max(tile.begin, first)
        end = lax.min(tile.end, first + TOKEN_ALIGNMENT)

        @pl.when(end - begin == TOKEN_ALIGNMENT)
        def _():
            rows = target.at[pl.ds(first, TOKEN_ALIGNMENT), columns]
            plgpu.copy_smem_to_gmem(eight, rows, commit_group=False)

        @pl.when(end - begin < TOKEN_ALIGNMENT)
        def _():
            # The swizzle ties eight rows together; single rows leave from an unswizzled copy.
            layout = eight_rows(shape.chunk)
            for chunk in range(0, eight.shape[1], shape.chunk):
                plgpu.commit_smem_to_gmem_group()
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                part = eight.at[:, pl.ds(chunk, shape.chunk)]
                store_registers(edge.at[:, 0], plgpu.load(part, layout=layout, optimized=False))
                plgpu.commit_smem()
                place = _columns_of(shape, head, column + chunk, shape.chunk)

                def store_one(token: Array, _: None, place: Any = place) -> None:
                    source, row = edge.at[token - first, pl.ds(0, 1)], pl.ds(token, 1)
                    plgpu.copy_smem_to_gmem(source, target.at[row, place], commit_group=False)

                lax.fori_loop(begin, end, store_one, None)

    @pl.when(jnp.logical_not(whole))
    def _():
        eights = jnp.int32(TOKEN_ALIGNMENT)
        begin = lax.div(lax.max(tile.begin - token, 0), eights)
        end = pl.cdiv(lax.clamp(0, tile.end - token, WARPGROUP_ROWS), eights)
        lax.fori_loop(begin, end, store_eight, None)
