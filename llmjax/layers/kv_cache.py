"""The paged KV cache and the part of a step that says where its tokens stand."""

from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from meshes import Rules


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of all layers in pages; page 0 of each batch rank is its own."""

    k: Float[Array, "layers pages page kv_heads head_dim"]
    """Keys, after rope."""
    v: Float[Array, "layers pages page kv_heads head_dim"]
    """Values."""

    @classmethod
    def zeros(cls, shape: tuple[int, int, int, int, int], dtype: jnp.dtype, rules: Rules) -> Self:
        """An empty cache, made on the devices."""
        spec = rules.spec("layers", "pages", None, "kv_heads", None)
        return cls(
            k=jnp.zeros(shape, dtype, out_sharding=spec),
            v=jnp.zeros(shape, dtype, out_sharding=spec),
        )

    def updated(self, k: Array, v: Array) -> Self:
        """The cache with other pages."""
        return replace(self, k=k, v=v)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the tokens of a step stand: in their requests, and in the cache.

    Each batch rank's tokens are its decode tokens, one a row, then its prefill tokens, rows beside
    each other. Arrays of rows have a leading axis of batch ranks.
    """

    positions: Int[Array, "tokens"]
    """Position of each token in its request; padding has 0."""
    slots: Int[Array, "tokens"]
    """page * page_size + offset of each token; -1 for padding."""
    page_table: Int[Array, "ranks rows width"]
    """Pages of each row, decode rows first."""
    lengths: Int[Array, "ranks rows"]
    """Cached tokens of each row, this step's included; 0 for an unused row."""
    prefill_start: Int[Array, "ranks prefill_rows_plus_one"]
    """First token of each prefill row, counted within the rank's prefill tokens."""
