"""Programs that can be lowered on one machine and timed on another, and the ceilings of a GPU."""

import functools
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from jax.experimental.mosaic.gpu import profiler

Job = Callable[[], jax.stages.Compiled]


def lower_all(
    folder: Path, shapes: Sequence[Any], programs: Callable[[Any], Iterable[tuple[str, Callable]]]
) -> None:
    """Writes the programs of every shape into a folder; those that lie there stay."""
    for index, shape in enumerate(shapes):
        for name, function in programs(shape):
            path = folder / f"{index:02d}~{name}.bin"
            if not path.exists():
                path.write_bytes(lower_program(function, shape.arguments()))


def compile_all(
    folder: Path, others: Mapping[tuple[int, str], Job] | None = None
) -> dict[tuple[int, str], jax.stages.Compiled | Exception]:
    """Compiles the programs of a folder and others side by side, by number of the shape and name.

    A contender that does not compile is an error in its place, not the end.
    """
    jobs: dict[tuple[int, str], Job] = {}
    for path in sorted(folder.glob("*.bin")):
        index, name = path.stem.split("~")
        jobs[int(index), name] = functools.partial(compile_program, path)
    jobs |= others or {}
    with ThreadPoolExecutor(16) as pool:
        return dict(zip(jobs, pool.map(_attempt, jobs.values()), strict=True))


def _attempt(job: Job) -> jax.stages.Compiled | Exception:
    try:
        return job()
    except Exception as error:
        return error


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


@contextmanager
def noting_failure(row: dict) -> Iterator[None]:
    """Notes in a row what kept its program from being measured, and goes on."""
    try:
        yield
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {str(error)[:200]}"


def run_over_nan(
    program: Callable, arguments: Sequence[Any], shape: tuple[int, ...], dtype: Any = jnp.bfloat16
) -> jax.Array:
    """A program's first output, of this shape, where NaN lay before: what is not written shows."""
    poison = jnp.full(shape, jnp.nan, dtype)
    poison.block_until_ready()
    del poison
    out = program(*arguments)
    return out[0] if isinstance(out, list | tuple) else out


def all_finite(out: jax.Array) -> bool:
    return bool(jnp.isfinite(jnp.sum(out, dtype=jnp.float32)))


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
