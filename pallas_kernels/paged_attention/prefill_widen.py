"""Turns a tile of float8 into float16 in shared memory, for the prefill kernel on Hopper.

Stores that Pallas writes to shared memory meet twice each; here a warpgroup meets once a tile.
"""

from typing import Any

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxtyping import Array

THREADS = 128
"""Threads of a warpgroup."""
CHUNK = 16
"""Features that a thread converts together: what it reads at once."""
AT_ONCE = 4
"""Chunks of a thread that are in registers at once."""


def widen_tile(
    narrow: Any, wide: Any, end: Array, *, narrow_swizzle: int, wide_swizzle: int
) -> None:
    """Converts a tile [positions, features], and clears it from position `end` on.

    Swizzles span so many features.
    """
    positions, features = narrow.shape

    @plgpu.inline_mgpu(
        arg_types=(
            plgpu.RefType(_transforms(narrow_swizzle, 1)),
            plgpu.RefType(_transforms(wide_swizzle, 2)),
            plgpu.Layout.WG_SPLAT,
        )
    )
    def widen(ctx: Any, narrow: Any, wide: Any, end: Any) -> None:
        del ctx
        tile = _Tile(positions, features)
        source, target = tile.at(narrow), tile.at(wide)
        turns = range(positions * features // (CHUNK * THREADS))
        for first in range(0, len(turns), AT_ONCE):
            places = [tile.place(turn) for turn in turns[first : first + AT_ONCE]]
            read = [_load(tile.address(source, *place, narrow_swizzle)) for place in places]
            for (row, column), words in zip(places, read, strict=True):
                kept = tile.mask(row, end.registers.item())
                words = [half for word in words for half in _convert(arith.andi(word, kept))]
                for part in range(2):
                    byte = arith.addi(arith.muli(column, _number(2)), _number(CHUNK * part))
                    address = tile.address(target, row, byte, 2 * wide_swizzle)
                    _store(address, words[4 * part : 4 * part + 4])

    inlined: Any = widen
    inlined(narrow, wide, end)


def _transforms(swizzle: int, element: int) -> tuple[Any, ...]:
    return (
        plgpu.TilingTransform((8, swizzle)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(swizzle * element),  # pyright: ignore[reportAbstractUsage]
    )


def _number(value: int) -> Any:
    return arith.constant(ir.IntegerType.get_signless(32), value)


class _Tile:
    """Where the threads of a warpgroup read and write a tile."""

    def __init__(self, positions: int, features: int):
        self.positions, self.features = positions, features
        self.thread = arith.remui(mgpu.utils.thread_idx(), _number(THREADS))

    def at(self, ref: Any) -> tuple[Any, int]:
        """Returns the address of a tile in shared memory, and its swizzled columns."""
        _, columns, _, _ = ir.MemRefType(ref.type).shape
        i32 = ir.IntegerType.get_signless(32)
        return llvm.ptrtoint(i32, mgpu.utils.memref_ptr(ref)), columns

    def place(self, turn: int) -> tuple[Any, Any]:
        """Returns the position and the first feature of the thread's chunk."""
        chunks = _number(self.features // CHUNK)
        index = arith.addi(self.thread, _number(turn * THREADS))
        column = arith.muli(arith.remui(index, chunks), _number(CHUNK))
        return arith.divui(index, chunks), column

    def address(self, base: tuple[Any, int], row: Any, byte: Any, swizzle: int) -> Any:
        """Returns where the bytes of a row begin, in tiles of 8 rows by `swizzle` bytes."""
        start, columns = base
        eight, inside = arith.divui(row, _number(8)), arith.remui(row, _number(8))
        column, offset = (
            operation(byte, _number(swizzle)) for operation in (arith.divui, arith.remui)
        )
        tile = arith.addi(arith.muli(eight, _number(columns)), column)
        line = arith.muli(inside, _number(swizzle))
        # Chunks of 16 bytes are spread over the banks by the 128 bytes that hold them.
        spread = arith.muli(arith.divui(line, _number(128)), _number(16))
        within = arith.addi(line, arith.xori(offset, spread))
        return arith.addi(start, arith.addi(arith.muli(tile, _number(8 * swizzle)), within))

    def mask(self, row: Any, end: Any) -> Any:
        """Returns the bits to keep of what is in a row."""
        visible = arith.cmpi(arith.CmpIPredicate.slt, row, end)
        return arith.select(visible, _number(-1), _number(0))


def _load(address: Any) -> list[Any]:
    i32 = ir.IntegerType.get_signless(32)
    four = llvm.inline_asm(
        ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>"),
        [address],
        "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,r,~{memory}",
        has_side_effects=True,
    )
    return [llvm.extractvalue(i32, four, [i]) for i in range(4)]


def _store(address: Any, words: list[Any]) -> None:
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [address, *words],
        "st.shared.v4.b32 [$0], {$1, $2, $3, $4};",
        "r,r,r,r,r,~{memory}",
        has_side_effects=True,
    )


def _convert(four: Any) -> list[Any]:
    """Converts four neighbours; returns two and two."""
    i32 = ir.IntegerType.get_signless(32)
    wide = llvm.inline_asm(
        ir.Type.parse("!llvm.struct<(i32, i32)>"),
        [four],
        """
        {
        .reg .b16 first, second;
        mov.b32 {first, second}, $2;
        cvt.rn.f16x2.e4m3x2 $0, first;
        cvt.rn.f16x2.e4m3x2 $1, second;
        }
        """,
        "=r,=r,r",
    )
    return [llvm.extractvalue(i32, wide, [i]) for i in range(2)]
