"""What a request changes in its logits before a token is chosen.

Everything here runs inside an island, on logits sharded over the vocabulary.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from llmjax.layers.sampler_state import SamplerState
from llmjax.layers.vocabulary import Vocabulary
from llmjax.parallel.collectives import all_gather, own_part

Processor = Callable[
    [Float32[Array, " vocab"], Int32[Array, " vocab"], Int32[Array, ""]], Float32[Array, " vocab"]
]
"""A user's function of logits, times each token was generated and the new token's position."""

MAX_PROCESSORS = 31
"""Bits of the mask that says which processors a row uses."""


def apply_processors(
    logits: Float32[Array, "rows vocab"],
    generated: Int32[Array, "rows vocab"],
    positions: Int32[Array, " rows"],
    masks: Int32[Array, " rows"],
    processors: Sequence[Processor],
    vocabulary: Vocabulary,
) -> Float32[Array, "rows vocab"]:
    """Runs each processor on the whole vocabulary of the rows whose mask has its bit."""
    with jax.named_scope("logits_processors"):
        whole = all_gather(logits, vocabulary.axes, axis=1)
        padding = whole.shape[1] - vocabulary.size
        whole = whole[:, : vocabulary.size]
        counts = all_gather(generated, vocabulary.axes, axis=1)[:, : vocabulary.size]
        for index, process in enumerate(processors):
            processed = jax.vmap(process)(whole, counts, positions)
            whole = jnp.where((masks[:, None] >> index) & 1 == 1, processed, whole)
        whole = jnp.pad(whole, ((0, 0), (0, padding)), constant_values=-jnp.inf)
        return own_part(whole, vocabulary.axes, axis=1)


def add_bias(
    logits: Float32[Array, "rows vocab"], state: SamplerState, vocabulary: Vocabulary
) -> Float32[Array, "rows vocab"]:
    """Adds each request's bias to the logits of the tokens that it names."""
    with jax.named_scope("logit_bias"):
        rows = jnp.arange(len(logits))[:, None]
        columns = vocabulary.columns(state.bias_ids, logits.shape[1])
        biased = logits.at[rows, columns].add(state.bias_values, mode="drop")
        # An infinite bias means "this one": a finite ceiling keeps differences of logits defined.
        return jnp.minimum(biased, jnp.finfo(jnp.float32).max)


def ban_stops(
    logits: Float32[Array, "rows vocab"],
    state: SamplerState,
    too_early: Array,
    vocabulary: Vocabulary,
) -> Float32[Array, "rows vocab"]:
    """Makes the stop tokens impossible in rows below their minimum length."""
    with jax.named_scope("min_tokens"):
        rows = jnp.arange(len(logits))[:, None]
        width = logits.shape[1]
        columns = vocabulary.columns(state.stop_ids, width)
        columns = jnp.where(too_early[:, None], columns, width)
        return logits.at[rows, columns].set(-jnp.inf, mode="drop")


def penalise(
    logits: Float32[Array, "rows vocab"],
    state: SamplerState,
    *,
    repetition: Float32[Array, " rows"],
    frequency: Float32[Array, " rows"],
    presence: Float32[Array, " rows"],
) -> Float32[Array, "rows vocab"]:
    """Repetition, frequency and presence penalty, in vLLM's order.

    Repetition counts prompt and output (Keskar et al., 2019: positive logits are divided, negative
    ones multiplied), the other two the output alone (OpenAI's definition).
    """
    with jax.named_scope("penalties"):
        repetition = repetition[:, None]
        repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
        logits = jnp.where(state.occurrences > 0, repeated, logits)
        logits = logits - frequency[:, None] * state.generated
        return logits - jnp.where(state.generated > 0, presence[:, None], 0)
