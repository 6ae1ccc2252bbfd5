"""Decode over pages on Hopper: one query a row, split over the cached positions.

Blocks take equal shares of the cached positions of all rows, see `schedule`. Each share goes to as
many blocks as there are KV heads: they read the same pages at the same time. A block that holds a
part of a row, but not its end, saves its sums; the block with the row's end merges them.

A block is two warpgroups: one copies tiles to shared memory, one computes on them. Pages of float8
take longer to compute on: there two warpgroups do, in turns. Scores are computed transposed, keys
by queries: positions fill the 64 rows of a wgmma tile and the query heads of one KV head its
columns, of which 8 is the least, not 64.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.paged_attention.covered import operand_problems, refuse
from pallas_kernels.paged_attention.decode_load import load_tiles
from pallas_kernels.paged_attention.decode_segments import SegmentComputer, clear_unused
from pallas_kernels.paged_attention.decode_shape import (
    REDUCED,
    DecodeConfig,
    DecodeRefs,
    DecodeShape,
)
from pallas_kernels.paged_attention.float8 import as_wide, pack_scales
from pallas_kernels.paged_attention.limits import pack_limits
from pallas_kernels.paged_attention.schedule import plan_share
from pallas_kernels.paged_attention.swizzle import swizzled_features
from pallas_kernels.paged_attention.tiles import tiled

LOAD_REGISTERS, COMPUTE_REGISTERS = 56, 224
"""Registers of a thread where two warpgroups compute: of the 504 that three start with."""
MAX_GROUP = 64
"""Query heads of a KV head: more would not fit in registers."""


def paged_decode(
    q: Float[Array, "rows heads d"],
    k_pages: Float[Array, "layers pages page kv_heads d"],
    v_pages: Float[Array, "layers pages page kv_heads dv"],
    layer: Int[Array, ""] | int,
    page_table: Int[Array, "rows width"],
    lengths: Int[Array, "rows"],
    *,
    scale: float,
    window: Int[Array, ""] | int | None = None,
    chunk: Int[Array, ""] | int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "heads"] | None = None,
    lows: Int[Array, "rows"] | None = None,
    k_scale: Float[Array, ""] | float | None = None,
    v_scale: Float[Array, ""] | float | None = None,
    config: DecodeConfig,
    interpret: Any = None,
) -> tuple[Float[Array, "rows heads dv"], Float[Array, "rows heads"]]:
    """Attention of one query a row over its pages, and its log-sum-exp; see the reference.

    Instead of a window and a chunk, `lows` may say which of its keys is the first that each row's
    query sees: below its length, or 0 where that is 0.

    Raises NotImplementedError for what the kernel does not cover.
    """
    rows, heads, d = q.shape
    _, pages, page, kv_heads, dv = v_pages.shape
    limits = pack_limits(window, chunk)
    shape = DecodeShape(
        rows=rows,
        kv_heads=kv_heads,
        group=heads // kv_heads,
        d=d,
        dv=dv,
        pages=pages,
        page=page,
        scale=scale,
        soft_cap=soft_cap,
        limited=limits is not None or lows is not None,
        has_sinks=sinks is not None,
        stored=k_pages.dtype.itemsize,
        config=config,
    )
    _check(shape, q, k_pages, v_pages)
    scaled = k_scale is not None or v_scale is not None
    if scaled and not shape.narrow:
        raise NotImplementedError("paged decode on Hopper scales pages of float8 only")
    group, columns = shape.group, shape.columns
    queries = q.reshape(rows * kv_heads, group, d)
    if group > 8 and group != columns:
        queries = jnp.pad(queries, ((0, 0), (0, columns - group), (0, 0)))
    operands = {
        "q": queries,
        "k_pages": k_pages.reshape(-1, kv_heads * d),
        "v_pages": v_pages.reshape(-1, kv_heads * dv),
        "layer": jnp.asarray(layer, jnp.int32).reshape(1),
        "page_table": page_table,
        "lengths": lengths,
    }
    if limits is not None:
        operands["limits"] = limits
    if lows is not None:
        operands["lows"] = lows
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(kv_heads, group)
        operands["sinks"] = jnp.pad(sinks, ((0, 0), (0, columns - group)))
    if shape.narrow:
        operands["q"] = as_wide(queries)
        operands["scales"] = pack_scales(k_scale, v_scale)
    out, lse = _launch(shape, operands, q.dtype, interpret)
    return out[..., :dv].reshape(rows, heads, dv), lse[:, :group].reshape(rows, heads)


def _check(shape: DecodeShape, q: Array, k_pages: Array, v_pages: Array) -> None:
    """Raises NotImplementedError for what the kernel does not cover."""
    config = shape.config
    problems = operand_problems(q, k_pages, v_pages) | {
        f"{shape.group} query heads a KV head; it takes up to {MAX_GROUP}": (
            shape.group > MAX_GROUP
        ),
        f"{shape.kv_heads} KV heads; it takes up to one a block, {config.blocks}": (
            shape.kv_heads > config.blocks
        ),
        f"{shape.group} query heads a KV head of {shape.d} and {shape.dv} features: "
        f"{config.stages} tiles of keys and values fit beside them, and it needs 2 to load ahead": (
            config.stages < 2
        ),
        f"{config.stages} stages for {config.computers} warpgroups; it takes multiples": (
            config.stages % config.computers != 0
        ),
    }
    refuse("paged decode", problems)


def _launch(
    shape: DecodeShape, operands: dict[str, Array], out_dtype: Any, interpret: Any
) -> tuple[Array, Array]:
    config, dtype = shape.config, operands["q"].dtype
    blocks, columns = shape.shares * shape.kv_heads, shape.columns
    wide, slots = jnp.float32, shape.rows * shape.kv_heads
    results = {
        "out": jax.ShapeDtypeStruct((slots, shape.group, shape.value_rows), out_dtype),
        "lse": jax.ShapeDtypeStruct((slots, columns), wide),
        "sums": jax.ShapeDtypeStruct((blocks, shape.value_rows, columns), wide),
        "highest": jax.ShapeDtypeStruct((blocks, columns), wide),
        "totals": jax.ShapeDtypeStruct((blocks, columns), wide),
    }
    stages, kv_block = config.stages, config.kv_block
    key_tiles = functools.partial(tiled, dtype=dtype, swizzle=shape.key_swizzle)
    value_tiles = functools.partial(tiled, dtype=dtype, swizzle=shape.value_swizzle)
    scratch = {
        "q_shared": key_tiles((2, columns, shape.d)),
        "k_shared": tiled(
            (stages, kv_block, shape.d),
            operands["k_pages"].dtype,
            swizzle=swizzled_features(shape.d, shape.stored),
        ),
        "v_shared": tiled(
            (stages, kv_block, shape.value_rows),
            operands["v_pages"].dtype,
            swizzle=shape.stored_swizzle,
        ),
        # Both sides of a product are swizzled alike.
        "weights_shared": value_tiles((config.computers, columns, kv_block)),
        "out_shared": plgpu.SMEM((config.computers, columns, shape.value_rows), out_dtype),
        "q_full": plgpu.Barrier(num_barriers=2),
        "q_free": plgpu.Barrier(num_barriers=2, num_arrivals=config.computers),
        "k_full": plgpu.Barrier(num_barriers=stages, num_arrivals=shape.copies),
        "k_free": plgpu.Barrier(num_barriers=stages),
        "v_full": plgpu.Barrier(num_barriers=stages, num_arrivals=shape.copies),
        "v_free": plgpu.Barrier(num_barriers=stages),
    }
    if shape.narrow and not shape.from_registers:
        scratch["k_wide"] = key_tiles((config.computers, kv_block, shape.d))
        scratch["v_wide"] = value_tiles((config.computers, kv_block, shape.value_rows))
    if config.computers == 2:
        scratch |= {
            "reduced": plgpu.SMEM((2, REDUCED), wide),
            "handed_sums": plgpu.SMEM((shape.value_rows, columns), wide),
            "handed_highest": plgpu.SMEM((columns,), wide),
            "handed_totals": plgpu.SMEM((columns,), wide),
            "handed_full": plgpu.Barrier(num_barriers=2),
            "handed_free": plgpu.Barrier(),
        }
    out, lse, *_ = plgpu.kernel(
        functools.partial(_decode_kernel, shape, (*operands, *results, *scratch)),
        out_type=tuple(results.values()),
        scratch_types=list(scratch.values()),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=config.computers + 1,
        thread_name="warpgroup",
        kernel_name="paged_decode",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(*operands.values())
    return out, lse


def _decode_kernel(shape: DecodeShape, names: tuple[str, ...], *all_refs: Any) -> None:
    refs, config = DecodeRefs(**dict(zip(names, all_refs, strict=True))), shape.config
    block = lax.axis_index("block")
    share, head = (
        lax.div(block, jnp.int32(shape.kv_heads)),
        lax.rem(block, jnp.int32(shape.kv_heads)),
    )
    schedule = plan_share(
        share,
        shape.shares,
        rows=shape.rows,
        tile=shape.copy_rows,
        at_once=64,
        min_tiles=config.min_tiles * shape.copies,
        lengths=refs.lengths,
        limits=refs.limits,
        lows=refs.lows,
        whole=shape.whole if refs.lows is None else 1,
        by_lanes=config.inlined,
    )
    saved = None
    if config.synchronize:
        saved = pl.get_global(plgpu.SemaphoreType.REGULAR((shape.shares * shape.kv_heads,)))

    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == config.computers)
    def _():
        if config.computers == 2:
            plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")
        load_tiles(shape, refs, schedule, head)

    @pl.when(warpgroup < config.computers)
    def _():
        if config.computers == 2:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        own = refs.of_warpgroup(warpgroup)

        @pl.when(warpgroup == 0)
        def _():
            clear_unused(shape, own, share, head)

        computer = SegmentComputer(
            shape=shape,
            refs=own,
            schedule=schedule,
            warpgroup=warpgroup,
            share=share,
            head=head,
            saved=saved,
        )
        computer.compute_all()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
