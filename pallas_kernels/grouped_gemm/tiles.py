"""How grouped products are cut into tiles, and which worker takes which."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

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


def round_up(rows: int, unit: int) -> int:
    """The multiple of a unit that holds so many rows."""
    return -(-rows // unit) * unit


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


class _Group(NamedTuple):
    """Where a group's rows lie, and into how much they are cut."""

    begin: Array
    end: Array
    """See `Tile`."""
    blocks: Array
    row_tiles: Array


class _Place(NamedTuple):
    """How far a worker is."""

    tile: Array
    """Number of its next tile."""
    tiles_before: Array
    """Tiles of all groups before."""
    rows_before: Array
    step: Array


@dataclass(frozen=True, kw_only=True)
class TileWalk:
    """The tiles that a worker takes.

    Tiles are numbered group by group, then by columns, then by rows, so that neighbours in time
    share weights. Each worker takes every num_workers-th. Groups are walked, not searched: their
    sizes stay in the first-level cache, and loading runs ahead of the products by some steps.
    """

    sizes: Any
    """Reference to the rows of every group, of which `groups` from `first_group` on are here."""
    layer: Any
    first_group: Any
    groups: int
    columns: int
    """Columns of what comes out, of which a tile has `tile_columns`."""
    tile_columns: int
    row_alignment: int
    config: TileConfig

    def for_each(self, body: Callable) -> Array:
        """Calls `step = body(rows, tile, step)` for every tile; returns the steps taken."""
        zero, first = jnp.int32(0), self.first_group[0]
        rows_before = lax.fori_loop(0, first, lambda g, total: total + self.sizes[g], zero)
        place = _Place(lax.axis_index("worker"), zero, rows_before, zero)
        some_groups = functools.partial(self._walk_some_groups, body, first)
        return lax.fori_loop(0, -(-self.groups // GROUPS_AT_ONCE), some_groups, place).step

    def _walk_some_groups(self, body: Callable, first: Array, index: Array, place: _Place):
        # Counted without a branch between them: with few rows most groups are passed over, and a
        # branch for each would take as long as the products.
        last, begin = self.sizes.shape[0] - 1, index * GROUPS_AT_ONCE
        tiles_after, rows_after = place.tiles_before, place.rows_before
        for group in range(GROUPS_AT_ONCE):
            size = self.sizes[lax.min(first + begin + group, last)]
            size = jnp.where(begin + group < self.groups, size, 0)
            cut = self._cut(first + (begin + group), rows_after, size)
            tiles_after += cut.row_tiles * self._column_tiles
            rows_after += size
        end = lax.min(begin + GROUPS_AT_ONCE, self.groups)
        walked = jnp.where(place.tile < tiles_after, end, begin)
        one_group = functools.partial(self._walk_group, body, first)
        tile, _, _, step = lax.fori_loop(begin, walked, one_group, place)
        return _Place(tile, tiles_after, rows_after, step)

    def _walk_group(self, body: Callable, first: Array, group: Array, place: _Place) -> _Place:
        size = self.sizes[first + group]
        cut = self._cut(first + group, place.rows_before, size)
        tiles_after = place.tiles_before + cut.row_tiles * self._column_tiles
        row_tiles = self.config.row_tiles

        def one_tile(carry):
            tile, step = carry
            work = self._tile(group, cut, tile - place.tiles_before)
            spanned = work.end - work.row
            size_class = sum((spanned > r).astype(jnp.int32) for r in row_tiles[:-1])
            branches = [functools.partial(body, rows, work) for rows in row_tiles]
            return tile + lax.axis_size("worker"), lax.switch(size_class, branches, step)

        start = place.tile, place.step
        tile, step = lax.while_loop(lambda c: c[0] < tiles_after, one_tile, start)
        return _Place(tile, tiles_after, place.rows_before + size, step)

    def _cut(self, group: Array, rows_before: Array, size: Array) -> _Group:
        begin = group_begin(rows_before, group, self.row_alignment)
        end = begin + size
        blocks = lax.div(end + BLOCK - 1, BLOCK) - lax.div(begin, BLOCK)
        blocks = jnp.where(size > 0, blocks, 0)
        if has_whole_blocks(self.row_alignment):
            end = begin + blocks * BLOCK
        return _Group(begin, end, blocks, lax.div(blocks + self._most - 1, self._most))

    def _tile(self, group: Array, cut: _Group, number: Array) -> Tile:
        """The tile of this number in the group."""
        column_tile = lax.div(number, cut.row_tiles)
        row_tile = number - column_tile * cut.row_tiles

        def blocks_before(row_tile):
            # A group is cut evenly: two tiles of 136 rows beat one of 256 and one of 16.
            if self.config.upright:
                return row_tile * self._most
            return lax.div(row_tile * cut.blocks, cut.row_tiles)

        first_block = lax.div(cut.begin, BLOCK)
        row = (first_block + blocks_before(row_tile)) * BLOCK
        row_after = (first_block + blocks_before(row_tile + 1)) * BLOCK
        return Tile(
            weights=self.layer[0] * self.groups + group,
            row=row,
            begin=lax.max(row, cut.begin),
            end=lax.min(row_after, cut.end),
            column=column_tile * self.tile_columns,
        )

    @property
    def _column_tiles(self) -> int:
        return -(-self.columns // self.tile_columns)

    @property
    def _most(self) -> int:
        """Blocks of a tile at most."""
        return self.config.max_rows // BLOCK
