"""Loads of the decode kernel on Hopper: the warpgroup that copies tiles to shared memory."""

import dataclasses
import functools
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.paged_attention.decode_shape import DecodeRefs, DecodeShape
from pallas_kernels.paged_attention.schedule import Schedule, Segment


def load_tiles(shape: DecodeShape, refs: DecodeRefs, schedule: Schedule, head: Array) -> None:
    """Copies the queries, keys and values of the block's segments to shared memory."""
    pool_start = refs.layer[0] * (shape.pages * shape.page)
    loader = _Loader(shape=shape, refs=refs, head=head, pool_start=pool_start)
    schedule.for_each_segment(loader.load_segment, (jnp.int32(0), jnp.int32(0)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Loader:
    shape: DecodeShape
    refs: DecodeRefs
    head: Array
    pool_start: Array
    """First row of the layer in the pool."""

    def load_segment(self, carry: tuple[Array, Array], segment: Segment) -> tuple[Array, Array]:
        """Loads a segment, after so many tiles and segments; returns how many it are then."""
        tiles, segments = carry
        self._load_queries(segments, segment)

        def load_tile(index: Array, pages: list[Array]) -> list[Array]:
            # The next page numbers are on their way while this tile waits for its slot.
            next_pages = self._pages_of(segment, jnp.minimum(index + 1, segment.count - 1))
            self._load_tile(tiles + index, segment, self._start_of(segment, index), pages)
            return next_pages

        lax.fori_loop(0, segment.count, load_tile, self._pages_of(segment, jnp.int32(0)))
        return tiles + segment.count, segments + 1

    def _load_queries(self, segments: Array, segment: Segment) -> None:
        shape, refs = self.shape, self.refs
        slot = lax.rem(segments, 2)

        @pl.when(segments >= 2)
        def _():
            plgpu.barrier_wait(refs.q_free.at[slot])

        # Where a group has fewer heads than a tile has columns, the copy fills the rest with 0.
        # The start is 0, but not to the tracer, which would refuse a slice larger than the group.
        queries = pl.ds(segments * 0, shape.columns)
        plgpu.copy_gmem_to_smem(
            refs.q.at[segment.row * shape.kv_heads + self.head, queries],
            refs.q_shared.at[slot],
            refs.q_full.at[slot],
        )

    def _load_tile(self, tile: Array, segment: Segment, start: Array, pages: list[Array]) -> None:
        shape, refs = self.shape, self.refs
        slot = lax.rem(tile, jnp.int32(shape.config.stages))
        # What wgmma takes beyond the last value is the next head's, or 0: it is never read out.
        for source, target, free, full, features, copied in (
            (refs.k_pages, refs.k_shared, refs.k_free, refs.k_full, shape.d, shape.d),
            (refs.v_pages, refs.v_shared, refs.v_free, refs.v_full, shape.dv, shape.value_rows),
        ):

            @pl.when(tile >= shape.config.stages)
            def _(free: Any = free):
                plgpu.barrier_wait(free.at[slot])

            columns = pl.ds(self.head * features, copied)
            for i, (row, visible) in enumerate(self._copies_of(segment, start, pages)):
                part = pl.ds(i * shape.copy_rows, shape.copy_rows)
                copy = functools.partial(
                    plgpu.copy_gmem_to_smem,
                    source.at[pl.ds(row, shape.copy_rows), columns],
                    target.at[slot].at[part],
                    full.at[slot],
                )
                # What is not copied is masked, and its values cleared.
                lax.cond(visible, copy, functools.partial(plgpu.barrier_arrive, full.at[slot]))

    def _start_of(self, segment: Segment, index: Array) -> Array:
        """Returns the first position of a segment's tile."""
        kv_block = jnp.int32(self.shape.config.kv_block)
        return (lax.div(segment.low, kv_block) + segment.first + index) * kv_block

    def _pages_of(self, segment: Segment, index: Array) -> list[Array]:
        """Returns the pages of a tile. Past the row's end, any: they are not read."""
        kv_block, page = self.shape.config.kv_block, jnp.int32(self.shape.page)
        start, last = self._start_of(segment, index), lax.div(segment.length - 1, page)
        offsets = range(0, kv_block, min(self.shape.page, kv_block))
        columns = [jnp.minimum(lax.div(start + offset, page), last) for offset in offsets]
        return [self.refs.page_table[segment.row, column] for column in columns]

    def _copies_of(
        self, segment: Segment, start: Array, pages: list[Array]
    ) -> list[tuple[Array, Array]]:
        """Returns where in the pool each copy of a tile begins, and whether the query sees it."""
        shape, copies = self.shape, []
        for i in range(shape.copies):
            position = start + i * shape.copy_rows
            row = self.pool_start + pages[i * len(pages) // shape.copies] * shape.page
            row = row + lax.rem(position, jnp.int32(shape.page))
            visible = position < segment.length
            if shape.limited:
                visible = visible & (position + shape.copy_rows > segment.low)
            copies.append((pl.multiple_of(row, shape.copy_rows), visible))
        return copies
