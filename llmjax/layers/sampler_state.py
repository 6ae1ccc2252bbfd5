"""What sampling remembers of a request between steps, on the device.

Only requests with penalties, a logit bias, `min_tokens` or logits processors take a slot. Slots
are split over the sampler's batch ranks: a request's slot must lie on the rank that samples its
row, that is slots [r * n, (r + 1) * n) belong to rank r of n slots each.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float32, Int32

from llmjax.layers.vocabulary import Vocabulary
from llmjax.parallel.collectives import axis_index, island
from meshes import Rules

UNUSED, PROMPT, GENERATED = 0, 1, 2
"""What an id given to `fill_slot` is: padding, a token of the prompt, a token generated before."""

_IN_PROMPT = 1
_ONE_GENERATED = 2


class SamplerState(NamedTuple):
    """One row a slot; ids are token ids, and -1 pads them."""

    occurrences: Int32[Array, "slots vocab"]
    """Twice the times that a token was generated, plus one if it occurs in the prompt."""
    bias_ids: Int32[Array, "slots max_bias"]
    """Tokens with a logit bias."""
    bias_values: Float32[Array, "slots max_bias"]
    """What is added to their logits."""
    stop_ids: Int32[Array, "slots max_stop_ids"]
    """Tokens that are impossible before the request's minimum length."""

    @property
    def generated(self) -> Int32[Array, "slots vocab"]:
        """Times that each token was generated."""
        return self.occurrences // _ONE_GENERATED


class SlotContent(NamedTuple):
    """What one call of `fill_slot` writes, replicated."""

    slot: Int32[Array, ""]
    ids: Int32[Array, "chunk"]
    """A part of the request's tokens."""
    kinds: Int32[Array, "chunk"]
    """UNUSED, PROMPT or GENERATED, for each id; a preempted request comes back with both."""
    bias_ids: Int32[Array, "max_bias"]
    bias_values: Float32[Array, "max_bias"]
    stop_ids: Int32[Array, "max_stop_ids"]
    reset: Bool[Array, ""]
    """Whether this is the request's first part."""


def init_state(
    *, slots: int, padded_vocab_size: int, max_bias: int, max_stop_ids: int, rules: Rules
) -> SamplerState:
    """Empty slots, for `jax.jit` to build in place or `jax.eval_shape` to describe.

    Raises:
        ValueError: the slots or the vocabulary do not divide over their ranks.
    """
    for name, value, axis in (
        ("slots", slots, "sampler_requests"),
        ("padded_vocab_size", padded_vocab_size, "vocab"),
    ):
        ranks = rules.size(axis)
        if value < ranks or value % ranks:
            fitting = -(-max(value, 1) // ranks) * ranks
            raise ValueError(f"{name}={value} does not divide over {ranks} ranks: use {fitting}.")
    table, row = rules.spec("sampler_requests", "vocab"), rules.spec("sampler_requests", None)
    return SamplerState(
        occurrences=jnp.zeros((slots, padded_vocab_size), jnp.int32, out_sharding=table),
        bias_ids=jnp.full((slots, max_bias), -1, jnp.int32, out_sharding=row),
        bias_values=jnp.zeros((slots, max_bias), jnp.float32, out_sharding=row),
        stop_ids=jnp.full((slots, max_stop_ids), -1, jnp.int32, out_sharding=row),
    )


def state_specs(rules: Rules) -> SamplerState:
    """PartitionSpecs in the places of the arrays."""
    row = rules.spec("sampler_requests", None)
    return SamplerState._make((rules.spec("sampler_requests", "vocab"), row, row, row))


def fill_slot(state: SamplerState, content: SlotContent, *, rules: Rules) -> SamplerState:
    """Writes a request into its slot; its tokens come in chunks, the first of which resets it.

    Jit it with the state donated: shapes are constant, so one program serves every request.
    """
    vocabulary = Vocabulary(size=state.occurrences.shape[1], axes=rules.axes("vocab"))

    def body(state: SamplerState, content: SlotContent) -> SamplerState:
        slots, width = state.occurrences.shape
        row = local_slots(content.slot, slots, rules)
        columns = vocabulary.columns(content.ids, width)
        old = state.occurrences.at[row].get(mode="fill", fill_value=0)
        marks = jnp.zeros(width, bool)
        marks = marks.at[jnp.where(content.kinds == PROMPT, columns, width)].set(True, mode="drop")
        new = jnp.where(content.reset, 0, old) | jnp.where(marks, _IN_PROMPT, 0)
        generated = jnp.where(content.kinds == GENERATED, columns, width)
        new = new.at[generated].add(_ONE_GENERATED, mode="drop")
        return SamplerState(
            occurrences=state.occurrences.at[row].set(new, mode="drop"),
            bias_ids=state.bias_ids.at[row].set(content.bias_ids, mode="drop"),
            bias_values=state.bias_values.at[row].set(content.bias_values, mode="drop"),
            stop_ids=state.stop_ids.at[row].set(content.stop_ids, mode="drop"),
        )

    specs, whole = state_specs(rules), PartitionSpec()
    fill = island(body, in_specs=(specs, whole), out_specs=specs)
    return fill(state, content)


def local_slots(slots: Int32[Array, "*shape"], held: int, rules: Rules) -> Int32[Array, "*shape"]:
    """Slots as rows of this device's part of the state; `held`, out of range, if elsewhere."""
    rows = slots - axis_index(rules.axes("sampler_requests")) * held
    here = (slots >= 0) & (rows >= 0) & (rows < held)
    return jnp.where(here, rows, held).astype(jnp.int32)


def select_slots(state: SamplerState, rows: Int32[Array, " rows"]) -> SamplerState:
    """Each row's part of the state, empty for rows out of range. Runs inside an island."""

    def select(array: Array, empty: int) -> Array:
        return array.at[rows].get(mode="fill", fill_value=empty)

    return SamplerState(
        occurrences=select(state.occurrences, 0),
        bias_ids=select(state.bias_ids, -1),
        bias_values=select(state.bias_values, 0),
        stop_ids=select(state.stop_ids, -1),
    )


def record_tokens(
    state: SamplerState,
    rows: Int32[Array, " rows"],
    tokens: Int32[Array, " rows"],
    vocabulary: Vocabulary,
) -> SamplerState:
    """Counts one generated token for each row in range. Runs inside an island."""
    with jax.named_scope("record_tokens"):
        columns = vocabulary.columns(tokens, state.occurrences.shape[1])
        updated = state.occurrences.at[rows, columns].add(_ONE_GENERATED, mode="drop")
        return state._replace(occurrences=updated)
