"""Loads of the decode kernel on Hopper: the warpgroup that copies tiles to shared memory."""

import dataclasses
import functools
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.paged_attention.decode_shape import COPY_ROWS, DecodeRefs, DecodeShape
from pallas_kernels.paged_attention.schedule import Schedule, Segment


def load_tiles(shape: DecodeShape, refs: DecodeRefs, schedule: Schedule, head: Array) -> None:
    """Copies the queries, keys and values of the block's segments to shared memory."""
    pool_start = refs.layer[0] * (shape.pages * shape.page)
    loader = _Loader(shape=shape, refs=refs, head=head, pool_start=pool_start)
    no_pages = [jnp.int32(0)] * shape.copies
    start = (jnp.int32(0), jnp.int32(0), jnp.int32(-1), no_pages)
    schedule.for_each_segment(loader.load_segment, start)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Loader:
    shape: DecodeShape
    refs: DecodeRefs
    head: Array
    pool_start: Array
    """First row of the layer in the pool."""

    def load_segment(self, carry: tuple[Any, ...], segment: Segment) -> tuple[Any, ...]:
        """Loads a segment, after so many tiles and segments; returns how many it are then.

        The carry ends with a row and with the pages of its first tile, which are known already.
        """
        tiles, segments, known_row, known_pages = carry
        assert segment.after is not None
        first_pages = lax.cond(
            segment.row == known_row,
            lambda: known_pages,
            lambda: self._pages_of(segment, jnp.int32(0)),
        )
        self._load_queries(segments, segment)
        count = self.shape.tiles(segment.count)

        def load_tile(index: Array, pages: list[Array]) -> list[Array]:
            # The next page numbers are on their way while this tile waits for its slot.
            next_pages = self._pages_of(segment, index + 1, index + 1 == count)
            self._load_tile(tiles + index, segment, self._start_of(segment, index), pages)
            return next_pages

        next_pages = lax.fori_loop(0, count, load_tile, first_pages)
        return tiles + count, segments + 1, segment.after.row, next_pages

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
                self._copy(
                    visible,
                    source.at[pl.ds(row, shape.copy_rows), columns],
                    target.at[slot].at[pl.ds(i * shape.copy_rows, shape.copy_rows)],
                    full.at[slot],
                )

    def _copy(self, visible: Array, source: Any, target: Any, full: Any) -> None:
        """Copies positions, so many of which are visible; others are masked and cleared."""
        half = self.shape.copy_rows // 2
        arrive = functools.partial(plgpu.barrier_arrive, full)
        if 2 * half < COPY_ROWS:
            copy = functools.partial(plgpu.copy_gmem_to_smem, source, target, full)
            lax.cond(visible > 0, copy, arrive)
            return

        def copy_part() -> None:
            rows = pl.ds(0, half)
            copy = functools.partial(
                plgpu.copy_gmem_to_smem, source.at[rows], target.at[rows], full
            )
            lax.cond(visible > 0, copy, arrive)

        copy_all = functools.partial(plgpu.copy_gmem_to_smem, source, target, full)
        lax.cond(visible > half, copy_all, copy_part)

    def _start_of(self, segment: Segment, index: Array) -> Array:
        """Returns the first position of a segment's tile."""
        return segment.begin(self.shape.copy_rows) + index * self.shape.config.kv_block

    def _pages_of(
        self, segment: Segment, index: Array, is_after: Array | bool = False
    ) -> list[Array]:
        """Returns the page of each copy of a tile, or of the first tile of the segment after.

        Past the row's end it is any: they are not read.
        """
        shape, page, after = self.shape, jnp.int32(self.shape.page), segment.after
        row, start, length = segment.row, self._start_of(segment, index), segment.length
        if after is not None:
            row = jnp.where(is_after, after.row, row)
            start = jnp.where(is_after, self._start_of(after, jnp.int32(0)), start)
            length = jnp.where(is_after, after.length, length)
        last = lax.div(length - 1, page)
        columns = [lax.div(start + i * shape.copy_rows, page) for i in range(shape.copies)]
        return [self.refs.page_table[row, jnp.minimum(c, last)] for c in columns]

    def _copies_of(
        self, segment: Segment, start: Array, pages: list[Array]
    ) -> list[tuple[Array, Array]]:
        """Returns where in the pool each copy of a tile begins, and how much of it is visible."""
        shape, copies = self.shape, []
        end = segment.end(shape.copy_rows)
        for i, page in enumerate(pages):
            position = start + i * shape.copy_rows
            row = self.pool_start + page * shape.page + lax.rem(position, jnp.int32(shape.page))
            copies.append((pl.multiple_of(row, shape.copy_rows), end - position))
        return copies
