"""From the last hidden states to tokens, on a sharded vocabulary, exact on every path.

Order: raw logits (whose log-probabilities are reported) -> processors -> bias -> minimum length
-> penalties -> temperature -> min-p, top-k -> top-p over the rest -> one draw by Gumbel-max.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt32

from llmjax.layers.logit_adjustments import (
    MAX_PROCESSORS,
    Processor,
    add_bias,
    apply_processors,
    ban_stops,
    penalise,
)
from llmjax.layers.logprobs import Logprobs, check_max_logprobs, compute_logprobs, no_logprobs
from llmjax.layers.noise import gumbel
from llmjax.layers.sampler_state import (
    SamplerState,
    local_slots,
    record_tokens,
    select_slots,
    state_specs,
)
from llmjax.layers.truncation import find_kept
from llmjax.layers.vocabulary import Vocabulary, compute_logits, find_argmax, find_max
from llmjax.parallel.collectives import Axes, all_gather, island, pmax
from meshes import Rules

GREEDY_BELOW = 1e-5
"""Temperatures below this take the most likely token, as in vLLM."""


class SampleRows(NamedTuple):
    """How each row of the batch is sampled; arrays of one entry a row."""

    valid: Bool[Array, " rows"]
    """Whether a token is sampled here at all."""
    slot: Int32[Array, " rows"]
    """The request's slot of `SamplerState`; -1 for none."""
    uses_state: Bool[Array, " rows"]
    """Whether penalties, bias, `min_position` or processors apply; they need a slot."""
    position: Int32[Array, " rows"]
    """Position of the token being sampled."""
    min_position: Int32[Array, " rows"]
    """Stop tokens are impossible at positions below this."""
    seed: UInt32[Array, " rows"]
    """Same seed and position, same noise."""
    temperature: Float32[Array, " rows"]
    """Divides the logits; 0 takes the most likely token."""
    top_k: Int32[Array, " rows"]
    """Keep this many tokens; 0 keeps all."""
    top_p: Float32[Array, " rows"]
    """Keep the likeliest tokens that reach this probability; 1 keeps all."""
    min_p: Float32[Array, " rows"]
    """Keep tokens at least this probable, relative to the likeliest; 0 keeps all."""
    repetition_penalty: Float32[Array, " rows"]
    presence_penalty: Float32[Array, " rows"]
    frequency_penalty: Float32[Array, " rows"]
    num_logprobs: Int32[Array, " rows"]
    """Alternatives whose log-probabilities are wanted; 0: the token's alone; -1: none."""
    processors: Int32[Array, " rows"]
    """Bit i: processor i applies."""


class Sampled(NamedTuple):
    """One entry a row; log-probabilities are zeros in a step where nobody asked for them."""

    tokens: Int32[Array, " rows"]
    logprob: Float32[Array, " rows"]
    """Log-probability of the token under the unmodified logits."""
    rank: Int32[Array, " rows"]
    """One more than the number of likelier tokens."""
    top_ids: Int32[Array, "rows max_logprobs"]
    """The likeliest tokens, in falling order."""
    top_logprobs: Float32[Array, "rows max_logprobs"]
    """Their log-probabilities."""


class _Needs(NamedTuple):
    """Whether any row of the whole batch needs a part of the sampler: the same on every device."""

    state: Array
    processors: Array
    noise: Array
    top_k: Array
    top_p: Array
    logprobs: Array


def sample(
    hidden: Float[Array, "rows embed"],
    head: Float[Array, "embed vocab"],
    rows: SampleRows,
    state: SamplerState,
    *,
    rules: Rules,
    vocab_size: int,
    max_logprobs: int = 0,
    processors: Sequence[Processor] = (),
    soft_cap: float | None = None,
) -> tuple[Sampled, SamplerState]:
    """Samples one token for each row and counts it in the request's slot.

    `hidden` lies on "requests" and `head` on "vocab", padded past `vocab_size`; `rows` and the
    results lie on "sampler_requests". Parts that no row needs are skipped at run time.

    Raises:
        ValueError: more log-probabilities than tokens, or more processors than bits of a mask.
    """
    check_max_logprobs(max_logprobs, vocab_size)
    if len(processors) > MAX_PROCESSORS:
        raise ValueError(
            f"{len(processors)} logits processors are too many: use at most {MAX_PROCESSORS}."
        )
    vocabulary = Vocabulary(size=vocab_size, axes=rules.axes("vocab"), soft_cap=soft_cap)
    shared = tuple(axis for axis in rules.axes("requests") if axis in vocabulary.axes)

    def body(
        hidden: Float[Array, "_ embed"],
        head: Float[Array, "embed _"],
        rows: SampleRows,
        state: SamplerState,
    ) -> tuple[Sampled, SamplerState]:
        raw = compute_logits(all_gather(hidden, shared), head, vocabulary)
        needs = _find_needs(rows, rules.axes("sampler_requests"))
        slots = local_slots(rows.slot, len(state.occurrences), rules)
        slots = jnp.where(rows.valid & rows.uses_state, slots, len(state.occurrences))

        def choose_likeliest() -> Int32[Array, " rows"]:
            return find_argmax(raw, vocabulary)

        def adjust_and_draw() -> Int32[Array, " rows"]:
            logits = _adjust(raw, rows, slots, state, needs, processors, vocabulary)
            return _draw(logits, rows, needs, vocabulary)

        # An all-greedy batch takes this one branch and pays for nothing else.
        tokens = lax.cond(
            needs.state | needs.processors | needs.noise, adjust_and_draw, choose_likeliest
        )

        def report() -> Logprobs:
            return compute_logprobs(raw, tokens, max_logprobs, vocabulary)

        def skip() -> Logprobs:
            return no_logprobs(len(raw), max_logprobs)

        logprobs = lax.cond(needs.logprobs, report, skip)
        return Sampled(tokens, *logprobs), record_tokens(state, slots, tokens, vocabulary)

    row, specs = rules.spec("sampler_requests"), state_specs(rules)
    in_specs = (rules.spec("requests", None), rules.spec(None, "vocab"), row, specs)
    with jax.named_scope("sample"):
        return island(body, in_specs=in_specs, out_specs=(row, specs))(hidden, head, rows, state)


def _find_needs(rows: SampleRows, axes: Axes) -> _Needs:
    random = rows.valid & (rows.temperature >= GREEDY_BELOW)
    needs = _Needs(
        state=rows.valid & rows.uses_state,
        processors=rows.valid & (rows.processors != 0),
        noise=random,
        top_k=random & (rows.top_k > 0),
        top_p=random & (rows.top_p < 1),
        logprobs=rows.valid & (rows.num_logprobs >= 0),
    )
    # Branches hold collectives: devices that took different ones would wait for each other.
    anywhere = pmax(jnp.stack(needs).any(axis=1).astype(jnp.int32), axes)
    return _Needs(*(anywhere > 0))


def _adjust(
    raw: Float32[Array, "rows vocab"],
    rows: SampleRows,
    slots: Int32[Array, " rows"],
    state: SamplerState,
    needs: _Needs,
    processors: Sequence[Processor],
    vocabulary: Vocabulary,
) -> Float32[Array, "rows vocab"]:
    def process() -> Float32[Array, "rows vocab"]:
        generated = select_slots(state, slots).generated
        return apply_processors(
            raw, generated, rows.position, rows.processors, processors, vocabulary
        )

    def keep() -> Float32[Array, "rows vocab"]:
        return raw

    logits = lax.cond(needs.processors, process, keep) if processors else raw

    def apply_state() -> Float32[Array, "rows vocab"]:
        selected = select_slots(state, slots)
        adjusted = add_bias(logits, selected, vocabulary)
        too_early = rows.position < rows.min_position
        adjusted = ban_stops(adjusted, selected, too_early, vocabulary)
        return penalise(
            adjusted,
            selected,
            repetition=rows.repetition_penalty,
            frequency=rows.frequency_penalty,
            presence=rows.presence_penalty,
        )

    def keep_logits() -> Float32[Array, "rows vocab"]:
        return logits

    return lax.cond(needs.state, apply_state, keep_logits)


def _draw(
    logits: Float32[Array, "rows vocab"], rows: SampleRows, needs: _Needs, vocabulary: Vocabulary
) -> Int32[Array, " rows"]:
    """Tokens of all rows, greedy or random: the argmax of logits plus noise (Gumbel-max)."""

    def add_noise() -> Float32[Array, "rows vocab"]:
        random = rows.temperature >= GREEDY_BELOW
        peak = find_max(logits, vocabulary)
        # Differences to the highest logit: they neither overflow at low temperatures nor drown
        # the noise in rounding. A row in which nothing is possible has no highest logit.
        peak = jnp.where(jnp.isfinite(peak), peak, 0)
        temperature = jnp.where(random, rows.temperature, 1)
        scaled = (logits - peak[:, None]) / temperature[:, None]
        kept = find_kept(
            logits,
            scaled,
            top_k=rows.top_k,
            top_p=rows.top_p,
            min_p=rows.min_p,
            any_top_k=needs.top_k,
            any_top_p=needs.top_p,
            vocabulary=vocabulary,
        )
        noise = gumbel(rows.seed, rows.position, vocabulary.ids(logits.shape[1]))
        noisy = jnp.where(kept, scaled + noise, -jnp.inf)
        return jnp.where(random[:, None], noisy, logits)

    def keep() -> Float32[Array, "rows vocab"]:
        return logits

    return find_argmax(lax.cond(needs.noise, add_noise, keep), vocabulary)
