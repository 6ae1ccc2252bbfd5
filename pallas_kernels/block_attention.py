"""Attention of ragged queries to some of their keys, as a ring passes them round, in plain XLA."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.softmax import (
    KV_BLOCK,
    QUERY_BLOCK,
    Softmax,
    add_keys,
    earliest_seen,
    empty_softmax,
    sees,
)


class Places(NamedTuple):
    """Where tokens stand, in rising order of row and position; padding comes last."""

    row: Int[Array, " tokens"]
    """`NO_ROW` for padding."""
    position: Int[Array, " tokens"]
    """Position in the row's sequence."""


NO_ROW = 2**31 - 1
"""Row of padding."""


def block_attention(
    q: Float[Array, "tokens heads d"],
    k: Float[Array, "keys kv_heads d"],
    v: Float[Array, "keys kv_heads dv"] | None,
    queries: Places,
    keys: Places,
    *,
    scale: float,
    window: Int[Array, ""] | int | None = None,
    chunk: Int[Array, ""] | int | None = None,
    soft_cap: float | None = None,
    value_dim: int | None = None,
) -> tuple[Float[Array, "tokens heads dv"], Float[Array, "tokens heads"]]:
    """Causal attention of ragged rows of queries to some of their keys, and its log-sum-exp.

    A query sees the keys of its row up to its own position, fewer with a `window` or a `chunk` (see
    `paged_attention`). One without a visible key gives 0, and -inf as log-sum-exp. Blocks of keys
    that a block of queries cannot see are left out. Without `v`, values are the first `value_dim`
    features of the keys. Results are float32, to be merged with those of other keys.
    """
    (tokens, heads, d), kv_heads = q.shape, k.shape[1]
    dv = value_dim or k.shape[2] if v is None else v.shape[2]
    places = _cut(queries, QUERY_BLOCK)
    group = heads // kv_heads
    blocks = _pad_to(q, places.row.size).reshape(*places.row.shape, kv_heads, group, d)
    key_places = _cut(keys, KV_BLOCK)
    key_shape = (*key_places.row.shape, kv_heads)
    k_blocks = _pad_to(k, key_places.row.size).reshape(*key_shape, k.shape[2])
    v_blocks = None if v is None else _pad_to(v, key_places.row.size).reshape(*key_shape, dv)
    first, stop = visible_blocks(queries, keys, window=window, chunk=chunk)

    def one_round(index: Array, carry: Softmax) -> Softmax:
        block = jnp.minimum(first + index, len(k_blocks) - 1)
        seen = Places(key_places.row[block], key_places.position[block])
        visible = sees(
            places.position[..., None], seen.position[:, None], window=window, chunk=chunk
        )
        visible &= (places.row[..., None] == seen.row[:, None]) & (seen.row != NO_ROW)[:, None]
        visible &= (first + index < stop)[:, None, None]
        k_block = k_blocks[block]
        v_block = k_block[..., :dv] if v_blocks is None else v_blocks[block]
        return add_keys(carry, blocks, k_block, v_block, visible, scale=scale, soft_cap=soft_cap)

    start = empty_softmax(blocks.shape[:-1], dv)
    _, total, sums = state = lax.fori_loop(0, jnp.max(stop - first), one_round, start)
    out = sums / jnp.where(total == 0, 1.0, total)[..., None]
    lse = state.highest + jnp.log(total)
    return out.reshape(-1, heads, dv)[:tokens], lse.reshape(-1, heads)[:tokens]


def visible_blocks(
    queries: Places,
    keys: Places,
    *,
    window: Int[Array, ""] | int | None = None,
    chunk: Int[Array, ""] | int | None = None,
) -> tuple[Int[Array, " blocks"], Int[Array, " blocks"]]:
    """First and one past the last block of `KV_BLOCK` keys that each block of queries may see."""
    rows, positions = _cut(queries, QUERY_BLOCK)
    count = (rows != NO_ROW).sum(1)
    last = jnp.maximum(count - 1, 0)[:, None]
    low = (rows[:, :1], earliest_seen(positions[:, :1], window, chunk))
    high = tuple(jnp.take_along_axis(x, last, axis=1) for x in (rows, positions))

    def keys_before(row: Array, position: Array) -> Array:
        return ((keys.row < row) | ((keys.row == row) & (keys.position < position))).sum(1)

    first, end = keys_before(*low), keys_before(high[0], high[1] + 1)
    is_empty = (count == 0) | (end <= first)
    first = first // KV_BLOCK
    return first, jnp.where(is_empty, first, -(-end // KV_BLOCK))


def _cut(places: Places, size: int) -> Places:
    """Blocks of `size` tokens; what is missing is padding."""
    count = -(-len(places.row) // size) * size - len(places.row)
    row = jnp.pad(places.row, (0, count), constant_values=NO_ROW)
    return Places(row.reshape(-1, size), jnp.pad(places.position, (0, count)).reshape(-1, size))


def _pad_to(x: Array, count: int) -> Array:
    return jnp.pad(x, ((0, count - len(x)), *((0, 0),) * (x.ndim - 1)))
