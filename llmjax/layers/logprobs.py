"""Log-probabilities of tokens under the model's own, unmodified logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from llmjax.layers.vocabulary import Vocabulary, compute_logits, find_max, find_top, pick
from llmjax.parallel.collectives import all_gather, island, own_part, pmax, psum
from meshes import Rules

_ROWS_AT_ONCE = 256


class Logprobs(NamedTuple):
    """One entry a row; zeros where nobody asked."""

    logprob: Float32[Array, " rows"]
    """Log-probability of the row's token."""
    rank: Int32[Array, " rows"]
    """One more than the number of likelier tokens."""
    top_ids: Int32[Array, "rows max_logprobs"]
    """The likeliest tokens, in falling order."""
    top_logprobs: Float32[Array, "rows max_logprobs"]
    """Their log-probabilities."""


def compute_logprobs(
    logits: Float32[Array, "rows vocab"],
    tokens: Int32[Array, " rows"],
    count: int,
    vocabulary: Vocabulary,
) -> Logprobs:
    """Log-probability and rank of each row's token, and the `count` likeliest tokens.

    Runs inside an island, on logits sharded over the vocabulary.
    """
    with jax.named_scope("logprobs"):
        peak = find_max(logits, vocabulary)
        total = psum(jnp.exp(logits - peak[:, None]).sum(axis=-1), vocabulary.axes)
        normaliser = jnp.log(total)
        chosen = pick(logits, tokens, vocabulary)
        likelier = jnp.sum(logits > chosen[:, None], axis=-1, dtype=jnp.int32)
        top, top_ids = find_top(logits, count, vocabulary)
        return Logprobs(
            logprob=(chosen - peak) - normaliser,
            rank=1 + psum(likelier, vocabulary.axes),
            top_ids=top_ids,
            top_logprobs=(top - peak[:, None]) - normaliser[:, None],
        )


def no_logprobs(rows: int, count: int) -> Logprobs:
    """Zeros in the place of log-probabilities that nobody asked for."""
    return Logprobs(
        logprob=jnp.zeros(rows, jnp.float32),
        rank=jnp.zeros(rows, jnp.int32),
        top_ids=jnp.zeros((rows, count), jnp.int32),
        top_logprobs=jnp.zeros((rows, count), jnp.float32),
    )


def score(
    hidden: Float[Array, "rows embed"],
    head: Float[Array, "embed vocab"],
    targets: Int32[Array, " rows"],
    *,
    rules: Rules,
    vocab_size: int,
    max_logprobs: int,
    soft_cap: float | None = None,
    axis: str = "tokens",
) -> Logprobs:
    """Log-probabilities of given tokens, such as a prompt's.

    `targets` holds the token that follows each row, -1 where nothing is asked; a step in which
    all are -1 computes nothing. Rows lie on the logical axis `axis`, and so do the results.
    """
    check_max_logprobs(max_logprobs, vocab_size)
    vocabulary = Vocabulary(size=vocab_size, axes=rules.axes("vocab"), soft_cap=soft_cap)
    shared = tuple(name for name in rules.axes(axis) if name in vocabulary.axes)

    def body(
        hidden: Float[Array, "_ embed"], head: Float[Array, "embed _"], targets: Int32[Array, " _"]
    ) -> Logprobs:
        hidden, targets = all_gather(hidden, shared), all_gather(targets, shared)
        asked = pmax(jnp.any(targets >= 0).astype(jnp.int32), rules.axes(axis)) > 0

        def score_all() -> Logprobs:
            return _score_in_parts(hidden, head, targets, max_logprobs, vocabulary)

        def skip() -> Logprobs:
            return no_logprobs(len(targets), max_logprobs)

        scores = lax.cond(asked, score_all, skip)
        return Logprobs(*(own_part(field, shared) for field in scores))

    rows = rules.spec(axis)
    in_specs = (rules.spec(axis, None), rules.spec(None, "vocab"), rows)
    return island(body, in_specs=in_specs, out_specs=rows)(hidden, head, targets)


def check_max_logprobs(max_logprobs: int, vocab_size: int) -> None:
    """Raises ValueError where more alternatives are asked for than there are tokens."""
    if not 0 <= max_logprobs <= vocab_size:
        raise ValueError(
            f"max_logprobs={max_logprobs} does not fit a vocabulary of {vocab_size} tokens: "
            f"use 0 to {vocab_size}."
        )


def _score_in_parts(
    hidden: Float[Array, "rows embed"],
    head: Float[Array, "embed vocab"],
    targets: Int32[Array, " rows"],
    count: int,
    vocabulary: Vocabulary,
) -> Logprobs:
    # The logits of a whole prompt would take gigabytes, so a few rows go at a time.
    rows = len(targets)
    size = min(rows, _ROWS_AT_ONCE)
    padding = -rows % size
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, size, hidden.shape[-1])
    targets = jnp.pad(targets, (0, padding)).reshape(-1, size)

    def score_part(part: tuple[Float[Array, "size embed"], Int32[Array, " size"]]) -> Logprobs:
        logits = compute_logits(part[0], head, vocabulary)
        return compute_logprobs(logits, part[1], count, vocabulary)

    parts = lax.map(score_part, (hidden, targets))
    return Logprobs(*(jax.lax.collapse(field, 0, 2)[:rows] for field in parts))
