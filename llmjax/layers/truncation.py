"""Top-k, top-p and min-p on a sharded vocabulary, exact for any k and p.

Nothing is sorted or gathered. The smallest kept logit is found bit by bit, from the highest: 32
rounds, each of which counts (or weighs) the tokens at or above a candidate on every shard. Tokens
equal to the smallest kept one are all kept, as Hugging Face's samplers do.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from llmjax.layers.vocabulary import Vocabulary
from llmjax.parallel.collectives import psum

_SIGN = 1 << 31


def find_kept(
    logits: Float32[Array, "rows vocab"],
    scaled: Float32[Array, "rows vocab"],
    *,
    top_k: Int32[Array, " rows"],
    top_p: Float32[Array, " rows"],
    min_p: Float32[Array, " rows"],
    any_top_k: Bool[Array, ""],
    any_top_p: Bool[Array, ""],
    vocabulary: Vocabulary,
) -> Bool[Array, "rows vocab"]:
    """Tokens that min-p and top-k leave, and of these the ones that top-p leaves.

    `scaled` is log(p / highest p) after temperature. `any_top_k` and `any_top_p` say whether any
    row needs the search, and must be the same on every device. Runs inside an island.
    """
    weights = jnp.exp(scaled)
    # Temperature keeps the order, so thresholds are sought on the logits, where scaling has not
    # made near ones equal.
    keys = order_keys(logits)
    kept = weights >= min_p[:, None]

    def keep_all() -> UInt32[Array, " rows"]:
        return jnp.zeros(len(keys), jnp.uint32)

    def find_top_k() -> UInt32[Array, " rows"]:
        return _top_k_threshold(keys, top_k, vocabulary)

    kept &= keys >= lax.cond(any_top_k, find_top_k, keep_all)[:, None]

    def find_top_p() -> UInt32[Array, " rows"]:
        return _top_p_threshold(keys, jnp.where(kept, weights, 0), top_p, vocabulary)

    return kept & (keys >= lax.cond(any_top_p, find_top_p, keep_all)[:, None])


def order_keys(values: Float32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Integers in the order of the floats; both zeros are equal, NaN has no place."""
    bits = lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values), jnp.uint32)
    return jnp.where(values < 0, ~bits, bits | jnp.uint32(_SIGN))


def _top_k_threshold(
    keys: UInt32[Array, "rows vocab"], top_k: Int32[Array, " rows"], vocabulary: Vocabulary
) -> UInt32[Array, " rows"]:
    """Key of the k-th highest token of each row; zero where `top_k` is off."""

    def reaches_k(candidate: UInt32[Array, " rows"]) -> Bool[Array, " rows"]:
        count = jnp.sum(keys >= candidate[:, None], axis=-1, dtype=jnp.int32)
        return psum(count, vocabulary.axes) >= top_k

    with jax.named_scope("top_k"):
        return jnp.where(top_k > 0, _largest_key(reaches_k, len(keys)), 0)


def _top_p_threshold(
    keys: UInt32[Array, "rows vocab"],
    weights: Float32[Array, "rows vocab"],
    top_p: Float32[Array, " rows"],
    vocabulary: Vocabulary,
) -> UInt32[Array, " rows"]:
    """Highest key at or above which lies the share `top_p` of the weights; zero where it is off."""
    target = top_p * psum(weights.sum(axis=-1), vocabulary.axes)

    def reaches_p(candidate: UInt32[Array, " rows"]) -> Bool[Array, " rows"]:
        mass = jnp.sum(jnp.where(keys >= candidate[:, None], weights, 0), axis=-1)
        mass = psum(mass, vocabulary.axes)
        # However small p is, the most likely token stays.
        return (mass >= target) & (mass > 0)

    with jax.named_scope("top_p"):
        # At p = 1 a sum that rounds to the total would drop tokens, so it is off altogether.
        return jnp.where(top_p < 1, _largest_key(reaches_p, len(keys)), 0)


def _largest_key(
    accepts: Callable[[UInt32[Array, " rows"]], Bool[Array, " rows"]], rows: int
) -> UInt32[Array, " rows"]:
    """Largest accepted key of each row, where every key below an accepted one is accepted too."""

    def try_bit(step: Int32[Array, ""], found: UInt32[Array, " rows"]) -> UInt32[Array, " rows"]:
        candidate = found | (jnp.uint32(_SIGN) >> step.astype(jnp.uint32))
        return jnp.where(accepts(candidate), candidate, found)

    return lax.fori_loop(0, 32, try_bit, jnp.zeros(rows, jnp.uint32))
