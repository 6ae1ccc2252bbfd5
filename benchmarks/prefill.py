"""Prefill over pages at the prompt lengths of serving, ours beside contiguous contenders.

Pages lie anywhere in a pool. The contenders know no pages: they read keys and values that lie in
one piece, and pad ragged rows to the longest. Outputs of some queries are compared with float64
after the memory they will land in was filled with NaN, and must be finite everywhere. FLOPs are
those that causal queries need.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.gpu import attention_mgpu

from benchmarks import timing
from benchmarks.pages import exact_attention, random_table, rates, relative_error
from pallas_kernels.paged_attention import configs, prefill_sm90
from pallas_kernels.paged_attention.prefill_shape import PrefillConfig

PICKED = 4
"""Queries of the first and of the last row that are compared."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One prefill step of one layer."""

    name: str
    queries: tuple[int, ...]
    """New tokens of each row."""
    cached: int = 0
    """Tokens before them, in each row."""
    page: int = 64
    heads: int = 32
    kv_heads: int = 8
    d: int = 128
    window: int | None = None
    float8: bool = False
    """Whether pages hold float8; queries and outputs do not."""

    @property
    def distribution(self) -> str:
        stored = ", float8" if self.float8 else ""
        return f"{self.heads}/{self.kv_heads} heads of {self.d}, page {self.page}{stored}"

    @property
    def dtype(self) -> np.dtype:
        """Type of the pages."""
        return jnp.dtype(jnp.float8_e4m3fn if self.float8 else jnp.bfloat16)

    @property
    def tokens(self) -> int:
        return sum(self.queries)

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(self.cached + count for count in self.queries)

    @property
    def width(self) -> int:
        return -(-max(self.lengths) // self.page)

    def seen(self) -> float:
        """Positions that all queries see."""
        window = self.window or 2**30
        rows = (np.arange(n - q, n) + 1 for n, q in zip(self.lengths, self.queries, strict=True))
        return float(sum(np.minimum(row, window).sum() for row in rows))

    def flops(self) -> float:
        return 4 * self.seen() * self.heads * self.d

    def bytes(self) -> float:
        """Bytes of keys, values, queries and outputs, each once."""
        cached = sum(self.lengths) * self.kv_heads * self.dtype.itemsize
        return 2.0 * self.d * (cached + 2 * self.tokens * self.heads)

    def arguments(self) -> list[jax.ShapeDtypeStruct]:
        rows = len(self.queries)
        pages = (1, rows * self.width, self.page, self.kv_heads, self.d)
        pool = jax.ShapeDtypeStruct(pages, self.dtype)
        return [
            jax.ShapeDtypeStruct((self.tokens, self.heads, self.d), jnp.bfloat16),
            pool,
            pool,
            jax.ShapeDtypeStruct((rows, self.width), jnp.int32),
            jax.ShapeDtypeStruct((rows + 1,), jnp.int32),
            jax.ShapeDtypeStruct((rows,), jnp.int32),
        ]


RAGGED = (819, 3628, 1337, 2501, 3001, 1999, 2877, 1111)
SHAPES = (
    Shape(name="1 x 4k", queries=(4096,)),
    Shape(name="1 x 32k", queries=(32768,)),
    Shape(name="8 x 4k", queries=(4096,) * 8),
    Shape(name="8 ragged, 819 to 3628", queries=RAGGED),
    Shape(name="512 over 32k", queries=(512,), cached=32768),
    Shape(name="4 x 512 over 32k", queries=(512,) * 4, cached=32768),
    Shape(name="16 x 512", queries=(512,) * 16),
    Shape(name="8 x 4k", queries=(4096,) * 8, page=16),
    Shape(name="8 x 4k", queries=(4096,) * 8, page=128),
    Shape(name="8 x 4k", queries=(4096,) * 8, heads=64, d=64),
    Shape(name="8 x 4k", queries=(4096,) * 8, heads=16, d=256),
    Shape(name="1 x 32k, window 4096", queries=(32768,), window=4096),
    *(Shape(name="8 x 4k", queries=(4096,) * 8, d=d) for d in (80, 96, 112)),
    Shape(name="8 x 4k", queries=(4096,) * 8, float8=True),
    Shape(name="512 over 32k", queries=(512,), cached=32768, float8=True),
    Shape(name="8 x 4k", queries=(4096,) * 8, heads=64, d=64, float8=True),
    Shape(name="8 x 4k", queries=(4096,) * 8, heads=16, d=256, float8=True),
)
TUNED = SHAPES[:3]
CANDIDATES = (PrefillConfig(blocks=132, kv_block=64, stages=4),)
"""What the tuner tries."""


def _ours(shape: Shape, config: PrefillConfig) -> Callable:
    def run(q, k_pages, v_pages, table, start, lengths):
        return prefill_sm90.paged_prefill(
            q, k_pages, v_pages, 0, table, start, lengths,
            scale=shape.d**-0.5, window=shape.window, config=config,
        )[0]  # fmt: skip

    return run


def programs(shape: Shape, *, tune: bool, num_sms: int) -> Iterator[tuple[str, Callable]]:
    """Name and function of each of our configurations; `llmjax` is what ships."""
    shipped = configs.prefill_config(
        d=shape.d, dv=shape.d, num_sms=num_sms, stored=shape.dtype.itemsize
    )
    yield "llmjax", _ours(shape, shipped)
    for config in CANDIDATES if tune and shape in TUNED else ():
        yield f"llmjax, {config.kv_block} x {config.stages}", _ours(shape, config)


def lower(folder: Path, *, tune: bool, num_sms: int) -> None:
    """Writes our programs into a folder; those of others need a GPU to lower."""
    timing.lower_all(folder, SHAPES, partial(programs, tune=tune, num_sms=num_sms))


def compile_all(folder: Path) -> dict[tuple[int, str], jax.stages.Compiled | Exception]:
    """Compiles every program side by side, by number of the shape and name."""
    others: dict[tuple[int, str], timing.Job] = {}
    for index, shape in enumerate(SHAPES):
        # Pages make no difference to those who know none, and only ours masks what is cached.
        if shape.page == 64 and not (shape.cached or shape.window or shape.float8):
            others[index, "cuDNN"] = partial(_compile_padded, shape, _cudnn)
            if len(set(shape.queries)) == 1:
                others[index, "JAX attention_mgpu"] = partial(
                    _compile_padded, shape, _jax_own, jnp.float16
                )
    return timing.compile_all(folder, others)


def _cudnn(shape: Shape, q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
    ragged: dict[str, Any] = {}
    if len(set(shape.queries)) > 1:
        ragged = dict(query_seq_lengths=lengths, key_value_seq_lengths=lengths)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn", **ragged)


def _jax_own(
    shape: Shape, q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array
) -> jax.Array:
    del lengths
    block_kv = 128 if shape.d <= 128 else 64
    config = attention_mgpu.TuningConfig(
        block_q=64, block_kv=block_kv, max_concurrent_steps=2, causal=True
    )
    return attention_mgpu.attention(q, k, v, config)


def _compile_padded(shape: Shape, run: Callable, dtype=jnp.bfloat16) -> jax.stages.Compiled:
    rows, longest = len(shape.queries), max(shape.queries)
    q = jax.ShapeDtypeStruct((rows, longest, shape.heads, shape.d), dtype)
    k = jax.ShapeDtypeStruct((rows, longest, shape.kv_heads, shape.d), dtype)
    lengths = jax.ShapeDtypeStruct((rows,), jnp.int32)
    return jax.jit(partial(run, shape)).lower(q, k, k, lengths).compile()


def measure(compiled: dict, limits: dict[str, float], *, seconds: float) -> Iterator[dict]:
    """A row for every program, while time is left."""
    deadline = time.monotonic() + seconds
    for index, shape in enumerate(SHAPES):
        for name, program in [(n, p) for (i, n), p in compiled.items() if i == index]:
            if time.monotonic() < deadline:
                yield _measure_program(shape, name, program, limits)


def _measure_program(shape: Shape, name: str, program, limits: dict[str, float]) -> dict:
    row: dict = {"shape": shape.name, "distribution": shape.distribution, "contender": name}
    with timing.noting_failure(row):
        if isinstance(program, Exception):
            raise program
        dtype = jnp.float16 if name.startswith("JAX") else jnp.bfloat16
        case = _paged_case(shape) if name.startswith("llmjax") else _padded_case(shape, dtype)
        row["error"] = _error(shape, program, case)
        us = timing.rotating_microseconds(program, [case], repeats=10)
        row |= rates(shape, us, limits)
    return row


def _random(shape: tuple[int, ...], dtype=jnp.bfloat16) -> jax.Array:
    return jax.random.normal(jax.random.key(time.time_ns() % 2**31), shape, dtype)


def _paged_case(shape: Shape) -> tuple:
    q, pages, _, table, *_ = shape.arguments()
    table = random_table(np.random.default_rng(), pages.shape[1], *table.shape)
    start = np.concatenate([[0], np.cumsum(shape.queries)])
    ragged = (jnp.asarray(numbers, jnp.int32) for numbers in (start, shape.lengths))
    keys, values = (_random(pages.shape).astype(pages.dtype) for _ in range(2))
    return _random(q.shape), keys, values, table, *ragged


def _padded_case(shape: Shape, dtype) -> tuple:
    rows, longest = len(shape.queries), max(shape.queries)
    # JAX's own kernel scales no scores.
    scale = dtype(shape.d**-0.5) if dtype == jnp.float16 else dtype(1)
    q = _random((rows, longest, shape.heads, shape.d), dtype) * scale
    k, v = (_random((rows, longest, shape.kv_heads, shape.d), dtype) for _ in range(2))
    return q, k, v, jnp.asarray(shape.queries, jnp.int32)


def _error(shape: Shape, program, case: tuple) -> float:
    """Relative error of some queries of the first and the last row, NaN if any is not finite."""
    out = timing.run_over_nan(program, case, case[0].shape, case[0].dtype)
    padded = out.ndim == 4
    if not padded and not timing.all_finite(out):
        return math.nan
    got, want = [], []
    for row in {0, len(shape.queries) - 1}:
        for query in np.linspace(0, shape.queries[row] - 1, PICKED).astype(int):
            index = (row, query) if padded else sum(shape.queries[:row]) + query
            got.append(np.asarray(out[index], np.float64))
            want.append(_exact(shape, case, row, query, index))
    return relative_error(np.array(got), np.array(want))


def _exact(shape: Shape, case: tuple, row: int, query: int, index) -> np.ndarray:
    q, keys, values = case[:3]
    end = shape.cached + query + 1
    begin = max(0, end - shape.window) if shape.window else 0
    scale = shape.d**-0.5 if q.dtype == jnp.bfloat16 else 1.0

    def cached(pages: jax.Array) -> np.ndarray:
        if pages.ndim == 5:
            pages = pages[0, case[3][row, : -(-end // shape.page)]]
            pages = pages.reshape(-1, shape.kv_heads, shape.d)
        else:
            pages = pages[row]
        return np.asarray(pages[begin:end], np.float64)

    return exact_attention(q[index], cached(keys), cached(values), scale=scale)
