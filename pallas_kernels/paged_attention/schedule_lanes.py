"""The shares of a schedule, worked out by the lanes of each warp: a row a lane, for few rows.

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
) -> tuple[Array, ...]:
    """Returns a share's size, begin and end in tiles, its last row and where that row begins.

    The window and the chunk reach further back than any position where there is none.
    """
    splat = plgpu.Layout.WG_SPLAT
    number = plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), layout=splat)

    @plgpu.inline_mgpu(arg_types=(splat, plgpu.RefType(), splat, splat), return_type=(number,) * 5)
    def place(ctx: Any, share: Any, lengths: Any, window: Any, chunk: Any) -> Any:
        del ctx
        limits = [limit.registers.item() for limit in (window, chunk)]
        counts = [
            _add_cost(_tiles_of(lengths, first, rows, tile, *limits), row_cost)
            for first in range(0, rows, LANES)
        ]
        total = _reduce("add", functools.reduce(arith.addi, counts))
        total = arith.maxsi(arith.subi(total, _number(row_cost)), _number(0))
        size = arith.divui(arith.addi(total, _number(shares - 1)), _number(shares))
        size = arith.maxsi(size, _number(min_tiles))
        begin = arith.muli(share.registers.item(), size)
        end = arith.minsi(arith.addi(begin, size), total)
        row, base, seen = _number(0), _number(0), _number(0)
        for count in counts:
            until = arith.addi(seen, _scan(count))
            before = arith.cmpi(arith.CmpIPredicate.slt, until, end)
            row = arith.addi(row, arith.extui(_i32(), before))
            base = arith.maxsi(base, arith.select(before, until, _number(0)))
            seen = _shuffle("idx", until, LANES - 1, 31)
        row, base = _reduce("add", row), _reduce("max", base)
        results = (size, begin, end, row, base)
        return tuple(mgpu.FragmentedArray.splat(x, (), is_signed=True) for x in results)

    inlined: Any = place
    return inlined(share, lengths, window, chunk)


def _tiles_of(lengths: Any, first: int, rows: int, tile: int, window: Any, chunk: Any) -> Any:
    """Returns the tiles of the lane's row of 32, 0 past the last row."""
    lane = arith.remui(mgpu.utils.thread_idx(), _number(LANES))
    row = arith.addi(lane, _number(first))
    here = arith.minsi(row, _number(rows - 1))
    length = memref.load(lengths, [arith.index_cast(ir.IndexType.get(), here)])
    position = arith.maxsi(arith.subi(length, _number(1)), _number(0))
    in_chunk = arith.muli(arith.divui(position, chunk), chunk)
    in_window = arith.addi(arith.subi(position, window), _number(1))
    low = arith.maxsi(in_chunk, in_window)
    last = arith.divui(arith.addi(length, _number(tile - 1)), _number(tile))
    count = arith.subi(last, arith.divui(low, _number(tile)))
    exists = arith.cmpi(arith.CmpIPredicate.slt, row, _number(rows))
    return arith.select(exists, count, _number(0))


def _add_cost(count: Any, row_cost: int) -> Any:
    """Returns what a row of so many tiles adds to a share that holds all of it."""
    has_tiles = arith.cmpi(arith.CmpIPredicate.sgt, count, _number(0))
    return arith.select(has_tiles, arith.addi(count, _number(row_cost)), _number(0))


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)


def _number(value: int) -> Any:
    return arith.constant(_i32(), value)


def _scan(value: Any) -> Any:
    """Returns the sum of a lane's value and of those of all lanes before it."""
    lane = arith.remui(mgpu.utils.thread_idx(), _number(LANES))
    for distance in (1, 2, 4, 8, 16):
        other = _shuffle("up", value, distance, 0)
        has_other = arith.cmpi(arith.CmpIPredicate.sge, lane, _number(distance))
        value = arith.addi(value, arith.select(has_other, other, _number(0)))
    return value


def _shuffle(kind: str, value: Any, lane: int, clamp: int) -> Any:
    code = f"shfl.sync.{kind}.b32 $0, $1, {lane}, {clamp}, 0xffffffff;"
    return llvm.inline_asm(_i32(), [value], code, "=r,r", has_side_effects=True)


def _reduce(kind: str, value: Any) -> Any:
    code = f"redux.sync.{kind}.s32 $0, $1, 0xffffffff;"
    return llvm.inline_asm(_i32(), [value], code, "=r,r", has_side_effects=True)
