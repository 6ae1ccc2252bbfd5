"""Loads of the latent-attention kernel on Hopper: the warpgroup that copies to shared memory."""

import dataclasses
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.paged_attention.mla_shape import (
    KV_BLOCK,
    ROPE,
    SIDES,
    MlaRefs,
    MlaShape,
)
from pallas_kernels.paged_attention.schedule import Schedule, Segment


def load_tiles(shape: MlaShape, refs: MlaRefs, schedule: Schedule, head_block: Array) -> None:
    """Copies the queries and keys of the block's segments to shared memory."""
    pool_start = refs.layer[0] * (shape.pages * shape.page)
    loader = _Loader(shape=shape, refs=refs, head_block=head_block, pool_start=pool_start)
    schedule.for_each_segment(loader.load_segment, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Loader:
    shape: MlaShape
    refs: MlaRefs
    head_block: Array
    pool_start: Array
    """First row of the layer in the pool."""

    def load_segment(self, _: None, segment: Segment) -> None:
        """Loads the queries of a segment, and its tiles to both places in turn."""
        # The first page numbers are on their way while the queries wait for their place.
        pages = self._pages_of(segment, jnp.int32(0))
        self._load_queries(segment)

        def load_tile(index: Array, pages: list[Array]) -> list[Array]:
            # The next page numbers are on their way while this tile waits for its place.
            next_pages = self._pages_of(segment, jnp.minimum(index + 1, segment.count - 1))
            self._load_tile(index, segment, pages)
            return next_pages

        lax.fori_loop(0, segment.count, load_tile, pages)

    def _load_queries(self, segment: Segment) -> None:
        shape, refs = self.shape, self.refs
        plgpu.barrier_wait(refs.q_free)
        queries = refs.q.at[segment.row * shape.head_blocks + self.head_block]
        own = pl.ds(0, shape.heads)
        for half in range(SIDES):
            latent = queries.at[:, pl.ds(half * shape.half, shape.half)]
            plgpu.copy_gmem_to_smem(latent, refs.q_latent.at[half, own], refs.q_full)
        rope = queries.at[:, pl.ds(shape.dv, ROPE)]
        plgpu.copy_gmem_to_smem(rope, refs.q_rope.at[own], refs.q_full)

    def _load_tile(self, index: Array, segment: Segment, pages: list[Array]) -> None:
        shape, refs = self.shape, self.refs
        start = (segment.first + index) * KV_BLOCK
        place = lax.rem(index, jnp.int32(SIDES))
        copies = [
            (self._row_of(start, i, page), start + i * shape.copy_rows < segment.length)
            for i, page in enumerate(pages)
        ]

        def load(target: Any, columns: Any, full: Any) -> None:
            for i, (row, visible) in enumerate(copies):
                source = refs.pages.at[pl.ds(row, shape.copy_rows), columns]
                rows = pl.ds(i * shape.copy_rows, shape.copy_rows)
                _copy_if(visible, source, target.at[rows], full)

        for half in range(SIDES):
            index, columns = place * SIDES + half, pl.ds(half * shape.half, shape.half)
            plgpu.barrier_wait(refs.latent_free.at[index])
            load(refs.latent.at[place, half], columns, refs.latent_full.at[index])
        plgpu.barrier_wait(refs.rope_free.at[place])
        load(refs.rope.at[place], pl.ds(shape.dv, ROPE), refs.rope_full.at[place])

    def _row_of(self, start: Array, index: int, page: Array) -> Array:
        """Returns where in the pool a copy of the tile at `start` begins."""
        shape = self.shape
        position = start + index * shape.copy_rows
        row = self.pool_start + page * shape.page + lax.rem(position, jnp.int32(shape.page))
        return pl.multiple_of(row, shape.copy_rows)

    def _pages_of(self, segment: Segment, index: Array) -> list[Array]:
        """Returns the page of each copy of a tile. Past the row's end, any: they are not read."""
        shape, page = self.shape, jnp.int32(self.shape.page)
        start, last = (segment.first + index) * KV_BLOCK, lax.div(segment.length - 1, page)
        columns = [lax.div(start + i * shape.copy_rows, page) for i in range(shape.copies)]
        return [self.refs.page_table[segment.row, jnp.minimum(c, last)] for c in columns]


def _copy_if(visible: Array, source: Any, target: Any, full: Any) -> None:
    """Copies, or only arrives: what is not copied is hidden, and its values are cleared."""

    def copy() -> None:
        plgpu.copy_gmem_to_smem(source, target, full)

    def skip() -> None:
        plgpu.barrier_arrive(full)

    lax.cond(visible, copy, skip)
