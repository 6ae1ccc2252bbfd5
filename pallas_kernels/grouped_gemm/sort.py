"""Sorting rows by group, as a grouped product needs them.

On a GPU, XLA's sort is a string of kernels whatever the size; counting takes one or a few. On a CPU
counting would hold the comparisons in memory, and the sort is one call.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from pallas_kernels.groups import group_begin, room_for

MAX_PAIRWISE = 2048
"""Rows up to which every row is compared with every other."""
BLOCK = 128
"""Rows that are compared with each other beyond that; counts up to it are exact in bfloat16."""


class SortedRows(NamedTuple):
    """A stable order of rows by group."""

    row: Int[Array, "places"]
    """Which row stands at each place; any row where none does."""
    place: Int[Array, "rows"]
    """Where each row stands."""
    sizes: Int[Array, "groups"]
    """Rows of each group."""


def sort_rows_by_xla(
    group_of_row: Int[Array, "rows"], groups: int, *, row_alignment: int = 1
) -> SortedRows:
    """Sorts rows by group; those whose group is not in [0, groups) come last.

    Groups begin where `groups.group_begin` says.
    """
    held = (group_of_row >= 0) & (group_of_row < groups)
    group_of_row = jnp.where(held, group_of_row, groups)
    place, sizes = lax.platform_dependent(
        group_of_row,
        cpu=partial(place_by_sorting, groups=groups),
        default=partial(place_by_counting, groups=groups),
    )
    rows = group_of_row.size
    if row_alignment > 1:
        before = jnp.cumsum(sizes, dtype=jnp.int32)
        before = jnp.concatenate([jnp.zeros(1, jnp.int32), before])
        moved = group_begin(before, jnp.arange(groups + 1), row_alignment) - before
        place += moved[group_of_row]
    row = jnp.zeros(room_for(rows, groups, row_alignment), jnp.int32)
    row = row.at[place].set(jnp.arange(rows, dtype=jnp.int32), unique_indices=True)
    return SortedRows(row, place, sizes)


def clip_unused(row: Int[Array, "places"], rows: int) -> Int[Array, "places"]:
    """Rows at places of which some may hold no number of a row, but anything."""
    return row if row.size == rows else jnp.clip(row, 0, rows - 1)


def place_by_sorting(group_of_row: Int[Array, "rows"], groups: int) -> tuple[Array, Array]:
    """Place of each row and sizes of the groups, by XLA's sort."""
    order = jnp.argsort(group_of_row)
    rows = jnp.arange(group_of_row.size, dtype=jnp.int32)
    place = jnp.zeros_like(rows).at[order].set(rows, unique_indices=True)
    return place, jnp.bincount(group_of_row, length=groups + 1)[:groups].astype(jnp.int32)


def place_by_counting(group_of_row: Int[Array, "rows"], groups: int) -> tuple[Array, Array]:
    """The same by counting the rows that come before each."""
    few = group_of_row.size <= MAX_PAIRWISE
    return (_count_all if few else _count_by_block)(group_of_row, groups)


def _count_all(group_of_row: Array, groups: int) -> tuple[Array, Array]:
    """A row's place is the number of rows that come before it."""
    rows = group_of_row.size
    key = group_of_row * rows + jnp.arange(rows)
    place = jnp.sum(key < key[:, None], axis=1, dtype=jnp.int32)
    sizes = jnp.sum(group_of_row == jnp.arange(groups)[:, None], axis=1, dtype=jnp.int32)
    return place, sizes


def _count_by_block(group_of_row: Array, groups: int) -> tuple[Array, Array]:
    """The same, comparing rows within a block only and adding up the counts of blocks."""
    rows = group_of_row.size
    blocked = jnp.pad(group_of_row, (0, -rows % BLOCK), constant_values=groups)
    blocked = blocked.reshape(-1, BLOCK)
    counts = jnp.sum(blocked[..., None] == jnp.arange(groups + 1), axis=1, dtype=jnp.int32)
    sizes = jnp.sum(counts, axis=0)
    smaller = jnp.tri(groups + 1, k=-1, dtype=jnp.int32)
    earlier_groups = jnp.sum(smaller * sizes, axis=1)
    earlier_blocks = jnp.dot(
        jnp.tri(len(blocked), k=-1, dtype=jnp.bfloat16),
        counts.astype(jnp.bfloat16),
        preferred_element_type=jnp.float32,
    ).astype(jnp.int32)
    index = jnp.arange(BLOCK)
    same = (blocked[:, None] == blocked[..., None]) & (index < index[:, None])
    place = jnp.take_along_axis(earlier_groups + earlier_blocks, blocked, axis=1)
    place += jnp.sum(same, axis=2, dtype=jnp.int32)
    return place.reshape(-1)[:rows], sizes[:groups]
