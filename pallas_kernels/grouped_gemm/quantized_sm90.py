"""Grouped GEMM of float8 operands with scales in blocks, for Hopper: `mosaic_sm90` with scales."""

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
from pallas_kernels.grouped_gemm.quantize import SCALE_BLOCK, QuantizedMatrices, QuantizedRows
from pallas_kernels.grouped_gemm.quantized_products import (
    UNIT,
    Stages,
    multiply_across,
    multiply_upright,
    skip_tile,
    unit_columns,
)
from pallas_kernels.grouped_gemm.scattered_rows import (
    MAX_SCALES,
    ScatteredRows,
    check_scattered,
    stage_rows,
)
from pallas_kernels.grouped_gemm.store import (
    activate,
    add_bias,
    store_memory,
    store_tile,
    store_upright,
    tiled,
)
from pallas_kernels.grouped_gemm.tiles import BLOCK, Tile, TileConfig, TileWalk, round_up


def grouped_gemm(
    lhs: QuantizedRows,
    rhs: QuantizedMatrices,
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

    Row r is that of `lhs` at `row_index[r]` where there is an index; groups then begin at whole
    blocks.

    Raises NotImplementedError for shapes that the kernel does not cover.
    """
    parts = 1 if activation is None else 2
    check_covered(rhs, config, activation)
    if row_index is not None:
        check_scattered(row_alignment)
        if config.max_rows > MAX_SCALES:
            raise NotImplementedError(
                f"needs tiles of at most {MAX_SCALES} rows for scattered rows with scales, got "
                f"{config.max_rows}"
            )
    layers, groups, n, k = rhs.values.shape
    values, scales = lhs
    rows = values.shape[0] if row_index is None else row_index.size
    padding = -rows % BLOCK
    if row_index is None and padding:
        values = jnp.pad(values, ((0, padding), (0, 0)))
        scales = jnp.pad(scales, ((0, 0), (0, padding)))
    out = launch(
        functools.partial(
            _kernel, groups=groups, activation=activation, row_alignment=row_alignment
        ),
        [
            values,
            scales,
            rhs.values.reshape(layers * groups, n, k),
            rhs.scales.reshape(layers * groups, *rhs.scales.shape[2:]),
            group_sizes,
        ],
        jax.ShapeDtypeStruct((rows + padding, n // parts), jnp.bfloat16),
        dict(
            lhs_smem=tiled((config.stages, stage_rows(config), SCALE_BLOCK), values.dtype),
            rhs_smem=tiled((config.stages, config.columns, SCALE_BLOCK), values.dtype),
            # A copy's target begins at a multiple of 128 bytes.
            scale_smem=plgpu.SMEM((config.stages, round_up(config.max_rows, 32)), jnp.float32),
            **store_memory(config, parts, jnp.dtype(jnp.bfloat16), row_alignment),
        ),
        row_copies=2,
        other_copies=parts,
        layer=layer,
        first_group=first_group,
        row_index=row_index,
        bias=bias,
        config=config,
        num_sms=num_sms,
        name="grouped_gemm_float8",
        interpret=interpret,
    )
    return out[:rows] if padding else out


def check_covered(rhs: QuantizedMatrices, config: TileConfig, activation: str | None) -> None:
    """Raises NotImplementedError, with the reason, for what the kernel does not cover."""
    n, k = rhs.values.shape[2:]
    needed = SCALE_BLOCK if activation is None else 2 * SCALE_BLOCK
    if not config.upright:
        needed = max(needed, config.columns)
    if k % SCALE_BLOCK:
        raise NotImplementedError(f"needs k to be a multiple of {SCALE_BLOCK}, got {k}")
    if n % needed:
        raise NotImplementedError(f"needs n to be a multiple of {needed}, got {n}")
    if activation is not None and config.width != 2 * UNIT:
        raise NotImplementedError(
            f"needs a width of {UNIT} columns of gate and as many of up, got {config.width} in all"
        )


def _kernel(
    lhs_ref, lhs_scale_ref, rhs_ref, rhs_scale_ref, sizes_ref, layer_ref, first_ref, *others,
    lhs_smem, rhs_smem, scale_smem, out_smem, filled, released,
    groups: int, activation: str | None, row_alignment: int, config: TileConfig,
    is_scattered: bool, edge_smem=None, row_barriers=None,
):  # fmt: skip
    *others, out_ref = others
    scattered = ScatteredRows(lhs_ref, others.pop(0), row_barriers) if is_scattered else None
    bias_ref = others
    warpgroup = lax.axis_index("warpgroup")
    parts = 1 if activation is None else 2
    n, k_steps = rhs_ref.shape[1], rhs_scale_ref.shape[2]
    walk = TileWalk(
        sizes=sizes_ref, layer=layer_ref, first_group=first_ref, groups=groups,
        columns=n // parts, tile_columns=config.columns // parts,
        row_alignment=row_alignment, config=config,
    )  # fmt: skip
    stages = Stages(
        lhs=lhs_smem, rhs=rhs_smem, lhs_scales=scale_smem, rhs_scales=rhs_scale_ref,
        filled=filled, released=released, scattered=scattered,
    )  # fmt: skip

    @pl.when(warpgroup == config.warpgroups)
    def load():
        plgpu.set_max_registers(load_registers(config.warpgroups), action="decrease")
        load_tile = functools.partial(_load_tile, lhs_ref, lhs_scale_ref, rhs_ref, stages, parts)
        if scattered is not None:
            scattered.start()
        drain(walk.for_each(load_tile), released)

    @pl.when(warpgroup < config.warpgroups)
    def multiply():
        plgpu.set_max_registers(multiply_registers(config.warpgroups), action="increase")

        def across(rows, tile, step):
            columns = unit_columns(tile, n, parts, config)
            sums = multiply_across(stages, columns, parts, config, rows, tile, step)
            results = activate(add_bias(sums, columns, bias_ref, tile, axis=0), activation)
            store_tile(results, out_smem, edge_smem, out_ref, tile)
            return step + k_steps

        def upright(rows, tile, step):
            del rows
            has_rows = tile.row + warpgroup * UNIT < tile.end

            @pl.when(has_rows)
            def _():
                columns = unit_columns(tile, n, parts, config)
                sums = multiply_upright(stages, columns, config, tile, step)
                results = activate(add_bias(sums, columns, bias_ref, tile, axis=1), activation)
                store_upright(results, out_smem, edge_smem, out_ref, tile)

            pl.when(jnp.logical_not(has_rows))(functools.partial(skip_tile, stages, step))
            return step + k_steps

        walk.for_each(upright if config.upright else across)
        plgpu.wait_smem_to_gmem(0)


def _load_tile(
    lhs_ref, lhs_scale_ref, rhs_ref, stages: Stages, parts: int,
    rows: int, tile: Tile, step: Array,
) -> Array:  # fmt: skip
    """Streams a tile's operands through the ring of stages."""
    count, columns = stages.rhs.shape[:2]
    tile_rows = pl.ds(pl.multiple_of(tile.row, BLOCK), rows)
    scattered = stages.scattered
    scattered_rows = None if scattered is None else scattered.of_tile(tile, rows)

    def one_step(k_step, step):
        slot = lax.rem(step, count)

        @pl.when(step >= count)
        def _():
            plgpu.barrier_wait(stages.released.at[slot])
            if scattered is None:
                # Scales were read by ordinary loads; the copies that replace them come after those.
                plgpu.commit_smem()

        k = pl.ds(k_step * SCALE_BLOCK, SCALE_BLOCK)
        filled = stages.filled.at[slot]
        for part in range(parts):
            # Columns past the last come as zeros, and nothing is stored of them.
            column = pl.multiple_of(part * (rhs_ref.shape[1] // parts) + tile.column, UNIT)
            source = rhs_ref.at[tile.weights, pl.ds(column, columns // parts), k]
            mine = pl.ds(part * (columns // parts), columns // parts)
            plgpu.copy_gmem_to_smem(source, stages.rhs.at[slot, mine], filled)
        if scattered_rows is not None:
            scattered_rows.copy(stages.lhs.at[slot], k_step)
            scattered_rows.copy_scales(lhs_scale_ref, stages.lhs_scales.at[slot], k_step)
            scattered_rows.rows.end_step(slot, stages.filled)
            return step + 1
        lhs, scales = lhs_ref.at[tile_rows, k], lhs_scale_ref.at[k_step, tile_rows]
        plgpu.copy_gmem_to_smem(lhs, stages.lhs.at[slot, pl.ds(0, rows)], filled)
        plgpu.copy_gmem_to_smem(scales, stages.lhs_scales.at[slot, pl.ds(0, rows)], filled)
        return step + 1

    return lax.fori_loop(0, lhs_scale_ref.shape[0], one_step, step)
