"""Sorting rows by group on Hopper: for up to some thousand, each row counts those before it."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from pallas_kernels.grouped_gemm import sort_many_sm90
from pallas_kernels.grouped_gemm.lanes_sm90 import (
    BY_LANE,
    check_columns,
    lanes_of,
    row_layout,
    rows_of,
    scatter,
)
from pallas_kernels.grouped_gemm.sort import SortedRows, clip_unused
from pallas_kernels.groups import group_begin, room_for
from pallas_kernels.registers import store_registers

MAX_PAIRWISE = 4096
"""Rows up to which every row is compared with every other."""
AT_ONCE = 16
"""Rows that a lane compares at once with its own."""
FEW_ROWS = 512
"""Rows up to which a block has no more of its own than it must."""
SHIFT = 16
LOWER = 1 << SHIFT
"""What a row of a lower group counts, more than there are rows."""


def sort_rows(
    group_of_row: Int[Array, "rows"],
    groups: int,
    *,
    row_alignment: int = 1,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> SortedRows:
    """Sorts rows by group; those whose group is not in [0, groups) come last.

    Groups begin where `groups.group_begin` says.

    Raises NotImplementedError for what the kernels do not cover.
    """
    check_covered(group_of_row, groups)
    rows = group_of_row.size
    if rows > MAX_PAIRWISE:
        return sort_many_sm90.sort_rows(
            group_of_row, groups, row_alignment=row_alignment, interpret=interpret
        )
    block = rows_of(rows) * (1 if rows <= FEW_ROWS else 4)
    room = room_for(rows, groups, row_alignment)
    kernel = plgpu.kernel(
        functools.partial(_kernel, block=block, row_alignment=row_alignment),
        out_type=tuple(jax.ShapeDtypeStruct((size,), jnp.int32) for size in (room, rows, groups)),
        # Rows in whole blocks, those that are left one by one, and groups in the same way.
        grid=(_blocks(rows, block) + _blocks(groups, block),),
        grid_names=("block",),
        scratch_types=dict(places=plgpu.SMEM((block,), jnp.int32)),
        compiler_params=BY_LANE,
        kernel_name="sort_rows",
        interpret=interpret,
    )
    row, place, sizes = kernel(group_of_row)
    return SortedRows(clip_unused(row, rows), place, sizes)


def check_covered(group_of_row: Array, groups: int) -> None:
    """Raises NotImplementedError, with the reason, for what the kernels do not cover."""
    if not group_of_row.size or not groups:
        raise NotImplementedError(
            f"needs rows and groups, got {group_of_row.size} rows and {groups} groups"
        )
    if group_of_row.size <= MAX_PAIRWISE:
        check_columns(group_of_row.size, "rows")


def _blocks(count: int, block: int) -> int:
    return count // block + count % block


def _kernel(
    group_ref, row_ref, place_ref, sizes_ref, *, places, block: int, row_alignment: int
):  # fmt: skip
    rows, groups = group_ref.shape[0], sizes_ref.shape[0]
    layout = row_layout(rows)
    load = functools.partial(_load_groups, group_ref, groups)
    count = functools.partial(_count_where, load, layout, rows)
    # A power of two, so that a key without its row is the first of its group.
    key_step = 1 << (rows - 1).bit_length()

    def key(group, row):
        return group * key_step + row

    def both_counts(keys, mine):
        """Adds up to the rows of lower groups, times LOWER, and those before in the same group."""
        lower = (keys < (mine & -key_step)).astype(jnp.int32)
        return lower * (LOWER - 1) + _comes_before(keys, mine)

    def place_of(group, row):
        if row_alignment == 1:
            return count(_comes_before, key, key(group, row))
        counts = count(both_counts, key, key(group, row))
        begin = group_begin(lax.shift_right_logical(counts, SHIFT), group, row_alignment)
        return begin + (counts & LOWER - 1)

    def place_block(first):
        row = plgpu.broadcasted_iota(jnp.int32, (block,), 0, layout=layout.reduce(1)) + first
        place = place_of(load(pl.ds(first, block), layout.reduce(1)), row)
        store_registers(place_ref.at[pl.ds(first, block)], place)
        store_registers(places, place)
        plgpu.commit_smem()
        scatter(places, row_ref, first)

    def place_one(row):
        place = place_of(load(row, None), row)
        place_ref[row] = place
        row_ref[place] = row

    def size_block(first):
        group = plgpu.broadcasted_iota(jnp.int32, (block,), 0, layout=layout.reduce(1)) + first
        store_registers(sizes_ref.at[pl.ds(first, block)], count(_equals, _group_alone, group))

    def size_one(group):
        sizes_ref[group] = count(_equals, _group_alone, group)

    index = lax.axis_index("block")
    row_blocks = _blocks(rows, block)
    _for_block(index, rows, block, place_block, place_one)
    _for_block(index - row_blocks, groups, block, size_block, size_one)


def _for_block(index, total: int, block: int, do_block, do_one) -> None:
    """Does what block number `index` has to do of some items: a whole block of them, or one."""
    whole, rest = total // block, total % block
    if whole:
        pl.when((index >= 0) & (index < whole))(lambda: do_block(index * block))
    if rest:
        is_mine = (index >= whole) & (index < whole + rest)
        pl.when(is_mine)(lambda: do_one(whole * block + index - whole))


def _load_groups(group_ref, groups: int, where, layout):
    """Groups of some rows; those that do not exist are one more."""
    group = plgpu.load(group_ref.at[where], layout=layout, optimized=False)
    return jnp.where((group >= 0) & (group < groups), group, groups)


def _group_alone(group, row):
    del row
    return group


def _comes_before(keys, mine):
    return (keys < mine).astype(jnp.int32)


def _equals(group, mine):
    return (group == mine).astype(jnp.int32)


def _count_where(load, layout, rows: int, compare, key, mine):
    """For each of mine, or for one, the sum of `compare(key(group, row), mine)` over the rows."""
    width = lanes_of(rows) * AT_ONCE

    def count(first, width: int):
        row = plgpu.broadcasted_iota(jnp.int32, (width,), 0, layout=layout.reduce(0)) + first
        keys = key(load(pl.ds(first, width), layout.reduce(0)), row)
        if mine.ndim == 0:
            return jnp.sum(compare(keys, mine))
        shape = (mine.shape[0], width)
        across = plgpu.layout_cast(lax.broadcast_in_dim(keys, shape, (1,)), layout)
        down = plgpu.layout_cast(lax.broadcast_in_dim(mine, shape, (0,)), layout)
        return jnp.sum(compare(across, down), axis=1)

    rest = rows % width
    if rows < width:
        return count(0, rest)
    counted = count(rows - rest, rest) if rest else count(0, width)
    return lax.fori_loop(
        0 if rest else 1, rows // width, lambda i, sums: sums + count(i * width, width), counted
    )
