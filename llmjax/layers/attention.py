"""Grouped-query attention over the paged cache."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llmjax.config import ModelConfig
from llmjax.layers.kv_cache import KVCache, Placement, placement_specs
from llmjax.layers.norm import RMSNorm
from llmjax.layers.params import Declare
from llmjax.layers.rope import RopeTables, apply_rope
from llmjax.parallel.collectives import island
from llmjax.parallel.head_slots import HeadSlots
from meshes import Rules
from pallas_kernels import paged_attention, write_pages


class Attention(nnx.Module):
    """Attention with one product for queries, keys and values, laid out by key/value slot."""

    def __init__(self, config: ModelConfig, slots: HeadSlots, *, declare: Declare):
        embed, head_dim, group = config.hidden_size, config.head_dim, slots.group
        fused, per_slot = (slots.num_kv, group + 2, head_dim), ("kv_heads", None, None)
        self.rules, self.group, self.scale = declare.rules, group, head_dim**-0.5
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
        norms = [RMSNorm(head_dim, eps=config.norm_eps, declare=declare) for _ in "qk"]
        self.q_norm, self.k_norm = norms if config.qk_norm else (None, None)

    def __call__(
        self,
        x: Float[Array, "tokens embed"],
        cache: KVCache,
        layer: Int[Array, ""],
        window: Int[Array, ""],
        placement: Placement,
        rope: RopeTables,
    ) -> tuple[Float[Array, "tokens embed"], KVCache]:
        spec = self.rules.spec
        heads = spec("tokens", "kv_heads", None, None)
        qkv = jnp.einsum("te,ekgd->tkgd", x, self.qkv[...], out_sharding=heads)
        if self.qkv_bias is not None:
            qkv = qkv + self.qkv_bias[...]
        q, k, v = qkv[:, :, : self.group], qkv[:, :, self.group], qkv[:, :, self.group + 1]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        attended, cache = attend(
            q, k, v, cache, layer, window, placement, rules=self.rules, scale=self.scale
        )
        out = jnp.einsum(
            "tkgd,kgde->te", attended, self.out[...], out_sharding=spec("tokens", None)
        )
        return (out if self.out_bias is None else out + self.out_bias[...]), cache


@jax.named_scope("attend")
def attend(
    q: Float[Array, "tokens kv_heads group head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    cache: KVCache,
    layer: Int[Array, ""],
    window: Int[Array, ""],
    placement: Placement,
    *,
    rules: Rules,
    scale: float,
) -> tuple[Float[Array, "tokens kv_heads group head_dim"], KVCache]:
    """Writes this step's keys and values, then attends to everything cached.

    The order matters: a cache that is read before it is written gets copied.
    """

    def body(q, k, v, k_pages, v_pages, layer, window, placement: Placement):
        k_pages, v_pages = write_pages(k_pages, v_pages, layer, k, v, placement.slots)
        flat = q.reshape(q.shape[0], -1, q.shape[-1])
        starts, lengths = placement.prefill_start[0], placement.lengths[0]
        decodes = lengths.shape[0] - (starts.shape[0] - 1)

        def read(queries: Array, rows: slice, row_starts: Array, longest: int) -> Array:
            out, _ = paged_attention(
                queries,
                k_pages,
                v_pages,
                layer,
                placement.page_table[0, rows],
                row_starts,
                lengths[rows],
                scale=scale,
                max_query_length=longest,
                window=window,
            )
            return out

        # Decode and prefill are one batch to the matrix products and two parts here: a decode row
        # has one query, which kernels treat in their own way.
        out = read(flat[:decodes], slice(0, decodes), jnp.arange(decodes + 1), 1)
        if prefills := flat.shape[0] - decodes:
            prefilled = read(flat[decodes:], slice(decodes, None), starts, prefills)
            out = jnp.concatenate([out, prefilled])
        return out.reshape(q.shape), k_pages, v_pages

    spec = rules.spec
    grouped, single = spec("tokens", "kv_heads", None, None), spec("tokens", "kv_heads", None)
    # The layers axis is the stage's own by now.
    pages = spec(None, "pages", None, "kv_heads", None)
    where = placement_specs(rules)
    out, k_pages, v_pages = island(
        body,
        in_specs=(grouped, single, single, pages, pages, spec(), spec(), where),
        out_specs=(grouped, pages, pages),
    )(q, k, v, cache.k, cache.v, layer, window, placement)
    return out, KVCache(k_pages, v_pages)
