"""Tiles of ragged rows of queries, worked out on the device in arrays of constant shape."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.paged_attention.limits import first_visible
from pallas_kernels.paged_attention.prefill_shape import TOKEN_ALIGNMENT


class Tile(NamedTuple):
    """Neighbouring queries of one row, and the positions that they see."""

    index: Array
    """Number of the tile before they were sorted."""
    row: Array
    token: Array
    """First token of the tile; those outside of [begin, end) are not the row's."""
    begin: Array
    end: Array
    position: Array
    """Position of the first token, less than 0 where a row of before reaches into the tile."""
    kv_begin: Array
    """First position to read."""
    kv_tiles: Array
    """Tiles of keys to read."""
    length: Array
    """Positions of the row."""


class Plan(NamedTuple):
    """The tiles of a batch, the most expensive first."""

    tiles: Int[Array, "tiles fields"]
    """The fields of each `Tile`."""
    count: Int[Array, "1"]
    """Tiles that are used."""
    row_end: Int[Array, "rows"]
    """One past the last token of each row."""
    row_token: Int[Array, "rows"]
    """First token of each row's first tile."""
    row_tile: Int[Array, "rows"]
    """Number of each row's first tile."""


def plan_tiles(
    query_start: Int[Array, "rows_plus_one"],
    lengths: Int[Array, "rows"],
    limits: Int[Array, " sizes"] | None,
    *,
    tokens: int,
    tile_tokens: int,
    kv_block: int,
    kv_alignment: int,
) -> Plan:
    """Cuts ragged rows into tiles of `tile_tokens`, the most expensive first.

    Tokens before the first row and after the last are rows without positions, so that tiles cover
    every token. Positions are read from multiples of `kv_alignment` on.
    """
    start = jnp.concatenate([jnp.zeros(1, jnp.int32), query_start])
    end = jnp.concatenate([query_start, jnp.full(1, tokens, jnp.int32)])
    length = jnp.pad(lengths, 1)
    row_token = start // TOKEN_ALIGNMENT * TOKEN_ALIGNMENT
    per_row = jnp.where(end > start, -(-(end - row_token) // tile_tokens), 0)
    tile_end = jnp.cumsum(per_row)

    index = jnp.arange(_most_tiles(tokens, len(start), tile_tokens))
    row = jnp.minimum((tile_end[None] <= index[:, None]).sum(1), len(start) - 1)
    token = row_token[row] + (index - (tile_end - per_row)[row]) * tile_tokens
    begin = jnp.maximum(token, start[row])
    tile = Tile(
        index=index,
        row=row - 1,
        token=token,
        begin=begin,
        end=jnp.minimum(token + tile_tokens, end[row]),
        position=(length - end)[row] + token,
        kv_begin=jnp.zeros_like(index),
        kv_tiles=jnp.zeros_like(index),
        length=length[row],
    )
    if limits is not None:
        low = first_visible((length - end)[row] + begin, limits)
        tile = tile._replace(kv_begin=low // kv_alignment * kv_alignment)
    kv_end = tile.position + tile.end - token
    kv_tiles = jnp.where(tile.length > 0, -(-(kv_end - tile.kv_begin) // kv_block), 0)
    used = index < tile_end[-1]
    order = jnp.argsort(jnp.where(used, -1 - kv_tiles, 0))
    tiles = jnp.stack(tile._replace(kv_tiles=kv_tiles), axis=1)[order]
    return Plan(tiles.astype(jnp.int32), tile_end[-1:], end, row_token, tile_end - per_row)


def gather_tokens(plan: Plan, of_tiles: Array, *, tokens: int, tile_tokens: int) -> Array:
    """Returns what belongs to each token, [tokens, heads], out of [tiles, heads, tile_tokens]."""
    token = jnp.arange(tokens)
    row = (plan.row_end[None] <= token[:, None]).sum(1)
    offset = token - plan.row_token[row]
    return of_tiles[plan.row_tile[row] + offset // tile_tokens, :, offset % tile_tokens]


def _most_tiles(tokens: int, rows: int, tile_tokens: int) -> int:
    """Returns how many tiles there are at most: each row ends in at most one that is not full."""
    rows = min(rows, tokens)
    return (tokens + rows * (tile_tokens + TOKEN_ALIGNMENT - 2)) // tile_tokens
