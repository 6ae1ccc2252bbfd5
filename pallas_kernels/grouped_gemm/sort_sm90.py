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
from pallas_kernels.grouped_gemm.sort import SortedRows
from pallas_kernels.registers import store_registers

MAX_PAIRWISE = 4096
"""Rows up to which every row is compared with every other."""
AT_ONCE = 16
"""Rows that a lane compares at once with its own."""
FEW_ROWS = 512
"""Rows up to which a block has no more of its own than it must."""


def sort_rows(
    group_of_row: Int[Array, "rows"],
    groups: int,
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> SortedRows:
    """Sorts rows by group; those whose group is not in [0, groups) come last.

    Raises NotImplementedError for what the kernels do not cover.
    """
    check_covered(group_of_row)
    rows = group_of_row.size
    if rows > MAX_PAIRWISE:
        return sort_many_sm90.sort_rows(group_of_row, groups, interpret=interpret)
    block = rows_of(rows) * (1 if rows <= FEW_ROWS else 4)
    kernel = plgpu.kernel(
        functools.partial(_kernel, block=block),
        out_type=tuple(jax.ShapeDtypeStruct((size,), jnp.int32) for size in (rows, rows, groups)),
        # Rows in whole blocks, those that are left one by one, and groups in the same way.
        grid=(_blocks(rows, block) + _blocks(groups, block),),
        grid_names=("block",),
        scratch_types=dict(places=plgpu.SMEM((block,), jnp.int32)),
        compiler_params=BY_LANE,
        kernel_name="sort_rows",
        interpret=interpret,
    )
    return SortedRows(*kernel(group_of_row))


def check_covered(group_of_row: Array) -> None:
    """Raises NotImplementedError, with the reason, for what the kernels do not cover."""
    if group_of_row.size <= MAX_PAIRWISE:
        check_columns(group_of_row.size, "rows")


def _blocks(count: int, block: int) -> int:
    return count // block + count % block


def _kernel(group_ref, row_ref, place_ref, sizes_ref, *, places, block: int):
    rows, groups = group_ref.shape[0], sizes_ref.shape[0]
    layout = row_layout(rows)
    load = functools.partial(_load_groups, group_ref, groups)
    count = functools.partial(_count_where, load, layout, rows)

    def key(group, row):
        return group * rows + row

    def place_block(first):
        row = plgpu.broadcasted_iota(jnp.int32, (block,), 0, layout=layout.reduce(1)) + first
        mine = key(load(pl.ds(first, block), layout.reduce(1)), row)
        place = count(lax.lt, key, mine)
        store_registers(place_ref.at[pl.ds(first, block)], place)
        store_registers(places, place)
        plgpu.commit_smem()
        scatter(places, row_ref, first)

    def place_one(row):
        place = count(lax.lt, key, key(load(row, None), row))
        place_ref[row] = place
        row_ref[place] = row

    def size_block(first):
        group = plgpu.broadcasted_iota(jnp.int32, (block,), 0, layout=layout.reduce(1)) + first
        store_registers(sizes_ref.at[pl.ds(first, block)], count(lax.eq, _group_alone, group))

    def size_one(group):
        sizes_ref[group] = count(lax.eq, _group_alone, group)

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


def _count_where(load, layout, rows: int, compare, key, mine):
    """For each of mine, or for one, the rows for which `compare(key(group, row), mine)` holds."""
    width = lanes_of(rows) * AT_ONCE

    def count(first, width: int):
        row = plgpu.broadcasted_iota(jnp.int32, (width,), 0, layout=layout.reduce(0)) + first
        keys = key(load(pl.ds(first, width), layout.reduce(0)), row)
        if mine.ndim == 0:
            return jnp.sum(compare(keys, mine).astype(jnp.int32))
        shape = (mine.shape[0], width)
        across = plgpu.layout_cast(lax.broadcast_in_dim(keys, shape, (1,)), layout)
        down = plgpu.layout_cast(lax.broadcast_in_dim(mine, shape, (0,)), layout)
        return jnp.sum(compare(across, down).astype(jnp.int32), axis=1)

    rest = rows % width
    if rows < width:
        return count(0, rest)
    counted = count(rows - rest, rest) if rest else count(0, width)
    return lax.fori_loop(
        0 if rest else 1, rows // width, lambda i, sums: sums + count(i * width, width), counted
    )
