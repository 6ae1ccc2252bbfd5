"""Multi-head latent attention in its absorbed form (DeepSeek-V2, 2024).

Keys and values of all heads are linear in one latent vector a token, and only that is cached. The
map from latent to keys is applied to the queries instead, that to values to what attention
returns: to the cache it is attention of many query heads over a single key/value head.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llmjax.config import LatentConfig, ModelConfig
from llmjax.layers.cached_attention import Scores, attend
from llmjax.layers.kv_cache import LatentCache, Placement
from llmjax.layers.norm import RMSNorm
from llmjax.layers.params import Declare
from llmjax.layers.rope import RopeTables, apply_rope, yarn_scale
from llmjax.layers.traits import LayerTraits

LATENT_NORM_EPS = 1e-6
"""The norms of the latents keep this, whatever the model's others have."""


class LatentAttention(nnx.Module):
    """Attention whose heads lie over ranks while every rank computes and caches the latent."""

    def __init__(self, config: ModelConfig, num_slots: int, *, declare: Declare):
        assert config.latent is not None
        latent, embed = config.latent, config.hidden_size
        self.config, self.latent, self.rules = config, latent, declare.rules
        self.scores = Scores(scale=latent_scale(config), value_dim=latent.kv_rank)
        down, query_dim = latent.cached_dim, latent.nope_dim + latent.rope_dim
        q_rank = latent.q_rank or 0
        # No rank has a part of its own here: all heads read all of it.
        self.fused_a = declare.param((embed, q_rank + down), (None, None), fan_in=embed)
        self.kv_norm = RMSNorm(latent.kv_rank, eps=LATENT_NORM_EPS, declare=declare)
        self.q_norm = (
            RMSNorm(q_rank, eps=LATENT_NORM_EPS, declare=declare) if latent.q_rank else None
        )
        inner = latent.q_rank or embed
        per_head = ("heads", None, None)
        self.q_up = declare.param((num_slots, inner, query_dim), per_head, fan_in=inner)
        self.k_up = declare.param(
            (num_slots, latent.nope_dim, latent.kv_rank), per_head, fan_in=latent.kv_rank
        )
        self.v_up = declare.param(
            (num_slots, latent.kv_rank, latent.value_dim), per_head, fan_in=latent.kv_rank
        )
        self.out = declare.param(
            (num_slots, latent.value_dim, embed),
            per_head,
            fan_in=config.num_heads * latent.value_dim,
        )
        bias = config.qkv_bias
        self.fused_a_bias = declare.param((q_rank + down,), (None,), init="zeros") if bias else None
        self.out_bias = (
            declare.param((embed,), (None,), init="zeros") if config.output_bias else None
        )

    def __call__(
        self,
        x: Float[Array, "tokens embed"],
        cache: LatentCache,
        layer: Int[Array, ""],
        traits: LayerTraits,
        placement: Placement,
        rope: RopeTables,
    ) -> tuple[Float[Array, "tokens embed"], LatentCache]:
        spec, latent = self.rules.spec, self.latent
        interleaved = self.config.rope_interleaved
        compressed = jnp.einsum(
            "te,ec->tc", x, self.fused_a[...], out_sharding=spec("tokens", None)
        )
        if self.fused_a_bias is not None:
            compressed = compressed + self.fused_a_bias[...]
        q_in, kv, k_rope = _split(compressed, latent)
        k_rope = apply_rope(k_rope, rope, interleaved=interleaved)
        cached = jnp.concatenate([self.kv_norm(kv), k_rope], axis=-1)[:, None]
        q_in = x if self.q_norm is None else self.q_norm(q_in)
        heads = spec("tokens", "heads", None)
        q = jnp.einsum("tc,hcd->thd", q_in, self.q_up[...], out_sharding=heads)
        q_nope, q_rope = q[..., : latent.nope_dim], q[..., latent.nope_dim :]
        q_rope = apply_rope(q_rope, rope, interleaved=interleaved)
        absorbed = jnp.einsum("thd,hdc->thc", q_nope, self.k_up[...], out_sharding=heads)
        queries = jnp.concatenate([absorbed, q_rope], axis=-1)[:, None]
        attended, cache = attend(
            queries,
            (cached,),
            cache,
            layer,
            traits,
            placement,
            scores=self.scores,
            head_axes=(None, "heads"),
            rules=self.rules,
        )
        values = jnp.einsum("thc,hcd->thd", attended[:, 0], self.v_up[...], out_sharding=heads)
        out = jnp.einsum("thd,hde->te", values, self.out[...], out_sharding=spec("tokens", None))
        return (out if self.out_bias is None else out + self.out_bias[...]), cache


def latent_scale(config: ModelConfig) -> float:
    """Factor on attention scores, which YaRN sharpens by its scale squared."""
    assert config.latent is not None
    rope, scale = config.rope, (config.latent.nope_dim + config.latent.rope_dim) ** -0.5
    if rope.kind != "default" and rope.mscale_all_dim:
        scale *= yarn_scale(rope.factor, rope.mscale_all_dim) ** 2
    return scale


def _split(
    compressed: Float[Array, "tokens _"], latent: LatentConfig
) -> tuple[Float[Array, "tokens _"], Float[Array, "tokens _"], Float[Array, "tokens _"]]:
    """What queries, keys and values, and the shared key features are computed from."""
    first = latent.q_rank or 0
    second = first + latent.kv_rank
    return compressed[:, :first], compressed[:, first:second], compressed[:, second:]
