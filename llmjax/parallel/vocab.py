"""Embedding over a vocabulary that is split over ranks."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llmjax.parallel.collectives import (
    all_gather,
    axis_index,
    island,
    psum,
    psum_scatter,
)
from meshes import Rules


def embed_tokens(
    table: Float[Array, "vocab embed"], ids: Int[Array, "tokens"], *, rules: Rules
) -> Float[Array, "tokens embed"]:
    """Each rank looks up the ids that it holds; the sum over ranks is the embedding.

    Where tokens are split over some of the vocabulary's axes, ids are gathered over those first
    and the sums scattered back.
    """
    vocab = rules.axes("vocab")
    shared = tuple(axis for axis in vocab if axis in rules.axes("tokens"))
    rest = tuple(axis for axis in vocab if axis not in shared)

    def body(table: Array, ids: Array) -> Array:
        local = all_gather(ids, shared) - axis_index(vocab) * table.shape[0]
        held = (local >= 0) & (local < table.shape[0])
        rows = jnp.where(held[:, None], table[jnp.where(held, local, 0)], 0)
        return psum_scatter(psum(rows, rest), shared)

    return island(
        body,
        in_specs=(rules.spec("vocab", None), rules.spec("tokens")),
        out_specs=rules.spec("tokens", None),
    )(table, ids)
