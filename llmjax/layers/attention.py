"""Grouped-query attention over the paged cache."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llmjax.config import ModelConfig
from llmjax.layers.cached_attention import Scores, attend
from llmjax.layers.kv_cache import KVCache, Placement
from llmjax.layers.norm import RMSNorm, unit_norm
from llmjax.layers.params import Declare
from llmjax.layers.rope import ROPES, RopeVariants, apply_rope, select_rope
from llmjax.layers.traits import LayerTraits
from llmjax.parallel.head_slots import HeadSlots


class Attention(nnx.Module):
    """Attention with one product for queries, keys and values, laid out by key/value slot."""

    def __init__(self, config: ModelConfig, slots: HeadSlots, *, declare: Declare):
        embed, head_dim, group = config.hidden_size, config.head_dim, slots.group
        fused, per_slot = (slots.num_kv, group + 2, head_dim), ("kv_heads", None, None)
        self.config, self.rules, self.group = config, declare.rules, group
        self.scores = Scores(
            scale=config.attention_scale or head_dim**-0.5, soft_cap=config.attention_soft_cap
        )
        self.qkv = declare.param((embed, *fused), (None, *per_slot), fan_in=embed)
        self.out = declare.param(
            (slots.num_kv, group, head_dim, embed),
            (*per_slot, None),
            fan_in=config.num_heads * head_dim,
        )
        self.qkv_bias = declare.param(fused, per_slot, init="zeros") if config.qkv_bias else None
        self.out_bias = (
            declare.param((embed,), (None,), init="zeros") if config.output_bias else None
        )
        self.sinks = (
            declare.param((slots.num_kv, group), ("kv_heads", None), init="zeros")
            if config.sinks
            else None
        )
        self.q_norm = self._declare_norm(declare) if config.qk_norm else None
        self.k_norm = self._declare_norm(declare) if config.qk_norm else None

    def __call__(
        self,
        x: Float[Array, "tokens embed"],
        cache: KVCache,
        layer: Int[Array, ""],
        traits: LayerTraits,
        placement: Placement,
        rope: RopeVariants,
    ) -> tuple[Float[Array, "tokens embed"], KVCache]:
        spec = self.rules.spec
        heads = spec("tokens", "kv_heads", None, None)
        qkv = jnp.einsum("te,ekgd->tkgd", x, self.qkv[...], out_sharding=heads)
        if self.qkv_bias is not None:
            qkv = qkv + self.qkv_bias[...]
        q, k, v = qkv[:, :, : self.group], qkv[:, :, self.group], qkv[:, :, self.group + 1]
        q, k = self._place(q, k, traits, placement, rope)
        attended, cache = attend(
            q,
            (k, v),
            cache,
            layer,
            traits,
            placement,
            scores=self.scores,
            head_axes=("kv_heads", None),
            sinks=None if self.sinks is None else self.sinks[...],
            rules=self.rules,
        )
        out = jnp.einsum(
            "tkgd,kgde->te", attended, self.out[...], out_sharding=spec("tokens", None)
        )
        return (out if self.out_bias is None else out + self.out_bias[...]), cache

    def _place(
        self,
        q: Float[Array, "tokens kv_heads group head_dim"],
        k: Float[Array, "tokens kv_heads head_dim"],
        traits: LayerTraits,
        placement: Placement,
        rope: RopeVariants,
    ) -> tuple[
        Float[Array, "tokens kv_heads group head_dim"], Float[Array, "tokens kv_heads head_dim"]
    ]:
        """Norms of queries and keys, and what makes them depend on their positions."""
        config = self.config
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        tables, interleaved = select_rope(rope, traits.rope), config.rope_interleaved
        q = apply_rope(q, tables, interleaved=interleaved)
        k = apply_rope(k, tables, interleaved=interleaved)
        has_rope = True if traits.rope is None else traits.rope != ROPES.index("none")
        if config.qk_unit_norm:
            q = jnp.where(has_rope, unit_norm(q, eps=config.norm_eps), q)
            k = jnp.where(has_rope, unit_norm(k, eps=config.norm_eps), k)
        if config.temperature_tuning is not None:
            tuning = config.temperature_tuning
            steps = jnp.floor((placement.positions + 1.0) / tuning.floor_scale)
            factor = jnp.where(has_rope, 1.0, jnp.log1p(steps) * tuning.scale + 1.0)
            q = (q * factor[:, None, None, None]).astype(q.dtype)
        return q, k

    def _declare_norm(self, declare: Declare) -> RMSNorm:
        config = self.config
        return RMSNorm(
            config.head_dim, eps=config.norm_eps, offset=config.norm_offset, declare=declare
        )
