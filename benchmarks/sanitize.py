"""`python -m benchmarks.sanitize`: compute-sanitizer over small shapes of the Hopper kernels.

`--lower-to DIR` lowers the programs on a machine without a GPU, `--lowered DIR` runs those.
"""

import argparse
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from pallas_kernels import quantize_matrices
from pallas_kernels.grouped_gemm import configs, few_rows_sm90, mosaic_sm90, quantized_sm90
from pallas_kernels.grouped_gemm.quantize import (
    QuantizedMatrices,
    QuantizedRows,
    quantize_rows_by_xla,
)
from pallas_kernels.groups import room_for
from pallas_kernels.paged_attention import decode_sm90, mla_decode_sm90, prefill_sm90
from pallas_kernels.paged_attention.configs import decode_config, mla_config, prefill_config

TOOLS = ("memcheck", "racecheck")
NUM_SMS = 2
"""Blocks of each kernel: so few that rings of stages are used again and again."""
SECONDS = 150
"""After which a tool is stopped."""
ENDED = "kernels have ended"

type Case = tuple[Callable[..., Any], tuple[Any, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="run the cases whose names have them all")
    parser.add_argument("--lower-to", type=Path, metavar="DIR")
    parser.add_argument("--lowered", type=Path, metavar="DIR")
    parser.add_argument("--run", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        _, arguments = CASES[options.run.stem]()
        jax.block_until_ready(timing.compile_program(options.run)(*arguments))
        print(ENDED)
        return
    names = [name for name in CASES if all(word in name for word in options.words)]
    if not names:
        parser.error(f"no case has all of these words; the cases are {'; '.join(CASES)}")
    if options.lower_to:
        _lower(names, options.lower_to)
        return
    if shutil.which("compute-sanitizer") is None:
        parser.error("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.lowered
        if folder is None:
            folder = Path(scratch)
            _lower(names, folder)
        jobs = [(tool, folder / f"{name}.bin") for tool in TOOLS for name in names]
        with ThreadPoolExecutor(8) as pool:
            clean = list(pool.map(_sanitize, jobs))
    sys.exit(not all(clean))


def _lower(names: list[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        function, arguments = CASES[name]()
        shapes = [jax.ShapeDtypeStruct(jnp.shape(a), jnp.asarray(a).dtype) for a in arguments]
        (folder / f"{name}.bin").write_bytes(timing.lower_program(function, shapes))


def _sanitize(job: tuple[str, Path]) -> bool:
    """Whether a tool finds nothing in a program; prints a line."""
    tool, path = job
    command = ["compute-sanitizer", "--tool", tool, "--kernel-regex", "kns=mosaic_gpu"]
    command += [sys.executable, "-m", "benchmarks.sanitize", "--run", str(path)]
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        # The tool and what it runs: that would keep the GPU.
        os.killpg(process.pid, signal.SIGKILL)
        output = f"has not ended after {SECONDS} s"
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
    ended = ENDED in output and process.returncode == 0
    verdict = found[-1] if found and ended else f"no verdict: {output.strip()[-200:]!r}"
    print(f"{tool}, {path.stem}: {verdict}", flush=True)
    return ended and bool(re.search(r": 0 (errors|hazards)", verdict))


def _grouped_gemm(tiles: str, *, alignment: int, scattered: bool = False) -> Case:
    rng, sizes, rows = _groups(alignment)
    lhs = jnp.asarray(rng.normal(size=(rows, 256)), jnp.bfloat16)
    rhs = jnp.asarray(rng.normal(size=(1, len(sizes), 256, 512)), jnp.bfloat16)
    index = [_index(rng, rows)] if scattered else []

    def run(lhs: Any, rhs: Any, sizes: Any, *index: Any) -> Any:
        return mosaic_sm90.grouped_gemm(
            lhs, rhs, sizes, 0, row_index=index[0] if index else None, row_alignment=alignment,
            config=configs.NAMED[tiles], num_sms=NUM_SMS,
        )  # fmt: skip

    return run, (lhs, rhs, sizes, *index)


def _quantized_gemm(tiles: str, *, alignment: int, scattered: bool = False) -> Case:
    rng, sizes, rows = _groups(alignment)
    lhs = quantize_rows_by_xla(jnp.asarray(rng.normal(size=(rows, 256)), jnp.float32))
    rhs = quantize_matrices(jnp.asarray(rng.normal(size=(1, len(sizes), 256, 512)), jnp.float32))
    index = [_index(rng, rows)] if scattered else []

    def run(values: Any, scales: Any, matrices: Any, matrix_scales: Any, sizes: Any, *index: Any):
        return quantized_sm90.grouped_gemm(
            QuantizedRows(values, scales), QuantizedMatrices(matrices, matrix_scales), sizes, 0,
            row_index=index[0] if index else None, row_alignment=alignment,
            config=configs.QUANTIZED[tiles], num_sms=NUM_SMS,
        )  # fmt: skip

    return run, (*lhs, *rhs, sizes, *index)


def _groups(alignment: int) -> tuple[np.random.Generator, Any, int]:
    """Where values come from, sizes of groups, and the rows of all."""
    sizes = np.array([0, 1, 7, 130, 64, 3, 200, 9], np.int32)
    rows = room_for(int(sizes.sum()) + 2, len(sizes), alignment)
    return np.random.default_rng(0), jnp.asarray(sizes), rows + -rows % 8


def _index(rng: np.random.Generator, rows: int) -> jax.Array:
    return jnp.asarray(rng.permutation(rows), jnp.int32)


def _expert_rows() -> Case:
    rng = np.random.default_rng(0)
    x, gate_up, down = (
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
        for shape in ((2, 256), (1, 32, 256, 512), (1, 32, 256, 256))
    )
    experts = jnp.asarray(rng.permutation(32)[:8].reshape(2, 4), jnp.int32)
    run = functools.partial(few_rows_sm90.expert_rows, layer=0, activation="silu", num_sms=NUM_SMS)
    return run, (x, experts, gate_up, down)


def _pages(kv_heads: int, d: int, lengths: list[int], dtype: Any) -> tuple[Any, ...]:
    """Pages of random values, a table of them and the lengths of rows."""
    rng = np.random.default_rng(0)
    columns = -(-max(lengths) // 64)
    pages = rng.normal(size=(1, len(lengths) * columns, 64, kv_heads, d))
    table = rng.permutation(len(lengths) * columns).reshape(len(lengths), columns)
    return jnp.asarray(pages, dtype), jnp.asarray(table, jnp.int32), jnp.asarray(lengths, jnp.int32)


def _decode(dtype: Any) -> Case:
    pages, table, lengths = _pages(2, 128, [0, 1, 70, 600], dtype)
    q = jnp.asarray(np.random.default_rng(1).normal(size=(4, 8, 128)), jnp.bfloat16)
    config = decode_config(
        heads=8, kv_heads=2, d=128, dv=128, num_sms=NUM_SMS, stored=pages.dtype.itemsize
    )

    def run(q: Any, pages: Any, *rows: Any) -> Any:
        return decode_sm90.paged_decode(q, pages, pages, 0, *rows, scale=0.1, config=config)

    return run, (q, pages, table, lengths)


def _latent_decode() -> Case:
    pages, table, lengths = _pages(1, 576, [0, 1, 70, 600], jnp.bfloat16)
    q = jnp.asarray(np.random.default_rng(1).normal(size=(4, 16, 576)), jnp.bfloat16)
    config = mla_config(num_sms=NUM_SMS)

    def run(q: Any, pages: Any, *rows: Any) -> Any:
        options: dict[str, Any] = dict(scale=0.1, value_dim=512, config=config)
        return mla_decode_sm90.mla_decode(q, pages, 0, *rows, **options)

    return run, (q, pages, table, lengths)


def _prefill() -> Case:
    pages, table, lengths = _pages(2, 128, [100, 70, 300], jnp.bfloat16)
    q = jnp.asarray(np.random.default_rng(1).normal(size=(208, 8, 128)), jnp.bfloat16)
    start = jnp.asarray([0, 100, 107, 207], jnp.int32)
    config = prefill_config(d=128, dv=128, num_sms=NUM_SMS, stored=2)

    def run(q: Any, pages: Any, *rows: Any) -> Any:
        return prefill_sm90.paged_prefill(q, pages, pages, 0, *rows, scale=0.1, config=config)

    return run, (q, pages, table, start, lengths)


CASES: dict[str, Callable[[], Case]] = {
    "grouped GEMM, wide, side by side": functools.partial(_grouped_gemm, "wide", alignment=1),
    "grouped GEMM, square, aligned": functools.partial(_grouped_gemm, "square", alignment=8),
    "grouped GEMM, wide, scattered": functools.partial(
        _grouped_gemm, "wide", alignment=8, scattered=True
    ),
    "grouped GEMM, square, scattered": functools.partial(
        _grouped_gemm, "square", alignment=8, scattered=True
    ),
    "float8, upright, side by side": functools.partial(_quantized_gemm, "upright", alignment=1),
    "float8, broad, scattered": functools.partial(
        _quantized_gemm, "broad", alignment=8, scattered=True
    ),
    "float8, upright, scattered": functools.partial(
        _quantized_gemm, "upright", alignment=8, scattered=True
    ),
    "expert rows": _expert_rows,
    "decode": functools.partial(_decode, jnp.bfloat16),
    "decode, float8": functools.partial(_decode, jnp.float8_e4m3fn),
    "latent decode": _latent_decode,
    "prefill": _prefill,
}


if __name__ == "__main__":
    main()
