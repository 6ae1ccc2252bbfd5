"""Writes rows into pages on Hopper, in place: copies alone, through shared memory.

A scatter of XLA moves an element a thread, at a tenth of the rate of the memory.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.paged_attention.tiles import COPY_ALIGNMENT

SHARED_BYTES = 128 * 1024
"""Shared memory of a block for rows, unless it takes more for one of each array."""
MOST_SHARED_BYTES = 224 * 1024
MOST_AT_ONCE = 16
"""Tokens that are copied at once, at most."""
STAGES = 2
"""Tokens on their way in while others are on their way out."""


def store_rows(
    pools: Sequence[Float[Array, "layers pages page kv_heads _"]],
    layer: Int[Array, ""] | int,
    rows: Sequence[Float[Array, "tokens kv_heads _"]],
    slots: Int[Array, "tokens"],
    *,
    num_sms: int,
    interpret: Any = None,
) -> tuple[Array, ...]:
    """Stores a row of each array for each token at slots = page * page_size + offset, -1 nowhere.

    Raises NotImplementedError for what the kernel does not cover.
    """
    _check(pools)
    tokens = len(slots)
    if tokens == 0:
        return tuple(pools)
    rows = tuple(row.astype(pool.dtype) for row, pool in zip(rows, pools, strict=True))
    row_bytes = sum(row.nbytes for row in rows) // tokens
    at_once = min(MOST_AT_ONCE, SHARED_BYTES // (STAGES * row_bytes), -(-tokens // num_sms))
    at_once = max(1, at_once)
    chunks = -(-tokens // at_once)
    blocks = min(num_sms, chunks)
    scratch = [plgpu.SMEM((STAGES, at_once, *row.shape[1:]), row.dtype) for row in rows]
    kernel = plgpu.kernel(
        functools.partial(_store_kernel, len(pools), tokens, at_once, chunks, blocks),
        scratch_types=[*scratch, plgpu.Barrier(num_barriers=STAGES, num_arrivals=len(pools))],
        grid=(blocks,),
        grid_names=("block",),
        kernel_name="store_rows",
        interpret=interpret,
    )
    number = jnp.asarray(layer, jnp.int32).reshape(1)

    def store(references: tuple[Any, ...]) -> None:
        kernel(*references, *rows, number, slots)

    stored: Any = pl.run_state(store)(tuple(pools))
    return tuple(stored)


def _check(pools: Sequence[Array]) -> None:
    for pool in pools:
        *_, kv_heads, features = pool.shape
        row_bytes = kv_heads * features * pool.dtype.itemsize
        if row_bytes % COPY_ALIGNMENT or features > 256 or kv_heads > 256:
            raise NotImplementedError(
                f"rows of {kv_heads} x {features} in {pool.dtype}; it takes multiples of "
                f"{COPY_ALIGNMENT} bytes, up to 256 x 256"
            )
    needed = STAGES * sum(math.prod(p.shape[3:]) * p.dtype.itemsize for p in pools)
    if needed > MOST_SHARED_BYTES:
        raise NotImplementedError(
            f"rows that need {needed} bytes of shared memory; it has {MOST_SHARED_BYTES}"
        )


def _store_kernel(
    count: int, tokens: int, at_once: int, chunks: int, blocks: int, *references: Any
) -> None:
    pools, rows = references[:count], references[count : 2 * count]
    layer, slots = references[2 * count : 2 * count + 2]
    shared, full = references[2 * count + 2 : -1], references[-1]
    block = lax.axis_index("block")
    own = pl.cdiv(chunks - block, jnp.int32(blocks))

    def load(turn: Array) -> None:
        stage = lax.rem(turn, jnp.int32(STAGES))
        # What is past the last token is not read, and not stored either.
        first = (block + turn * blocks) * at_once
        for source, target in zip(rows, shared, strict=True):
            plgpu.copy_gmem_to_smem(
                source.at[pl.ds(first, at_once)], target.at[stage], full.at[stage]
            )

    def one_turn(turn: Array, _: None) -> None:
        stage = lax.rem(turn, jnp.int32(STAGES))
        first = (block + turn * blocks) * at_once
        places = [slots[jnp.minimum(first + i, tokens - 1)] for i in range(at_once)]
        plgpu.barrier_wait(full.at[stage])
        for i, slot in enumerate(places):

            @pl.when((slot >= 0) & (first + i < tokens))
            def _(i: int = i, slot: Array = slot):
                for pool, staged in zip(pools, shared, strict=True):
                    page = jnp.int32(pool.shape[2])
                    place = pool.at[layer[0], lax.div(slot, page), lax.rem(slot, page)]
                    plgpu.copy_smem_to_gmem(staged.at[stage, i], place, commit_group=False)

        plgpu.commit_smem_to_gmem_group()

        @pl.when(turn + STAGES - 1 < own)
        def _():
            # The stage of the turn before is free once its rows have left.
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            load(turn + STAGES - 1)

    for turn in range(STAGES - 1):

        @pl.when(turn < own)
        def _(turn: int = turn):
            load(jnp.int32(turn))

    lax.fori_loop(0, own, one_turn, None)
    plgpu.wait_smem_to_gmem(0)
