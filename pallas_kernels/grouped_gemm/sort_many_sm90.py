"""Sorting many rows by group on Hopper, in two kernels: counts of each part, then places.

A row's place is the number of rows of lower groups, of rows of its group in earlier parts, and of
those before it in its own part.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from pallas_kernels.grouped_gemm.lanes_sm90 import (
    BY_LANE,
    LANES,
    WARPS,
    row_layout,
    scatter,
)
from pallas_kernels.grouped_gemm.sort import SortedRows, clip_unused
from pallas_kernels.groups import group_begin, room_for
from pallas_kernels.registers import store_registers

PART = 128
"""Rows that are compared with each other."""
PARTS = 8
"""Parts whose counts are added up, so that a block reads fewer."""
ROWS = 16
"""Rows that a block compares at once with others of its part and with all groups."""
HELD_COUNTS = 32
"""Counts that a lane loads at once."""
LAYOUT = row_layout(LANES)
"""Of every array here: its last axis is a multiple of 32 and lies over the lanes."""
ACROSS, DOWN = LAYOUT.reduce(0), LAYOUT.reduce(1)


def sort_rows(
    group_of_row: Int[Array, "rows"],
    groups: int,
    *,
    row_alignment: int = 1,
    part: int = PART,
    parts: int = PARTS,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> SortedRows:
    """Sorts rows by group; those whose group is not in [0, groups) come last.

    Groups begin where `groups.group_begin` says.
    """
    rows = group_of_row.size
    padding, columns = -rows % (part * parts), groups + -groups % LANES
    padded = jnp.pad(group_of_row, (0, padding), constant_values=-1) if padding else group_of_row
    runs = padded.size // (part * parts)
    places, all_places = (room_for(size, groups, row_alignment) for size in (rows, padded.size))
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    kernel = functools.partial(plgpu.kernel, compiler_params=BY_LANE, interpret=interpret)
    counts = kernel(
        functools.partial(_count, groups=groups, part=part, parts=parts),
        out_type=(array((runs * parts, columns)), array((runs, columns))),
        grid=(runs, columns // LANES),
        grid_names=("run", "slice"),
        scratch_types=(),
        kernel_name="count_rows",
    )(padded)
    row, place, sizes = kernel(
        functools.partial(_place, row_alignment=row_alignment, part=part, parts=parts),
        out_type=(array((all_places,)), array((padded.size,)), array((groups,))),
        grid=(runs * parts,),
        grid_names=("part",),
        scratch_types=dict(
            places=plgpu.SMEM((part,), jnp.int32), totals=plgpu.SMEM((columns,), jnp.int32)
        ),
        kernel_name="place_rows",
    )(padded, *counts)
    return SortedRows(clip_unused(row[:places], rows), place[:rows], sizes)


def _count(group_ref, counts_ref, sums_ref, *, groups: int, part: int, parts: int):
    """Rows of 32 groups in each part of a run, and in all of it."""
    run, first = lax.axis_index("run"), lax.axis_index("slice") * LANES
    mine = plgpu.broadcasted_iota(jnp.int32, (LANES,), 0, layout=DOWN) + first
    # Rows of no group match none.
    mine = _down(jnp.where(mine < groups, mine, -2), part)
    all_counts = []
    for index in range(parts):
        number = run * parts + index
        group = _load(group_ref.at[pl.ds(number * part, part)], ACROSS)
        counts = jnp.sum((_across(group, LANES) == mine).astype(jnp.int32), axis=1)
        store_registers(counts_ref.at[number, pl.ds(first, LANES)], counts)
        all_counts.append(counts)
    total = sum(all_counts[1:], start=all_counts[0])
    store_registers(sums_ref.at[run, pl.ds(first, LANES)], total)


def _place(
    group_ref, counts_ref, sums_ref, row_ref, place_ref, sizes_ref,
    *, places, totals, row_alignment: int, part: int, parts: int,
):  # fmt: skip
    index = lax.axis_index("part")
    run = lax.div(index, parts)
    columns, groups = sums_ref.shape[1], sizes_ref.shape[0]
    earlier, total = _add_runs(sums_ref, run)
    for other in range(parts - 1):
        counts = _load(counts_ref.at[run * parts + other], ACROSS)
        earlier += jnp.where(run * parts + other < index, counts, 0)

    @pl.when(index == 0)
    def _():
        if groups == columns:
            return store_registers(sizes_ref, total)
        store_registers(totals, total)
        plgpu.commit_smem()
        for group in range(groups):
            sizes_ref[group] = totals[group]

    first = index * part
    # Rows of no group follow all others.
    ungrouped = group_begin(jnp.sum(total), jnp.int32(groups), row_alignment)
    ungrouped += first - jnp.sum(earlier)
    column = plgpu.broadcasted_iota(jnp.int32, (columns,), 0, layout=ACROSS)
    theirs = _load(group_ref.at[pl.ds(first, part)], ACROSS)
    is_grouped = (theirs >= 0) & (theirs < groups)
    theirs = jnp.where(is_grouped, theirs, -1)
    position = plgpu.broadcasted_iota(jnp.int32, (part,), 0, layout=ACROSS)

    def some(step, _):
        begin = pl.multiple_of(step * ROWS, ROWS)
        mine = _load(group_ref.at[pl.ds(first + begin, ROWS)], DOWN)
        mine = jnp.where((mine >= 0) & (mine < groups), mine, -1)
        mine_position = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=DOWN) + begin
        wide, group = _down(mine, columns), _across(column, ROWS)
        lower = jnp.sum(jnp.where(group < wide, _across(total, ROWS), 0), axis=1)
        before = jnp.sum(jnp.where(group == wide, _across(earlier, ROWS), 0), axis=1)
        same = _across(theirs, ROWS) == _down(mine, part)
        same &= _across(position, ROWS) < _down(mine_position, part)
        grouped = group_begin(lower, mine, row_alignment)
        place = before + jnp.sum(same.astype(jnp.int32), axis=1)
        place += jnp.where(mine >= 0, grouped, ungrouped)
        store_registers(place_ref.at[pl.ds(first + begin, ROWS)], place)
        store_registers(places.at[pl.ds(begin, ROWS)], place)

    lax.fori_loop(0, part // ROWS, some, None)
    plgpu.commit_smem()
    scatter(places, row_ref, first)


def _add_runs(sums_ref, run) -> tuple[Array, Array]:
    """Rows of each group in the runs before this one, and in all."""
    runs, columns = sums_ref.shape
    at_once = max(1, HELD_COUNTS * LANES // columns) * WARPS

    def add(first, count: int):
        counts = _load(sums_ref.at[pl.ds(first, count)], LAYOUT)
        number = plgpu.broadcasted_iota(jnp.int32, counts.shape, 0, layout=LAYOUT) + first
        return jnp.sum(jnp.where(number < run, counts, 0), axis=0), jnp.sum(counts, axis=0)

    zeros = plgpu.layout_cast(jnp.zeros((columns,), jnp.int32), ACROSS)
    sums = (zeros, zeros)
    whole, rest = runs // at_once * at_once, runs % WARPS
    if whole:
        sums = lax.fori_loop(
            0, whole // at_once, lambda i, sums: _add(sums, add(i * at_once, at_once)), sums
        )
    if runs - rest > whole:
        sums = _add(sums, add(whole, runs - rest - whole))
    for index in range(runs - rest, runs):
        counts = _load(sums_ref.at[index], ACROSS)
        sums = _add(sums, (jnp.where(index < run, counts, 0), counts))
    return sums


def _add(sums, others):
    return tuple(mine + other for mine, other in zip(sums, others, strict=True))


def _load(ref, layout):
    return plgpu.load(ref, layout=layout, optimized=False)


def _across(x, rows: int):
    """The same values in each of some rows."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (rows, x.shape[0]), (1,)), LAYOUT)


def _down(x, columns: int):
    """A row's value in each of some columns."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (x.shape[0], columns), (0,)), LAYOUT)
