"""Programs that can be lowered on one machine and timed on another, and the ceilings of a GPU."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from jax.experimental.mosaic.gpu import profiler


def lower_program(function: Callable, arguments: Sequence[jax.ShapeDtypeStruct]) -> bytes:
    """Lowers a function for CUDA, on a machine with or without a GPU."""
    check = export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
    exporter = export.export(jax.jit(function), platforms=["cuda"], disabled_checks=[check])
    return bytes(exporter(*arguments).serialize())


def compile_program(path: Path) -> jax.stages.Compiled:
    """Compiles a stored program for the GPU of this machine."""
    program = export.deserialize(bytearray(path.read_bytes()))
    arguments = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in program.in_avals]
    return jax.jit(program.call).lower(*arguments).compile()


def kernel_microseconds(
    program: jax.stages.Compiled, *arguments: jax.Array, repeats: int = 20
) -> float:
    """Median over repeats of the time that the GPU spends in the kernels of one call (CUPTI)."""
    timed = profiler.Cupti(finalize=False).measure(program, iterations=repeats)
    milliseconds: Any = timed(*arguments)[1]
    return 1e3 * statistics.median(milliseconds)


def rotating_microseconds(
    program: jax.stages.Compiled, cases: Sequence[tuple[jax.Array, ...]], *, repeats: int
) -> float:
    """Median GPU time of the kernels of one call, over operands taken in turn.

    Operands that fill the L2 cache between them are read from memory each time.
    """
    extension: Any = profiler.mosaic_gpu_lib  # pyright: ignore[reportPrivateImportUsage]
    extension = extension._mosaic_gpu_ext
    for case in cases:
        jax.block_until_ready(program(*case))
    extension._cupti_init()
    try:
        results = [program(*cases[i % len(cases)]) for i in range(repeats)]
        jax.block_until_ready(results)
    finally:
        kernels = extension._cupti_get_timings(False)
    if not kernels or len(kernels) % repeats:
        raise RuntimeError(f"{len(kernels or [])} kernels were seen in {repeats} calls")
    each = len(kernels) // repeats
    calls = [kernels[i * each : (i + 1) * each] for i in range(repeats)]
    return 1e3 * statistics.median(sum(ms for _, ms in call) for call in calls)


def ceilings() -> dict[str, float]:
    """What this GPU reaches now: copy in GB/s (read plus written) and bfloat16 in TFLOP/s."""
    values = jnp.arange(1 << 30, dtype=jnp.float32)
    copy = jax.jit(lambda x: x + 1.0).lower(values).compile()
    copy_us = kernel_microseconds(copy, values, repeats=5)
    copy_gbps = 2 * values.nbytes / copy_us / 1e3
    del values
    square = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    matmul = jax.jit(jnp.matmul).lower(square, square).compile()
    matmul_us = kernel_microseconds(matmul, square, square, repeats=50)
    return {"copy_gbps": copy_gbps, "tflops": 2 * 8192**3 / matmul_us / 1e6}
