"""The decoder that all families share: embedding, layers in loops, norm and head."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from llmjax.config import ModelConfig
from llmjax.layers.attention import Attention
from llmjax.layers.kv_cache import Cache, KVCache, LatentCache, Placement
from llmjax.layers.latent_attention import LatentAttention
from llmjax.layers.mlp import GatedMLP
from llmjax.layers.moe import DispatchOptions, Experts, ExpertWeights, MoE
from llmjax.layers.norm import RMSNorm
from llmjax.layers.params import Declare
from llmjax.layers.rope import RopeVariants, rope_tables
from llmjax.layers.traits import LayerTraits, stack_traits
from llmjax.models.layer_stack import Loop, stack_layers
from llmjax.parallel.head_slots import HeadSlots, assign_head_slots
from llmjax.parallel.pipeline import Held, run_stages
from llmjax.parallel.vocab import embed_tokens
from meshes import Rules

LayerLoop = Literal["scan", "unroll"]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a decoder runs; what it computes stays the same."""

    layer_loop: LayerLoop = "scan"
    """Loop over repeated layers in the compiled program, or write each of them out."""
    dispatch: DispatchOptions = DispatchOptions()
    """How tokens reach their experts."""


class Block(nnx.Module):
    """What all layers have alike: attention, and the norms around it and the feed-forward part."""

    def __init__(self, config: ModelConfig, slots: HeadSlots, *, declare: Declare):
        self.attention_norm = _declare_norm(config, declare)
        self.attention = (
            LatentAttention(config, slots.num_kv, declare=declare)
            if config.latent
            else Attention(config, slots, declare=declare)
        )
        self.post_attention_norm = _declare_norm(config, declare) if config.post_norms else None
        self.mlp_norm = _declare_norm(config, declare)
        self.post_mlp_norm = _declare_norm(config, declare) if config.post_norms else None

    def attend(
        self,
        x: Float[Array, "tokens embed"],
        cache: Cache,
        layer: Int[Array, ""],
        traits: LayerTraits,
        placement: Placement,
        rope: RopeVariants,
    ) -> tuple[Float[Array, "tokens embed"], Cache]:
        """What attention adds to the residual stream."""
        normed = self.attention_norm(x)
        # The model's cache is of the kind that its attention takes.
        attention: Any = self.attention
        out, cache = attention(normed, cache, layer, traits, placement, rope)
        return (out if self.post_attention_norm is None else self.post_attention_norm(out)), cache

    def feed_forward(
        self,
        x: Float[Array, "tokens embed"],
        part: GatedMLP | MoE,
        experts: ExpertWeights | None,
        row: Int[Array, ""],
        is_real: Bool[Array, "tokens"],
        options: DispatchOptions,
    ) -> Float[Array, "tokens embed"]:
        """The residual stream after the feed-forward part, whose experts lie in that row."""
        normed = self.mlp_norm(x)
        if isinstance(part, MoE):
            assert experts is not None
            out = part(normed, experts, row, is_real, options)
        else:
            out = part(normed)
        return x + (out if self.post_mlp_norm is None else self.post_mlp_norm(out))


class Decoder(nnx.Module):
    """A causal language model up to its logits, which the sampler takes from `head`."""

    def __init__(self, config: ModelConfig, rules: Rules, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config, self.rules = config, rules
        stack = stack_layers(config, rules)
        once = Declare(rules=rules, dtype=dtype, rngs=rngs)

        def stacked(kind: str | None = None) -> Declare:
            rows = stack.rows if kind is None else stack.rows_of_kind(kind)
            return Declare(rules=rules, dtype=dtype, rngs=rngs, layers=rows)

        vocab, embed = padded_vocab(config, rules), config.hidden_size
        self.embedding = once.param((vocab, embed), ("vocab", None))
        self.layers = Block(config, head_slots(config, rules), declare=stacked())
        self.mlp = (
            GatedMLP(
                embed,
                config.intermediate_size,
                activation=config.activation,
                bias=config.mlp_bias,
                declare=stacked("dense"),
            )
            if "dense" in stack.kinds
            else None
        )
        sparse = "experts" in stack.kinds
        self.moe = MoE(config, declare=stacked("experts")) if sparse else None
        self.experts = Experts(config, declare=stacked("experts")) if sparse else None
        self.norm = _declare_norm(config, once)
        tied = config.tie_word_embeddings
        self.output = None if tied else once.param((vocab, embed), ("vocab", None), fan_in=embed)

    @property
    def head(self) -> Float[Array, "embed vocab"]:
        """Maps the residual stream to logits."""
        table = self.embedding if self.output is None else self.output
        return table[...].T

    def __call__(
        self,
        ids: Int[Array, "tokens"],
        cache: Cache,
        placement: Placement,
        held: Held | None,
        *,
        options: RunOptions,
    ) -> tuple[Float[Array, "tokens embed"], Cache, Held | None]:
        """One tick: hidden states after the final norm, and the cache with these tokens in it.

        Args:
            ids: tokens of the micro-batch that enters.
            placement: where the tokens of each stage's micro-batch stand; stages lead.
            held: what the stages were handed in the tick before; None for one stage. The hidden
                states are those of the micro-batch that leaves.
        """
        config, rules = self.config, self.rules
        with jax.named_scope("embed"):
            x = embed_tokens(self.embedding[...], ids, rules=rules)
            x = x * jnp.asarray(config.embedding_scale, x.dtype)
        layers = stack_layers(config, rules)
        traits = stack_traits(config, layers.rows, rules)
        modules = {"block": self.layers, "dense": self.mlp, "experts": self.moe}
        split = {name: nnx.split(module) for name, module in modules.items() if module}
        weights = {name: state for name, (_, state) in split.items()}
        experts = None if self.experts is None else self.experts.weights

        def stage(stack: Any, cache: Cache, placement: Placement, x: Array) -> tuple[Array, Cache]:
            weights, experts, traits = stack
            rope = rope_tables(config, rotated_dim(config), placement.positions)
            is_real = placement.slots >= 0

            def build(name: str, row: Array) -> Any:
                return nnx.merge(split[name][0], _take_row(weights[name], row))

            def run_layer(x: Array, cache: Cache, kind: str, layer: Array, row: Array) -> Any:
                block, own = build("block", layer), _take_row(traits, layer)
                with jax.named_scope("attention"):
                    attended, cache = block.attend(x, cache, layer, own, placement, rope)
                with jax.named_scope("mlp"):
                    new = block.feed_forward(
                        x + attended, build(kind, row), experts, row, is_real, options.dispatch
                    )
                return (new if own.active is None else jnp.where(own.active, new, x)), cache

            def run_loop(loop: Loop, x: Array, cache: Cache) -> tuple[Array, Cache]:
                def run_period(carry: tuple[Array, Array, Cache]) -> tuple[Array, Array, Cache]:
                    repeat, x, cache = carry
                    for offset, kind in enumerate(loop.kinds):
                        layer = _advance(loop.first + offset, len(loop.kinds), repeat)
                        row = _advance(*loop.row(offset), repeat)
                        x, cache = run_layer(x, cache, kind, layer, row)
                    return repeat + 1, x, cache

                carry = (jnp.int32(0), x, cache)
                if options.layer_loop == "unroll":
                    for _ in range(loop.repeats):
                        carry = run_period(carry)
                else:
                    carry = lax.while_loop(partial(_lasts, loop.repeats), run_period, carry)
                return carry[1:]

            for loop in layers.loops:
                x, cache = run_loop(loop, x, cache)
            return x, cache

        stack = (weights, experts, traits)
        x, cache, held = run_stages(stage, stack, cache, placement, x, held, rules=rules)
        with jax.named_scope("final_norm"):
            return self.norm(x), cache, held


def head_slots(config: ModelConfig, rules: Rules) -> HeadSlots:
    """Head slots of a model on a plan; in latent attention each head has its own slot."""
    if config.latent:
        return assign_head_slots(config.num_heads, config.num_heads, rules.size("heads"))
    return assign_head_slots(config.num_heads, config.num_kv_heads, rules.size("kv_heads"))


def padded_vocab(config: ModelConfig, rules: Rules) -> int:
    """Vocabulary entries, padded to divide over the ranks that hold them."""
    return config.vocab_size + -config.vocab_size % rules.size("vocab")


def rotated_dim(config: ModelConfig) -> int:
    """Features of a head that may be rotated."""
    return config.latent.rope_dim if config.latent else config.head_dim


def cache_shapes(config: ModelConfig, rules: Rules, *, pages: int, page_size: int) -> Any:
    """The model's cache with shapes in the places of arrays; `pages` are those of all ranks."""
    common = (len(stack_layers(config, rules).rows), pages, page_size)
    if config.latent:
        return LatentCache._make([(*common, 1, config.latent.cached_dim)])
    return KVCache._make([(*common, head_slots(config, rules).num_kv, config.head_dim)] * 2)


def _declare_norm(config: ModelConfig, declare: Declare) -> RMSNorm:
    return RMSNorm(
        config.hidden_size, eps=config.norm_eps, offset=config.norm_offset, declare=declare
    )


def _take_row(stack: Any, row: Array) -> Any:
    # XLA reads a layer's weights in place where it sees that the row is the loop's own counter: it
    # must not pass a test for negative indices, and scan and fori_loop would add a second counter.
    take = partial(
        lax.dynamic_index_in_dim, index=row, keepdims=False, allow_negative_indices=False
    )
    return jax.tree.map(take, stack)


def _lasts(repeats: int, carry: tuple[Array, Array, Cache]) -> Array:
    return carry[0] < repeats


def _advance(first: int, step: int, repeat: Array) -> Array:
    return repeat if (first, step) == (0, 1) else first + step * repeat
