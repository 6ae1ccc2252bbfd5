"""Grouped GEMM for Hopper: wgmma fed by TMA, one persistent warp-specialised kernel.

The product is computed transposed, `out^T = rhs^T lhs^T`. Tensor cores take 64 rows at a time on
one side and any multiple of eight on the other; with the weights on the fixed side, a group of 3
rows costs 8 and a group of 130 costs 136, where the usual orientation would pay for 64 and 192.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_gemm.pipeline_sm90 import (
    drain,
    launch,
    load_registers,
    multiply_registers,
)
from pallas_kernels.grouped_gemm.scattered_rows import (
    ScatteredRows,
    check_scattered,
    stage_rows,
)
from pallas_kernels.grouped_gemm.store import activate, add_bias, store_memory, store_tile, tiled
from pallas_kernels.grouped_gemm.tiles import BLOCK, Tile, TileConfig, TileWalk


def grouped_gemm(
    lhs: Float[Array, "lhs_rows k"],
    rhs: Float[Array, "layers groups k n"],
    group_sizes: Int[Array, "all_groups"],
    layer: Int[Array, ""] | int,
    *,
    row_index: Int[Array, "rows"] | None = None,
    bias: Float[Array, "layers groups n"] | None = None,
    activation: str | None = None,
    first_group: Int[Array, ""] | int = 0,
    row_alignment: int = 1,
    config: TileConfig,
    num_sms: int,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Float[Array, "rows out"]:
    """Multiplies each group's rows with that group's matrix; rows of absent groups are not written.

    Row r is `lhs[row_index[r]]` where there is an index; groups then begin at whole blocks.

    Raises NotImplementedError for shapes and types that the kernel does not cover.
    """
    parts = 1 if activation is None else 2
    check_covered(lhs, rhs, config, activation)
    if row_index is not None:
        check_scattered(row_alignment)
    layers, groups, k, n = rhs.shape
    rows = lhs.shape[0] if row_index is None else row_index.size
    padding = -rows % BLOCK
    if row_index is None and padding:
        lhs = jnp.pad(lhs, ((0, padding), (0, 0)))
    out = launch(
        functools.partial(
            _kernel, groups=groups, activation=activation, row_alignment=row_alignment
        ),
        [lhs, rhs.reshape(layers * groups, k, n), group_sizes],
        jax.ShapeDtypeStruct((rows + padding, n // parts), lhs.dtype),
        dict(
            lhs_smem=tiled((config.stages, stage_rows(config), config.block_k), lhs.dtype),
            rhs_smem=tiled(
                (config.stages, parts, config.block_k, config.columns // parts), rhs.dtype
            ),
            **store_memory(config, parts, lhs.dtype, row_alignment),
        ),
        row_copies=1,
        other_copies=parts,
        layer=layer,
        first_group=first_group,
        row_index=row_index,
        bias=bias,
        config=config,
        num_sms=num_sms,
        name="grouped_gemm",
        interpret=interpret,
    )
    return out[:rows] if padding else out


def check_covered(lhs: Array, rhs: Array, config: TileConfig, activation: str | None) -> None:
    """Raises NotImplementedError, with the reason, for what the kernel does not cover."""
    k, n = rhs.shape[2:]
    if lhs.dtype != jnp.bfloat16 or rhs.dtype != jnp.bfloat16:
        raise NotImplementedError(f"needs bfloat16 operands, got {lhs.dtype} and {rhs.dtype}")
    if k % config.block_k:
        raise NotImplementedError(f"needs k to be a multiple of {config.block_k}, got {k}")
    if n % config.columns:
        raise NotImplementedError(f"needs n to be a multiple of {config.columns}, got {n}")
    if activation is not None and config.width % 128:
        raise NotImplementedError(
            f"needs a width of 64 columns of gate and as many of up, got {config.width} in all"
        )


def _kernel(
    lhs_ref, rhs_ref, sizes_ref, layer_ref, first_ref, *others,
    lhs_smem, rhs_smem, out_smem, filled, released,
    groups: int, activation: str | None, row_alignment: int, config: TileConfig,
    is_scattered: bool, edge_smem=None, row_barriers=None,
):  # fmt: skip
    *others, out_ref = others
    scattered = ScatteredRows(lhs_ref, others.pop(0), row_barriers) if is_scattered else None
    bias_ref = others
    warpgroup = lax.axis_index("warpgroup")
    parts, _, part_columns = rhs_smem.shape[1:]
    walk = TileWalk(
        sizes=sizes_ref, layer=layer_ref, first_group=first_ref, groups=groups,
        columns=rhs_ref.shape[2] // parts, tile_columns=part_columns,
        row_alignment=row_alignment, config=config,
    )  # fmt: skip
    k_steps = rhs_ref.shape[1] // config.block_k

    @pl.when(warpgroup == config.warpgroups)
    def load():
        plgpu.set_max_registers(load_registers(config.warpgroups), action="decrease")
        load_tile = functools.partial(
            _load_tile,
            lhs_ref, rhs_ref, lhs_smem, rhs_smem, filled, released, k_steps, config, scattered,
        )  # fmt: skip
        if scattered is not None:
            scattered.start()
        drain(walk.for_each(load_tile), released)

    @pl.when(warpgroup < config.warpgroups)
    def multiply():
        plgpu.set_max_registers(multiply_registers(config.warpgroups), action="increase")

        def one_tile(rows, tile, step):
            sums, step = _multiply_tile(
                lhs_smem, rhs_smem, filled, released, k_steps, config, scattered, rows, step
            )
            part_width = config.width // parts
            column = tile.column + warpgroup * part_width
            columns = [column + part * (rhs_ref.shape[2] // parts) for part in range(parts)]
            results = activate(add_bias(sums, columns, bias_ref, tile, axis=0), activation)
            store_tile(results, out_smem, edge_smem, out_ref, tile)
            return step

        walk.for_each(one_tile)
        plgpu.wait_smem_to_gmem(0)


def _load_tile(
    lhs_ref, rhs_ref, lhs_smem, rhs_smem, filled, released,
    k_steps: int, config: TileConfig, scattered: ScatteredRows | None,
    rows: int, tile: Tile, step: Array,
) -> Array:  # fmt: skip
    """Streams a tile's operands through the ring of stages."""
    parts, _, part_columns = rhs_smem.shape[1:]
    scattered_rows = None if scattered is None else scattered.of_tile(tile, rows)

    def one_step(k_step, step):
        slot = lax.rem(step, config.stages)

        @pl.when(step >= config.stages)
        def _():
            plgpu.barrier_wait(released.at[slot])

        k = pl.ds(k_step * config.block_k, config.block_k)
        for part in range(parts):
            column = pl.multiple_of(part * (rhs_ref.shape[2] // parts) + tile.column, 64)
            plgpu.copy_gmem_to_smem(
                rhs_ref.at[tile.weights, k, pl.ds(column, part_columns)],
                rhs_smem.at[slot, part],
                filled.at[slot],
            )
        if scattered_rows is not None:
            scattered_rows.copy(lhs_smem.at[slot], k_step)
            scattered_rows.rows.end_step(slot, filled)
            return step + 1
        plgpu.copy_gmem_to_smem(
            lhs_ref.at[pl.ds(pl.multiple_of(tile.row, BLOCK), rows), k],
            lhs_smem.at[slot, pl.ds(0, rows)],
            filled.at[slot],
        )
        return step + 1

    return lax.fori_loop(0, k_steps, one_step, step)


def _multiply_tile(
    lhs_smem, rhs_smem, filled, released, k_steps: int, config: TileConfig,
    scattered: ScatteredRows | None, rows: int, step: Array,
) -> tuple[list[Array], Array]:  # fmt: skip
    """Multiplies what `_load_tile` streams in: this warpgroup's columns of each part, and step."""
    parts = rhs_smem.shape[1]
    width = config.width // parts
    columns = pl.ds(pl.multiple_of(lax.axis_index("warpgroup") * width, 64), width)

    def release(step):
        plgpu.barrier_arrive(released.at[lax.rem(step, config.stages)])

    def accumulate(*sums):
        def one_step(k_step, step):
            slot = lax.rem(step, config.stages)
            plgpu.barrier_wait(filled.at[slot])
            if scattered is not None:
                scattered.wait(step, slot)
            for part in range(parts):
                plgpu.wgmma(
                    sums[part],
                    rhs_smem.at[slot, part, :, columns].transpose((1, 0)),
                    lhs_smem.at[slot, pl.ds(0, rows)].transpose((1, 0)),
                )
            plgpu.wgmma_wait(parts)  # One step stays in flight; the one before it is done.
            pl.when(k_step > 0)(functools.partial(release, step - 1))
            return step + 1

        last = lax.fori_loop(0, k_steps, one_step, step)
        results = [part[...] for part in sums]
        release(last - 1)
        return results, last

    accumulator = plgpu.WGMMAAccumulatorRef((width, rows), jnp.float32)
    return pl.run_scoped(accumulate, *[accumulator] * parts)
