"""Scores of the latent-attention kernel on Hopper: the warpgroup that turns tiles into weights.

Arrays are [heads, positions] or [heads].
"""

import dataclasses
import math
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.paged_attention.mla_parts import Parts
from pallas_kernels.paged_attention.mla_shape import CHUNKS, HEADS, KV_BLOCK, MlaRefs, MlaShape
from pallas_kernels.paged_attention.rows import along, full, in_rows, store
from pallas_kernels.paged_attention.schedule import Schedule, Segment

LOG2_E = math.log2(math.e)


def weigh_tiles(
    shape: MlaShape, refs: MlaRefs, schedule: Schedule, head_block: Array, parts: Parts
) -> None:
    """Computes the weights of the block's segments, and what the sums of each end with."""
    weigher = _Weigher(shape=shape, refs=refs, head_block=head_block, parts=parts)
    schedule.for_each_segment(weigher.weigh_segment, (jnp.int32(0), jnp.int32(0)))
    parts.end_block()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Weigher:
    shape: MlaShape
    refs: MlaRefs
    head_block: Array
    parts: Parts

    def weigh_segment(self, carry: tuple[Array, Array], segment: Segment) -> tuple[Array, Array]:
        """Weighs a segment, after so many tiles and segments; returns how many it are then."""
        tiles, segments = carry
        refs = self.refs
        plgpu.barrier_wait(refs.q_full)

        def weigh_tile(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            start = (segment.first + index) * KV_BLOCK
            last = index == segment.count - 1
            return self._weigh_tile(tiles + index, segment.length - start, last, carry)

        start = full((HEADS,), -jnp.inf), full((HEADS,), 0.0)
        highest, total = lax.fori_loop(0, segment.count, weigh_tile, start)

        @pl.when(segments > 0)
        def _():
            plgpu.barrier_wait(refs.inverse_free)

        store(refs.inverse, 1.0 / total)
        plgpu.barrier_arrive(refs.inverse_full)
        self._finish(segment, highest, total)
        return tiles + segment.count, segments + 1

    def _weigh_tile(
        self, tile: Array, visible: Array, last: Array, carry: tuple[Array, Array]
    ) -> tuple[Array, Array]:
        """Weighs a tile of which so many positions are visible."""
        shape, refs = self.shape, self.refs
        slot = lax.rem(tile, jnp.int32(shape.config.stages))
        scores = self._multiply(slot)

        @pl.when(last)
        def _():
            plgpu.barrier_arrive(refs.q_free)

        position = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
        scores = jnp.where(position < visible, scores, -jnp.inf)
        before, total = carry
        factor = shape.scale * LOG2_E
        highest = in_rows(jnp.maximum(before, scores.max(axis=1) * factor))
        keep = jnp.exp2(before - highest)
        # The sums are scaled down while the weights are computed.
        store(refs.keep.at[slot], keep)
        plgpu.barrier_arrive(refs.keep_full.at[slot])
        weights = in_rows(jnp.exp2(scores * factor - along(highest, KV_BLOCK)))
        refs.rope.at[slot][...] = in_rows(weights.astype(refs.rope.dtype))
        plgpu.commit_smem()
        plgpu.barrier_arrive(refs.weights_full.at[slot])
        return highest, in_rows(total * keep + weights.sum(axis=1))

    def _multiply(self, slot: Array) -> Array:
        """Returns the products of the queries and the keys of a tile."""
        refs = self.refs

        def multiply(product: Any) -> Array:
            for chunk in range(CHUNKS):
                plgpu.barrier_wait(refs.latent_full.at[slot * CHUNKS + chunk])
                keys = refs.latent.at[slot, chunk].transpose((1, 0))
                plgpu.wgmma(product, refs.q_latent.at[chunk], keys)
            plgpu.barrier_wait(refs.rope_full.at[slot])
            plgpu.wgmma(product, refs.q_rope, refs.rope.at[slot].transpose((1, 0)))
            return in_rows(product[...])

        return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((HEADS, KV_BLOCK), jnp.float32))

    def _finish(self, segment: Segment, highest: Array, total: Array) -> None:
        """Writes the log-sum-exp of a whole row, or saves what merging a part needs."""
        shape, refs = self.shape, self.refs

        @pl.when(segment.starts & segment.ends)
        def _():
            index = segment.row * shape.head_blocks + self.head_block
            store(refs.lse.at[index], (highest + jnp.log2(total)) * (1 / LOG2_E))

        @pl.when(jnp.logical_not(segment.starts & segment.ends))
        def _():
            place = self.parts.place(segment)
            store(refs.highest.at[place], highest)
            store(refs.totals.at[place], total)
            self.parts.signal(segment)
