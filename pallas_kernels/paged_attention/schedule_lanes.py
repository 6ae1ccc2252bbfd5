"""The shares of a schedule, worked out by the lanes of each warp: up to 16 rows a lane.

Where one thread adds up the lengths of 256 rows, every block of a kernel starts some 4 us late.
"""

import functools
from typing import Any

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref
from jaxtyping import Array

from pallas_kernels.inlined import i32, inline, number

LANES = 32
MOST_ROWS = 512
"""Rows whose tiles fit into the registers of a warp, with room to spare."""


def place_share(
    share: Array,
    lengths: Any,
    window: Array,
    chunk: Array,
    *,
    rows: int,
    tile: int,
    shares: int,
    min_tiles: int,
    row_cost: int,
    whole: int,
) -> tuple[Array, ...]:
    """Returns a share's size, begin and end in tiles, and of its last row: the number, where it
    begins, its length and that of the row before. For `row_cost` and `whole` see `Schedule`.

    The window and the chunk reach further back than any position where there is none.
    """
    splat = plgpu.Layout.WG_SPLAT
    integer = plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), layout=splat)

    @inline(splat, plgpu.RefType(), splat, splat, returns=(integer,) * 7)
    def place(share: Any, lengths: Any, window: Any, chunk: Any) -> Any:
        limits = [limit.registers.item() for limit in (window, chunk)]
        firsts = range(0, rows, LANES)
        lengths = [_length_of(lengths, first, rows) for first in firsts]
        counts = [_add_cost(_tiles_of(length, tile, *limits), row_cost) for length in lengths]
        total = _reduce("add", functools.reduce(arith.addi, counts))
        if row_cost:
            total = arith.maxsi(arith.subi(total, number(row_cost)), number(0))
        size = arith.divui(arith.addi(total, number(shares - 1)), number(shares))
        size = arith.maxsi(size, number(min_tiles))
        begin = arith.muli(share.registers.item(), size)
        end = arith.minsi(arith.addi(begin, size), total)
        untils, seen = [], number(0)
        for count in counts:
            untils.append(arith.addi(seen, _scan(count)))
            seen = _shuffle("idx", untils[-1], LANES - 1, 31)
        if whole > 1:
            begin, end = (_move_border(border, untils, whole) for border in (begin, end))
        row, base = number(0), number(0)
        for until in untils:
            before = arith.cmpi(arith.CmpIPredicate.slt, until, end)
            row = arith.addi(row, arith.extui(i32(), before))
            base = arith.maxsi(base, arith.select(before, until, number(0)))
        row, base = _reduce("add", row), _reduce("max", base)
        # Read from memory, these would have the block wait for it once more.
        previous = arith.subi(row, number(1))
        known = [_of_row(index, lengths, firsts) for index in (row, previous)]
        results = (size, begin, end, row, base, *known)
        return tuple(mgpu.FragmentedArray.splat(x, (), is_signed=True) for x in results)

    return place(share, lengths, window, chunk)


def _move_border(border: Any, untils: list[Any], whole: int) -> Any:
    """Moves a border of shares to where a row begins or ends, see `whole` of `Schedule`."""
    base, end = number(0), number(2**30)
    for until in untils:
        before = arith.cmpi(arith.CmpIPredicate.sle, until, border)
        base = arith.maxsi(base, arith.select(before, until, number(0)))
        end = arith.minsi(end, arith.select(before, number(2**30), until))
    base, end = _reduce("max", base), _reduce("min", end)
    is_begin = arith.cmpi(arith.CmpIPredicate.slt, arith.subi(border, base), number(whole))
    is_end = arith.cmpi(arith.CmpIPredicate.slt, arith.subi(end, border), number(whole))
    return arith.select(is_begin, base, arith.select(is_end, end, border))


def _of_row(index: Any, lengths: list[Any], firsts: range) -> Any:
    """Returns the length of a row from the lane that has it, 0 where there is no such row."""
    lane = arith.remui(mgpu.utils.thread_idx(), number(LANES))
    found = number(0)
    for length, first in zip(lengths, firsts, strict=True):
        is_here = arith.cmpi(arith.CmpIPredicate.eq, arith.addi(lane, number(first)), index)
        found = arith.select(is_here, length, found)
    return _reduce("add", found)


def _length_of(lengths: Any, first: int, rows: int) -> Any:
    """Returns the length of the lane's row of 32, 0 past the last row."""
    lane = arith.remui(mgpu.utils.thread_idx(), number(LANES))
    row = arith.addi(lane, number(first))
    here = arith.minsi(row, number(rows - 1))
    length = memref.load(lengths, [arith.index_cast(ir.IndexType.get(), here)])
    exists = arith.cmpi(arith.CmpIPredicate.slt, row, number(rows))
    return arith.select(exists, length, number(0))


def _tiles_of(length: Any, tile: int, window: Any, chunk: Any) -> Any:
    """Returns the tiles that the query of a row of this length sees."""
    position = arith.maxsi(arith.subi(length, number(1)), number(0))
    in_chunk = arith.muli(arith.divui(position, chunk), chunk)
    in_window = arith.addi(arith.subi(position, window), number(1))
    low = arith.maxsi(in_chunk, in_window)
    last = arith.divui(arith.addi(length, number(tile - 1)), number(tile))
    return arith.subi(last, arith.divui(low, number(tile)))


def _add_cost(count: Any, row_cost: int) -> Any:
    """Returns what a row of so many tiles adds to a share that holds all of it."""
    if not row_cost:
        return count
    has_tiles = arith.cmpi(arith.CmpIPredicate.sgt, count, number(0))
    return arith.select(has_tiles, arith.addi(count, number(row_cost)), number(0))


def _scan(value: Any) -> Any:
    """Returns the sum of a lane's value and of those of all lanes before it."""
    lane = arith.remui(mgpu.utils.thread_idx(), number(LANES))
    for distance in (1, 2, 4, 8, 16):
        other = _shuffle("up", value, distance, 0)
        has_other = arith.cmpi(arith.CmpIPredicate.sge, lane, number(distance))
        value = arith.addi(value, arith.select(has_other, other, number(0)))
    return value


def _shuffle(kind: str, value: Any, lane: int, clamp: int) -> Any:
    code = f"shfl.sync.{kind}.b32 $0, $1, {lane}, {clamp}, 0xffffffff;"
    return llvm.inline_asm(i32(), [value], code, "=r,r", has_side_effects=True)


def _reduce(kind: str, value: Any) -> Any:
    code = f"redux.sync.{kind}.s32 $0, $1, 0xffffffff;"
    return llvm.inline_asm(i32(), [value], code, "=r,r", has_side_effects=True)
