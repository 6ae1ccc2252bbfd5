"""Tiles of float8 as the decode kernel on Hopper multiplies them: in float16, in registers.

The chip turns float8 into float16 only, which holds all of it. Products take their left side from
registers: keys as they lie, values transposed. Values are read two features at a time, because what
transposes on the way from shared memory (ldmatrix) knows no elements of one byte.
"""

from typing import Any

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Array

from pallas_kernels.inlined import i32, inline, number
from pallas_kernels.paged_attention.float8 import WIDE

WARP_FEATURES = 16
"""Features of a warp in a product of 64."""
LANES = 32
"""Positions that a warp reads at once, one a lane."""

PAIRS = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 8), (16, 8), (2, 8), (2, 2), (2, 1))),
    warp_dims=(-10,),
    lane_dims=(-8, -5),
    vector_dim=-2,
)
"""Registers of a product whose rows are features in the order that values are read in: a thread
holds two neighbours, where wgmma has rows that are 8 apart."""


def widen_keys(keys: Any) -> Array:
    """Returns a tile of keys [positions, d] in float16."""
    # Threads hold neighbours that are read at once, and exchange them for those of wgmma.
    narrow = plgpu.load(keys, layout=plgpu.Layout.WGMMA_UPCAST_2X, optimized=False)
    return plgpu.layout_cast(narrow.astype(WIDE), plgpu.Layout.WGMMA)


def widen_values(values: Any, begin: Array, end: Array, *, swizzle: int) -> Array:
    """Returns a tile of values [dv, positions] in float16, 0 outside of positions [begin, end).

    Features are in the order that `PAIRS` says. The swizzle spans so many bytes.
    """
    positions, features = values.shape
    transforms = (
        plgpu.TilingTransform((8, swizzle)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(swizzle),  # pyright: ignore[reportAbstractUsage]
    )

    @inline(
        plgpu.RefType(transforms),
        plgpu.Layout.WG_SPLAT,
        plgpu.Layout.WG_SPLAT,
        returns=plgpu.ShapeDtypeStruct(
            (features, positions), jnp.dtype(WIDE), layout=plgpu.Layout.WGMMA
        ),
    )
    def widen(ref: Any, begin: Any, end: Any) -> Any:
        return _read(ref, begin.registers.item(), end.registers.item(), swizzle=swizzle)

    return widen(values, begin, end)


def in_order(product: Array) -> Array:
    """States the rows of a product of values that were read two features at a time."""

    @inline(
        plgpu.Layout.WGMMA,
        returns=plgpu.ShapeDtypeStruct(product.shape, product.dtype, layout=PAIRS),
    )
    def rename(array: Any) -> Any:
        parameterized: Any = PAIRS
        layout = parameterized.to_mgpu()
        # Rows are 8 apart along axis 4, columns are neighbours in a register: now it is rows.
        pairs = np.empty(layout.registers_shape(array.shape), dtype=object)
        for index in np.ndindex(array.registers.shape[:2]):
            first, second = (array.registers[(*index, 0, 0, row)].item() for row in range(2))
            for column in range(2):
                pairs[index].reshape(-1)[column] = vector.shuffle(
                    first, second, [column, 2 + column]
                )
        return mgpu.FragmentedArray(_registers=pairs, _layout=layout, _is_signed=None)

    return rename(product)


def reduce_rows(kind: str, array: Array, scratch: Any) -> Array:
    """Reduces an array along its rows, "max" or "add", in scratch memory of the warpgroup's own."""

    @inline(
        plgpu.Layout.WGMMA,
        plgpu.RefType(),
        returns=plgpu.ShapeDtypeStruct(
            array.shape[1:], array.dtype, layout=plgpu.Layout.WGMMA.reduce(0)
        ),
    )
    def reduce(array: Any, scratch: Any) -> Any:
        return array.reduce(kind, 0, scratch)

    return reduce(array, scratch)


def _read(ref: Any, begin: Any, end: Any, *, swizzle: int) -> Any:
    """Reads, transposes and converts a tile in tiles of 8 positions by `swizzle` features."""
    eights, columns, _, _ = ir.MemRefType(ref.type).shape
    positions, features = eights * 8, columns * swizzle
    thread = mgpu.utils.thread_idx()
    lane = arith.remui(thread, number(LANES))
    warp = arith.remui(arith.divui(thread, number(LANES)), number(4))
    # The row of a tile that the lane reads, of the tiles of 8 positions that 8 lanes read.
    row, tile = arith.remui(lane, number(8)), arith.divui(lane, number(8))
    start = arith.addi(
        arith.muli(tile, number(columns * 8 * swizzle)), arith.muli(row, number(swizzle))
    )
    # Chunks of 16 bytes are spread over the banks: which, depends on the 128 bytes that hold them.
    spread = arith.divui(arith.muli(row, number(swizzle)), number(128))
    start = arith.addi(start, llvm.ptrtoint(i32(), mgpu.utils.memref_ptr(ref)))
    layout = mgpu.WGMMA_LAYOUT
    registers = np.empty(layout.registers_shape((features, positions)), dtype=object)
    pair = arith.muli(arith.remui(lane, number(4)), number(2))
    kept = [_kept(arith.addi(pair, number(8 * eight)), begin, end) for eight in range(eights)]
    for block in range(features // 64):
        feature = arith.addi(arith.muli(warp, number(WARP_FEATURES)), number(64 * block))
        column = arith.divui(feature, number(swizzle))
        chunk = arith.divui(arith.remui(feature, number(swizzle)), number(16))
        chunk = arith.muli(arith.xori(chunk, spread), number(16))
        offset = arith.addi(arith.muli(column, number(8 * swizzle)), chunk)
        offset = arith.addi(start, offset)
        for first in range(0, eights, 4):
            address = arith.addi(offset, number(first * columns * 8 * swizzle))
            for i, four in enumerate(_load_transposed(address)):
                eight = first + i
                wide = _widen(arith.andi(four, kept[eight]))
                for half, register in enumerate(wide):
                    registers[block, eight, 0, 0, half, 0, 0, 0, 0] = register
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _kept(position: Any, begin: Any, end: Any) -> Any:
    """Returns the bits to keep of values at a position (two bytes) and the next (two more)."""
    bits = number(0)
    for offset, both in ((0, 0xFFFF), (1, -(1 << 16))):
        here = arith.addi(position, number(offset))
        visible = arith.andi(
            arith.cmpi(arith.CmpIPredicate.sge, here, begin),
            arith.cmpi(arith.CmpIPredicate.slt, here, end),
        )
        bits = arith.ori(bits, arith.select(visible, number(both), number(0)))
    return bits


def _load_transposed(address: Any) -> list[Any]:
    """Loads four matrices of 8 positions by 8 pairs of features, a row each lane's address."""
    four = llvm.inline_asm(
        ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>"),
        [address],
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,r,~{memory}",
        has_side_effects=True,
    )
    return [llvm.extractvalue(i32(), four, [i]) for i in range(4)]


def _widen(four: Any) -> list[Any]:
    """Converts two features at two positions; returns both positions of each feature."""
    wide = llvm.inline_asm(
        ir.Type.parse("!llvm.struct<(i32, i32)>"),
        [four],
        """
        {
        .reg .b32 by_feature;
        .reg .b16 first, second;
        prmt.b32 by_feature, $2, 0, 0x3120;
        mov.b32 {first, second}, by_feature;
        cvt.rn.f16x2.e4m3x2 $0, first;
        cvt.rn.f16x2.e4m3x2 $1, second;
        }
        """,
        "=r,=r,r",
    )
    pair = ir.VectorType.get((2,), ir.F16Type.get())
    return [mgpu.utils.bitcast(llvm.extractvalue(i32(), wide, [i]), pair) for i in range(2)]
