"""Decode of multi-head latent attention on Hopper: many query heads over one latent vector a token.

Values are the first features of the keys, so that a tile is read once for both products. With 64
query heads or more the tensor cores are the bound, not the memory. Blocks take equal shares of the
cached positions of all rows, see `schedule`, each 64 query heads of them.

A block is three warpgroups: one copies tiles to shared memory, two compute. No thread could hold
the sums of all 512 value features, so each of these has half of them, of all tiles, and computes
the weights of every other tile, which the other reads from shared memory. So the tensor cores work
for one while the other turns scores into weights: the idea is FlashMLA's (DeepSeek, 2025).
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.paged_attention.covered import page_problems, refuse
from pallas_kernels.paged_attention.mla_load import load_tiles
from pallas_kernels.paged_attention.mla_parts import Parts
from pallas_kernels.paged_attention.mla_shape import (
    HEADS,
    KV_BLOCK,
    ROPE,
    SIDES,
    MlaConfig,
    MlaRefs,
    MlaShape,
)
from pallas_kernels.paged_attention.mla_sides import attend_side
from pallas_kernels.paged_attention.rows import full, store
from pallas_kernels.paged_attention.schedule import plan_share
from pallas_kernels.paged_attention.swizzle import swizzled_features
from pallas_kernels.paged_attention.tiles import tiled

LOAD = SIDES
"""The warpgroup after those that compute."""
COMPUTE_REGISTERS, LOAD_REGISTERS = 232, 40
"""Registers of a thread: the 504 that three warpgroups start with."""


def mla_decode(
    q: Float[Array, "rows heads d"],
    pages: Float[Array, "layers pages page 1 d"],
    layer: Int[Array, ""] | int,
    page_table: Int[Array, "rows width"],
    lengths: Int[Array, "rows"],
    *,
    scale: float,
    value_dim: int,
    config: MlaConfig,
    interpret: Any = None,
) -> tuple[Float[Array, "rows heads dv"], Float[Array, "rows heads"]]:
    """Attention of one query a row over its pages, and its log-sum-exp; see the reference.

    Raises NotImplementedError for what the kernel does not cover.
    """
    rows, heads, d = q.shape
    _check(q, pages, value_dim, config)
    head_blocks = -(-heads // HEADS)
    # Copies of queries move eight at a time.
    padding = -heads % (8 * head_blocks)
    shape = MlaShape(
        rows=rows,
        head_blocks=head_blocks,
        heads=(heads + padding) // head_blocks,
        dv=value_dim,
        pages=pages.shape[1],
        page=pages.shape[2],
        scale=scale,
        config=config,
    )
    operands = {
        "q": _pad_heads(q, padding).reshape(rows * head_blocks, shape.heads, d),
        "pages": pages.reshape(-1, d),
        "layer": jnp.asarray(layer, jnp.int32).reshape(1),
        "page_table": page_table,
        "lengths": lengths,
    }
    out, lse = _launch(shape, operands, interpret)
    out, lse = out[:, : shape.heads], lse[:, : shape.heads]
    out, lse = out.reshape(rows, -1, value_dim), lse.reshape(rows, -1)
    return out[:, :heads], lse[:, :heads]


def _pad_heads(q: Array, padding: int) -> Array:
    return jnp.pad(q, ((0, 0), (0, padding), (0, 0))) if padding else q


def _check(q: Array, pages: Array, value_dim: int, config: MlaConfig) -> None:
    """Raises NotImplementedError for what the kernel does not cover."""
    _, heads, d = q.shape
    kv_heads = pages.shape[3]
    problems = {
        f"queries of {q.dtype} and pages of {pages.dtype}; it takes bfloat16 or float16, one "
        "for both": q.dtype != pages.dtype or q.dtype not in (jnp.bfloat16, jnp.float16),
        f"keys of {d} features and values of {value_dim} of them; it takes {ROPE} more of keys "
        "than of values, and 256 or 512 of these": (
            d != value_dim + ROPE or value_dim not in (256, 512)
        ),
        f"{kv_heads} KV heads; it takes one": kv_heads != 1,
        f"{heads} query heads; it takes up to {HEADS} a block of {config.blocks}": (
            heads > HEADS * config.blocks
        ),
        **page_problems(pages),
    }
    refuse("latent attention", problems)


def _launch(shape: MlaShape, operands: dict[str, Array], interpret: Any) -> tuple[Array, Array]:
    dtype = operands["q"].dtype
    blocks, slots = shape.shares * shape.head_blocks, shape.rows * shape.head_blocks
    wide = jnp.float32
    results = {
        "out": jax.ShapeDtypeStruct((slots, HEADS, shape.dv), dtype),
        "lse": jax.ShapeDtypeStruct((slots, HEADS), wide),
        "sums": jax.ShapeDtypeStruct((2 * blocks, HEADS * shape.dv), wide),
        "saved_lse": jax.ShapeDtypeStruct((2 * blocks, HEADS), wide),
    }
    tiles = functools.partial(tiled, dtype=dtype, swizzle=swizzled_features(ROPE))
    scratch = {
        "q_latent": tiles((SIDES, HEADS, shape.half)),
        "q_rope": tiles((HEADS, ROPE)),
        "latent": tiles((SIDES, SIDES, KV_BLOCK, shape.half)),
        "rope": tiles((SIDES, KV_BLOCK, ROPE)),
        "highest": plgpu.SMEM((SIDES, HEADS), wide),
        "totals": plgpu.SMEM((2, SIDES, HEADS), wide),
        "q_full": plgpu.Barrier(num_arrivals=SIDES + 1),
        "q_free": plgpu.Barrier(num_arrivals=SIDES),
        "latent_full": plgpu.Barrier(num_barriers=SIDES * SIDES, num_arrivals=shape.copies),
        "latent_free": plgpu.Barrier(num_barriers=SIDES * SIDES),
        "rope_full": plgpu.Barrier(num_barriers=SIDES, num_arrivals=shape.copies),
        "rope_free": plgpu.Barrier(num_barriers=SIDES, num_arrivals=SIDES),
        "weights_full": plgpu.Barrier(num_barriers=SIDES),
        "totals_full": plgpu.Barrier(num_barriers=2 * SIDES),
        "block_saved": plgpu.Barrier(num_arrivals=SIDES),
    }
    out, lse, *_ = plgpu.kernel(
        functools.partial(_mla_kernel, shape, (*operands, *results, *scratch)),
        out_type=tuple(results.values()),
        scratch_types=list(scratch.values()),
        grid=(shape.shares, shape.head_blocks),
        grid_names=("share", "head_block"),
        num_threads=SIDES + 1,
        thread_name="warpgroup",
        kernel_name="mla_decode",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(*operands.values())
    return out, lse


def _mla_kernel(shape: MlaShape, names: tuple[str, ...], *all_refs: Any) -> None:
    refs, config = MlaRefs(**dict(zip(names, all_refs, strict=True))), shape.config
    share, head_block = lax.axis_index("share"), lax.axis_index("head_block")
    warpgroup = lax.axis_index("warpgroup")
    with jax.named_scope("plan"):
        schedule = plan_share(
            share,
            shape.shares,
            rows=shape.rows,
            tile=KV_BLOCK,
            at_once=32,
            min_tiles=config.min_tiles,
            lengths=refs.lengths,
            limits=None,
            row_cost=config.row_cost,
            by_lanes=config.in_registers,
        )
    saved = None
    if config.synchronize:
        saved = pl.get_global(plgpu.SemaphoreType.REGULAR((shape.shares * shape.head_blocks,)))
    parts = Parts(
        shape=shape, refs=refs, schedule=schedule, share=share, head_block=head_block, saved=saved
    )

    @pl.when(warpgroup == LOAD)
    def _():
        plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")
        _clear_unused(shape, refs, share, head_block)
        load_tiles(shape, refs, schedule, head_block)

    for own in range(SIDES):

        @pl.when(warpgroup == own)
        def _(own=own):
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            attend_side(shape, refs, schedule, head_block, parts, own=own)


def _clear_unused(shape: MlaShape, refs: MlaRefs, share: Array, head_block: Array) -> None:
    """Writes 0 and -inf for the rows of length 0, which have no tiles."""

    def clear_row(index: Array, _: None) -> None:
        row = share + index * shape.shares

        @pl.when(refs.lengths[row] == 0)
        def _():
            slot = row * shape.head_blocks + head_block
            store(refs.lse.at[slot], full((HEADS,), -jnp.inf))
            for column in range(0, shape.dv, ROPE):
                zeros = full((HEADS, ROPE), 0.0, refs.out.dtype)
                store(refs.out.at[slot, :, pl.ds(column, ROPE)], zeros)

    lax.fori_loop(0, pl.cdiv(shape.rows - share, jnp.int32(shape.shares)), clear_row, None)
