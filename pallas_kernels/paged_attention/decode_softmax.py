"""Softmax of the decode kernel on Hopper, in registers: computed, merged, saved and written.

Arrays are [positions, columns] or [dv, columns], with a column for each query head of a KV head,
and dv padded to what wgmma takes.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.paged_attention.decode_shape import DecodeRefs, DecodeShape
from pallas_kernels.paged_attention.decode_widen import (
    in_order,
    reduce_rows,
    widen_keys,
    widen_values,
)
from pallas_kernels.paged_attention.powers import LOG2_E, capped
from pallas_kernels.paged_attention.schedule import Segment
from pallas_kernels.registers import store_registers

WIDENED_ROWS = 64
"""Positions of float8 that are converted at a time."""
CLEARED_ROWS = 64
"""Positions that are cleared at a time, if any of them is hidden."""


class Softmax(NamedTuple):
    """A softmax in progress, in powers of 2."""

    sums: Array
    """Weighted sums of values [dv, columns]."""
    highest: Array
    """Highest score [columns]."""
    total: Array
    """Sum of weights [columns]."""


def _across(vector: Array, rows: int) -> Array:
    """Repeats a value of each query head, [columns], as [rows, columns]."""
    return _wgmma(lax.broadcast_in_dim(vector, (rows, vector.shape[0]), [1]))


def _wgmma(value: Array) -> Array:
    """States the register layout, which is otherwise searched for, at length."""
    layout = plgpu.Layout.WGMMA if value.ndim == 2 else plgpu.Layout.WGMMA.reduce(0)
    return plgpu.layout_cast(value, layout)


def store(ref: Any, value: Array) -> None:
    """Stores registers in the layout of wgmma."""
    store_registers(ref, _wgmma(value))


def full(shape: tuple[int, ...], value: float, dtype: Any = jnp.float32) -> Array:
    return _wgmma(jnp.full(shape, value, dtype))


def attend(
    shape: DecodeShape,
    refs: DecodeRefs,
    segment: Segment,
    tiles: Array,
    queries: Any,
    *,
    first: Array | int = 0,
) -> Softmax:
    """Computes attention of one row and KV head over the tiles of a segment.

    Where two warpgroups compute, it is every other tile from `first` on.
    """
    kv_block, columns, dv = shape.config.kv_block, shape.columns, shape.value_rows
    weights_shared = refs.weights_shared.transpose((1, 0))
    k_scale = 1.0 if refs.scales is None else refs.scales[0]
    begin, end = (place(shape.copy_rows) for place in (segment.begin, segment.end))

    def one_tile(turn: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        sums, highest, totals = carry
        index = first + turn * shape.config.computers
        slot = lax.rem(tiles + index, jnp.int32(shape.config.stages))
        start = begin + index * kv_block
        low, high = segment.low - start, end - start
        product = _multiply_keys(shape, refs, slot, queries)
        visible = _visible(shape, low, high, (kv_block, columns))
        scores = jnp.where(visible, _scale(shape, product, k_scale), -jnp.inf)

        new_highest = _wgmma(jnp.maximum(highest, _reduce(shape, refs, "max", scores)))
        weights = _wgmma(jnp.exp2(scores - _across(new_highest, kv_block)))
        keep = jnp.exp2(highest - new_highest)
        totals = _wgmma(totals * _across(keep, kv_block) + weights)
        weights_shared[...] = _wgmma(weights.astype(refs.weights_shared.dtype))

        product = _multiply_values(shape, refs, slot, low, high, weights_shared)
        return _wgmma(sums * _across(keep, dv) + product), new_highest, totals

    # The sum of weights stays apart for each row of a tile: it is summed up once, at the end.
    start = (
        full((dv, columns), 0.0),
        full((columns,), -jnp.inf),
        full((kv_block, columns), 0.0),
    )
    turns = pl.cdiv(shape.tiles(segment.count) - first, jnp.int32(shape.config.computers))
    sums, highest, totals = lax.fori_loop(0, turns, one_tile, start)
    return Softmax(sums, highest, _wgmma(_reduce(shape, refs, "add", totals)))


def _multiply_keys(shape: DecodeShape, refs: DecodeRefs, slot: Array, queries: Any) -> Array:
    """Returns the products of a tile's keys and the queries, [positions, columns]."""
    plgpu.barrier_wait(refs.k_full.at[slot])
    keys = refs.k_shared.at[slot]
    if shape.from_registers:
        keys = widen_keys(keys)
    elif shape.narrow:
        _widen(keys, refs.k_wide)
        plgpu.commit_smem()
        keys = refs.k_wide
    if shape.narrow:
        plgpu.barrier_arrive(refs.k_free.at[slot])
    product = _multiply(keys, queries.transpose((1, 0)), (shape.config.kv_block, shape.columns))
    if not shape.narrow:
        plgpu.barrier_arrive(refs.k_free.at[slot])
    return product


def _multiply_values(
    shape: DecodeShape, refs: DecodeRefs, slot: Array, low: Array, high: Array, weights: Any
) -> Array:
    """Returns a tile's values, of which those in [low, high) are visible, times their weights."""
    plgpu.barrier_wait(refs.v_full.at[slot])
    values = refs.v_shared.at[slot]
    if shape.narrow and not shape.from_registers:
        _widen(values, refs.v_wide)
        values = refs.v_wide
    if shape.from_registers:
        transposed = widen_values(values, low, high, swizzle=shape.stored_swizzle)
    else:
        _clear_hidden(shape, values, low, high)
        transposed = values.transpose((1, 0))
    plgpu.commit_smem()
    if shape.narrow:
        plgpu.barrier_arrive(refs.v_free.at[slot])
    product = _multiply(transposed, weights, (shape.value_rows, shape.columns))
    if not shape.narrow:
        plgpu.barrier_arrive(refs.v_free.at[slot])
    return product


def _multiply(left: Any, right: Any, shape: tuple[int, int]) -> Array:
    """Returns the product of two tiles, when it is complete."""

    def multiply(product: Any) -> Array:
        plgpu.wgmma(product, left, right)
        return _wgmma(product[...])

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def _reduce(shape: DecodeShape, refs: DecodeRefs, kind: str, array: Array) -> Array:
    """Reduces an array along its rows."""
    if shape.config.computers == 2 and shape.config.inlined:
        return reduce_rows(kind, array, refs.reduced)
    return array.max(axis=0) if kind == "max" else array.sum(axis=0)


def hand_over(
    refs: DecodeRefs,
    part: Softmax,
    shared: Array,
    is_last: Array,
    handed: Array,
) -> None:
    """Gives the part of a segment that is shared to the warpgroup that has its last tile.

    Both warpgroups wait for everything that is handed over or taken, or they would lose count; in
    turns, because one may hand over the next before the other waits for this.
    """
    full_now = refs.handed_full.at[lax.rem(handed, 2)]

    @pl.when(shared & (handed > 0))
    def _():
        plgpu.barrier_wait(refs.handed_free)

    @pl.when(shared & jnp.logical_not(is_last))
    def _():
        store(refs.handed_sums, part.sums)
        store(refs.handed_highest, part.highest)
        store(refs.handed_totals, part.total)
        plgpu.barrier_arrive(full_now)

    @pl.when(shared)
    def _():
        plgpu.barrier_wait(full_now)


def take_over(shape: DecodeShape, refs: DecodeRefs, part: Softmax, shared: Array) -> Softmax:
    """Returns the whole of a segment, which may be shared."""

    def add_other(_: Array, part: Softmax) -> Softmax:
        vector = plgpu.Layout.WGMMA.reduce(0)
        other = Softmax(
            plgpu.load(refs.handed_sums, layout=plgpu.Layout.WGMMA, optimized=False),
            plgpu.load(refs.handed_highest, layout=vector, optimized=False),
            plgpu.load(refs.handed_totals, layout=vector, optimized=False),
        )
        plgpu.barrier_arrive(refs.handed_free)
        return _combine(shape, part, other)

    return lax.fori_loop(0, shared.astype(jnp.int32), add_other, part)


def _widen(narrow: Any, wide: Any) -> None:
    """Converts a tile of float8, as many rows at a time as registers hold easily."""
    for row in range(0, narrow.shape[0], WIDENED_ROWS):
        rows = pl.ds(row, WIDENED_ROWS)
        # Threads hold neighbours that are read at once, and exchange them for those of wgmma.
        tile = plgpu.load(narrow.at[rows], layout=plgpu.Layout.WGMMA_UPCAST_2X, optimized=False)
        # The chip turns float8 into float16 only, which holds all of it.
        tile = tile.astype(jnp.float16)
        wide[rows, :] = _wgmma(tile)


def _scale(shape: DecodeShape, product: Array, k_scale: Array | float) -> Array:
    """Turns products of queries and keys into scores, in powers of 2."""
    scale = shape.scale * LOG2_E * k_scale
    if shape.soft_cap is None:
        return product * scale
    return (shape.soft_cap * LOG2_E) * capped(product, scale, shape.soft_cap)


def _visible(shape: DecodeShape, low: Array, end: Array, tile_shape: tuple[int, int]) -> Array:
    """Returns which positions of a tile, its rows, are in the segment and seen by the query."""
    position = plgpu.broadcasted_iota(jnp.int32, tile_shape, 0, layout=plgpu.Layout.WGMMA)
    visible = position < end
    if shape.limited:
        visible = visible & (position >= low)
    return visible


def _clear_hidden(shape: DecodeShape, values: Any, low: Array, end: Array) -> None:
    """Clears values that the query does not see: a weight of 0 would keep a NaN among them."""
    for start in range(0, values.shape[0], CLEARED_ROWS):
        rows = pl.ds(start, CLEARED_ROWS)
        here = values.at[rows]
        partly_hidden = start + CLEARED_ROWS > end
        if shape.limited:
            partly_hidden = partly_hidden | (start < low)

        @pl.when(partly_hidden)
        def _(here: Any = here, start: int = start):
            visible = _visible(shape, low - start, end - start, here.shape)
            tile = _wgmma(here[...])
            here[...] = jnp.where(visible, tile, jnp.zeros((), tile.dtype))


def write(shape: DecodeShape, refs: DecodeRefs, index: Array, done: Softmax) -> None:
    """Writes the outputs and log-sum-exps of one row and KV head."""
    sums, highest, total = done
    if shape.has_sinks:
        sinks = plgpu.load(
            refs.sinks.at[lax.rem(index, jnp.int32(shape.kv_heads))],
            layout=plgpu.Layout.WGMMA.reduce(0),
            optimized=False,
        )
        empty = Softmax(jnp.zeros_like(sums), sinks * LOG2_E, jnp.ones_like(total))
        sums, highest, total = _combine(shape, done, empty)
    v_scale = 1.0 if refs.scales is None else refs.scales[1]
    out = sums * _across(v_scale / total, shape.value_rows)
    write_out(shape, refs, index, out.astype(refs.out.dtype))
    store(refs.lse.at[index], (highest + jnp.log2(total)) * (1 / LOG2_E))


def write_out(shape: DecodeShape, refs: DecodeRefs, index: Array, out: Array) -> None:
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    if shape.from_registers:
        store_registers(refs.out_shared.transpose((1, 0)), in_order(out))
    else:
        store(refs.out_shared.transpose((1, 0)), out)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(refs.out_shared.at[pl.ds(0, shape.group)], refs.out.at[index])


def _combine(shape: DecodeShape, one: Softmax, other: Softmax) -> Softmax:
    highest = jnp.maximum(one.highest, other.highest)
    keep, grow = jnp.exp2(one.highest - highest), jnp.exp2(other.highest - highest)
    rows = shape.value_rows
    sums = one.sums * _across(keep, rows) + other.sums * _across(grow, rows)
    return Softmax(sums, highest, one.total * keep + other.total * grow)


def save(refs: DecodeRefs, slot: Array, part: Softmax) -> None:
    store(refs.sums.at[slot], part.sums)
    store(refs.highest.at[slot], part.highest)
    store(refs.totals.at[slot], part.total)


def _saved(refs: DecodeRefs, slot: Array) -> Softmax:
    vector = plgpu.Layout.WGMMA.reduce(0)
    sums = plgpu.load(refs.sums.at[slot], layout=plgpu.Layout.WGMMA, optimized=False)
    highest = plgpu.load(refs.highest.at[slot], layout=vector, optimized=False)
    return Softmax(sums, highest, plgpu.load(refs.totals.at[slot], layout=vector, optimized=False))


def merge(
    shape: DecodeShape,
    refs: DecodeRefs,
    part: Softmax,
    first_share: Array,
    share: Array,
    block_of: Callable[[Array], Array],
) -> Softmax:
    """Merges the part of a row with those that the shares from `first_share` on have saved."""
    part_registers = max(1, shape.value_rows * shape.columns // 128)
    at_once = max(1, shape.config.merge_registers // part_registers)

    def add_several(index: Array, carry: Softmax) -> Softmax:
        others = [first_share + index * at_once + i for i in range(at_once)]
        parts = [_saved(refs, block_of(jnp.minimum(other, share - 1))) for other in others]
        absent = [jnp.where(other < share, 0.0, -jnp.inf) for other in others]
        highests = [saved.highest + a for saved, a in zip(parts, absent, strict=True)]
        # All at once, as one after the other each would wait for the one before.
        highest = functools.reduce(jnp.maximum, highests, carry.highest)
        keep = jnp.exp2(carry.highest - highest)
        sums, total = carry.sums * _across(keep, shape.value_rows), carry.total * keep
        for saved, own in zip(parts, highests, strict=True):
            grow = jnp.exp2(own - highest)
            sums += saved.sums * _across(grow, shape.value_rows)
            total += saved.total * grow
        return Softmax(sums, highest, total)

    return lax.fori_loop(0, pl.cdiv(share - first_share, jnp.int32(at_once)), add_several, part)
