"""Sums of the latent-attention kernel on Hopper: two warpgroups, with half of the features each.

Arrays are [heads, features] or [heads].
"""

import dataclasses
import functools
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.paged_attention.mla_parts import Parts, SharedRow
from pallas_kernels.paged_attention.mla_shape import (
    CHUNKS,
    HEADS,
    KV_BLOCK,
    OWN_CHUNKS,
    SUMMERS,
    MlaRefs,
    MlaShape,
)
from pallas_kernels.paged_attention.rows import along, full, in_rows, load, store
from pallas_kernels.paged_attention.schedule import Schedule, Segment

CLEARED_COLUMNS = 64
"""Features that are cleared at a time: sums take most of the registers."""

type Sums = tuple[Array, ...]
"""Weighted sums of a warpgroup's chunks of values, [heads, features] each."""


def sum_values(
    shape: MlaShape, refs: MlaRefs, schedule: Schedule, head_block: Array, parts: Parts
) -> None:
    """Sums up the weighted values of the block's segments, then merges the rows it shares."""
    summer = _Summer(
        shape=shape,
        refs=refs,
        warpgroup=lax.axis_index("warpgroup"),
        head_block=head_block,
        parts=parts,
    )
    none = parts.no_row()
    _, from_earlier, into_later = schedule.for_each_segment(
        summer.sum_segment, (jnp.int32(0), none, none)
    )
    parts.end_block()
    parts.wait_for_block()
    parts.merge(from_earlier, summer.warpgroup)
    parts.merge(into_later, summer.warpgroup)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Summer:
    shape: MlaShape
    refs: MlaRefs
    warpgroup: Array
    head_block: Array
    parts: Parts

    def sum_segment(
        self, carry: tuple[Array, SharedRow, SharedRow], segment: Segment
    ) -> tuple[Array, SharedRow, SharedRow]:
        """Sums up a segment, after so many tiles; returns these, and the rows that are shared."""
        tiles, from_earlier, into_later = carry

        def add_tile(index: Array, sums: Sums) -> Sums:
            start = (segment.first + index) * KV_BLOCK
            return self._add_tile(tiles + index, segment.length - start, sums)

        zeros = tuple(full((HEADS, self.shape.chunk), 0.0) for _ in range(OWN_CHUNKS))
        sums = lax.fori_loop(0, segment.count, add_tile, zeros)
        self._finish(segment, sums)
        row = self.parts.row_of(segment)
        from_earlier = _replace_row(from_earlier, row, jnp.logical_not(segment.starts))
        split = segment.starts & jnp.logical_not(segment.ends)
        return tiles + segment.count, from_earlier, _replace_row(into_later, row, split)

    def _own_chunk(self, index: int) -> Array:
        # The warpgroups are done with their first chunks at the same time, which are loaded first.
        return index * SUMMERS + self.warpgroup

    def _columns(self, index: int) -> Any:
        """Returns the features of one of the warpgroup's chunks."""
        return pl.ds(self._own_chunk(index) * self.shape.chunk, self.shape.chunk)

    def _add_tile(self, tile: Array, visible: Array, sums: Sums) -> Sums:
        """Adds the values of a tile of which so many positions are visible."""
        refs = self.refs
        slot = lax.rem(tile, jnp.int32(self.shape.config.stages))
        values = [refs.latent.at[slot, self._own_chunk(i)] for i in range(OWN_CHUNKS)]
        plgpu.barrier_wait(refs.keep_full.at[slot])
        keep = along(load(refs.keep.at[slot]), self.shape.chunk)
        kept = lax.optimization_barrier([in_rows(chunk * keep) for chunk in sums])
        plgpu.barrier_wait(refs.weights_full.at[slot])

        @pl.when(visible < KV_BLOCK)
        def _():
            for chunk in values:
                _clear(chunk, visible)
            plgpu.commit_smem()

        free = [refs.latent_free.at[slot * CHUNKS + self._own_chunk(i)] for i in range(OWN_CHUNKS)]
        added = self._multiply(kept, refs.rope.at[slot], values, free)
        plgpu.barrier_arrive(refs.rope_free.at[slot])
        return added

    def _multiply(
        self, sums: list[Array], weights: Any, values: list[Any], free: list[Any]
    ) -> Sums:
        """Returns the sums with the weighted values of a tile, whose places it frees."""

        def multiply(products: Any) -> None:
            for product, chunk in zip(products, values, strict=True):
                plgpu.wgmma(product, weights, chunk)
            for index, barrier in enumerate(free):
                plgpu.wgmma_wait(OWN_CHUNKS - 1 - index)
                plgpu.barrier_arrive(barrier)

        def multiply_from_zero(product: Any, chunk: Any) -> Array:
            plgpu.wgmma(product, weights, chunk)
            return product[...]

        if self.shape.config.in_registers:
            start: Any = [plgpu.WGMMAAccumulatorRef.init(chunk) for chunk in sums]
            added: Any = pl.run_state(multiply)(start)
            return tuple(in_rows(chunk) for chunk in added)
        accumulator = plgpu.WGMMAAccumulatorRef((HEADS, self.shape.chunk), jnp.float32)
        products = [
            pl.run_scoped(functools.partial(multiply_from_zero, chunk=chunk), accumulator)
            for chunk in values
        ]
        for barrier in free:
            plgpu.barrier_arrive(barrier)
        return tuple(in_rows(one + other) for one, other in zip(sums, products, strict=True))

    def _finish(self, segment: Segment, sums: Sums) -> None:
        """Writes the outputs of a whole row, or saves a part."""
        shape, refs = self.shape, self.refs
        plgpu.barrier_wait(refs.inverse_full)
        inverse = along(load(refs.inverse), shape.chunk)
        plgpu.barrier_arrive(refs.inverse_free)

        @pl.when(segment.starts & segment.ends)
        def _():
            index = segment.row * shape.head_blocks + self.head_block
            for i, chunk in enumerate(sums):
                out = (chunk * inverse).astype(refs.out.dtype)
                store(refs.out.at[index, :, self._columns(i)], out)

        @pl.when(jnp.logical_not(segment.starts & segment.ends))
        def _():
            place = self.parts.place(segment)
            for i, chunk in enumerate(sums):
                store(refs.sums.at[place, :, self._columns(i)], chunk)
            self.parts.signal(segment)


def _replace_row(old: SharedRow, new: SharedRow, condition: Array) -> SharedRow:
    return SharedRow(*[jnp.where(condition, n, o) for n, o in zip(new, old, strict=True)])


def _clear(values: Any, visible: Array) -> None:
    """Clears values past a row's end: a weight of 0 would keep a NaN among them."""
    for column in range(0, values.shape[1], CLEARED_COLUMNS):
        part = values.at[:, pl.ds(column, CLEARED_COLUMNS)]
        tile = in_rows(part[...])
        position = plgpu.broadcasted_iota(jnp.int32, tile.shape, 0, layout=plgpu.Layout.WGMMA)
        part[...] = jnp.where(position < visible, tile, jnp.zeros((), tile.dtype))
