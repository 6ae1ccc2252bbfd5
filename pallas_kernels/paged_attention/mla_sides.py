"""Scores and sums of the latent-attention kernel on Hopper: two warpgroups that take turns.

Each computes the weights of the tiles in its own place, and sums up its half of the value features
over the tiles in both. Arrays are [heads, positions], [heads, features] or [heads].
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.paged_attention.mla_parts import Attended, Parts, SharedRow
from pallas_kernels.paged_attention.mla_shape import HEADS, KV_BLOCK, SIDES, MlaRefs, MlaShape
from pallas_kernels.paged_attention.powers import LOG2_E
from pallas_kernels.paged_attention.rows import along, full, in_rows, load, store
from pallas_kernels.paged_attention.schedule import Schedule, Segment

CLEARED_COLUMNS = 128
"""Features that are cleared at a time: sums take most of the registers."""


class _State(NamedTuple):
    """What a side knows of a row after some tiles."""

    highest: Array
    """The highest score, times log2(e)."""
    total: Array
    """The sum of the weights that this side computed."""
    sums: Array
    """The weighted sum of this side's half of the values."""


def attend_side(
    shape: MlaShape,
    refs: MlaRefs,
    schedule: Schedule,
    head_block: Array,
    parts: Parts,
    *,
    own: int,
) -> None:
    """Attends to the block's segments, then merges the rows it shares with other blocks."""
    side = _Side(shape=shape, refs=refs, own=own, head_block=head_block, parts=parts)
    side.free_all()
    none = parts.no_row()
    _, *shared = schedule.for_each_segment(side.attend_segment, (jnp.int32(0), none, none))
    with jax.named_scope("merge"):
        parts.wait_for_block()
        parts.merge(*shared, own=own)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Side:
    shape: MlaShape
    refs: MlaRefs
    own: int
    """The place whose tiles this side weighs, and the half of the values that it sums up."""
    head_block: Array
    parts: Parts

    @property
    def other(self) -> int:
        return 1 - self.own

    def free_all(self) -> None:
        """Says that nothing is in use yet."""
        plgpu.barrier_arrive(self.refs.q_free)
        for place in range(SIDES):
            self._free(place)

    def _free(self, place: int) -> None:
        plgpu.barrier_arrive(self.refs.latent_free.at[place * SIDES + self.own])
        plgpu.barrier_arrive(self.refs.rope_free.at[place])

    def attend_segment(
        self, carry: tuple[Array, SharedRow, SharedRow], segment: Segment
    ) -> tuple[Array, SharedRow, SharedRow]:
        """Attends to a segment, after so many; returns these, and the rows that are shared."""
        segments, from_earlier, into_later = carry
        plgpu.barrier_wait(self.refs.q_full)
        # A side without a tile is done with the queries.
        self._free_queries(segment.count <= self.own)

        def attend_pair(pair: Array, state: _State) -> _State:
            return self._attend_pair(pair * SIDES, segment, state)

        state = _State(
            full((HEADS,), -jnp.inf), full((HEADS,), 0.0), full((HEADS, self.shape.half), 0.0)
        )
        pairs = lax.div(segment.count + (SIDES - 1 - self.own), jnp.int32(SIDES))
        state = lax.fori_loop(0, pairs, attend_pair, state)
        if self.own == 1:
            alone = lax.rem(segment.count, jnp.int32(SIDES)) == 1
            state = self._add_other_if(alone, segment.count - 1, segment, state)
        with jax.named_scope("finish"):
            self._finish(segment, segments, state)
        row = self.parts.row_of(segment)
        from_earlier = _replace_row(from_earlier, row, jnp.logical_not(segment.starts))
        split = segment.starts & jnp.logical_not(segment.ends)
        return segments + 1, from_earlier, _replace_row(into_later, row, split)

    def _attend_pair(self, first: Array, segment: Segment, state: _State) -> _State:
        """Attends to the tile `first`, which is in the first place, and to the one after it."""
        if self.own == 1:
            return self._attend_own(first + 1, segment, state, with_other=True)
        state = self._attend_own(first, segment, state, with_other=False)
        return self._add_other_if(first + 1 < segment.count, first + 1, segment, state)

    def _attend_own(
        self, tile: Array, segment: Segment, state: _State, *, with_other: bool
    ) -> _State:
        """Attends to a tile in the own place.

        `with_other` adds the values of the tile before it, in the other place, which has weights
        by then: the tensor cores work on them while this side turns scores into weights.
        """
        visible = segment.length - (segment.first + tile) * KV_BLOCK
        last = tile + SIDES >= segment.count
        # A zero that the compiler takes for a variable: else it would compute the descriptors of
        # all products ahead of the loop, and spill them.
        zero = jnp.minimum(visible, 0)

        def attend(product: Any) -> _State:
            self._multiply_keys(product, zero)
            before = self._take_weights(state) if with_other else state

            def weigh(refs: Any) -> None:
                sums, highest_ref, total_ref = refs
                if with_other:
                    self._multiply_values(sums, self.other + zero)
                scores = plgpu.wgmma_accumulator_load(product, wait_n=int(with_other))
                self._free_queries(last)
                highest_ref[...], total_ref[...] = self._weigh(scores, visible, before)
                plgpu.wgmma_wait(0)

            start: Any = plgpu.WGMMAAccumulatorRef.init(before.sums)
            sums, highest, total = pl.run_state(weigh)((start, before.highest, before.total))
            return self._after(before, highest, total, in_rows(sums), with_other)

        def attend_in_turn(product: Any) -> _State:
            self._multiply_keys(product, zero)
            scores = product[...]
            before = self._take_weights(state) if with_other else state
            sums = before.sums
            if with_other:
                sums = self._add_values(sums, self.other + zero)
            self._free_queries(last)
            highest, total = self._weigh(scores, visible, before)
            return self._after(before, highest, total, sums, with_other)

        run = attend if self.shape.config.in_registers else attend_in_turn
        scores = plgpu.WGMMAAccumulatorRef((HEADS, KV_BLOCK), jnp.float32)
        return self._add(self.own, zero, visible, pl.run_scoped(run, scores))

    def _after(
        self, before: _State, highest: Array, total: Array, sums: Array, with_other: bool
    ) -> _State:
        """Returns the state once a tile has weights, with sums as its highest score scales them."""
        if with_other:
            self._free(self.other)
        keep = jnp.exp2(before.highest - highest)
        return _State(highest, total, in_rows(sums * along(keep, self.shape.half)))

    def _free_queries(self, done: Array) -> None:
        @pl.when(done)
        def _():
            plgpu.barrier_arrive(self.refs.q_free)

    def _add_other_if(self, present: Array, tile: Array, segment: Segment, state: _State) -> _State:
        """Adds the values of a tile in the other place, if there is one."""

        def add() -> _State:
            visible = segment.length - (segment.first + tile) * KV_BLOCK
            zero = jnp.minimum(visible, 0)
            return self._add(self.other, zero, visible, self._take_weights(state))

        def skip() -> _State:
            return state

        return _State(*lax.cond(present, add, skip))

    def _take_weights(self, state: _State) -> _State:
        """Waits for the weights of the other place, and scales down to their highest score."""
        with jax.named_scope("wait_weights"):
            plgpu.barrier_wait(self.refs.weights_full.at[self.other])
        highest = load(self.refs.highest.at[self.other])
        keep = jnp.exp2(state.highest - highest)
        sums = in_rows(state.sums * along(keep, self.shape.half))
        return _State(highest, in_rows(state.total * keep), sums)

    def _weigh(self, scores: Array, visible: Array, before: _State) -> tuple[Array, Array]:
        """Turns the scores of the own place, of which so many are visible, into weights.

        Returns the highest score and the sum of the weights with them.
        """
        shape, refs = self.shape, self.refs
        with jax.named_scope("softmax"):
            position = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
            scores = jnp.where(position < visible, in_rows(scores), -jnp.inf)
            factor = shape.scale * LOG2_E
            highest = in_rows(jnp.maximum(before.highest, scores.max(axis=1) * factor))
            store(refs.highest.at[self.own], highest)
            weights = in_rows(jnp.exp2(scores * factor - along(highest, KV_BLOCK)))
            refs.rope.at[self.own][...] = in_rows(weights.astype(refs.rope.dtype))
            plgpu.commit_smem()
            plgpu.barrier_arrive(refs.weights_full.at[self.own])
            keep = jnp.exp2(before.highest - highest)
            return highest, in_rows(before.total * keep + weights.sum(axis=1))

    def _multiply_keys(self, product: Any, zero: Array) -> None:
        """Begins to multiply the queries and the keys in the own place."""
        refs, own = self.refs, self.own
        with jax.named_scope("keys"):
            for half in range(SIDES):
                plgpu.barrier_wait(refs.latent_full.at[own * SIDES + half])
                keys = refs.latent.at[own + zero, half].transpose((1, 0))
                plgpu.wgmma(product, refs.q_latent.at[half + zero], keys)
            plgpu.barrier_wait(refs.rope_full.at[own])
            plgpu.wgmma(product, refs.q_rope, refs.rope.at[own + zero].transpose((1, 0)))

    def _multiply_values(self, product: Any, place: Array) -> None:
        """Begins to multiply the weights and this side's values in a place."""
        half = self.own + place - place
        plgpu.wgmma(product, self.refs.rope.at[place], self.refs.latent.at[place, half])

    def _add(self, place: int, zero: Array, visible: Array, state: _State) -> _State:
        """Adds the weighted values in a place, of which so many are visible, and frees it."""

        @pl.when(visible < KV_BLOCK)
        def _():
            _clear(self.refs.latent.at[place, self.own], visible)
            plgpu.commit_smem()

        with jax.named_scope("values"):
            sums = self._add_values(state.sums, place + zero)
        self._free(place)
        return state._replace(sums=sums)

    def _add_values(self, sums: Array, place: Array) -> Array:
        """Returns the sums with the weighted values in a place."""
        if self.shape.config.in_registers:

            def multiply(product: Any) -> None:
                self._multiply_values(product, place)
                plgpu.wgmma_wait(0)

            start: Any = plgpu.WGMMAAccumulatorRef.init(sums)
            return in_rows(pl.run_state(multiply)(start))

        def multiply_from_zero(product: Any) -> Array:
            self._multiply_values(product, place)
            return product[...]

        accumulator = plgpu.WGMMAAccumulatorRef((HEADS, self.shape.half), jnp.float32)
        return in_rows(sums + pl.run_scoped(multiply_from_zero, accumulator))

    def _finish(self, segment: Segment, segments: Array, state: _State) -> None:
        """Writes the outputs of a whole row, or saves a part."""
        shape, refs, parts, own = self.shape, self.refs, self.parts, self.own
        # In turns: the other side may be done with the next segment before this one waits.
        turn = lax.rem(segments, jnp.int32(2))
        totals = refs.totals.at[turn]
        store(totals.at[own], state.total)
        plgpu.barrier_arrive(refs.totals_full.at[turn * SIDES + own])
        plgpu.barrier_wait(refs.totals_full.at[turn * SIDES + self.other])
        total = state.total + load(totals.at[self.other])
        attended = Attended(
            in_rows(state.sums * along(1.0 / total, shape.half)),
            in_rows(state.highest + jnp.log2(total)),
        )
        columns = pl.ds(own * shape.half, shape.half)
        whole = segment.starts & segment.ends

        @pl.when(whole)
        def _():
            parts.write(segment.row, columns, attended)

        @pl.when(jnp.logical_not(whole))
        def _():
            parts.save(segment, columns, attended)


def _replace_row(old: SharedRow, new: SharedRow, condition: Array) -> SharedRow:
    return SharedRow(*[jnp.where(condition, n, o) for n, o in zip(new, old, strict=True)])


def _clear(values: Any, visible: Array) -> None:
    """Clears values past a row's end: a weight of 0 would keep a NaN among them."""
    columns = min(CLEARED_COLUMNS, values.shape[1])
    for column in range(0, values.shape[1], columns):
        part = values.at[:, pl.ds(column, columns)]
        tile = in_rows(part[...])
        position = plgpu.broadcasted_iota(jnp.int32, tile.shape, 0, layout=plgpu.Layout.WGMMA)
        part[...] = jnp.where(position < visible, tile, jnp.zeros((), tile.dtype))
