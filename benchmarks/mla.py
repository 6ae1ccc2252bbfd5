"""Decode of latent attention at the batch sizes and contexts of serving, ours beside XLA's.

Lengths are ragged, from half the context to all of it; pages lie anywhere in a pool. Small caches
are read from several places in turn, so that the L2 cache cannot serve them. Outputs of the first
and the last row are compared with float64 after the memory they will land in was filled with NaN,
and must be finite everywhere.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import timing
from pallas_kernels import reference
from pallas_kernels.paged_attention import configs
from pallas_kernels.paged_attention.mla_decode_sm90 import mla_decode
from pallas_kernels.paged_attention.mla_shape import MlaConfig

D, DV = 576, 512
SCALE = 192**-0.5
POOL_POSITIONS = 2**21
"""Positions of the pool: twice those of 64 rows of 16k."""
COLD_BYTES = 200e6
"""Bytes of different places to read in turn: more than three times the L2 cache."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One decode step of one layer."""

    rows: int
    context: int
    heads: int = 128
    page: int = 64

    @property
    def name(self) -> str:
        return f"{self.rows} x {self.context}, {self.heads} heads"

    @property
    def distribution(self) -> str:
        return f"ragged, page {self.page}"

    @property
    def width(self) -> int:
        return self.context // self.page

    def lengths(self) -> np.ndarray:
        rng = np.random.default_rng(0)
        lengths = rng.integers(self.context // 2, self.context + 1, self.rows)
        lengths[0] = self.context
        return lengths.astype(np.int32)

    def bytes(self) -> float:
        return 2.0 * D * int(self.lengths().sum())

    def flops(self) -> float:
        return 2.0 * (D + DV) * self.heads * int(self.lengths().sum())

    def arguments(self) -> list[jax.ShapeDtypeStruct]:
        return [
            jax.ShapeDtypeStruct((self.rows, self.heads, D), jnp.bfloat16),
            jax.ShapeDtypeStruct(
                (1, POOL_POSITIONS // self.page, self.page, 1, D), jnp.bfloat16
            ),
            jax.ShapeDtypeStruct((self.rows, self.width), jnp.int32),
            jax.ShapeDtypeStruct((self.rows,), jnp.int32),
        ]  # fmt: skip


ANCHORS = ((1, 4096), (16, 4096), (64, 4096), (64, 16384), (256, 4096))
SHAPES = (
    *(Shape(rows=rows, context=context) for rows, context in ANCHORS),
    *(Shape(rows=64, context=4096, heads=heads) for heads in (16, 64)),
    *(Shape(rows=64, context=4096, page=page) for page in (16, 128)),
)
TUNED = (SHAPES[0], SHAPES[1], SHAPES[2], SHAPES[4])
CANDIDATES = (("4 tiles at least", MlaConfig(blocks=132, min_tiles=4)),)
"""What the tuner tries."""


def _ours(config: MlaConfig) -> Callable:
    def run(q, pages, table, lengths):
        return mla_decode(
            q, pages, 0, table, lengths, scale=SCALE, value_dim=DV, config=config
        )[0]  # fmt: skip

    return run


def _reference(q, pages, table, lengths):
    return reference.paged_attention(
        q, pages, None, 0, table, jnp.arange(q.shape[0] + 1), lengths,
        scale=SCALE, max_query_length=1, value_dim=DV,
    )[0]  # fmt: skip


def _gather(q, pages, table, lengths):
    keys = pages[0, table].reshape(q.shape[0], -1, D)
    return _attend_contiguous(q, keys, lengths)


def _attend_contiguous(q, keys, lengths):
    scores = jnp.einsum("bhd,bsd->bhs", q, keys, preferred_element_type=jnp.float32) * SCALE
    hidden = jnp.arange(keys.shape[1]) >= lengths[:, None, None]
    weights = jax.nn.softmax(jnp.where(hidden, -1e30, scores), -1).astype(jnp.bfloat16)
    return jnp.einsum("bhs,bsd->bhd", weights, keys[..., :DV])


def programs(shape: Shape, *, tune: bool, num_sms: int) -> Iterator[tuple[str, Callable]]:
    """Name and function of each program; `llmjax` is what ships."""
    yield "llmjax", _ours(configs.mla_config(num_sms=num_sms))
    for name, config in CANDIDATES if tune and shape in TUNED else ():
        yield f"llmjax, {name}", _ours(config)
    if shape.rows * shape.context <= 2**18:
        yield "XLA, reference", _reference
        yield "XLA, gather", _gather


def lower(folder: Path, *, tune: bool, num_sms: int) -> None:
    """Writes the programs into a folder."""
    for index, shape in enumerate(SHAPES):
        for name, function in programs(shape, tune=tune, num_sms=num_sms):
            path = folder / f"{index:02d}~{name}.bin"
            if not path.exists():
                path.write_bytes(timing.lower_program(function, shape.arguments()))


def compile_all(folder: Path) -> dict[tuple[int, str], jax.stages.Compiled | Exception]:
    """Compiles every program side by side, by number of the shape and name."""
    jobs: dict[tuple[int, str], Callable[[], jax.stages.Compiled]] = {}
    for path in sorted(folder.glob("*.bin")):
        index, name = path.stem.split("~")
        jobs[int(index), name] = functools.partial(timing.compile_program, path)
    with ThreadPoolExecutor(16) as pool:
        return dict(zip(jobs, pool.map(_attempt, jobs.values()), strict=True))


def _attempt(job: Callable[[], jax.stages.Compiled]) -> jax.stages.Compiled | Exception:
    try:
        return job()
    except Exception as error:  # A contender that does not compile is a row, not the end.
        return error


def measure(compiled: dict, limits: dict[str, float], *, seconds: float) -> list[dict]:
    """A row for every program, while time is left."""
    deadline = time.monotonic() + seconds
    pool = _pool(jax.random.key(time.time_ns() % 2**31))
    rows = []
    for index, shape in enumerate(SHAPES):
        # Outside of a program a reshape copies: once here, not once for every place.
        pool = pool.reshape(shape.arguments()[1].shape)
        for name, program in [(n, p) for (i, n), p in compiled.items() if i == index]:
            if time.monotonic() < deadline:
                rows.append(_measure_program(shape, name, program, pool, limits))
                print(*rows[-1].values(), flush=True)
    return rows


@jax.jit
def _pool(key: jax.Array) -> jax.Array:
    """Random values at distinct addresses: one block of them, over and over."""
    block = jax.random.normal(key, (POOL_POSITIONS // 32 * D,), jnp.bfloat16)
    return lax.broadcast_in_dim(block, (32, block.size), (1,)).reshape(-1)


def _measure_program(
    shape: Shape, name: str, program: Any, pool: jax.Array, limits: dict[str, float]
) -> dict:
    row: dict = {"shape": shape.name, "distribution": shape.distribution, "contender": name}
    try:
        if isinstance(program, Exception):
            raise program
        places = max(1, min(16, math.ceil(COLD_BYTES / shape.bytes())))
        cases = [_arguments(shape, pool, place) for place in range(places)]
        row["error"] = _error(shape, program, cases[0])
        us = timing.rotating_microseconds(program, cases, repeats=max(places, 20))
        row |= rates(shape, us, limits)
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
    return row


def _arguments(shape: Shape, pool: jax.Array, place: int) -> tuple:
    rng = np.random.default_rng(place)
    q = jax.random.normal(jax.random.key(place), (shape.rows, shape.heads, D), jnp.bfloat16)
    table = rng.permutation(POOL_POSITIONS // shape.page)[: shape.rows * shape.width]
    table = jnp.asarray(table.reshape(shape.rows, shape.width), jnp.int32)
    return q, pool, table, jnp.asarray(shape.lengths())


def _error(shape: Shape, program: Any, case: tuple) -> float:
    """Relative error of the first and the last row, NaN if anything is not finite."""
    poison = jnp.full((shape.rows, shape.heads, DV), jnp.nan, jnp.bfloat16)
    poison.block_until_ready()
    del poison
    out = program(*case)
    out = out[0] if isinstance(out, list | tuple) else out
    if not bool(jnp.isfinite(jnp.sum(out, dtype=jnp.float32))):
        return math.nan
    picked = np.unique([0, shape.rows - 1])
    want = np.stack([_exact_row(case, row) for row in picked])
    got = np.asarray(out[picked], np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def _exact_row(case: tuple, row: int) -> np.ndarray:
    q, pool, table, lengths = case
    keys = np.asarray(pool[0, table[row]].reshape(-1, D)[: int(lengths[row])], np.float64)
    scores = np.asarray(q[row], np.float64) @ keys.T * SCALE
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights @ keys[:, :DV] / weights.sum(-1, keepdims=True)


def rates(shape: Shape, us: float, limits: dict[str, float]) -> dict:
    """Time, rates of what the queries need, and the share of the nearer bound."""
    gbps, tflops = shape.bytes() / us / 1e3, shape.flops() / us / 1e6
    share = max(gbps / limits["copy_gbps"], tflops / limits["tflops"])
    return {
        "us": round(us, 1),
        "gbps": round(gbps),
        "tflops": round(tflops, 1),
        "roofline_pct": round(100 * share, 1),
    }
