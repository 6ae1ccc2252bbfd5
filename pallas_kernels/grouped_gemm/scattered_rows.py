"""Rows that lie anywhere, brought to shared memory as wgmma reads them.

The copy engine moves boxes of neighbouring rows only. Here the warpgroup that loads copies 16 bytes
a thread (cp.async), eight threads for the 128 bytes that a step takes of a row, to where the
swizzle has them. Their arrival is counted by barriers of our own in plain shared memory: Pallas has
none for such copies.
"""

from dataclasses import dataclass
from typing import Any

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxtyping import Array, Int

from pallas_kernels.grouped_gemm.store import swizzle
from pallas_kernels.grouped_gemm.tiles import BLOCK, Tile, TileConfig, has_whole_blocks, round_up
from pallas_kernels.inlined import i32, inline, number

STEP_BYTES = 128
"""Bytes of a row that a step takes: a line of the swizzle, eight lines of which repeat."""
THREADS = 128
BARRIER_WORDS = 2
ROWS_AT_ONCE = 16
"""Rows of which the threads of a warpgroup copy a step's part together."""
MAX_SCALES = THREADS
"""Rows of a tile that may have scales: a thread copies one."""

EIGHT_A_ROW = plgpu.Layout.TILED(
    plgpu.Tiling(((ROWS_AT_ONCE,), (4,), (1,))),
    warp_dims=(-3,),
    lane_dims=(-2, plgpu.Replicated(8)),
    vector_dim=-1,
)
"""How eight threads hold what is known of each of sixteen rows."""


def check_scattered(row_alignment: int) -> None:
    """Raises NotImplementedError where groups share blocks: their edges take the barriers' room."""
    if not has_whole_blocks(row_alignment):
        raise NotImplementedError(
            f"needs groups that begin at a multiple of {BLOCK} for scattered rows, got "
            f"row_alignment={row_alignment}"
        )


def pad_index(index: Int[Array, "rows"], max_rows: int) -> Int[Array, "more_rows"]:
    """An index with as much behind it as a tile of at most so many rows reads past its end."""
    return jnp.pad(index.astype(jnp.int32), (0, round_up(max_rows, ROWS_AT_ONCE)))


def stage_rows(config: TileConfig) -> int:
    """Rows of a stage: those of the largest tile and what is copied with them."""
    return round_up(config.max_rows, ROWS_AT_ONCE)


@dataclass(frozen=True)
class ScatteredRows:
    """Rows of an array in the order of an index, as the warpgroup that loads copies them."""

    source: Any
    """[tokens, k] in global memory."""
    index: Any
    """[rows] and some more in global memory: which row of the source each row is."""
    barriers: Any
    """Shared memory of `barrier_memory`; None in the interpreter, which has no threads."""

    def start(self) -> None:
        """Makes the barriers. Whoever loads does so before anything else."""
        if self.barriers is not None:
            inline(plgpu.RefType())(_make_barriers)(self.barriers)
            plgpu.commit_smem()

    def of_tile(self, tile: Tile, rows: int) -> "TileRows":
        """The rows of a tile."""
        rows_of_tile = self.index.at[pl.ds(tile.row, round_up(rows, ROWS_AT_ONCE))]
        return TileRows(self, plgpu.load(rows_of_tile, layout=EIGHT_A_ROW, optimized=False))

    def end_step(self, slot: Array, filled: Any) -> None:
        """Lets the copies of a step, once they have come, count at the barrier of its slot."""
        if self.barriers is None:
            plgpu.commit_smem()
            plgpu.barrier_arrive(filled.at[slot])
            return
        inline(plgpu.RefType(), plgpu.Layout.WG_SPLAT)(_arrive)(self.barriers, slot)

    def wait(self, step: Array, slot: Array) -> None:
        """Waits until the rows of a step have come and wgmma sees them.

        To be called after the wait for what else the step needs: before that, the barriers may not
        have been made yet.
        """
        if self.barriers is not None:
            stages = self.barriers.shape[0] // BARRIER_WORDS
            phase = lax.rem(lax.div(step, stages), 2)
            arg_types = plgpu.RefType(), plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT
            inline(*arg_types)(_wait)(self.barriers, slot, phase)


@dataclass(frozen=True)
class TileRows:
    """The scattered rows of one tile."""

    rows: ScatteredRows
    tokens: Array
    """Which row of the source each is."""

    def copy(self, target: Any, k_step: Array) -> None:
        """Begins to copy one step's part of the rows to `target` [rows, 128 bytes]."""
        source, tokens = self.rows.source, self.tokens
        depth = STEP_BYTES // jnp.dtype(target.dtype).itemsize
        if self.rows.barriers is None:
            k = pl.ds(k_step * depth, depth)

            def copy_row(row, _):
                target.at[pl.ds(row, 1)][...] = source.at[pl.ds(tokens[row], 1), k][...]

            lax.fori_loop(0, tokens.shape[0], copy_row, None)
            return
        swizzled = plgpu.RefType(swizzle(target.dtype))
        arg_types = plgpu.RefType(), swizzled, EIGHT_A_ROW, plgpu.Layout.WG_SPLAT
        inline(*arg_types)(_copy_rows)(source, target, tokens, k_step)

    def copy_scales(self, scales: Any, target: Any, k_step: Array) -> None:
        """Begins to copy one step's scales, of [k_steps, tokens], to `target` [rows]."""
        tokens = self.tokens
        if self.rows.barriers is None:

            def copy_scale(row, _):
                target.at[pl.ds(row, 1)][...] = scales.at[k_step, pl.ds(tokens[row], 1)][...]

            lax.fori_loop(0, tokens.shape[0], copy_scale, None)
            return
        arg_types = plgpu.RefType(), plgpu.RefType(), EIGHT_A_ROW, plgpu.Layout.WG_SPLAT
        inline(*arg_types)(_copy_scales)(scales, target, tokens, k_step)


def barrier_memory(stages: int) -> Any:
    """The shared memory of a barrier for each stage."""
    return plgpu.SMEM((stages * BARRIER_WORDS,), jnp.int32)


def _make_barriers(barriers: Any) -> None:
    is_first = arith.cmpi(arith.CmpIPredicate.eq, _thread(), number(0))
    (words,) = ir.MemRefType(barriers.type).shape
    for word in range(0, words, BARRIER_WORDS):
        address = arith.addi(_address(barriers), number(4 * word))
        code = f"@$0 mbarrier.init.shared::cta.b64 [$1], {THREADS};"
        _assemble(code, [is_first, address], "b,r,~{memory}")


def _arrive(barriers: Any, slot: Any) -> None:
    code = "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];"
    _assemble(code, [_barrier(barriers, slot)], "r,~{memory}")


def _wait(barriers: Any, slot: Any, phase: Any) -> None:
    code = """
    {
    .reg .pred complete;
    again:
    mbarrier.try_wait.parity.shared::cta.b64 complete, [$0], $1;
    @!complete bra again;
    fence.proxy.async.shared::cta;
    }
    """
    operands = [_barrier(barriers, slot), phase.registers.item()]
    _assemble(code, operands, "r,r,~{memory}")


def _barrier(barriers: Any, slot: Any) -> Any:
    return arith.addi(_address(barriers), _product(slot.registers.item(), 4 * BARRIER_WORDS))


def _copy_rows(source: Any, target: Any, tokens: Any, k_step: Any) -> None:
    """What one thread copies: the same 16 bytes of every sixteenth row."""
    row, chunk = _row_and_chunk()
    swizzled = arith.xori(chunk, arith.remui(row, number(8)))
    place = _sum(_address(target), _product(row, STEP_BYTES), _product(swizzled, 16))
    offset = _sum(_product(k_step.registers.item(), STEP_BYTES), _product(chunk, 16))
    begin = arith.addi(_address(source), _widened(offset))
    row_bytes = ir.MemRefType(source.type).shape[1] * _itemsize(source)
    for index, token in enumerate(tokens.registers.flat):
        here = arith.addi(place, number(index * ROWS_AT_ONCE * STEP_BYTES))
        address = arith.addi(begin, _product(_widened(token), row_bytes))
        code = "cp.async.cg.shared.global.L2::128B [$0], [$1], 16;"
        _assemble(code, [here, address], "r,l,~{memory}")


def _copy_scales(scales: Any, target: Any, tokens: Any, k_step: Any) -> None:
    """What one thread copies: the scale of one of the rows that it has a part of."""
    row, chunk = _row_and_chunk()
    mine, *others = (_widened(token) for token in tokens.registers.flat)
    for index, token in enumerate(others, start=1):
        is_mine = arith.cmpi(arith.CmpIPredicate.eq, chunk, number(index))
        mine = arith.select(is_mine, token, mine)
    row = arith.addi(row, _product(chunk, ROWS_AT_ONCE))
    _, all_rows = ir.MemRefType(scales.type).shape
    skipped = _product(_widened(k_step.registers.item()), 4 * all_rows)
    address = _sum(_address(scales), skipped, _product(mine, 4))
    here = arith.addi(_address(target), _product(row, 4))
    is_there = arith.cmpi(arith.CmpIPredicate.ult, row, number(tokens.shape[0]))
    code = "@$0 cp.async.ca.shared.global [$1], [$2], 4;"
    _assemble(code, [is_there, here, address], "b,r,l,~{memory}")


def _row_and_chunk() -> tuple[Any, Any]:
    """Which of sixteen rows a thread copies a part of, and which 16 bytes of a step's."""
    return arith.divui(_thread(), number(8)), arith.remui(_thread(), number(8))


def _thread() -> Any:
    return arith.remui(mgpu.utils.thread_idx(), number(THREADS))


def _assemble(code: str, operands: list[Any], constraints: str) -> None:
    void = ir.Type.parse("!llvm.void")
    llvm.inline_asm(void, operands, code, constraints, has_side_effects=True)


def _address(ref: Any) -> Any:
    """Where a reference begins: 32 bits in shared memory, 64 in global."""
    bits = 32 if mgpu.utils.is_smem_ref(ref) else 64
    return llvm.ptrtoint(ir.IntegerType.get_signless(bits), mgpu.utils.memref_ptr(ref))


def _itemsize(ref: Any) -> int:
    return mgpu.utils.bytewidth(ir.MemRefType(ref.type).element_type)


def _widened(value: Any) -> Any:
    """A number, or a register that holds one, with 64 bits."""
    narrow = mgpu.utils.bitcast(value, i32())
    return arith.extui(ir.IntegerType.get_signless(64), narrow)


def _product(value: Any, factor: int) -> Any:
    return arith.muli(value, arith.constant(value.type, factor))


def _sum(*values: Any) -> Any:
    total, *others = values
    for value in others:
        total = arith.addi(total, value)
    return total
