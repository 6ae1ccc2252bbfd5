"""The decoder that all families share: embedding, a stack of like layers, norm and head."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llmjax.config import ModelConfig
from llmjax.layers.attention import Attention
from llmjax.layers.kv_cache import KVCache, Placement
from llmjax.layers.mlp import GatedMLP
from llmjax.layers.norm import RMSNorm
from llmjax.layers.params import Declare
from llmjax.layers.rope import Rope, RopeTables
from llmjax.parallel.head_slots import HeadSlots, assign_head_slots
from llmjax.parallel.pipeline import run_stage
from llmjax.parallel.vocab import embed_tokens
from meshes import Rules

LayerLoop = Literal["scan", "unroll"]


class DecoderLayer(nnx.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, slots: HeadSlots, *, declare: Declare):
        embed, eps = config.hidden_size, config.norm_eps
        self.attention_norm = RMSNorm(embed, eps=eps, declare=declare)
        self.attention = Attention(config, slots, declare=declare)
        self.mlp_norm = RMSNorm(embed, eps=eps, declare=declare)
        self.mlp = GatedMLP(config, declare=declare)

    def __call__(
        self,
        x: Float[Array, "tokens embed"],
        cache: KVCache,
        layer: Int[Array, ""],
        window: Int[Array, ""],
        placement: Placement,
        rope: RopeTables,
    ) -> tuple[Float[Array, "tokens embed"], KVCache]:
        with jax.named_scope("attention"):
            attended, cache = self.attention(
                self.attention_norm(x), cache, layer, window, placement, rope
            )
            x = x + attended
        with jax.named_scope("mlp"):
            return x + self.mlp(self.mlp_norm(x)), cache


class Decoder(nnx.Module):
    """A causal language model up to its logits, which the sampler takes from `head`."""

    def __init__(self, config: ModelConfig, rules: Rules, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config, self.rules = config, rules
        slots = head_slots(config, rules)
        once = Declare(rules=rules, dtype=dtype, rngs=rngs)
        stack = Declare(rules=rules, dtype=dtype, rngs=rngs, num_layers=config.num_layers)
        vocab, embed = padded_vocab(config, rules), config.hidden_size
        self.rope = Rope(config.rope, head_dim=config.head_dim)
        self.embedding = once.param((vocab, embed), ("vocab", None))
        self.layers = DecoderLayer(config, slots, declare=stack)
        self.norm = RMSNorm(embed, eps=config.norm_eps, declare=once)
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
        cache: KVCache,
        placement: Placement,
        *,
        layer_loop: LayerLoop,
    ) -> tuple[Float[Array, "tokens embed"], KVCache]:
        """Hidden states after the final norm, and the cache with these tokens in it."""
        with jax.named_scope("embed"):
            x = embed_tokens(self.embedding[...], ids, rules=self.rules)
        rope = self.rope.tables(placement.positions)
        graph, weights = nnx.split(self.layers)
        count = self.config.num_layers
        windows = jnp.array(self.config.windows or (0,) * count, jnp.int32)
        windows = jax.sharding.reshard(windows, self.rules.spec("layers"))

        def stage(stack, cache: KVCache, inputs):
            weights, windows = stack
            x, placement, rope = inputs

            def run(carry, one):
                weights, layer, window = one
                x, cache = carry
                run_layer = nnx.merge(graph, weights)
                return run_layer(x, cache, layer, window, placement, rope), None

            stacked = (weights, jnp.arange(len(windows)), windows)
            # Unrolled, XLA reads each layer's weights in place; in a scan it may copy them first.
            unroll = len(windows) if layer_loop == "unroll" else 1
            return jax.lax.scan(run, (x, cache), stacked, unroll=unroll)[0]

        x, cache = run_stage(stage, (weights, windows), cache, (x, placement, rope))
        with jax.named_scope("final_norm"):
            return self.norm(x), cache


def head_slots(config: ModelConfig, rules: Rules) -> HeadSlots:
    """Head slots of a model on a plan."""
    return assign_head_slots(config.num_heads, config.num_kv_heads, rules.size("kv_heads"))


def padded_vocab(config: ModelConfig, rules: Rules) -> int:
    """Vocabulary entries, padded to divide over the ranks that hold them."""
    return config.vocab_size + -config.vocab_size % rules.size("vocab")
