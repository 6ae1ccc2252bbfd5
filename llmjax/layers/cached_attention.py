"""Writes a step's keys and values into the paged cache, and attends to everything cached."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llmjax.layers.context_attention import ContextAttention
from llmjax.layers.kv_cache import Cache, Placement, placement_specs
from llmjax.layers.traits import LayerTraits
from llmjax.parallel.collectives import axis_size, island
from meshes import Rules
from pallas_kernels import paged_attention, store_rows


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How attention scores are made, the same in all layers."""

    scale: float
    """Factor on the products of queries and keys."""
    soft_cap: float | None = None
    """Scores s become cap * tanh(s / cap)."""
    value_dim: int | None = None
    """Values are this many leading features of the keys; None: they are cached beside them."""


@jax.named_scope("attend")
def attend[CacheT: Cache](
    q: Float[Array, "tokens kv_heads group head_dim"],
    new: Sequence[Float[Array, "tokens kv_heads _"]],
    cache: CacheT,
    layer: Int[Array, ""],
    traits: LayerTraits,
    placement: Placement,
    *,
    scores: Scores,
    head_axes: tuple[str | None, str | None],
    sinks: Float[Array, "kv_heads group"] | None = None,
    rules: Rules,
) -> tuple[Float[Array, "tokens kv_heads group value_dim"], CacheT]:
    """Stores `new`, one array for each of the cache's, then reads with a mask by position.

    The order matters: a cache that is read before it is written gets copied.

    Args:
        layer: the layer's row in the cache.
        head_axes: logical axes of `kv_heads` and `group`.
    """

    context = rules.axes("context")

    def body(q, new, pages, layer, traits, placement: Placement, sinks):
        flat = q.reshape(q.shape[0], -1, q.shape[-1])
        sinks = None if sinks is None else sinks.reshape(-1)
        options = dict(
            scale=scores.scale,
            window=traits.window,
            chunk=traits.chunk,
            soft_cap=scores.soft_cap,
            value_dim=scores.value_dim,
        )
        if axis_size(context) > 1:
            attention = ContextAttention(pages, layer, placement, options, axes=context)
            out, pages = attention(flat, new, sinks)
        else:
            out, pages = _attend_whole(flat, new, pages, layer, placement, sinks, options)
        return out.reshape(*q.shape[:-1], out.shape[-1]), pages

    spec = rules.spec
    grouped, row = spec("tokens", *head_axes, None), spec("tokens", head_axes[0], None)
    # The layers axis is the stage's own by now.
    held = spec(None, *cache.axes[1:])
    # A tuple of specs in the place of a named tuple with gaps; type checkers cannot know.
    numbers: Any = jax.tree.map(lambda _: spec(), traits)
    out, pages = island(
        body,
        in_specs=(grouped, row, held, spec(), numbers, placement_specs(rules), spec(*head_axes)),
        out_specs=(grouped, held),
    )(q, tuple(new), tuple(cache), layer, traits, placement, sinks)
    return out, type(cache)._make(pages)


def _attend_whole(
    q: Float[Array, "tokens heads head_dim"],
    new: Sequence[Float[Array, "tokens kv_heads _"]],
    pages: tuple[Array, ...],
    layer: Int[Array, ""],
    placement: Placement,
    sinks: Float[Array, " heads"] | None,
    options: dict[str, Any],
) -> tuple[Float[Array, "tokens heads value_dim"], tuple[Array, ...]]:
    """Attention of a rank that has all tokens and all pages of its sequences."""
    pages = store_rows(pages, layer, new, placement.slots)
    starts, lengths = placement.prefill_start[0], placement.lengths[0]
    decodes = lengths.shape[0] - (starts.shape[0] - 1)

    def read(queries: Array, rows: slice, row_starts: Array, longest: int) -> Array:
        out, _ = paged_attention(
            queries,
            pages[0],
            pages[1] if len(pages) > 1 else None,
            layer,
            placement.page_table[0, rows],
            row_starts,
            lengths[rows],
            max_query_length=longest,
            sinks=sinks,
            **options,
        )
        return out

    # Decode and prefill are one batch to the matrix products and two parts here: a decode row
    # has one query, which kernels treat in their own way.
    out = read(q[:decodes], slice(0, decodes), jnp.arange(decodes + 1), 1)
    if prefills := q.shape[0] - decodes:
        prefilled = read(q[decodes:], slice(decodes, None), starts, prefills)
        out = jnp.concatenate([out, prefilled])
    return out, pages
