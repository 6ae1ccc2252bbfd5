"""Both products of an expert layer in one launch, for a few tokens: bound by reading the weights.

A unit of work is one row (a token at one of its experts) and 128 columns of one of the products, in
two parts of 64: gate and up, or neighbours. A warpgroup copies, and one for each part multiplies.
No tensor core is needed for a single row: weights are multiplied in the registers that they are
read to, and added up once a unit is done. Units of the first product come first, and blocks take
them in turn; a unit of the second waits until all of the first that make its row are done, while
its weights are already on their way.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.activation import ACTIVATIONS
from pallas_kernels.grouped_gemm.pipeline_sm90 import drain, load_registers
from pallas_kernels.grouped_gemm.store import tiled
from pallas_kernels.registers import store_registers

DEPTH = 64
"""Rows of a matrix in one step."""
PART = 64
"""Columns of each of the two parts of a unit."""
STAGES = 12
"""Steps in flight: 16 KB each."""
MAX_ROW = 8192
"""Features of a row that fit beside the steps in flight."""
TILE = plgpu.Layout.TILED(
    plgpu.Tiling(((DEPTH, PART), (16, 16), (16, 8))),
    warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1,
)  # fmt: skip
"""How a warpgroup holds a step of one part: a warp 16 columns, a thread 8 of them of 4 rows."""
ROWS, COLUMNS = TILE.reduce(1), TILE.reduce(0)


def expert_rows(
    x: Float[Array, "tokens embed"],
    experts: Int[Array, "tokens choices"],
    gate_up: Float[Array, "layers experts embed two_ffn"],
    down: Float[Array, "layers experts ffn embed"],
    layer: Int[Array, ""] | int,
    *,
    gate_up_bias: Float[Array, "layers experts two_ffn"] | None = None,
    activation: str,
    num_sms: int,
    synchronize: bool = True,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Float[Array, "tokens choices embed"]:
    """What each of a token's experts makes of it; unspecified where the expert is negative.

    `synchronize=False` leaves the signals between blocks out, for an interpreter without them; then
    there must be one block.

    Raises NotImplementedError for shapes and types that the kernel does not cover.
    """
    check_covered(x, gate_up, down)
    layers, count, embed, two_ffn = gate_up.shape
    ffn, rows = two_ffn // 2, experts.size
    kernel = plgpu.kernel(
        functools.partial(
            _kernel,
            choices=experts.shape[1],
            count=count,
            activation=activation,
            synchronize=synchronize,
        ),
        out_type=(
            jax.ShapeDtypeStruct((rows, embed), x.dtype),
            jax.ShapeDtypeStruct((rows, ffn), x.dtype),
        ),
        grid=(num_sms,),
        grid_names=("worker",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=dict(
            weights_smem=tiled((STAGES, 2, DEPTH, PART), x.dtype),
            row_smem=plgpu.SMEM((2, max(embed, ffn)), x.dtype),
            up_smem=plgpu.SMEM((PART,), jnp.float32),
            filled=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            released=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            up_given=plgpu.Barrier(),
            up_taken=plgpu.Barrier(),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name="expert_rows",
        interpret=interpret,
    )
    results, _ = kernel(
        x,
        experts.reshape(-1),
        gate_up.reshape(-1, embed, two_ffn),
        down.reshape(-1, ffn, embed),
        jnp.asarray(layer, jnp.int32).reshape(1),
        *([] if gate_up_bias is None else [gate_up_bias.reshape(-1, two_ffn)]),
    )
    return results.reshape(*experts.shape, embed)


def check_covered(x: Array, gate_up: Array, down: Array) -> None:
    """Raises NotImplementedError, with the reason, for what the kernel does not cover."""
    embed, ffn = gate_up.shape[2], gate_up.shape[3] // 2
    dtypes = {array.dtype for array in (x, gate_up, down)}
    if dtypes != {jnp.dtype(jnp.bfloat16)}:
        raise NotImplementedError(f"needs bfloat16 operands, got {', '.join(map(str, dtypes))}")
    if embed % (2 * PART) or ffn % (2 * PART):
        raise NotImplementedError(
            f"needs tokens and experts of a multiple of {2 * PART} features, got {embed} and {ffn}"
        )
    if max(embed, ffn) > MAX_ROW:
        raise NotImplementedError(f"needs at most {MAX_ROW} features, got {embed} and {ffn}")


def _kernel(
    x_ref, experts_ref, gate_up_ref, down_ref, layer_ref, *bias_and_results,
    weights_smem, row_smem, up_smem, filled, released, up_given, up_taken,
    choices: int, count: int, activation: str, synchronize: bool,
):  # fmt: skip
    *bias_ref, out_ref, hidden_ref = bias_and_results
    rows, ffn = hidden_ref.shape
    ready = pl.get_global(plgpu.SemaphoreType.REGULAR((rows,))) if synchronize else None
    walk = functools.partial(_for_each_unit, experts_ref, layer_ref[0] * count, out_ref, hidden_ref)
    ring = (weights_smem, filled, released)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == 2)
    def load():
        plgpu.set_max_registers(load_registers(2), action="decrease")

        def first(row, weights, unit, step):
            del row
            return _load_unit(gate_up_ref, weights, unit * PART, ffn + unit * PART, ring, step)

        def second(row, weights, unit, step):
            del row
            column = unit * 2 * PART
            return _load_unit(down_ref, weights, column, column + PART, ring, step)

        drain(walk(first, second), released)

    @pl.when(warpgroup < 2)
    def multiply():
        plgpu.set_max_registers(208, action="increase")
        my_row = row_smem.at[warpgroup]

        def first(row, weights, unit, step):
            _stage_row(x_ref.at[lax.div(row, choices)], my_row)
            values = _multiply_unit(my_row, x_ref.shape[1], ring, step)
            columns = pl.ds(pl.multiple_of(unit * PART, PART), PART)
            for ref in bias_ref:
                part = pl.ds(pl.multiple_of(warpgroup * ffn + unit * PART, PART), PART)
                values += _load(ref.at[weights, part])

            # One warpgroup has the gate, the other what it gates.
            @pl.when(warpgroup == 1)
            def _():
                _store(up_smem, values)
                plgpu.barrier_arrive(up_given)
                plgpu.barrier_wait(up_taken)

            @pl.when(warpgroup == 0)
            def _():
                plgpu.barrier_wait(up_given)
                hidden = ACTIVATIONS[activation](values, _load(up_smem))
                _store(hidden_ref.at[row, columns], hidden)
                plgpu.barrier_arrive(up_taken)
                if ready is not None:
                    # One thread signals, for what all have stored.
                    plgpu.commit_smem()
                    plgpu.semaphore_signal(ready.at[row], memory_scope="gpu")

            return step + x_ref.shape[1] // DEPTH

        def second(row, weights, unit, step):
            del weights
            if ready is not None:
                units = ffn // PART
                plgpu.semaphore_wait(ready.at[row], units, decrement=False, memory_scope="gpu")
            _stage_row(hidden_ref.at[row], my_row)
            values = _multiply_unit(my_row, ffn, ring, step)
            column = pl.multiple_of((2 * unit + warpgroup) * PART, PART)
            _store(out_ref.at[row, pl.ds(column, PART)], values)
            return step + ffn // DEPTH

        walk(first, second)


def _for_each_unit(experts_ref, first_matrix, out_ref, hidden_ref, first, second) -> Array:
    """Calls `step = first(row, weights, unit, step)`, then `second`, for this worker's units.

    Returns the steps taken.
    """
    worker, workers = lax.axis_index("worker"), lax.axis_size("worker")
    rows, ffn = hidden_ref.shape
    units = [rows * (ffn // PART), rows * (out_ref.shape[1] // (2 * PART))]

    def loop(body, begin, count, step):
        each = jnp.int32(count // rows)

        def one_unit(index, step):
            unit = begin + index * workers
            row = lax.div(unit, each)
            expert = experts_ref[row]

            def held(step):
                return body(row, first_matrix + expert, unit - row * each, step)

            return lax.cond(expert >= 0, held, lambda step: step, step)

        turns = lax.div(count - begin + workers - 1, jnp.int32(workers))
        return lax.fori_loop(0, turns, one_unit, step)

    step = loop(first, worker, units[0], jnp.int32(0))
    # The turns go on where those of the first product ended.
    begin = lax.rem(worker + (-units[0]) % workers, jnp.int32(workers))
    return loop(second, begin, units[1], step)


def _load_unit(weights_ref, weights, first, second, ring, step: Array) -> Array:
    """Streams the two parts of a unit, from columns `first` and `second` on, through the ring."""
    weights_smem, filled, released = ring
    columns = [pl.ds(pl.multiple_of(column, PART), PART) for column in (first, second)]

    def one_step(k_step, step):
        slot = lax.rem(step, STAGES)

        @pl.when(step >= STAGES)
        def _():
            plgpu.barrier_wait(released.at[slot])
            # Weights were read by ordinary loads; the copies that replace them come after those.
            plgpu.commit_smem()

        k = pl.ds(k_step * DEPTH, DEPTH)
        for part, column in enumerate(columns):
            plgpu.copy_gmem_to_smem(
                weights_ref.at[weights, k, column], weights_smem.at[slot, part], filled.at[slot]
            )
        return step + 1

    return lax.fori_loop(0, weights_ref.shape[1] // DEPTH, one_step, step)


def _multiply_unit(row_smem, depth: int, ring, step: Array) -> Array:
    """The row times the columns of this warpgroup's part, in float32."""
    weights_smem, filled, released = ring

    def one_step(k_step, total):
        slot = lax.rem(step + k_step, STAGES)
        k = pl.ds(pl.multiple_of(k_step * DEPTH, DEPTH), DEPTH)
        row = plgpu.load(row_smem.at[k], layout=ROWS, optimized=False).astype(jnp.float32)
        row = plgpu.layout_cast(lax.broadcast_in_dim(row, (DEPTH, PART), (0,)), TILE)
        plgpu.barrier_wait(filled.at[slot])
        part = weights_smem.at[slot, lax.axis_index("warpgroup")]
        weights = plgpu.load(part, layout=TILE, optimized=False)
        plgpu.barrier_arrive(released.at[slot])
        return total + weights.astype(jnp.float32) * row

    zeros = plgpu.layout_cast(jnp.zeros((DEPTH, PART), jnp.float32), TILE)
    total = lax.fori_loop(0, depth // DEPTH, one_step, zeros)
    return plgpu.layout_cast(total.sum(axis=0), COLUMNS)


def _stage_row(row_ref, row_smem) -> None:
    """Copies a row into shared memory, where every thread finds what it needs."""
    size = row_ref.shape[0]
    vector = next(width for width in (8, 4, 2, 1) if size % (128 * width) == 0)
    layout = plgpu.Layout.WG_STRIDED((size,), vec_size=vector)
    # Another warp may still read the row before.
    plgpu.commit_smem()
    row_smem[pl.ds(0, size)] = plgpu.load(row_ref, layout=layout, optimized=False)
    plgpu.commit_smem()


def _load(ref: Any) -> Array:
    return plgpu.load(ref, layout=COLUMNS, optimized=False).astype(jnp.float32)


def _store(ref: Any, values: Array) -> None:
    store_registers(ref, plgpu.layout_cast(values.astype(ref.dtype), COLUMNS))
