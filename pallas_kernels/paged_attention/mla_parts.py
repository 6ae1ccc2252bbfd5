"""Rows of latent attention that several blocks share: what each saves, and who merges it.

Every block that has a part of a row saves it, waits for the others, and merges some of the
features. So the merge of a long row is spread over as many multiprocessors as its positions were.
They must all run at the same time, which one block a multiprocessor does.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.paged_attention.mla_shape import (
    HEADS,
    SUMMERS,
    MlaRefs,
    MlaShape,
)
from pallas_kernels.paged_attention.rows import along, full, load, store
from pallas_kernels.paged_attention.schedule import Schedule, Segment

LN_2 = 0.6931471805599453
MERGES = (64, 2), (16, 8)
"""Features that a warpgroup merges at a time, and parts that it reads at once: for a row that few
blocks share, and for one that many do."""
FEW_WARPGROUPS = 8
SIGNALS = SUMMERS + 1
"""Warpgroups that save something of a part."""


class SharedRow(NamedTuple):
    """A row that shares `first` to `last` hold parts of; no row where `last` is -1."""

    row: Array
    first: Array
    last: Array


class _Merged(NamedTuple):
    sums: Array
    highest: Array
    total: Array


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

    def place(self, segment: Segment) -> Array:
        """Returns where the part of a segment is saved."""
        return self._place(self.share, segment.starts.astype(jnp.int32))

    def _place(self, share: Array, begins: Array | int) -> Array:
        return (share * self.shape.head_blocks + self.head_block) * 2 + begins

    def signal(self, segment: Segment) -> None:
        """Says that a warpgroup has saved its own of a part."""
        if self.saved is not None:
            first = self.row_of(segment).first
            plgpu.semaphore_signal(self._signal_of(first), memory_scope="gpu")

    def end_block(self) -> None:
        """Says that a warpgroup has saved its own of all parts of the block."""
        if self.saved is None:
            plgpu.barrier_arrive(self.refs.block_saved)

    def wait_for_block(self) -> None:
        """Waits for all warpgroups of the block, where no signals would do so later."""
        if self.saved is None:
            plgpu.barrier_wait(self.refs.block_saved)

    def _signal_of(self, share: Array) -> Any:
        return self.saved.at[share * self.shape.head_blocks + self.head_block]

    def merge(self, shared: SharedRow, warpgroup: Array) -> None:
        """Merges what falls to a warpgroup of a row, once all of its parts are saved."""
        shares = shared.last - shared.first + 1
        if self.saved is not None:
            wanted = jnp.where(shared.last < 0, 0, shares * SIGNALS)
            first = jnp.maximum(shared.first, 0)
            plgpu.semaphore_wait(
                self._signal_of(first), wanted, decrement=False, memory_scope="gpu"
            )
            worker, workers = (self.share - shared.first) * SUMMERS + warpgroup, shares * SUMMERS
        else:
            # Blocks run in turn, so that the last one finds all parts.
            worker, workers = warpgroup, jnp.int32(SUMMERS)
            shared = shared._replace(
                last=jnp.where(self.share == shared.last, shared.last, jnp.int32(-1))
            )
        few = workers <= FEW_WARPGROUPS
        for (features, at_once), chosen in zip(MERGES, (few, jnp.logical_not(few)), strict=True):
            units = jnp.int32(self.shape.dv // features)

            def merge_unit(index: Array, _: None, features=features, at_once=at_once) -> None:
                self._merge_unit(shared, worker + index * workers, features, at_once)

            @pl.when(chosen & (shared.last >= 0))
            def _(units=units, merge_unit=merge_unit):
                own = pl.cdiv(jnp.maximum(units - worker, 0), workers)
                lax.fori_loop(0, own, merge_unit, None)

    def _merge_unit(self, shared: SharedRow, unit: Array, features: int, at_once: int) -> None:
        """Merges some features of all parts of a row."""
        refs = self.refs
        columns = pl.ds(unit * features, features)

        def add_several(index: Array, merged: _Merged) -> _Merged:
            shares = [shared.first + index * at_once + i for i in range(at_once)]
            parts = [
                self._saved(jnp.minimum(share, shared.last), share == shared.first, columns)
                for share in shares
            ]
            for share, part in zip(shares, parts, strict=True):
                absent = jnp.where(share <= shared.last, 0.0, -jnp.inf)
                merged = _combine(merged, part._replace(highest=part.highest + absent))
            return merged

        start = _Merged(full((HEADS, features), 0.0), full((HEADS,), -jnp.inf), full((HEADS,), 0.0))
        rounds = pl.cdiv(shared.last - shared.first + 1, jnp.int32(at_once))
        merged = lax.fori_loop(0, rounds, add_several, start)
        index = shared.row * self.shape.head_blocks + self.head_block
        out = merged.sums * along(1.0 / merged.total, features)
        store(refs.out.at[index, :, columns], out.astype(refs.out.dtype))

        @pl.when(unit == 0)
        def _():
            store(refs.lse.at[index], (merged.highest + jnp.log2(merged.total)) * LN_2)

    def _saved(self, share: Array, begins: Array, columns: Any) -> _Merged:
        place, refs = self._place(share, begins.astype(jnp.int32)), self.refs
        sums = load(refs.sums.at[place, :, columns])
        return _Merged(sums, load(refs.highest.at[place]), load(refs.totals.at[place]))


def _combine(one: _Merged, other: _Merged) -> _Merged:
    highest = jnp.maximum(one.highest, other.highest)
    keep = jnp.exp2(one.highest - highest)
    grow = jnp.exp2(other.highest - highest)
    features = one.sums.shape[1]
    sums = one.sums * along(keep, features) + other.sums * along(grow, features)
    return _Merged(sums, highest, one.total * keep + other.total * grow)
