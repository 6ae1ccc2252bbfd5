"""Loads of the prefill kernel on Hopper: the warpgroup that copies tiles to shared memory."""

import dataclasses
import functools
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.paged_attention.prefill_shape import (
    TOKEN_ALIGNMENT,
    WARPGROUP_ROWS,
    WARPGROUPS,
    PrefillRefs,
    PrefillShape,
)
from pallas_kernels.paged_attention.prefill_store import eight_rows, store_registers
from pallas_kernels.paged_attention.prefill_walk import Item, for_each_item


def load_items(shape: PrefillShape, refs: PrefillRefs) -> None:
    """Copies the queries, keys and values of the block's items to shared memory."""
    pool_start = refs.layer[0] * (shape.pages * shape.page)
    loader = _Loader(shape=shape, refs=refs, pool_start=pool_start)
    for_each_item(shape, refs, loader.load_item)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Loader:
    shape: PrefillShape
    refs: PrefillRefs
    pool_start: Array
    """First row of the layer in the pool."""

    def load_item(self, item: Item) -> None:
        def load_tile(index: Array, pages: list[Array]) -> list[Array]:
            # The next page numbers are on their way while this tile waits for its slot.
            next_pages = self._pages_of(item, jnp.minimum(index + 1, item.tile.kv_tiles - 1))
            self._load_tile(item, index, pages)
            return next_pages

        @pl.when(item.tile.kv_tiles > 0)
        def _():
            first_pages = self._pages_of(item, jnp.int32(0))
            lax.fori_loop(0, item.tile.kv_tiles, load_tile, first_pages)

    def _load_tile(self, item: Item, index: Array, pages: list[Array]) -> None:
        shape, refs = self.shape, self.refs
        step = item.steps + index
        slot = lax.rem(step, jnp.int32(shape.config.stages))
        start = item.tile.kv_begin + index * shape.config.kv_block
        copy_keys = functools.partial(
            self._copy_tile, item, start, pages, refs.k_pages, refs.k_shared.at[slot], shape.d
        )
        copy_values = functools.partial(
            self._copy_tile, item, start, pages, refs.v_pages, refs.v_shared.at[slot], shape.dv
        )

        @pl.when(step >= shape.config.stages)
        def _():
            plgpu.barrier_wait(refs.k_free.at[slot])

        copy_keys(refs.k_full.at[slot])

        @pl.when(index == 0)
        def _():
            self._load_queries(item)

        @pl.when(step >= shape.config.stages)
        def _():
            plgpu.barrier_wait(refs.v_free.at[slot])

        def copy_and_clear() -> None:
            copy_values(refs.v_landed)
            plgpu.barrier_wait(refs.v_landed)
            self._clear(refs.v_shared.at[slot], item.tile.length - start)
            for _ in range(shape.copies):
                plgpu.barrier_arrive(refs.v_full.at[slot])

        partly_hidden = start + shape.config.kv_block > item.tile.length
        lax.cond(
            partly_hidden, copy_and_clear, functools.partial(copy_values, refs.v_full.at[slot])
        )

    def _load_queries(self, item: Item) -> None:
        shape, refs = self.shape, self.refs

        @pl.when(item.loaded > 0)
        def _():
            plgpu.barrier_wait(refs.q_free)

        for warpgroup in range(WARPGROUPS):
            token, head = item.queries_of(shape, jnp.int32(warpgroup))
            rows = pl.ds(pl.multiple_of(token, TOKEN_ALIGNMENT), WARPGROUP_ROWS)
            plgpu.copy_gmem_to_smem(
                refs.q.at[rows, pl.ds(head * shape.d, shape.d)],
                refs.q_shared.at[warpgroup],
                refs.q_full,
            )

    def _copy_tile(
        self,
        item: Item,
        start: Array,
        pages: list[Array],
        source: Any,
        target: Any,
        features: int,
        full: Any,
    ) -> None:
        """Copies the pages of a tile. Past the row's end nothing is read."""
        shape = self.shape
        columns = pl.ds(item.kv_head(shape) * features, features)
        for i, page in enumerate(pages):
            position = start + i * shape.copy_rows
            row = self.pool_start + page * shape.page + lax.rem(position, jnp.int32(shape.page))
            rows = pl.ds(pl.multiple_of(row, shape.copy_rows), shape.copy_rows)
            copy = functools.partial(
                plgpu.copy_gmem_to_smem,
                source.at[rows, columns],
                target.at[pl.ds(i * shape.copy_rows, shape.copy_rows)],
                full,
            )
            skip = functools.partial(plgpu.barrier_arrive, full)
            lax.cond(position < item.tile.length, copy, skip)

    def _pages_of(self, item: Item, index: Array) -> list[Array]:
        """Returns the page of each copy of a tile. Past the row's end, any: they are not read."""
        shape = self.shape
        page = jnp.int32(shape.page)
        start = item.tile.kv_begin + index * shape.config.kv_block
        last = lax.div(item.tile.length - 1, page)
        columns = [lax.div(start + i * shape.copy_rows, page) for i in range(shape.copies)]
        return [self.refs.page_table[item.tile.row, jnp.minimum(c, last)] for c in columns]

    def _clear(self, values: Any, first: Array) -> None:
        """Clears values from row `first` on: a weight of 0 would keep a NaN among them."""
        chunk = self.shape.chunk
        layout = eight_rows(chunk)

        def clear_rows(block: Array, _: None) -> None:
            begin = pl.multiple_of(block * TOKEN_ALIGNMENT, TOKEN_ALIGNMENT)
            rows = values.at[pl.ds(begin, TOKEN_ALIGNMENT)]
            for column in range(0, self.shape.dv, chunk):
                part = rows.at[:, pl.ds(column, chunk)]
                kept = plgpu.load(part, layout=layout, optimized=False)
                row = plgpu.broadcasted_iota(jnp.int32, kept.shape, 0, layout=layout)
                kept = jnp.where(row < first - begin, kept, jnp.zeros((), kept.dtype))
                store_registers(part, kept)

        count = jnp.int32(self.shape.config.kv_block // TOKEN_ALIGNMENT)
        lax.fori_loop(lax.div(first, jnp.int32(TOKEN_ALIGNMENT)), count, clear_rows, None)
        plgpu.commit_smem()
