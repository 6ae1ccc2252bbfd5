"""Softmax of the prefill kernel on Hopper: the warpgroups that compute on the tiles.

Arrays are [queries, positions] or [queries, dv]. The two warpgroups take turns: while the tensor
cores work for one, the other exponentiates (FlashAttention-3, Shah et al., 2024).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.paged_attention.limits import first_visible
from pallas_kernels.paged_attention.powers import LOG2_E, capped
from pallas_kernels.paged_attention.prefill_shape import (
    WARPGROUP_ROWS,
    WARPGROUPS,
    PrefillRefs,
    PrefillShape,
)
from pallas_kernels.paged_attention.prefill_store import store_log_sum_exp, store_out
from pallas_kernels.paged_attention.prefill_walk import Item, for_each_item
from pallas_kernels.paged_attention.rows import along, in_rows

HIDDEN = -(2.0**100)
"""Score of a hidden position. It is finite: a row that has seen nothing yet stays a number, and
what it has summed up is forgotten at the first position that it sees. It is a power of 2: its
products are exact, so that it less itself is 0 where the product is fused with the difference."""


class Softmax(NamedTuple):
    """A softmax in progress, in powers of 2."""

    sums: Array
    """Weighted sums of values [queries, dv]."""
    highest: Array
    """Highest score [queries]."""
    total: Array
    """Sum of weights [queries]."""


def compute_items(shape: PrefillShape, refs: PrefillRefs) -> None:
    """Computes and writes the block's items."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == 1)
    def _():
        plgpu.barrier_arrive(refs.turn.at[0])

    computer = _Computer(shape=shape, refs=refs, warpgroup=warpgroup)
    for_each_item(shape, refs, computer.compute_item)

    @pl.when(warpgroup == 0)
    def _():
        plgpu.barrier_wait(refs.turn.at[0])

    plgpu.wait_smem_to_gmem(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Computer:
    shape: PrefillShape
    refs: PrefillRefs
    warpgroup: Array

    def compute_item(self, item: Item) -> None:
        shape = self.shape
        token, head = item.queries_of(shape, self.warpgroup)
        done = self._attend(item, token - item.tile.token + item.tile.position)
        empty = item.tile.kv_tiles == 0
        if shape.has_sinks:
            done = self._add_sink(done, self.refs.sinks[head])
        inverse = jnp.where(done.total > 0, 1.0 / done.total, 0.0)
        if self.refs.scales is not None:
            inverse *= self.refs.scales[1]
        out = in_rows(done.sums * along(inverse, shape.dv))
        store_out(shape, self.refs, item, token, head, self.warpgroup, out)
        lse = (done.highest + jnp.log2(done.total)) * (1 / LOG2_E)
        lse = in_rows(lse + jnp.where(empty, -jnp.inf, 0.0))
        store_log_sum_exp(self.refs, item.tile, token, head, lse)

    def _attend(self, item: Item, position: Array) -> Softmax:
        """Attends from the queries that begin at a position to the tiles of an item."""
        shape, kv_block, count = self.shape, self.shape.config.kv_block, item.tile.kv_tiles
        queries = WARPGROUP_ROWS
        start = Softmax(
            in_rows(jnp.zeros((queries, shape.dv), jnp.float32)),
            in_rows(jnp.full((queries,), -jnp.inf, jnp.float32)),
            in_rows(jnp.zeros((queries,), jnp.float32)),
        )

        place = item.place(shape)

        @pl.when((count > 0) | shape.shares_queries)
        def _():
            plgpu.barrier_wait(self.refs.q_full.at[place])

        @pl.when(count > 0)
        def _():
            plgpu.barrier_wait(self.refs.turn.at[self.warpgroup])

        if shape.shares_queries:

            @pl.when(count == 0)
            def _():
                self._free_queries(item)

        # The positions that all queries see are between two edges.
        last_full = lax.div(jnp.maximum(position + 1 - item.tile.kv_begin, 0), jnp.int32(kv_block))
        last_full = jnp.minimum(last_full, count)
        first_full = jnp.int32(0)
        if shape.limited:
            low = first_visible(position + queries - 1, self.refs.limits)
            first_full = pl.cdiv(jnp.maximum(low - item.tile.kv_begin, 0), jnp.int32(kv_block))
            first_full = jnp.minimum(first_full, count)
            last_full = jnp.maximum(first_full, last_full)
        whole_tile = functools.partial(self._attend_tile, item, position, False)
        edge_tile = functools.partial(self._attend_tile, item, position, True)
        done = start
        if shape.limited:
            done = lax.fori_loop(0, first_full, edge_tile, done)
        done = lax.fori_loop(first_full, last_full, whole_tile, done)
        return lax.fori_loop(last_full, count, edge_tile, done)

    def _attend_tile(
        self, item: Item, position: Array, masked: bool, index: Array, carry: Softmax
    ) -> Softmax:
        """Adds a tile to the softmax. It begins and ends with the turn at the tensor cores."""
        slot = lax.rem(item.steps + index, jnp.int32(self.shape.config.stages))
        last = index == item.tile.kv_tiles - 1
        scores, factor = self._capped(self._multiply_keys(item, index, slot, last))
        if masked:
            start = item.tile.kv_begin + index * self.shape.config.kv_block
            scores = jnp.where(self._visible(position, start), scores, HIDDEN)
        done, weights = self._weigh(carry, scores, factor)
        return done._replace(sums=self._add_values(done.sums, weights, slot, last))

    def _multiply_keys(self, item: Item, index: Array, slot: Array, last: Array) -> Array:
        """Returns the products of queries and keys, and ends the turn."""
        refs = self.refs
        plgpu.barrier_wait(refs.k_full.at[slot])

        def multiply(product: Any) -> Array:
            keys = refs.k_shared.at[slot].transpose((1, 0))
            plgpu.wgmma(product, refs.q_shared.at[item.place(self.shape), self.warpgroup], keys)
            self._end_turn()
            return in_rows(product[...])

        tile = (WARPGROUP_ROWS, self.shape.config.kv_block)
        product = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(tile, jnp.float32))
        plgpu.barrier_arrive(refs.k_free.at[slot])

        if self.shape.shares_queries:

            @pl.when(index == 0)
            def _():
                self._free_queries(item)
        else:

            @pl.when(last)
            def _():
                plgpu.barrier_arrive(refs.q_free.at[item.place(self.shape)])

        return product

    def _free_queries(self, item: Item) -> None:
        """Frees the place of the item before, from where its outputs have left by now."""

        @pl.when(item.loaded > 0)
        def _():
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            stages = jnp.int32(self.shape.query_stages)
            plgpu.barrier_arrive(self.refs.q_free.at[lax.rem(item.loaded + 1, stages)])

    def _weigh(
        self, before: Softmax, scores: Array, factor: Array | float
    ) -> tuple[Softmax, Array]:
        """Returns the softmax without the values of a tile, and the weights of these."""
        highest = in_rows(jnp.maximum(before.highest, scores.max(axis=1) * factor))
        keep = jnp.exp2(before.highest - highest)
        weights = in_rows(jnp.exp2(scores * factor - along(highest, scores.shape[1])))
        total = in_rows(before.total * keep + weights.sum(axis=1))
        sums = in_rows(before.sums * along(keep, self.shape.dv))
        weights = in_rows(weights.astype(self.refs.v_shared.dtype))
        # What the other warpgroup's turn can hide is done before this one's begins.
        sums, highest, total, weights = lax.optimization_barrier((sums, highest, total, weights))
        return Softmax(sums, highest, total), weights

    def _add_values(self, sums: Array, weights: Array, slot: Array, last: Array) -> Array:
        """Adds weighted values to the sums, in a turn that goes on where there are more keys."""
        refs, own = self.refs, self.warpgroup
        plgpu.barrier_wait(refs.v_full.at[slot])
        plgpu.barrier_wait(refs.turn.at[own])

        def multiply(product: Any) -> None:
            plgpu.wgmma(product, weights, refs.v_shared.at[slot])
            pl.when(last)(self._end_turn)

        def multiply_in_shared_memory(product: Any) -> Array:
            refs.weights_shared.at[own][...] = weights
            plgpu.commit_smem()
            plgpu.wgmma(product, refs.weights_shared.at[own], refs.v_shared.at[slot])
            pl.when(last)(self._end_turn)
            return product[...]

        if self.shape.config.in_registers:
            start: Any = plgpu.WGMMAAccumulatorRef.init(sums)
            added: Any = pl.run_state(multiply)(start)
        else:
            tile = (WARPGROUP_ROWS, self.shape.dv)
            accumulator = plgpu.WGMMAAccumulatorRef(tile, jnp.float32)
            added = sums + pl.run_scoped(multiply_in_shared_memory, accumulator)
        plgpu.barrier_arrive(refs.v_free.at[slot])
        return in_rows(added)

    def _end_turn(self) -> None:
        plgpu.barrier_arrive(self.refs.turn.at[WARPGROUPS - 1 - self.warpgroup])

    def _capped(self, product: Array) -> tuple[Array, Array | float]:
        """Returns scores and what turns them into powers of 2."""
        shape, scale = self.shape, self.shape.scale * LOG2_E
        if self.refs.scales is not None:
            scale *= self.refs.scales[0]
        if shape.soft_cap is None:
            return product, scale
        return capped(product, scale, shape.soft_cap), shape.soft_cap * LOG2_E

    def _visible(self, position: Array, start: Array) -> Array:
        """Returns which positions from `start` on the queries from `position` on see."""
        tile = (WARPGROUP_ROWS, self.shape.config.kv_block)
        query, key = (
            plgpu.broadcasted_iota(jnp.int32, tile, axis, layout=plgpu.Layout.WGMMA)
            for axis in (0, 1)
        )
        behind = query - key + (position - start)
        visible = behind >= 0
        if self.shape.windowed:
            window = self.refs.limits[0]
            visible = visible & (behind < jnp.where(window > 0, window, jnp.iinfo(jnp.int32).max))
        if self.shape.chunked:
            row = plgpu.Layout.WGMMA.reduce(1)
            query = plgpu.broadcasted_iota(jnp.int32, (WARPGROUP_ROWS,), 0, layout=row)
            low = first_visible(query + position, self.refs.limits) - start
            visible = visible & (key >= along(low, tile[1]))
        return visible

    def _add_sink(self, done: Softmax, sink: Array) -> Softmax:
        """Adds a position without a value, with the score `sink`."""
        highest = jnp.maximum(done.highest, sink * LOG2_E)
        keep = jnp.exp2(done.highest - highest)
        sums = in_rows(done.sums * along(keep, self.shape.dv))
        return Softmax(sums, highest, done.total * keep + jnp.exp2(sink * LOG2_E - highest))
