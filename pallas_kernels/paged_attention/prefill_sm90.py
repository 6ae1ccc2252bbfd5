"""Prefill over pages on Hopper: ragged rows of many queries, in one launch.

Queries are cut into tiles on the device, see `prefill_plan`; the blocks, one on each
multiprocessor, walk over them. A block is three warpgroups: one copies pages to shared memory, two
compute, on two query heads of the same KV head where there are, so that they read the same tiles.
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
from pallas_kernels.paged_attention.float8 import as_wide, pack_scales
from pallas_kernels.paged_attention.limits import pack_limits
from pallas_kernels.paged_attention.prefill_load import load_items
from pallas_kernels.paged_attention.prefill_plan import Plan, gather_tokens, plan_tiles
from pallas_kernels.paged_attention.prefill_shape import (
    TOKEN_ALIGNMENT,
    WARPGROUP_ROWS,
    WARPGROUPS,
    PrefillConfig,
    PrefillRefs,
    PrefillShape,
)
from pallas_kernels.paged_attention.prefill_softmax import compute_items
from pallas_kernels.paged_attention.tiles import COPY_ALIGNMENT, tiled

LOAD_REGISTERS, COMPUTE_REGISTERS = 40, 232
"""Registers of a thread: of the 504 that three warpgroups start with."""


def paged_prefill(
    q: Float[Array, "tokens heads d"],
    k_pages: Float[Array, "layers pages page kv_heads d"],
    v_pages: Float[Array, "layers pages page kv_heads dv"],
    layer: Int[Array, ""] | int,
    page_table: Int[Array, "rows width"],
    query_start: Int[Array, "rows_plus_one"],
    lengths: Int[Array, "rows"],
    *,
    scale: float,
    window: Int[Array, ""] | int | None = None,
    chunk: Int[Array, ""] | int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "heads"] | None = None,
    k_scale: Float[Array, ""] | float | None = None,
    v_scale: Float[Array, ""] | float | None = None,
    config: PrefillConfig,
    interpret: Any = None,
) -> tuple[Float[Array, "tokens heads dv"], Float[Array, "tokens heads"]]:
    """Causal attention of ragged rows over their pages, and its log-sum-exp; see the reference.

    Raises NotImplementedError for what the kernel does not cover.
    """
    tokens, heads, d = q.shape
    _, pages, page, kv_heads, dv = v_pages.shape
    limits = pack_limits(window, chunk)
    shape = PrefillShape(
        tokens=tokens + -tokens % TOKEN_ALIGNMENT,
        heads=heads,
        kv_heads=kv_heads,
        d=d,
        dv=dv,
        pages=pages,
        page=page,
        scale=scale,
        soft_cap=soft_cap,
        windowed=window is not None,
        chunked=chunk is not None,
        has_sinks=sinks is not None,
        stored=k_pages.dtype.itemsize,
        config=config,
    )
    _check(shape, q, k_pages, v_pages)
    if not shape.narrow and (k_scale is not None or v_scale is not None):
        raise NotImplementedError("paged prefill on Hopper scales pages of float8 only")
    plan = plan_tiles(
        query_start,
        lengths,
        limits,
        tokens=tokens,
        tile_tokens=shape.item_tokens,
        kv_block=config.kv_block,
        kv_alignment=shape.copy_rows,
    )
    queries = (as_wide(q) if shape.narrow else q).reshape(tokens, heads * d)
    operands = {
        "q": jnp.pad(queries, ((0, shape.tokens - tokens), (0, 0))),
        "k_pages": k_pages.reshape(-1, kv_heads * d),
        "v_pages": v_pages.reshape(-1, kv_heads * dv),
        "layer": jnp.asarray(layer, jnp.int32).reshape(1),
        "page_table": page_table,
        "tiles": plan.tiles,
        "tile_count": plan.count,
    }
    if limits is not None:
        operands["limits"] = limits
    if sinks is not None:
        operands["sinks"] = sinks.astype(jnp.float32)
    if shape.narrow:
        operands["scales"] = pack_scales(k_scale, v_scale)
    out, lse = _launch(shape, plan, operands, q.dtype, interpret)
    lse = gather_tokens(plan, lse, tokens=tokens, tile_tokens=shape.item_tokens)
    return out[:tokens].reshape(tokens, heads, dv), lse


def _check(shape: PrefillShape, q: Array, k_pages: Array, v_pages: Array) -> None:
    """Raises NotImplementedError for what the kernel does not cover."""
    stages = shape.config.stages
    problems = operand_problems(q, k_pages, v_pages) | {
        f"a scale of {shape.scale}; it takes positive ones": shape.scale <= 0,
        # A tile of float8 waits beside the stages.
        f"{stages} stages; it needs 2 to load ahead": stages + shape.narrow < 2,
    }
    refuse("paged prefill", problems)


def _launch(
    shape: PrefillShape, plan: Plan, operands: dict[str, Array], out_dtype: Any, interpret: Any
) -> tuple[Array, Array]:
    config, dtype = shape.config, operands["q"].dtype
    tiles = plan.tiles.shape[0]
    results = {
        "out": jax.ShapeDtypeStruct((shape.tokens, shape.heads * shape.dv), out_dtype),
        "lse": jax.ShapeDtypeStruct((tiles, shape.heads, shape.item_tokens), jnp.float32),
    }
    stages, kv_block = config.stages, config.kv_block
    key_tiles = functools.partial(tiled, dtype=dtype, swizzle=shape.key_swizzle)
    value_tiles = functools.partial(tiled, dtype=dtype, swizzle=shape.chunk)
    row_bytes = shape.chunk * jnp.dtype(out_dtype).itemsize
    # Copies say that a tile is full, or the warpgroup that widens it.
    arrivals = 1 if shape.narrow else shape.copies
    scratch = {
        "q_shared": key_tiles((shape.query_stages, WARPGROUPS, WARPGROUP_ROWS, shape.d)),
        "k_shared": key_tiles((stages, kv_block, shape.d)),
        "v_shared": value_tiles((stages, kv_block, shape.dv)),
        "edge_shared": plgpu.SMEM(
            (WARPGROUPS, TOKEN_ALIGNMENT, COPY_ALIGNMENT // row_bytes, shape.chunk), out_dtype
        ),
        "q_full": plgpu.Barrier(num_barriers=shape.query_stages, num_arrivals=WARPGROUPS),
        "q_free": plgpu.Barrier(num_barriers=shape.query_stages, num_arrivals=WARPGROUPS),
        "k_full": plgpu.Barrier(num_barriers=stages, num_arrivals=arrivals),
        "k_free": plgpu.Barrier(num_barriers=stages, num_arrivals=WARPGROUPS),
        "v_full": plgpu.Barrier(num_barriers=stages, num_arrivals=arrivals),
        "v_free": plgpu.Barrier(num_barriers=stages, num_arrivals=WARPGROUPS),
        "v_landed": plgpu.Barrier(num_arrivals=shape.copies),
        "turn": plgpu.Barrier(num_barriers=WARPGROUPS),
    }
    if not shape.shares_queries:
        scratch["out_shared"] = tiled(
            (WARPGROUPS, shape.out_stages, WARPGROUP_ROWS, shape.chunk),
            out_dtype,
            swizzle=shape.chunk,
        )
    if shape.narrow:
        scratch["k_landed"] = plgpu.Barrier(num_arrivals=shape.copies)
        for name, features in (("k", shape.d), ("v", shape.dv)):
            scratch[f"{name}_narrow"] = tiled(
                (kv_block, features),
                operands[f"{name}_pages"].dtype,
                swizzle=shape.stored_swizzle(features),
            )
    if not config.in_registers:
        scratch["weights_shared"] = value_tiles((WARPGROUPS, WARPGROUP_ROWS, kv_block))
    out, lse = plgpu.kernel(
        functools.partial(_prefill_kernel, shape, (*operands, *results, *scratch)),
        out_type=tuple(results.values()),
        scratch_types=list(scratch.values()),
        grid=(config.blocks,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="paged_prefill",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(*operands.values())
    return out, lse


def _prefill_kernel(shape: PrefillShape, names: tuple[str, ...], *all_refs: Any) -> None:
    refs = PrefillRefs(**dict(zip(names, all_refs, strict=True)))
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == WARPGROUPS)
    def _():
        plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")
        load_items(shape, refs)

    @pl.when(warpgroup < WARPGROUPS)
    def _():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        compute_items(shape, refs)
