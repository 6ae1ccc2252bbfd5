"""Rows of many queries as rows of one each, which a decode kernel takes."""

import jax.numpy as jnp
from jaxtyping import Array, Int, Int32


def split_rows(
    page_table: Int[Array, "rows width"],
    query_start: Int[Array, "rows_plus_one"],
    lengths: Int[Array, "rows"],
    *,
    tokens: int,
) -> tuple[Int[Array, "tokens width"], Int32[Array, " tokens"]]:
    """Page table and length of each query alone: it sees itself and what is before it in its row.

    Queries outside every row, and those of rows that have fewer positions, have length 0.
    """
    token = jnp.arange(tokens, dtype=jnp.int32)
    row = jnp.searchsorted(query_start, token, side="right", method="compare_all") - 1
    in_row = (row >= 0) & (row < lengths.shape[0])
    row = jnp.clip(row, 0, lengths.shape[0] - 1)
    visible = jnp.maximum(lengths[row] - (query_start[row + 1] - 1 - token), 0)
    return page_table[row], jnp.where(in_row, visible, 0).astype(jnp.int32)
