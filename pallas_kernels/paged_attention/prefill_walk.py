"""The walk of a thread block over its work items: a tile of queries and one or two heads each."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.paged_attention.prefill_plan import Tile
from pallas_kernels.paged_attention.prefill_shape import WARPGROUP_ROWS, PrefillRefs, PrefillShape


class Item(NamedTuple):
    """What a thread block computes at a time."""

    tile: Tile
    head: Array
    """First query head."""
    steps: Array
    """Tiles of keys that the block has read before."""
    loaded: Array
    """Items before this one that loaded queries: those that read any tile, or, where queries and
    outputs share their places, all."""

    def place(self, shape: PrefillShape) -> Array:
        """Which place in shared memory its queries have."""
        return lax.rem(self.loaded, jnp.int32(shape.query_stages))

    def queries_of(self, shape: PrefillShape, warpgroup: Array) -> tuple[Array, Array]:
        """Returns the first token and the head of a warpgroup's queries."""
        if shape.item_heads == 1:
            return self.tile.token + warpgroup * WARPGROUP_ROWS, self.head
        return self.tile.token, self.head + warpgroup

    def kv_head(self, shape: PrefillShape) -> Array:
        return lax.div(self.head, jnp.int32(shape.group))


def for_each_item(shape: PrefillShape, refs: PrefillRefs, body: Callable[[Item], None]) -> None:
    """Runs the body over the block's items.

    Items are sorted by cost and dealt out to the blocks back and forth, so that each gets about the
    same work. The heads of a tile are neighbours: they read the same pages at the same time.
    """
    block, blocks = lax.axis_index("block"), shape.config.blocks
    per_tile = shape.heads // shape.item_heads
    items = refs.tile_count[0] * per_tile

    def index_of(turn: Array) -> Array:
        there = lax.rem(turn, jnp.int32(2)) == 0
        return turn * blocks + jnp.where(there, block, blocks - 1 - block)

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        return index_of(state[0]) < items

    def one_item(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        turn, steps, loaded = state
        index = index_of(turn)
        number = lax.div(index, jnp.int32(per_tile))
        tile = Tile(*[refs.tiles[number, field] for field in range(len(Tile._fields))])
        head = lax.rem(index, jnp.int32(per_tile)) * shape.item_heads
        body(Item(tile, head, steps, loaded))
        return (
            turn + 1,
            steps + tile.kv_tiles,
            loaded + (1 if shape.shares_queries else (tile.kv_tiles > 0).astype(jnp.int32)),
        )

    zero = jnp.int32(0)
    lax.while_loop(unfinished, one_item, (zero, zero, zero))
