"""Grouped GEMM for Hopper: wgmma fed by TMA, one persistent warp-specialised kernel.

The product is computed transposed, `out^T = rhs^T lhs^T`. Tensor cores take 64 rows at a time on
one side and any multiple of eight on the other; with the weights on the fixed side, a group of 3
rows costs 8 and a group of 130 costs 136, where the usual orientation would pay for 64 and 192.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

BLOCK = 8
"""Rows of one swizzle tile: row tiles begin at a multiple of it and are stored by it."""
LOAD_REGISTERS = 40
"""Registers that a loading thread keeps."""
EDGE_LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 64), (2, 64), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
"""How a warpgroup holds eight rows of 64: each warp two rows, each lane four neighbours."""


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
    """Columns of the result that each of them owns, a multiple of 64."""
    stages: int
    """Steps in flight."""
    store_rows: int = 64
    """Rows that a warpgroup stages in shared memory at a time on their way out."""

    @property
    def max_rows(self) -> int:
        return self.row_tiles[-1]

    @property
    def columns(self) -> int:
        return self.width * self.warpgroups


def grouped_gemm(
    lhs: Float[Array, "rows k"],
    rhs: Float[Array, "layers groups k n"],
    group_sizes: Int[Array, "all_groups"],
    layer: Int[Array, ""] | int,
    *,
    first_group: Int[Array, ""] | int = 0,
    config: TileConfig,
    num_sms: int,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Float[Array, "rows n"]:
    """Multiplies each group's rows with that group's matrix; rows of absent groups are not written.

    Raises NotImplementedError for shapes and types that the kernel does not cover.
    """
    check_covered(lhs, rhs, config)
    layers, groups, k, n = rhs.shape
    rows = lhs.shape[0]
    padding = -rows % BLOCK
    lhs = jnp.pad(lhs, ((0, padding), (0, 0))) if padding else lhs
    kernel = plgpu.kernel(
        functools.partial(_kernel, groups=groups, config=config),
        out_type=jax.ShapeDtypeStruct((rows + padding, n), lhs.dtype),
        grid=(num_sms,),
        grid_names=("worker",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=dict(
            lhs_smem=_tiled((config.stages, config.max_rows, config.block_k), lhs.dtype),
            rhs_smem=_tiled((config.stages, config.block_k, config.columns), rhs.dtype),
            out_smem=_tiled((config.warpgroups, 2, config.store_rows, config.width), lhs.dtype),
            edge_smem=plgpu.SMEM((config.warpgroups, BLOCK, 64), lhs.dtype),
            filled=plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
            released=plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name="grouped_gemm",
        interpret=interpret,
    )
    out = kernel(
        lhs,
        rhs.reshape(layers * groups, k, n),
        group_sizes,
        jnp.asarray(layer, jnp.int32).reshape(1),
        jnp.asarray(first_group, jnp.int32).reshape(1),
    )
    return out[:rows] if padding else out


def check_covered(lhs: Array, rhs: Array, config: TileConfig) -> None:
    """Raises NotImplementedError, with the reason, for what the kernel does not cover."""
    k, n = rhs.shape[2:]
    if lhs.dtype != jnp.bfloat16 or rhs.dtype != jnp.bfloat16:
        raise NotImplementedError(f"needs bfloat16 operands, got {lhs.dtype} and {rhs.dtype}")
    if k % config.block_k:
        raise NotImplementedError(f"needs k to be a multiple of {config.block_k}, got {k}")
    if n % config.columns:
        raise NotImplementedError(f"needs n to be a multiple of {config.columns}, got {n}")


@dataclass(frozen=True)
class _Tile:
    """One piece of work: some rows of one group, times one block of its columns."""

    weights: Array
    """Which of the stacked matrices."""
    row: Array
    """First row of the tile, a multiple of BLOCK."""
    begin: Array
    """First row that belongs to the group and to the tile."""
    end: Array
    """One past the last such row."""
    column: Array
    """First column."""


def _kernel(
    lhs_ref, rhs_ref, sizes_ref, layer_ref, first_ref, out_ref,
    lhs_smem, rhs_smem, out_smem, edge_smem, filled, released,
    *, groups: int, config: TileConfig,
):  # fmt: skip
    warpgroup = lax.axis_index("warpgroup")
    walk = functools.partial(
        _for_each_tile, sizes_ref, layer_ref, first_ref, groups, rhs_ref.shape[2], config
    )
    k_steps = rhs_ref.shape[1] // config.block_k

    @pl.when(warpgroup == config.warpgroups)
    def load():
        plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")
        steps = walk(
            functools.partial(
                _load_tile, lhs_ref, rhs_ref, lhs_smem, rhs_smem, filled, released, k_steps, config
            )
        )
        pending = lax.min(steps, jnp.int32(config.stages))

        def drain(index, _):
            plgpu.barrier_wait(released.at[lax.rem(steps - pending + index, config.stages)])

        lax.fori_loop(0, pending, drain, None)

    @pl.when(warpgroup < config.warpgroups)
    def multiply():
        plgpu.set_max_registers(_multiply_registers(config.warpgroups), action="increase")
        walk(
            functools.partial(
                _multiply_tile, lhs_smem, rhs_smem, out_smem, edge_smem, out_ref, filled, released,
                k_steps, config,
            )
        )  # fmt: skip
        plgpu.wait_smem_to_gmem(0)


def _for_each_tile(
    sizes_ref, layer_ref, first_ref, groups: int, n: int, config: TileConfig, body: Callable
) -> Array:
    """Calls `step = body(rows, tile, step)` for this worker's tiles; returns the steps taken.

    Tiles are numbered group by group, then by columns, then by rows, so that neighbours in time
    share weights. Each worker takes every num_workers-th. Groups are walked, not searched: their
    sizes stay in the first-level cache, and loading runs ahead of the products by some steps.
    """
    workers = lax.axis_size("worker")
    column_tiles = n // config.columns
    blocks_per_tile = config.max_rows // BLOCK
    first = first_ref[0]
    start = lax.fori_loop(0, first, lambda g, total: total + sizes_ref[g], jnp.int32(0))

    def one_group(group, carry):
        tile, tiles_before, start, step = carry
        end = start + sizes_ref[first + group]
        first_block = lax.div(start, BLOCK)
        blocks = jnp.where(end > start, lax.div(end + BLOCK - 1, BLOCK) - first_block, 0)
        row_tiles = lax.div(blocks + blocks_per_tile - 1, blocks_per_tile)
        # A group is cut evenly: two tiles of 136 rows beat one of 256 and one of 16.
        per_tile = lax.div(blocks + row_tiles - 1, lax.max(row_tiles, 1))
        tiles_after = tiles_before + row_tiles * column_tiles

        def one_tile(carry):
            tile, step = carry
            column_tile = lax.div(tile - tiles_before, row_tiles)
            row_tile = tile - tiles_before - column_tile * row_tiles
            row = (first_block + row_tile * per_tile) * BLOCK
            work = _Tile(
                weights=layer_ref[0] * groups + group,
                row=row,
                begin=lax.max(row, start),
                end=lax.min(row + per_tile * BLOCK, end),
                column=column_tile * config.columns,
            )
            spanned = work.end - row
            size_class = sum((spanned > r).astype(jnp.int32) for r in config.row_tiles[:-1])
            branches = [functools.partial(body, rows, work) for rows in config.row_tiles]
            return tile + workers, lax.switch(size_class, branches, step)

        tile, step = lax.while_loop(lambda c: c[0] < tiles_after, one_tile, (tile, step))
        return tile, tiles_after, end, step

    tile = lax.axis_index("worker")
    return lax.fori_loop(0, groups, one_group, (tile, jnp.int32(0), start, jnp.int32(0)))[3]


def _load_tile(
    lhs_ref, rhs_ref, lhs_smem, rhs_smem, filled, released,
    k_steps: int, config: TileConfig, rows: int, tile: _Tile, step: Array,
) -> Array:  # fmt: skip
    """Streams a tile's operands through the ring of stages."""

    def one_step(k_step, step):
        slot = lax.rem(step, config.stages)

        @pl.when(step >= config.stages)
        def _():
            plgpu.barrier_wait(released.at[slot])

        k = pl.ds(k_step * config.block_k, config.block_k)
        plgpu.copy_gmem_to_smem(
            rhs_ref.at[tile.weights, k, pl.ds(pl.multiple_of(tile.column, 64), config.columns)],
            rhs_smem.at[slot],
            filled.at[slot],
        )
        plgpu.copy_gmem_to_smem(
            lhs_ref.at[pl.ds(pl.multiple_of(tile.row, BLOCK), rows), k],
            lhs_smem.at[slot, pl.ds(0, rows)],
            filled.at[slot],
        )
        return step + 1

    return lax.fori_loop(0, k_steps, one_step, step)


def _multiply_tile(
    lhs_smem, rhs_smem, out_smem, edge_smem, out_ref, filled, released,
    k_steps: int, config: TileConfig, rows: int, tile: _Tile, step: Array,
) -> Array:  # fmt: skip
    """Multiplies what `_load_tile` streams in and stores this warpgroup's columns."""
    warpgroup = lax.axis_index("warpgroup")
    columns = pl.ds(pl.multiple_of(warpgroup * config.width, 64), config.width)

    def release(step):
        plgpu.barrier_arrive(released.at[lax.rem(step, config.stages)])

    def accumulate(sums):
        def one_step(k_step, step):
            slot = lax.rem(step, config.stages)
            plgpu.barrier_wait(filled.at[slot])
            plgpu.wgmma(
                sums,
                rhs_smem.at[slot, :, columns].transpose((1, 0)),
                lhs_smem.at[slot, pl.ds(0, rows)].transpose((1, 0)),
            )
            plgpu.wgmma_wait(1)  # One product stays in flight; the one before it is done.
            pl.when(k_step > 0)(functools.partial(release, step - 1))
            return step + 1

        last = lax.fori_loop(0, k_steps, one_step, step)
        result = sums[...]
        release(last - 1)
        return result, last

    result, step = pl.run_scoped(
        accumulate, plgpu.WGMMAAccumulatorRef((config.width, rows), jnp.float32)
    )
    result = plgpu.layout_cast(result.astype(out_ref.dtype), plgpu.Layout.WGMMA)
    for index, begin in enumerate(range(0, rows, config.store_rows)):
        count = min(config.store_rows, rows - begin)
        staged = out_smem.at[warpgroup, index % 2, pl.ds(0, count)]
        # Two halves alternate within a tile; a tile begins with both free.
        plgpu.wait_smem_to_gmem(min(index, 1), wait_read_only=True)
        staged.transpose((1, 0))[...] = result[:, begin : begin + count]
        plgpu.commit_smem()
        _store_rows(staged, edge_smem.at[warpgroup], out_ref, tile, tile.row + begin)
        plgpu.commit_smem_to_gmem_group()
    return step


def _store_rows(staged, edge, out_ref, tile: _Tile, row: Array) -> None:
    """Copies staged rows out to `row` on, leaving alone those of neighbouring groups."""
    count, width = staged.shape
    column = pl.multiple_of(tile.column + lax.axis_index("warpgroup") * width, 64)
    columns = pl.ds(column, width)
    row = pl.multiple_of(row, BLOCK)
    whole = (tile.begin <= row) & (row + count <= tile.end)

    @pl.when(whole)
    def _():
        target = out_ref.at[pl.ds(row, count), columns]
        plgpu.copy_smem_to_gmem(staged, target, commit_group=False)

    def one_block(block, _):
        block_row = pl.multiple_of(row + block * BLOCK, BLOCK)
        block_rows = staged.at[pl.ds(pl.multiple_of(block * BLOCK, BLOCK), BLOCK)]
        begin = lax.max(tile.begin, block_row)
        end = lax.min(tile.end, block_row + BLOCK)

        @pl.when(end - begin == BLOCK)
        def _():
            target = out_ref.at[pl.ds(block_row, BLOCK), columns]
            plgpu.copy_smem_to_gmem(block_rows, target, commit_group=False)

        @pl.when(end - begin < BLOCK)
        def _():
            # The swizzle ties eight rows together; single rows leave from an unswizzled copy.
            for part in range(0, width, 64):
                plgpu.commit_smem_to_gmem_group()
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                source = block_rows.at[:, pl.ds(part, 64)]
                edge[...] = plgpu.load(source, layout=EDGE_LAYOUT, optimized=False)
                plgpu.commit_smem()

                def one_row(index, _, part=part):
                    target = out_ref.at[pl.ds(index, 1), pl.ds(column + part, 64)]
                    source = edge.at[pl.ds(index - block_row, 1)]
                    plgpu.copy_smem_to_gmem(source, target, commit_group=False)

                lax.fori_loop(begin, end, one_row, None)

    @pl.when(jnp.logical_not(whole))
    def _():
        first = lax.div(lax.max(tile.begin - row, 0), BLOCK)
        last = lax.div(lax.clamp(0, tile.end - row, count) + BLOCK - 1, BLOCK)
        lax.fori_loop(first, last, one_block, None)


def _multiply_registers(warpgroups: int) -> int:
    """Registers a multiplying thread may hold once the loading threads gave theirs back."""
    # A block gets what its threads were launched with, 8 at a time, out of 65536.
    at_launch = (warpgroups + 1) * min(248, 512 // (warpgroups + 1) // 8 * 8)
    return min(240, (at_launch - LOAD_REGISTERS) // warpgroups // 8 * 8)


def _tiled(shape: tuple[int, ...], dtype: jnp.dtype):
    """Shared memory in the swizzled tiles that wgmma reads and TMA fills without bank conflicts."""
    transforms = (
        plgpu.TilingTransform((BLOCK, 64)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(128),  # pyright: ignore[reportAbstractUsage]
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)
