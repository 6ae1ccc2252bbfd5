"""The step: one jitted function a bucket, from packed integers to sampled tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from llmjax.config import LogitsProcessor
from llmjax.engine.batch import FLOAT_COLUMNS, Bucket, split_fields
from llmjax.layers.kv_cache import Cache, Placement, placement_specs
from llmjax.layers.logprobs import Logprobs, score
from llmjax.layers.sampler import Sampled, SampleRows, sample
from llmjax.layers.sampler_state import SamplerState
from llmjax.layers.vocabulary import cap_softly
from llmjax.models.decoder import Decoder, RunOptions
from llmjax.parallel.collectives import all_gather, axis_index, island, pmax
from llmjax.parallel.context import TokenDeal, restore, select_tokens
from llmjax.parallel.pipeline import Held, count_stage_tokens
from llmjax.weights.model import Weights
from meshes import Rules


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class EngineState:
    """Everything that stays on the devices between steps; each step is given it for good."""

    cache: Cache
    """Keys and values."""
    last_tokens: Int[Array, "ranks slots"]
    """The token that each slot sampled last."""
    held: Held | None
    """What each pipeline stage was handed in the tick before; None for one stage."""
    sampler: SamplerState
    """Token counts, biases and stop tokens of the slots that need them."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """What the host reads, replicated; one entry a row of every batch rank."""

    sampled: Sampled
    """Tokens and, where asked for, log-probabilities."""
    prompt: Logprobs | None
    """Log-probabilities of the prompts' next tokens; None in a bucket without prefill."""
    stage_tokens: Int[Array, "stages"] | None
    """Tokens that each pipeline stage computed; None for one stage, which the host counts."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StepInput:
    """The packed integers, unpacked and laid on the mesh."""

    ids: Int[Array, "tokens"]
    """Of the micro-batch that enters; everything else but `placement` is of the one that leaves."""
    targets: Int[Array, "tokens"]
    placement: Placement
    """Of the micro-batch at each stage."""
    sample_token: Int[Array, "rows"]
    """Token of the own batch rank whose hidden state each row samples from."""
    sampling: Int[Array, "rows columns"]
    """How each row samples: the fields of `SampleRows` as integers."""


@dataclass(frozen=True, kw_only=True)
class StepMaker:
    """What the steps of one engine have in common."""

    graph: nnx.GraphDef
    """The decoder without its weights."""
    abstract: nnx.State
    """Shapes of the decoder's weights."""
    rules: Rules
    vocab_size: int
    soft_cap: float | None
    """Bound of the logits, where the model has one."""
    max_logprobs: int
    processors: Sequence[LogitsProcessor]
    options: RunOptions

    def decoder(self, weights: Weights) -> Decoder:
        """The decoder with these weights."""
        state = jax.tree.map(_identity, self.abstract)
        nnx.replace_by_pure_dict(state, weights)
        return nnx.merge(self.graph, state)

    def make(self, bucket: Bucket) -> Callable[..., tuple[StepOutput, EngineState]]:
        """The step of a bucket: (weights, state, packed) -> (output, state)."""

        def step(
            weights: Weights, state: EngineState, packed: Int[Array, "stages ranks numbers"]
        ) -> tuple[StepOutput, EngineState]:
            decoder = self.decoder(weights)
            inputs = unpack(packed, state.last_tokens, bucket, rules=self.rules)
            hidden, cache, held = decoder(
                inputs.ids, state.cache, inputs.placement, state.held, options=self.options
            )
            rows = read_sampling(inputs.sampling, rules=self.rules)
            tokens = deal_tokens(bucket, self.rules)
            sampled, sampler = sample(
                select_tokens(hidden, inputs.sample_token, tokens, rules=self.rules),
                decoder.head,
                rows,
                state.sampler,
                rules=self.rules,
                vocab_size=self.vocab_size,
                max_logprobs=self.max_logprobs,
                processors=self.processors,
                soft_cap=self.soft_cap,
            )
            prompt = None
            if bucket.prefill_tokens:
                prompt = score(
                    hidden,
                    decoder.head,
                    inputs.targets,
                    rules=self.rules,
                    vocab_size=self.vocab_size,
                    max_logprobs=self.max_logprobs,
                    soft_cap=self.soft_cap,
                )
                prompt = jax.tree.map(partial(restore, tokens=tokens, rules=self.rules), prompt)
            counted = count_stage_tokens(inputs.placement.slots >= 0, rules=self.rules)
            # Every process reads the tokens, so that all of them schedule alike.
            output = StepOutput(sampled=sampled, prompt=prompt, stage_tokens=counted)
            output = jax.tree.map(replicate, output)
            last = remember_tokens(state.last_tokens, output.sampled.tokens, rows, rules=self.rules)
            state = replace(state, cache=cache, held=held, last_tokens=last, sampler=sampler)
            return output, state

        return step

    def make_logits(
        self, bucket: Bucket, empty_state: Callable[[], EngineState]
    ) -> Callable[..., Float[Array, "tokens vocab"]]:
        """Logits of the first batch rank's prefill tokens: (weights, packed) -> logits."""

        def compute(weights: Weights, packed: Int[Array, "stages ranks numbers"]) -> Array:
            decoder, state = self.decoder(weights), empty_state()
            inputs = unpack(packed, state.last_tokens, bucket, rules=self.rules)
            hidden, cache, held = jnp.zeros(()), state.cache, state.held
            # All stages run the same tokens; those of the last tick have passed them all.
            for _ in range(len(packed)):
                hidden, cache, held = decoder(
                    inputs.ids, cache, inputs.placement, held, options=self.options
                )
            hidden = restore(hidden, deal_tokens(bucket, self.rules), rules=self.rules)
            prefilled = replicate(hidden)[bucket.decodes : bucket.tokens]
            logits = jnp.einsum(
                "te,ev->tv",
                prefilled,
                decoder.head,
                out_sharding=self.rules.spec(None, "vocab"),
                preferred_element_type=jnp.float32,
            )
            logits = replicate(logits)[:, : self.vocab_size]
            return logits if self.soft_cap is None else cap_softly(logits, self.soft_cap)

        return compute


def unpack(
    packed: Int[Array, "stages ranks numbers"],
    last_tokens: Int[Array, "ranks slots"],
    bucket: Bucket,
    *,
    rules: Rules,
) -> StepInput:
    """Reads each batch rank's row, and takes from the device the tokens that the host lacks.

    The micro-batch that enters leads the stages, the one that leaves is the last.
    """
    stages, context = rules.axes("layers"), rules.axes("context")
    tokens = deal_tokens(bucket, rules)

    def body(packed: Array, last_tokens: Array) -> StepInput:
        entering, leaving = (split_fields(packed[stage, 0], bucket) for stage in (0, -1))
        own = split_fields(packed[axis_index(stages), 0], bucket)
        source = entering["token_source"]
        newest = last_tokens[0, jnp.maximum(source, 0)]
        decode_ids = jnp.where(source >= 0, newest, entering["ids"][: bucket.decodes])
        ids = jnp.concatenate([decode_ids, entering["ids"][bucket.decodes :]])
        unscored = jnp.full(bucket.decodes, -1, jnp.int32)
        targets = jnp.concatenate([unscored, leaving["targets"]])
        take = partial(tokens.take, rank=axis_index(context))
        return StepInput(
            ids=take(ids),
            targets=take(targets),
            placement=Placement(
                positions=take(own["positions"])[None],
                slots=take(own["cache_slots"])[None],
                all_positions=own["positions"][None, None],
                all_slots=own["cache_slots"][None, None],
                has_context=_any_has_context(packed[:, 0], bucket, rules)[None, None],
                page_table=own["page_table"][None, None],
                lengths=own["lengths"][None, None],
                prefill_start=own["prefill_start"][None, None],
            ),
            sample_token=leaving["sample_token"],
            sampling=leaving["sampling"],
        )

    # Specs stand in the places of arrays, which type checkers cannot know.
    by_token: Any = rules.spec("tokens")
    ranks: Any = rules.spec("requests")
    per_rank: Any = rules.spec("requests", None)
    specs = StepInput(
        ids=by_token,
        targets=by_token,
        placement=placement_specs(rules, by_stage=True),
        sample_token=ranks,
        sampling=per_rank,
    )
    with jax.named_scope("unpack"):
        return island(
            body, in_specs=(rules.spec(None, "requests", None), per_rank), out_specs=specs
        )(packed, last_tokens)


def deal_tokens(bucket: Bucket, rules: Rules) -> TokenDeal:
    """How the tokens of a step lie on the context ranks of a batch rank."""
    return TokenDeal(bucket.decodes, bucket.prefill_tokens, rules.size("context"))


def _any_has_context(
    stages: Int[Array, "stages numbers"], bucket: Bucket, rules: Rules
) -> Bool[Array, ""]:
    """Whether any prefill has something cached; all devices get the same answer."""
    if rules.size("context") == 1:
        return jnp.bool_(False)
    found = jnp.int32(0)
    for packed in stages:
        fields = split_fields(packed, bucket)
        starts, lengths = fields["prefill_start"], fields["lengths"][bucket.decodes :]
        found |= jnp.any(lengths > starts[1:] - starts[:-1])
    return pmax(found, rules.axes("requests")) > 0


def read_sampling(columns: Int[Array, "rows columns"], *, rules: Rules) -> SampleRows:
    """The rows' sampling parameters, gathered in one piece to where the sampler wants them."""
    gathered = tuple(
        axis for axis in rules.axes("requests") if axis not in rules.axes("sampler_requests")
    )

    def body(columns: Array) -> SampleRows:
        columns = all_gather(columns, gathered)
        values = []
        for index, name in enumerate(SampleRows._fields):
            column = columns[:, index]
            if name in FLOAT_COLUMNS:
                column = lax.bitcast_convert_type(column, jnp.float32)
            elif name in ("valid", "uses_state"):
                column = column != 0
            elif name == "seed":
                column = lax.bitcast_convert_type(column, jnp.uint32)
            values.append(column)
        return SampleRows(*values)

    return island(
        body,
        in_specs=rules.spec("requests", None),
        out_specs=SampleRows._make(rules.spec("sampler_requests") for _ in SampleRows._fields),
    )(columns)


def remember_tokens(
    last_tokens: Int[Array, "ranks slots"],
    tokens: Int[Array, "rows"],
    rows: SampleRows,
    *,
    rules: Rules,
) -> Int[Array, "ranks slots"]:
    """Stores each sampled token at its slot; slots count over all batch ranks."""
    ranks, slots = last_tokens.shape
    per_rank = rules.spec("requests", None)

    def body(last: Array, tokens: Array, valid: Array, slot: Array) -> Array:
        mine = slot - axis_index(rules.axes("requests")) * slots
        held = valid & (mine >= 0) & (mine < slots)
        return last.at[0, jnp.where(held, mine, slots)].set(tokens, mode="drop")

    row = rules.spec("requests")
    valid, slot, tokens = (jax.sharding.reshard(x, row) for x in (rows.valid, rows.slot, tokens))
    return island(body, in_specs=(per_rank, row, row, row), out_specs=per_rank)(
        last_tokens, tokens, valid, slot
    )


def replicate(x: Array) -> Array:
    """The whole array on every device."""
    return jax.sharding.reshard(x, PartitionSpec())


def _identity(x: Any) -> Any:
    return x
