"""The paged cache, and the part of a step that says where its tokens stand."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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
    each other. Arrays of rows have a leading axis of batch ranks.
    """

    positions: Int[Array, " tokens"]
    """Position of each token in its request; padding has 0."""
    slots: Int[Array, " tokens"]
    """page * page_size + offset of each token; -1 for padding."""
    page_table: Int[Array, "ranks rows width"]
    """Pages of each row, decode rows first."""
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
    return Placement._make((tokens, tokens, ranks, ranks, ranks))
