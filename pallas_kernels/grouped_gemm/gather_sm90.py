"""Gathering rows on Hopper by the bulk copy engine, which XLA's gather does not use.

Each multiprocessor copies rows into shared memory, several copies ahead, and writes whole chunks
out: one thread issues all of it.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

CHUNK_BYTES = 32 * 1024
"""What is written out at once."""
AHEAD = 4
"""Chunks that are read ahead of the one being written."""
WRITING = 2
"""Chunks that may still be on their way out."""


def gather_rows(
    x: Float[Array, "tokens embed"],
    index: Int[Array, "rows"],
    *,
    num_sms: int,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Float[Array, "rows embed"]:
    """x[index], for an index whose every entry is in [0, tokens).

    Raises NotImplementedError for shapes and types that the kernel does not cover.
    """
    check_covered(x, index)
    rows, chunk = index.size, _chunk_rows(x)
    # The copy engine takes boxes of at most 256 elements a side.
    lane = next(size for size in (256, 128, 64) if x.shape[1] % size == 0)
    row_shape = (x.shape[1] // lane, lane)
    stages = AHEAD + WRITING
    kernel = plgpu.kernel(
        functools.partial(_kernel, chunk=chunk),
        out_type=jax.ShapeDtypeStruct((rows, *row_shape), x.dtype),
        grid=(num_sms,),
        grid_names=("worker",),
        scratch_types=dict(
            buffer=plgpu.SMEM((stages, chunk, *row_shape), x.dtype),
            filled=plgpu.Barrier(num_arrivals=chunk, num_barriers=stages),
        ),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        kernel_name="gather_rows",
        interpret=interpret,
    )
    return kernel(x.reshape(-1, *row_shape), index).reshape(rows, -1)


def check_covered(x: Array, index: Array) -> None:
    """Raises NotImplementedError, with the reason, for what the kernel does not cover."""
    if x.dtype.itemsize != 2:
        raise NotImplementedError(f"needs elements of two bytes, got {x.dtype}")
    if x.shape[1] % 64 or x.shape[1] > CHUNK_BYTES // 2:
        raise NotImplementedError(
            f"needs rows of a multiple of 64 elements, at most {CHUNK_BYTES // 2}, got {x.shape[1]}"
        )
    if index.size % _chunk_rows(x):
        raise NotImplementedError(f"needs a multiple of {_chunk_rows(x)} rows, got {index.size}")


def _chunk_rows(x: Array) -> int:
    """Rows that are written out at once: a power of two."""
    return 1 << (CHUNK_BYTES // (x.shape[1] * x.dtype.itemsize)).bit_length() - 1


def _kernel(x_ref, index_ref, out_ref, *, buffer, filled, chunk: int):
    worker, workers = lax.axis_index("worker"), lax.axis_size("worker")
    chunks = index_ref.shape[0] // chunk
    mine = lax.div(chunks - worker + workers - 1, jnp.int32(workers))
    stages = buffer.shape[0]

    def first_row(step):
        return (worker + step * workers) * chunk

    def read(step):
        slot = lax.rem(step, stages)
        for row in range(chunk):
            token = index_ref[first_row(step) + row]
            plgpu.copy_gmem_to_smem(
                x_ref.at[pl.ds(token, 1)], buffer.at[slot, pl.ds(row, 1)], filled.at[slot]
            )

    def one_chunk(step, _):
        slot = lax.rem(step, stages)
        plgpu.barrier_wait(filled.at[slot])
        plgpu.copy_smem_to_gmem(buffer.at[slot], out_ref.at[pl.ds(first_row(step), chunk)])
        # The slot that is filled next left WRITING chunks ago.
        plgpu.wait_smem_to_gmem(WRITING, wait_read_only=True)
        pl.when(step + AHEAD < mine)(functools.partial(read, step + AHEAD))

    lax.fori_loop(0, lax.min(mine, jnp.int32(AHEAD)), lambda step, _: read(step), None)
    lax.fori_loop(0, mine, one_chunk, None)
    plgpu.wait_smem_to_gmem(0)
