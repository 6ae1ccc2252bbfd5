"""Segments of the decode kernel on Hopper: what each warpgroup computes, saves and writes."""

from typing import Any

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


def compute_segments(
    shape: DecodeShape,
    refs: DecodeRefs,
    schedule: Schedule,
    warpgroup: Array,
    share: Array,
    head: Array,
    saved: Any,
) -> None:
    """Computes the block's segments: rows that end in it are written, a part of another is saved.

    Where two warpgroups compute, the one that has the last tile of a segment does that.

    It waits for earlier blocks only, which the chip starts first, so that no order can deadlock.
    """

    def block_of(other: Array) -> Array:
        return other * shape.kv_heads + head

    def finish_segment(segment: Segment, part: Softmax) -> None:
        index = segment.row * shape.kv_heads + head

        @pl.when(segment.ends & segment.starts)
        def _():
            write(shape, refs, index, part)

        @pl.when(segment.ends & jnp.logical_not(segment.starts))
        def _():
            first_share = schedule.sharers(segment)[0]
            if saved is not None:
                parts = share - first_share
                plgpu.semaphore_wait(saved.at[block_of(share)], parts, memory_scope="gpu")
            write(shape, refs, index, merge(shape, refs, part, first_share, share, block_of))

        @pl.when(jnp.logical_not(segment.ends))
        def _():
            save(refs, block_of(share), part)

    def signal(owed: Array) -> None:
        """Tells the block that merges a row, if there is one, that the part of it is saved."""
        if saved is not None:

            @pl.when(owed >= 0)
            def _():
                plgpu.semaphore_signal(saved.at[owed], memory_scope="gpu")

    def compute_segment(carry: tuple[Array, ...], segment: Segment) -> tuple[Array, ...]:
        tiles, segments, handed, owed = carry
        q_slot = lax.rem(segments, 2)
        plgpu.barrier_wait(refs.q_full.at[q_slot])
        queries = refs.q_shared.at[q_slot]
        count = shape.tiles(segment.count)
        if shape.config.computers == 1:
            part = attend(shape, refs, segment, tiles, queries)
            plgpu.barrier_arrive(refs.q_free.at[q_slot])
            is_last = True
            # Where the memory is busy, a part takes microseconds to be written: one segment later
            # the signal need not wait for it.
            signal(owed)
            finish_segment(segment, part)
        else:
            first = lax.rem(tiles + warpgroup, 2)
            part = attend(shape, refs, segment, tiles, queries, first=first)
            plgpu.barrier_arrive(refs.q_free.at[q_slot])
            is_last = lax.rem(tiles + count - 1 + warpgroup, 2) == 0
            shared = count > 1
            hand_over(refs, part, shared, is_last, handed)
            signal(owed)

            @pl.when(is_last)
            def _():
                whole = take_over(shape, refs, part, shared)
                finish_segment(segment, whole)

            handed += shared.astype(jnp.int32)
        last_share = schedule.sharers(segment)[1]
        owed = jnp.where(segment.ends | jnp.logical_not(is_last), -1, block_of(last_share))
        return tiles + count, segments + 1, handed, owed

    none = jnp.int32(0)
    *_, owed = schedule.for_each_segment(compute_segment, (none, none, none, jnp.int32(-1)))
    signal(owed)


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
