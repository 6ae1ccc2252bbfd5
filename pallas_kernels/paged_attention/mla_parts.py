"""Rows of latent attention that several blocks share: what each saves, and who merges it.

A part is saved as the attention over its positions alone, and the log-sum-exp of these. Every block
that has a part of a row saves it, waits for the others, and merges some of the features. So the
merge of a long row is spread over as many multiprocessors as its positions were. They must all run
at the same time, which one block a multiprocessor does.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.paged_attention.fragments import load_flat, store_flat, store_runs
from pallas_kernels.paged_attention.mla_shape import HEADS, SIDES, MlaRefs, MlaShape
from pallas_kernels.paged_attention.rows import along, full, in_rows, load, store
from pallas_kernels.paged_attention.schedule import Schedule, Segment

LN_2 = 0.6931471805599453


class _Merge(NamedTuple):
    """How a row is merged that up to so many warpgroups have parts of."""

    warpgroups: int
    features: int
    """What a warpgroup merges at a time."""
    parts: int
    """Parts that it reads at once."""


MERGES = (_Merge(4, 128, 2), _Merge(20, 64, 4), _Merge(2**31 - 1, 8, 16))
"""For a row of two parts, of several, and of many."""


class SharedRow(NamedTuple):
    """A row that shares `first` to `last` hold parts of; no row where `last` is -1."""

    row: Array
    first: Array
    last: Array


class Attended(NamedTuple):
    """Attention over some positions, [heads, features] and [heads]."""

    out: Array
    lse: Array
    """The log-sum-exp of the scores, to the base 2."""


class _Merged(NamedTuple):
    """Some parts of a row, each weighted by what its scores add up to."""

    out: Array
    total: Array
    """The sum of the weights."""
    highest: Array
    """The highest log-sum-exp of a part, whose weight is 1."""

    def add(self, parts: list[Attended]) -> "_Merged":
        features = self.out.shape[1]
        highest = in_rows(functools.reduce(jnp.maximum, [part.lse for part in parts], self.highest))
        weights = [in_rows(jnp.exp2(part.lse - highest)) for part in parts]
        keep = in_rows(jnp.exp2(self.highest - highest))
        out, total = self.out * along(keep, features), self.total * keep
        for part, weight in zip(parts, weights, strict=True):
            out += part.out * along(weight, features)
            total += weight
        return _Merged(in_rows(out), in_rows(total), highest)

    def divided(self) -> Attended:
        out = self.out * along(1.0 / self.total, self.out.shape[1])
        return Attended(in_rows(out), in_rows(self.highest + jnp.log2(self.total)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """What a block has to do with the rows that it shares with others."""

    shape: MlaShape
    refs: MlaRefs
    schedule: Schedule
    share: Array
    head_block: Array
    saved: Any
    """Signals by share and head block: how much of the row that begins there, but does not end
    there, is saved."""

    def no_row(self) -> SharedRow:
        return SharedRow(jnp.int32(0), jnp.int32(0), jnp.int32(-1))

    def row_of(self, segment: Segment) -> SharedRow:
        first = lax.div(segment.base, self.schedule.size)
        last = lax.div(segment.base + segment.tiles - 1, self.schedule.size)
        return SharedRow(segment.row, first, last)

    def save(self, segment: Segment, columns: Any, attended: Attended) -> None:
        """Saves a warpgroup's features of a part, with the first the log-sum-exp, and says so."""
        place = self._place(self.share, segment.starts)
        store_flat(self._sums(place, columns), attended.out, inlined=self._inlined)
        if columns.start == 0:
            store(self.refs.saved_lse.at[place], attended.lse)
        if self.saved is not None:
            first = self.row_of(segment).first
            plgpu.semaphore_signal(self._signal_of(first), memory_scope="gpu")

    def write(self, row: Array, columns: Any, attended: Attended) -> None:
        """Writes attention over a whole row, and its log-sum-exp with the first features."""
        index = row * self.shape.head_blocks + self.head_block
        out = attended.out.astype(self.refs.out.dtype)
        store_runs(self.refs.out.at[index, :, columns], out, inlined=self._inlined)

        @pl.when(columns.start == 0)
        def _():
            store(self.refs.lse.at[index], attended.lse * LN_2)

    def wait_for_block(self) -> None:
        """Waits for all warpgroups of the block, where no signals do so later."""
        if self.saved is None:
            plgpu.barrier_arrive(self.refs.block_saved)
            plgpu.barrier_wait(self.refs.block_saved)

    def _place(self, share: Array, begins: Array) -> Array:
        begins = begins.astype(jnp.int32)
        return (share * self.shape.head_blocks + self.head_block) * 2 + begins

    def _signal_of(self, share: Array) -> Any:
        return self.saved.at[share * self.shape.head_blocks + self.head_block]

    def merge(self, one: SharedRow, other: SharedRow, *, own: int) -> None:
        """Merges what falls to a warpgroup of two rows, once all of their parts are saved."""

        def merge_row(index: Array, _: None) -> None:
            pairs = zip(one, other, strict=True)
            self._merge_row(SharedRow(*[jnp.where(index == 0, o, p) for o, p in pairs]), own)

        lax.fori_loop(0, 2, merge_row, None)

    def _merge_row(self, shared: SharedRow, own: int) -> None:
        shares = shared.last - shared.first + 1
        if self.saved is not None:
            wanted = jnp.where(shared.last < 0, 0, shares * SIDES)
            first = jnp.maximum(shared.first, 0)
            plgpu.semaphore_wait(
                self._signal_of(first), wanted, decrement=False, memory_scope="gpu"
            )
            worker, workers = (self.share - shared.first) * SIDES + own, shares * SIDES
        else:
            # Blocks run in turn, so that the last one finds all parts.
            worker, workers = jnp.int32(own), jnp.int32(SIDES)
            shared = shared._replace(
                last=jnp.where(self.share == shared.last, shared.last, jnp.int32(-1))
            )
        fewer = 0
        for most, features, at_once in MERGES:
            chosen = (workers > fewer) & (workers <= most)
            fewer = most
            units = jnp.int32(self.shape.dv // features)

            def merge_unit(index: Array, _: None, features=features, at_once=at_once) -> None:
                columns = pl.ds((worker + index * workers) * features, features)
                self.write(shared.row, columns, self._merge(shared, columns, at_once))

            @pl.when(chosen & (shared.last >= 0))
            def _(units=units, merge_unit=merge_unit):
                own = pl.cdiv(jnp.maximum(units - worker, 0), workers)
                lax.fori_loop(0, own, merge_unit, None)

    def _merge(self, shared: SharedRow, columns: Any, at_once: int) -> Attended:
        """Merges some features of all parts of a row."""
        features = columns.size

        def add_several(index: Array, merged: _Merged) -> _Merged:
            shares = [shared.first + index * at_once + i for i in range(at_once)]
            absent = [jnp.where(share <= shared.last, 0.0, -jnp.inf) for share in shares]
            places = [
                self._place(jnp.minimum(share, shared.last), share == shared.first)
                for share in shares
            ]
            # All loads are on their way before the first part is needed.
            lses = [load(self.refs.saved_lse.at[place]) for place in places]
            outs = [
                load_flat(self._sums(place, columns), features, inlined=self._inlined)
                for place in places
            ]
            parts = zip(outs, lses, absent, strict=True)
            return merged.add([Attended(out, in_rows(lse + hide)) for out, lse, hide in parts])

        nothing = _Merged(
            full((HEADS, features), 0.0), full((HEADS,), 0.0), full((HEADS,), -jnp.inf)
        )
        rounds = pl.cdiv(shared.last - shared.first + 1, jnp.int32(at_once))
        return lax.fori_loop(0, rounds, add_several, nothing).divided()

    def _sums(self, place: Array, columns: Any) -> Any:
        """Where some features of a part are saved."""
        return self.refs.sums.at[place, pl.ds(columns.start * HEADS, columns.size * HEADS)]

    @property
    def _inlined(self) -> bool:
        return self.shape.config.in_registers
