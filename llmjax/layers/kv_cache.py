"""The paged cache, and the part of a step that says where its tokens stand."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from meshes import Rules


class KVCache(NamedTuple):
    """Keys and values of all layers in pages; each batch rank counts its own pages from 0."""

    k: Float[Array, "layers pages page kv_heads head_dim"]
    """Keys, after rope."""
    v: Float[Array, "layers pages page kv_heads head_dim"]
    """Values."""

    @property
    def axes(self) -> tuple[str | None, ...]:
        """Logical axes of each array."""
        return ("layers", "pages", None, "kv_heads", None)


class LatentCache(NamedTuple):
    """What latent attention caches, in pages: one vector a token, the same for all heads."""

    latent: Float[Array, "layers pages page 1 cached_dim"]
    """The normed latent, then the key features with position, after rope."""

    @property
    def axes(self) -> tuple[str | None, ...]:
        """Logical axes of the array: ranks that share the heads hold copies."""
        return ("layers", "pages", None, None, None)


Cache = KVCache | LatentCache


class Placement(NamedTuple):
    """Where the tokens of a step stand: in their requests, and in the cache.

    Each batch rank's tokens are its decode tokens, one a row, then its prefill tokens, rows beside
    each other; context ranks hold a part of both. Arrays of rows have a leading axis of batch
    ranks, and so has what context ranks know of all tokens of their batch rank.

    A block of the cache is a page, or with context ranks one page on each of them.
    """

    positions: Int[Array, " tokens"]
    """Position of each token in its request; padding has 0."""
    slots: Int[Array, " tokens"]
    """block * positions of a block + offset of each token; -1 for padding."""
    all_positions: Int[Array, "ranks rank_tokens"]
    """Positions of all tokens of the batch rank."""
    all_slots: Int[Array, "ranks rank_tokens"]
    """Slots of all tokens of the batch rank."""
    has_context: Bool[Array, "ranks"]
    """Whether any prefill of the whole mesh has something cached: the same everywhere."""
    page_table: Int[Array, "ranks rows width"]
    """Blocks of each row, decode rows first."""
    lengths: Int[Array, "ranks rows"]
    """Cached tokens of each row, this step's included; 0 for an unused row."""
    prefill_start: Int[Array, "ranks prefill_rows_plus_one"]
    """First token of each prefill row, counted within the rank's prefill tokens."""


def empty_cache(shapes: Any, dtype: Any, rules: Rules) -> Any:
    """A cache of zeros, made on the devices that hold it, from one with shapes for arrays."""
    spec = rules.spec(*shapes.axes)
    return type(shapes)._make(jnp.zeros(shape, dtype, out_sharding=spec) for shape in shapes)


def placement_specs(rules: Rules, *, by_stage: bool = False) -> Placement:
    """PartitionSpecs in the places of the arrays, which have pipeline stages in front or not."""
    stage = ("layers",) if by_stage else ()
    tokens, ranks = rules.spec(*stage, "tokens"), rules.spec(*stage, "requests")
    return Placement._make((tokens, tokens, *(ranks,) * (len(Placement._fields) - 2)))
