"""How grouped products are cut into tiles, and which worker takes which."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.groups import group_begin

BLOCK = 8
"""Rows of one swizzle tile: row tiles begin at a multiple of it and are stored by it."""

GROUPS_AT_ONCE = 8
"""Groups whose tiles are counted together."""


@dataclass(frozen=True, kw_only=True)
class TileConfig:
    """How one product is cut; `configs.py` holds the tuned choices."""

    row_tiles: tuple[int, ...]
    """Row counts that a tile may have, ascending: each is compiled, the smallest that fits runs."""
    block_k: int = 64
    """Depth of one step, in elements."""
    warpgroups: int = 2
    """Warpgroups that multiply."""
    width: int = 64
    """Columns of the product that each of them owns, a multiple of 64; half are gate, half up
    where the two are one product."""
    stages: int
    """Steps in flight."""
    store_rows: int = 64
    """Rows that a warpgroup stages in shared memory at a time on their way out."""
    upright: bool = False
    """Whether warpgroups share out rows, 64 each, and all multiply the same `width` columns."""

    @property
    def max_rows(self) -> int:
        return self.row_tiles[-1]

    @property
    def columns(self) -> int:
        return self.width if self.upright else self.width * self.warpgroups


def has_whole_blocks(row_alignment: int) -> bool:
    """Whether no two groups share a block, so that tiles may take what is unused of their last."""
    return row_alignment % BLOCK == 0


@dataclass(frozen=True)
class Tile:
    """One piece of work: some rows of one group, times one block of its columns."""

    weights: Array
    """Which of the stacked matrices."""
    row: Array
    """First row of the tile, a multiple of BLOCK."""
    begin: Array
    """First row that belongs to the group and to the tile."""
    end: Array
    """One past the last such row, or past its block where no two groups share one."""
    column: Array
    """First column of what comes out."""


def for_each_tile(
    sizes_ref, layer_ref, first_ref, groups: int, columns: int, tile_columns: int,
    row_alignment: int, config: TileConfig, body: Callable,
) -> Array:  # fmt: skip
    """Calls `step = body(rows, tile, step)` for this worker's tiles; returns the steps taken.

    Tiles are numbered group by group, then by columns, then by rows, so that neighbours in time
    share weights. Each worker takes every num_workers-th. Groups are walked, not searched: their
    sizes stay in the first-level cache, and loading runs ahead of the products by some steps.
    """
    workers = lax.axis_size("worker")
    column_tiles = -(-columns // tile_columns)
    blocks_per_tile = config.max_rows // BLOCK
    first, last = first_ref[0], sizes_ref.shape[0] - 1

    def cut(group, rows_before, size):
        """A group's `begin` and `end` as in `Tile`, its blocks, and the tiles that these take."""
        start = group_begin(rows_before, first + group, row_alignment)
        end = start + size
        blocks = lax.div(end + BLOCK - 1, BLOCK) - lax.div(start, BLOCK)
        blocks = jnp.where(size > 0, blocks, 0)
        if has_whole_blocks(row_alignment):
            end = start + blocks * BLOCK
        return start, end, blocks, lax.div(blocks + blocks_per_tile - 1, blocks_per_tile)

    def one_group(group, carry):
        tile, tiles_before, rows_before, step = carry
        size = sizes_ref[first + group]
        start, end, blocks, row_tiles = cut(group, rows_before, size)
        tiles_after = tiles_before + row_tiles * column_tiles

        def one_tile(carry):
            tile, step = carry
            column_tile = lax.div(tile - tiles_before, row_tiles)
            row_tile = tile - tiles_before - column_tile * row_tiles

            def blocks_before(row_tile):
                # A group is cut evenly: two tiles of 136 rows beat one of 256 and one of 16.
                if config.upright:
                    return row_tile * blocks_per_tile
                return lax.div(row_tile * blocks, row_tiles)

            first_block = lax.div(start, BLOCK)
            row = (first_block + blocks_before(row_tile)) * BLOCK
            row_after = (first_block + blocks_before(row_tile + 1)) * BLOCK
            work = Tile(
                weights=layer_ref[0] * groups + group,
                row=row,
                begin=lax.max(row, start),
                end=lax.min(row_after, end),
                column=column_tile * tile_columns,
            )
            spanned = work.end - row
            size_class = sum((spanned > r).astype(jnp.int32) for r in config.row_tiles[:-1])
            branches = [functools.partial(body, rows, work) for rows in config.row_tiles]
            return tile + workers, lax.switch(size_class, branches, step)

        tile, step = lax.while_loop(lambda c: c[0] < tiles_after, one_tile, (tile, step))
        return tile, tiles_after, rows_before + size, step

    def some_groups(index, carry):
        # Counted without a branch between them: with few rows most groups are passed over, and a
        # branch for each would take as long as the products.
        tile, tiles_before, rows_before, step = carry
        begin = index * GROUPS_AT_ONCE
        tiles_after, rows_after = tiles_before, rows_before
        for group in range(GROUPS_AT_ONCE):
            size = sizes_ref[lax.min(first + begin + group, last)]
            size = jnp.where(begin + group < groups, size, 0)
            tiles_after += cut(begin + group, rows_after, size)[-1] * column_tiles
            rows_after += size
        walked = jnp.where(tile < tiles_after, lax.min(begin + GROUPS_AT_ONCE, groups), begin)
        tile, _, _, step = lax.fori_loop(
            begin, walked, one_group, (tile, tiles_before, rows_before, step)
        )
        return tile, tiles_after, rows_after, step

    rows_before = lax.fori_loop(0, first, lambda g, total: total + sizes_ref[g], jnp.int32(0))
    carry = (lax.axis_index("worker"), jnp.int32(0), rows_before, jnp.int32(0))
    return lax.fori_loop(0, -(-groups // GROUPS_AT_ONCE), some_groups, carry)[-1]
