"""Which keys a query sees, and the softmax over blocks of them, in plain XLA."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

QUERY_BLOCK = 64
"""Queries of one row that are computed together."""
KV_BLOCK = 256
"""Cached positions that one round of the softmax reads."""


def sees(
    position: Int[Array, "*#queries"],
    key_position: Int[Array, "*#keys"],
    *,
    window: Int[Array, ""] | int | None,
    chunk: Int[Array, ""] | int | None,
) -> Bool[Array, "..."]:
    """Whether the key stands where the causal query of the same row looks; shapes broadcast."""
    return (key_position <= position) & (key_position >= earliest_seen(position, window, chunk))


def earliest_seen(position: Array, window: Any, chunk: Any) -> Array:
    """The first position that a query sees."""
    earliest = jnp.zeros_like(position)
    if window is not None:
        earliest = jnp.where(jnp.asarray(window) <= 0, earliest, position - window + 1)
    if chunk is not None:
        start = position // jnp.maximum(chunk, 1) * chunk
        earliest = jnp.where(jnp.asarray(chunk) <= 0, earliest, jnp.maximum(earliest, start))
    return earliest


class Softmax(NamedTuple):
    """A softmax over some keys and the values it weighs (Milakov & Gimelshein, 2018)."""

    highest: Float[Array, "..."]
    """Largest score."""
    total: Float[Array, "..."]
    """Sum of exp(score - highest)."""
    sums: Float[Array, "..."]
    """Sum of exp(score - highest) * value."""


def empty_softmax(shape: tuple[int, ...], dv: int) -> Softmax:
    return Softmax(jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, dv)))


def add_keys(
    carry: Softmax,
    queries: Float[Array, "blocks queries kv_heads group d"],
    keys: Float[Array, "blocks keys kv_heads d"],
    values: Float[Array, "blocks keys kv_heads dv"],
    visible: Bool[Array, "blocks queries keys"],
    *,
    scale: Float[Array, ""] | float,
    soft_cap: float | None,
) -> Softmax:
    scores = jnp.einsum("bqhgd,bshd->bqhgs", queries, keys, preferred_element_type=jnp.float32)
    scores = scores * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(visible[:, :, None, None], scores, -jnp.inf)
    highest = jnp.maximum(carry.highest, scores.max(-1))
    # A block without a visible key keeps -inf; exp(-inf - -inf) would be NaN.
    shift = jnp.where(jnp.isneginf(highest), 0.0, highest)
    weights = jnp.exp(scores - shift[..., None])
    keep = jnp.exp(carry.highest - shift)
    sums = jnp.einsum(
        "bqhgs,bshd->bqhgd",
        weights.astype(values.dtype),
        values,
        preferred_element_type=jnp.float32,
    )
    total = carry.total * keep + weights.sum(-1)
    return Softmax(highest, total, carry.sums * keep[..., None] + sums)
