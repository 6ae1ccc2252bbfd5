"""What kernels share in which one warpgroup loads ahead through a ring of stages."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_gemm.scattered_rows import barrier_memory, pad_index
from pallas_kernels.grouped_gemm.tiles import TileConfig


def launch(
    kernel: Callable[..., None],
    operands: Sequence[Array],
    out_type: jax.ShapeDtypeStruct,
    memory: dict[str, Any],
    *,
    row_copies: int,
    other_copies: int,
    layer: Int[Array, ""] | int,
    first_group: Int[Array, ""] | int,
    row_index: Int[Array, "rows"] | None,
    bias: Float[Array, "layers groups n"] | None,
    config: TileConfig,
    num_sms: int,
    name: str,
    interpret: plgpu.InterpretGPUParams | None,
) -> Array:
    """Runs a kernel on every multiprocessor, one warpgroup that loads and those that multiply.

    It gets the operands, the layer, the first group and, if there are any, the index and the bias
    [layers * groups, n]; then its output, the memory, and the barriers `filled` and `released` of
    each stage. Loading a step takes so many copies of rows and others; scattered rows count at
    `row_barriers`.
    """
    if row_index is not None:
        # The interpreter has no threads of whose copies each counts.
        counted = interpret is None
        row_copies = 0 if counted else 1
        memory = {**memory, "row_barriers": barrier_memory(config.stages)} if counted else memory
    barrier = functools.partial(plgpu.Barrier, num_barriers=config.stages)
    run = plgpu.kernel(
        functools.partial(kernel, config=config, is_scattered=row_index is not None),
        out_type=out_type,
        grid=(num_sms,),
        grid_names=("worker",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=dict(
            **memory,
            filled=barrier(num_arrivals=row_copies + other_copies),
            released=barrier(num_arrivals=config.warpgroups),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name=name,
        interpret=interpret,
    )
    scalars = [jnp.asarray(number, jnp.int32).reshape(1) for number in (layer, first_group)]
    index = [] if row_index is None else [pad_index(row_index, config.max_rows)]
    biases = [] if bias is None else [bias.reshape(-1, bias.shape[-1])]
    return run(*operands, *scalars, *index, *biases)


def drain(steps: Array, released) -> None:
    """Waits until the last stages that were filled are read."""
    stages = released.shape[0]
    pending = lax.min(steps, jnp.int32(stages))

    def wait(index, _):
        plgpu.barrier_wait(released.at[lax.rem(steps - pending + index, stages)])

    lax.fori_loop(0, pending, wait, None)


def load_registers(warpgroups: int) -> int:
    """Registers that a loading thread keeps beside so many multiplying warpgroups."""
    # One of these holds all it may without what the loading threads could give.
    return 104 if warpgroups == 1 else 40


def multiply_registers(warpgroups: int) -> int:
    """Registers a multiplying thread may hold once the loading threads gave theirs back."""
    # A block gets what its threads were launched with, 8 at a time, out of 65536.
    at_launch = (warpgroups + 1) * min(248, 512 // (warpgroups + 1) // 8 * 8)
    return min(240, (at_launch - load_registers(warpgroups)) // warpgroups // 8 * 8)
