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
from pallas_kernels.paged_attention.prefill_store import eight_rows
from pallas_kernels.paged_attention.prefill_walk import Item, for_each_item
from pallas_kernels.registers import store_registers

AT_ONCE = 4
"""Eight rows of a tile that are in registers at once when it is rewritten."""


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

        def widen_tile(index: Array, pages: list[Array]) -> list[Array]:
            # One tile waits to be widened, the pages of the next are known.
            next_pages = self._pages_of(item, jnp.minimum(index + 2, item.tile.kv_tiles - 1))
            self._widen_tile(item, index, pages)
            return next_pages

        if self.shape.shares_queries:
            pl.when(item.tile.kv_tiles == 0)(functools.partial(self._load_queries, item))

        @pl.when(item.tile.kv_tiles > 0)
        def _():
            first = jnp.int32(0)
            pages = self._pages_of(item, first)
            if self.shape.narrow:
                next_pages = self._pages_of(item, jnp.minimum(first + 1, item.tile.kv_tiles - 1))
                self._copy_keys(item, first, pages, self.refs.k_narrow, self.refs.k_landed)
                self._copy_values(item, first, pages, self.refs.v_narrow, self.refs.v_landed)
                lax.fori_loop(0, item.tile.kv_tiles, widen_tile, next_pages)
            else:
                lax.fori_loop(0, item.tile.kv_tiles, load_tile, pages)

    def _load_tile(self, item: Item, index: Array, pages: list[Array]) -> None:
        shape, refs = self.shape, self.refs
        step = item.steps + index
        slot = lax.rem(step, jnp.int32(shape.config.stages))
        self._wait_for(refs.k_free, step)
        self._copy_keys(item, index, pages, refs.k_shared.at[slot], refs.k_full.at[slot])

        @pl.when(index == 0)
        def _():
            self._load_queries(item)

        self._wait_for(refs.v_free, step)
        copy_values = functools.partial(
            self._copy_values, item, index, pages, refs.v_shared.at[slot]
        )

        def copy_and_clear() -> None:
            copy_values(refs.v_landed)
            plgpu.barrier_wait(refs.v_landed)
            self._clear(refs.v_shared.at[slot], self._visible(item, index))
            for _ in range(shape.copies):
                plgpu.barrier_arrive(refs.v_full.at[slot])

        partly_hidden = self._visible(item, index) < shape.config.kv_block
        lax.cond(
            partly_hidden, copy_and_clear, functools.partial(copy_values, refs.v_full.at[slot])
        )

    def _widen_tile(self, item: Item, index: Array, pages: list[Array]) -> None:
        """Turns a tile of float8 into float16, and copies the next one, from `pages`, meanwhile."""
        shape, refs = self.shape, self.refs
        step = item.steps + index
        slot = lax.rem(step, jnp.int32(shape.config.stages))
        following = index + 1
        has_next = following < item.tile.kv_tiles
        plgpu.barrier_wait(refs.k_landed)
        self._wait_for(refs.k_free, step)
        _rewrite(refs.k_narrow, refs.k_shared.at[slot], shape.stored_swizzle(shape.d))
        plgpu.barrier_arrive(refs.k_full.at[slot])

        @pl.when(has_next)
        def _():
            self._copy_keys(item, following, pages, refs.k_narrow, refs.k_landed)

        @pl.when(index == 0)
        def _():
            self._load_queries(item)

        plgpu.barrier_wait(refs.v_landed)
        self._wait_for(refs.v_free, step)
        visible = self._visible(item, index)
        _rewrite(refs.v_narrow, refs.v_shared.at[slot], shape.stored_swizzle(shape.dv), end=visible)
        plgpu.barrier_arrive(refs.v_full.at[slot])

        @pl.when(has_next)
        def _():
            self._copy_values(item, following, pages, refs.v_narrow, refs.v_landed)

    def _wait_for(self, free: Any, step: Array) -> None:
        """Waits until the place of a tile is free."""
        stages = self.shape.config.stages

        @pl.when(step >= stages)
        def _():
            plgpu.barrier_wait(free.at[lax.rem(step, jnp.int32(stages))])

    def _visible(self, item: Item, index: Array) -> Array:
        """Returns how many positions there are from a tile's first to the end of the row."""
        return item.tile.length - item.tile.kv_begin - index * self.shape.config.kv_block

    def _copy_keys(
        self, item: Item, index: Array, pages: list[Array], target: Any, full: Any
    ) -> None:
        self._copy_tile(item, index, pages, self.refs.k_pages, target, self.shape.d, full)

    def _copy_values(
        self, item: Item, index: Array, pages: list[Array], target: Any, full: Any
    ) -> None:
        self._copy_tile(item, index, pages, self.refs.v_pages, target, self.shape.dv, full)

    def _load_queries(self, item: Item) -> None:
        shape, refs = self.shape, self.refs

        place = item.place(shape)

        @pl.when(item.loaded >= shape.query_stages)
        def _():
            plgpu.barrier_wait(refs.q_free.at[place])

        for warpgroup in range(WARPGROUPS):
            token, head = item.queries_of(shape, jnp.int32(warpgroup))
            rows = pl.ds(pl.multiple_of(token, TOKEN_ALIGNMENT), WARPGROUP_ROWS)
            plgpu.copy_gmem_to_smem(
                refs.q.at[rows, pl.ds(head * shape.d, shape.d)],
                refs.q_shared.at[place, warpgroup],
                refs.q_full.at[place],
            )

    def _copy_tile(
        self,
        item: Item,
        index: Array,
        pages: list[Array],
        source: Any,
        target: Any,
        features: int,
        full: Any,
    ) -> None:
        """Copies the pages of a tile. Past the row's end nothing is read."""
        shape = self.shape
        columns = pl.ds(item.kv_head(shape) * features, features)
        start = item.tile.kv_begin + index * shape.config.kv_block
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
        begin = lax.div(first, jnp.int32(TOKEN_ALIGNMENT * AT_ONCE))
        _rewrite(values, values, self.shape.chunk, begin=begin, end=first)


def _rewrite(
    source: Any, target: Any, chunk: int, *, begin: Array | int = 0, end: Array | None = None
) -> None:
    """Copies a tile from its part `begin` on, converts it, and clears the rows from `end` on.

    So many features of a row, that a swizzle spans, are copied at once. A part is `AT_ONCE` times
    eight rows.
    """
    layout, columns = eight_rows(chunk), range(0, source.shape[1], chunk)

    def rewrite_rows(index: Array, _: None) -> None:
        # What is read at once hides each other's latency.
        eights = [(index * AT_ONCE + i) * TOKEN_ALIGNMENT for i in range(AT_ONCE)]
        parts = [
            (first, pl.ds(pl.multiple_of(first, TOKEN_ALIGNMENT), TOKEN_ALIGNMENT), column)
            for first in eights
            for column in columns
        ]
        kept = [
            plgpu.load(source.at[rows, pl.ds(column, chunk)], layout=layout, optimized=False)
            for _, rows, column in parts
        ]
        for (first, rows, column), part in zip(parts, kept, strict=True):
            part = part.astype(target.dtype)
            if end is not None:
                row = plgpu.broadcasted_iota(jnp.int32, part.shape, 0, layout=layout)
                part = jnp.where(row < end - first, part, jnp.zeros((), part.dtype))
            store_registers(target.at[rows, pl.ds(column, chunk)], part)

    count = source.shape[0] // (TOKEN_ALIGNMENT * AT_ONCE)
    lax.fori_loop(begin, jnp.int32(count), rewrite_rows, None)
    plgpu.commit_smem()
