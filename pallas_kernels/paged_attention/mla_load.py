"""Loads of the latent-attention kernel on Hopper: the warpgroup that copies to shared memory."""

import dataclasses
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.paged_attention.mla_shape import CHUNKS, KV_BLOCK, ROPE, MlaRefs, MlaShape
from pallas_kernels.paged_attention.schedule import Schedule, Segment


def load_tiles(shape: MlaShape, refs: MlaRefs, schedule: Schedule, head_block: Array) -> None:
    """Copies the queries and keys of the block's segments to shared memory."""
    zero = jnp.int32(0)
    pool_start = refs.layer[0] * (shape.pages * shape.page)
    loader = _Loader(shape=shape, refs=refs, head_block=head_block, pool_start=pool_start)
    schedule.for_each_segment(loader.load_segment, (zero, zero))


class _Part(NamedTuple):
    """A part of a tile: the barriers of its place, and its features."""

    free: Any
    target: Any
    full: Any
    columns: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Loader:
    shape: MlaShape
    refs: MlaRefs
    head_block: Array
    pool_start: Array
    """First row of the layer in the pool."""

    def load_segment(self, carry: tuple[Array, Array], segment: Segment) -> tuple[Array, Array]:
        """Loads a segment, after so many tiles and segments; returns how many it are then."""
        tiles, segments = carry
        self._load_queries(segments, segment)

        def load_tile(index: Array, pages: list[Array]) -> list[Array]:
            # The next page numbers are on their way while this tile waits for its slot.
            next_pages = self._pages_of(segment, jnp.minimum(index + 1, segment.count - 1))
            self._load_tile(tiles + index, segment, (segment.first + index) * KV_BLOCK, pages)
            return next_pages

        lax.fori_loop(0, segment.count, load_tile, self._pages_of(segment, jnp.int32(0)))
        return tiles + segment.count, segments + 1

    def _load_queries(self, segments: Array, segment: Segment) -> None:
        shape, refs = self.shape, self.refs

        @pl.when(segments > 0)
        def _():
            plgpu.barrier_wait(refs.q_free)

        queries = refs.q.at[segment.row * shape.head_blocks + self.head_block]
        own = pl.ds(0, shape.heads)
        for chunk in range(CHUNKS):
            latent = queries.at[:, pl.ds(chunk * shape.chunk, shape.chunk)]
            plgpu.copy_gmem_to_smem(latent, refs.q_latent.at[chunk, own], refs.q_full)
        rope = queries.at[:, pl.ds(shape.dv, ROPE)]
        plgpu.copy_gmem_to_smem(rope, refs.q_rope.at[own], refs.q_full)

    def _load_tile(self, tile: Array, segment: Segment, start: Array, pages: list[Array]) -> None:
        shape = self.shape
        copies = [
            (self._row_of(start, i, page), start + i * shape.copy_rows < segment.length)
            for i, page in enumerate(pages)
        ]
        for part in self._parts_of(tile):

            @pl.when(tile >= shape.config.stages)
            def _(part: _Part = part):
                plgpu.barrier_wait(part.free)

            for i, (row, visible) in enumerate(copies):
                source = self.refs.pages.at[pl.ds(row, shape.copy_rows), part.columns]
                target = part.target.at[pl.ds(i * shape.copy_rows, shape.copy_rows)]
                _copy_if(visible, source, target, part.full)

    def _parts_of(self, tile: Array) -> list[_Part]:
        """Returns the parts of a tile in the order in which they are needed."""
        shape, refs = self.shape, self.refs
        slot = lax.rem(tile, jnp.int32(shape.config.stages))
        parts = []
        for chunk in range(CHUNKS):
            index, columns = slot * CHUNKS + chunk, pl.ds(chunk * shape.chunk, shape.chunk)
            free, full = refs.latent_free.at[index], refs.latent_full.at[index]
            parts.append(_Part(free, refs.latent.at[slot, chunk], full, columns))
        free, full = refs.rope_free.at[slot], refs.rope_full.at[slot]
        return [*parts, _Part(free, refs.rope.at[slot], full, pl.ds(shape.dv, ROPE))]

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
