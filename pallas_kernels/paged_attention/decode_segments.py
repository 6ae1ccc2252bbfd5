"""Segments of the decode kernel on Hopper: what each warpgroup computes, saves and writes."""

import dataclasses
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.paged_attention.decode_shape import DecodeRefs, DecodeShape
from pallas_kernels.paged_attention.decode_softmax import (
    Softmax,
    attend,
    full,
    hand_over,
    merge,
    save,
    store,
    take_over,
    write,
    write_out,
)
from pallas_kernels.paged_attention.schedule import Schedule, Segment


class _Progress(NamedTuple):
    """How far a warpgroup is in its share."""

    tiles: Array
    segments: Array
    handed: Array
    """Segments that both warpgroups computed parts of."""
    owed: Array
    """The block that waits to be told of the last part that was saved; -1 if none does."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentComputer:
    """A warpgroup that computes: rows that end in its block are written, parts of others saved.

    Where two warpgroups compute, the one that has the last tile of a segment does that.

    It waits for earlier blocks only, which the chip starts first, so that no order can deadlock.
    """

    shape: DecodeShape
    refs: DecodeRefs
    schedule: Schedule
    warpgroup: Array
    share: Array
    head: Array
    saved: Any
    """A semaphore for each block: parts that others saved for it. None without synchronisation."""

    def compute_all(self) -> None:
        """Computes the segments of the block's share."""
        none = jnp.int32(0)
        start = _Progress(none, none, none, owed=jnp.int32(-1))
        self._signal(self.schedule.for_each_segment(self._compute, start).owed)

    def _compute(self, progress: _Progress, segment: Segment) -> _Progress:
        q_slot = lax.rem(progress.segments, 2)
        plgpu.barrier_wait(self.refs.q_full.at[q_slot])
        count = self.shape.tiles(segment.count)
        if self.shape.config.computers == 1:
            handed, is_last = progress.handed, True
            self._compute_alone(progress, segment, q_slot)
        else:
            handed, is_last = self._compute_in_turns(progress, segment, q_slot, count)
        last_share = self.schedule.sharers(segment)[1]
        owed = jnp.where(segment.ends | jnp.logical_not(is_last), -1, self._block_of(last_share))
        return _Progress(progress.tiles + count, progress.segments + 1, handed, owed)

    def _compute_alone(self, progress: _Progress, segment: Segment, q_slot: Array) -> None:
        queries = self.refs.q_shared.at[q_slot]
        part = attend(self.shape, self.refs, segment, progress.tiles, queries)
        plgpu.barrier_arrive(self.refs.q_free.at[q_slot])
        # Where the memory is busy, a part takes microseconds to be written: one segment later the
        # signal need not wait for it.
        self._signal(progress.owed)
        self._finish(segment, part)

    def _compute_in_turns(
        self, progress: _Progress, segment: Segment, q_slot: Array, count: Array
    ) -> tuple[Array, Array]:
        """Computes every other tile; returns the segments handed over, and who had the last."""
        shape, refs, tiles = self.shape, self.refs, progress.tiles
        queries = refs.q_shared.at[q_slot]
        first = lax.rem(tiles + self.warpgroup, 2)
        part = attend(shape, refs, segment, tiles, queries, first=first)
        plgpu.barrier_arrive(refs.q_free.at[q_slot])
        is_last = lax.rem(tiles + count - 1 + self.warpgroup, 2) == 0
        shared = count > 1
        hand_over(refs, part, shared, is_last, progress.handed)
        self._signal(progress.owed)

        @pl.when(is_last)
        def _():
            self._finish(segment, take_over(shape, refs, part, shared))

        return progress.handed + shared.astype(jnp.int32), is_last

    def _finish(self, segment: Segment, part: Softmax) -> None:
        shape, refs, share = self.shape, self.refs, self.share
        index = segment.row * shape.kv_heads + self.head

        @pl.when(segment.ends & segment.starts)
        def _():
            write(shape, refs, index, part)

        @pl.when(segment.ends & jnp.logical_not(segment.starts))
        def _():
            first_share = self.schedule.sharers(segment)[0]
            if self.saved is not None:
                mine = self.saved.at[self._block_of(share)]
                plgpu.semaphore_wait(mine, share - first_share, memory_scope="gpu")
            write(shape, refs, index, merge(shape, refs, part, first_share, share, self._block_of))

        @pl.when(jnp.logical_not(segment.ends))
        def _():
            save(refs, self._block_of(share), part)

    def _signal(self, owed: Array) -> None:
        """Tells the block that merges a row, if there is one, that the part of it is saved."""
        if self.saved is not None:

            @pl.when(owed >= 0)
            def _():
                plgpu.semaphore_signal(self.saved.at[owed], memory_scope="gpu")

    def _block_of(self, share: Array) -> Array:
        return share * self.shape.kv_heads + self.head


def clear_unused(shape: DecodeShape, refs: DecodeRefs, share: Array, head: Array) -> None:
    """Writes 0 and -inf for the rows of length 0, which have no tiles."""

    def clear_row(index: Array, _: None) -> None:
        row = share + index * shape.shares

        @pl.when(refs.lengths[row] == 0)
        def _():
            slot = row * shape.kv_heads + head
            zeros = full((shape.value_rows, shape.columns), 0.0, refs.out.dtype)
            write_out(shape, refs, slot, zeros)
            store(refs.lse.at[slot], full((shape.columns,), -jnp.inf))

    lax.fori_loop(0, pl.cdiv(shape.rows - share, jnp.int32(shape.shares)), clear_row, None)
