"""Paged decode at the batch sizes and contexts of serving, ours beside the contenders.

Lengths are ragged, from half the context to all of it; pages lie anywhere in a pool. Small caches
are read from several places in turn, so that the L2 cache cannot serve them. Outputs of the first
and the last row are compared with float32 after the memory they will land in was filled with NaN,
and must be finite everywhere.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import timing
from pallas_kernels.paged_attention import configs, decode_sm90
from pallas_kernels.paged_attention.decode_shape import DecodeConfig

POOL_ELEMENTS = 2**31
"""Keys of the pool, and as many values: room for 64 rows of 32k."""
COLD_BYTES = 200e6
"""Bytes of different places to read in turn: more than three times the L2 cache."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One decode step of one layer."""

    rows: int
    context: int
    page: int = 64
    heads: int = 32
    kv_heads: int = 8
    d: int = 128
    window: int | None = None
    sinks: bool = False

    @property
    def name(self) -> str:
        extras = f", window {self.window}" if self.window else ""
        extras += ", sinks" if self.sinks else ""
        heads = f"{self.heads}/{self.kv_heads} heads of {self.d}"
        return f"{self.rows} x {self.context}, {heads}{extras}"

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

    def seen(self) -> int:
        lengths = self.lengths()
        return int((np.minimum(lengths, self.window) if self.window else lengths).sum())

    def bytes(self) -> float:
        """Bytes of the keys and values that the queries see."""
        return 4.0 * self.seen() * self.kv_heads * self.d

    def flops(self) -> float:
        return 4.0 * self.seen() * self.heads * self.d

    def pool(self) -> tuple[int, ...]:
        pages = POOL_ELEMENTS // (self.page * self.kv_heads * self.d)
        return (1, pages, self.page, self.kv_heads, self.d)

    def arguments(self) -> list[jax.ShapeDtypeStruct]:
        pool = jax.ShapeDtypeStruct(self.pool(), jnp.bfloat16)
        return [
            jax.ShapeDtypeStruct((self.rows, self.heads, self.d), jnp.bfloat16),
            pool,
            pool,
            jax.ShapeDtypeStruct((self.rows, self.width), jnp.int32),
            jax.ShapeDtypeStruct((self.rows,), jnp.int32),
        ]


ANCHORS = ((1, 4096), (1, 32768), (16, 4096), (16, 32768), (64, 4096), (256, 1024), (256, 4096))
SHAPES = (
    *(Shape(rows=rows, context=context) for rows, context in (*ANCHORS, (64, 32768))),
    *(Shape(rows=16, context=4096, page=page) for page in (16, 32, 128)),
    *(Shape(rows=64, context=4096, page=page) for page in (16, 128)),
    *(Shape(rows=rows, context=4096, heads=64, d=64) for rows in (16, 64, 256)),
    Shape(rows=64, context=4096, heads=64, d=64, window=128, sinks=True),
    Shape(rows=64, context=32768, window=4096),
)
TUNED = (SHAPES[0], *SHAPES[2:3], *SHAPES[5:6], *SHAPES[11:12], *SHAPES[13:14])
CANDIDATES = {
    128: (
        DecodeConfig(blocks=132, kv_block=64, stages=6),
        DecodeConfig(blocks=264, kv_block=64, stages=3, merge_registers=64),
        DecodeConfig(blocks=132, kv_block=128, stages=3, min_tiles=4),
    ),
    64: (
        DecodeConfig(blocks=132, kv_block=128, stages=6),
        DecodeConfig(blocks=264, kv_block=128, stages=3, merge_registers=64),
    ),
}
"""What the tuner tries, by head dimension."""


def _ours(shape: Shape, config: DecodeConfig) -> Callable:
    def run(q, k_pages, v_pages, table, lengths):
        sinks = jnp.zeros(shape.heads) if shape.sinks else None
        return decode_sm90.paged_decode(
            q, k_pages, v_pages, 0, table, lengths,
            scale=shape.d**-0.5, window=shape.window, sinks=sinks, config=config,
        )[0]  # fmt: skip

    return run


def programs(shape: Shape, *, tune: bool, num_sms: int) -> Iterator[tuple[str, Callable]]:
    """Name and function of each of our configurations; `llmjax` is what ships."""
    d = shape.d
    shipped = configs.decode_config(
        heads=shape.heads, kv_heads=shape.kv_heads, d=d, dv=d, num_sms=num_sms
    )
    yield "llmjax", _ours(shape, shipped)
    for config in CANDIDATES[shape.d] if tune and shape in TUNED else ():
        size = f"{config.blocks} blocks, {config.kv_block} x {config.stages}"
        extra = f", {config.min_tiles} tiles" if config.min_tiles > 1 else ""
        yield f"llmjax, {size}{extra}", _ours(shape, config)


def lower(folder: Path, *, tune: bool, num_sms: int) -> None:
    """Writes our programs into a folder; those of JAX itself need a GPU to lower."""
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
    for index, shape in enumerate(SHAPES):
        if not (shape.window or shape.sinks):
            jobs[index, "cuDNN paged"] = functools.partial(_compile_cudnn, shape)
            if shape.page == 64 and shape.rows * shape.context <= 2**20:
                jobs[index, "JAX paged_attention"] = functools.partial(_compile_jax_own, shape)
    with ThreadPoolExecutor(16) as pool:
        return dict(zip(jobs, pool.map(_attempt, jobs.values()), strict=True))


def _attempt(job: Callable[[], jax.stages.Compiled]) -> jax.stages.Compiled | Exception:
    try:
        return job()
    except Exception as error:  # A contender that does not compile is a row, not the end.
        return error


def _compile_cudnn(shape: Shape) -> jax.stages.Compiled:
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    def run(q, k_pages, v_pages, table, lengths):
        table, ones = table.reshape(shape.rows, 1, shape.width, 1), jnp.ones_like(lengths)
        return cudnn.paged_attention(
            q[:, None], k_pages, v_pages, ones, lengths, table, table,
            scale=shape.d**-0.5, mask_type=cudnn.MaskType.PADDING,
        )  # fmt: skip

    pages = (shape.rows * shape.width, *shape.pool()[2:])
    return _compile_with_pages(run, shape, pages)


def _compile_jax_own(shape: Shape) -> jax.stages.Compiled:
    from jax.experimental.pallas.ops.gpu import paged_attention as own

    def run(q, k_pages, v_pages, table, lengths):
        q = q * jnp.bfloat16(shape.d**-0.5)
        return own.paged_attention(
            q, k_pages, v_pages, table, lengths, k_splits=16,
            pages_per_compute_block=1, num_warps=4, num_stages=2,
        )  # fmt: skip

    pages = (shape.kv_heads, shape.rows * shape.width, shape.page, shape.d)
    return _compile_with_pages(run, shape, pages)


def _compile_with_pages(run: Callable, shape: Shape, pages: tuple[int, ...]) -> jax.stages.Compiled:
    q, _, _, *rest = shape.arguments()
    pool = jax.ShapeDtypeStruct(pages, jnp.bfloat16)
    return jax.jit(run).lower(q, pool, pool, *rest).compile()


def measure(compiled: dict, limits: dict[str, float], *, seconds: float) -> list[dict]:
    """A row for every program, while time is left."""
    deadline = time.monotonic() + seconds
    pools = [_pool(jax.random.key(time.time_ns() % 2**31 + i)) for i in range(2)]
    rows = []
    for index, shape in enumerate(SHAPES):
        # Outside of a program a reshape copies: once here, not once for every place.
        pools = [pool.reshape(shape.pool()) for pool in pools]
        for name, program in [(n, p) for (i, n), p in compiled.items() if i == index]:
            if time.monotonic() < deadline:
                rows.append(_measure_program(shape, name, program, pools, limits))
                print(*rows[-1].values(), flush=True)
    return rows


@jax.jit
def _pool(key: jax.Array) -> jax.Array:
    """Random values at distinct addresses: one block of them, over and over."""
    block = jax.random.normal(key, (2**26,), jnp.bfloat16)
    return lax.broadcast_in_dim(block, (POOL_ELEMENTS // 2**26, 2**26), (1,)).reshape(-1)


def _measure_program(
    shape: Shape, name: str, program, pools: list[jax.Array], limits: dict[str, float]
) -> dict:
    row: dict = {"shape": shape.name, "distribution": shape.distribution, "contender": name}
    try:
        if isinstance(program, Exception):
            raise program
        places = max(1, min(16, math.ceil(COLD_BYTES / shape.bytes())))
        places = 1 if shape.bytes() > 0.75 * COLD_BYTES else places
        cases = [_arguments(shape, name, pools, place) for place in range(places)]
        row["error"] = _error(shape, name, program, cases[0])
        us = timing.rotating_microseconds(program, cases, repeats=max(places, 20))
        row |= rates(shape, us, limits)
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
    return row


def _arguments(shape: Shape, name: str, pools: list[jax.Array], place: int) -> tuple:
    """Operands of one place: ours takes any pages of the pool, the others their own few."""
    rng = np.random.default_rng(place)
    q = jax.random.normal(jax.random.key(place), (shape.rows, shape.heads, shape.d), jnp.bfloat16)
    needed = shape.rows * shape.width
    if name.startswith("llmjax"):
        table = rng.permutation(shape.pool()[1])[:needed]
        keys, values = pools
    else:
        table = rng.permutation(needed)
        keys, values = (pool[0, place * needed : (place + 1) * needed] for pool in pools)
        if name.startswith("JAX"):
            keys, values = (
                x.reshape(shape.kv_heads, needed, shape.page, shape.d) for x in (keys, values)
            )
    table = table.reshape(shape.rows, shape.width).astype(np.int32)
    return q, keys, values, jnp.asarray(table), jnp.asarray(shape.lengths())


def _error(shape: Shape, name: str, program, case: tuple) -> float:
    """Relative error of the first and the last row, NaN if anything is not finite."""
    poison = jnp.full((shape.rows, shape.heads, shape.d), jnp.nan, jnp.bfloat16)
    poison.block_until_ready()
    del poison
    out = program(*case)
    out = (out[0] if isinstance(out, list | tuple) else out).reshape(-1, shape.heads, shape.d)
    if not bool(jnp.isfinite(jnp.sum(out, dtype=jnp.float32))):
        return math.nan
    picked = np.unique([0, shape.rows - 1])
    want = np.stack([_exact_row(shape, name, case, row) for row in picked])
    got = np.asarray(out[picked], np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def _exact_row(shape: Shape, name: str, case: tuple, row: int) -> np.ndarray:
    q, keys, values, table, lengths = case
    end = int(lengths[row])
    begin = max(0, end - shape.window) if shape.window else 0
    used = table[row, : -(-end // shape.page)]

    def cached(pages: jax.Array) -> np.ndarray:
        if name.startswith("JAX"):
            pages = jnp.moveaxis(pages[:, used], 0, 2)
        else:
            pages = pages.reshape(-1, *shape.pool()[2:])[used]
        return np.asarray(pages.reshape(-1, shape.kv_heads, shape.d)[begin:end], np.float64)

    grouped = np.asarray(q[row], np.float64).reshape(shape.kv_heads, -1, shape.d)
    scores = np.einsum("hgd,shd->hgs", grouped, cached(keys)) * shape.d**-0.5
    highest = np.maximum(scores.max(-1, keepdims=True), 0 if shape.sinks else -np.inf)
    weights = np.exp(scores - highest)
    total = weights.sum(-1, keepdims=True) + (np.exp(-highest) if shape.sinks else 0)
    out = np.einsum("hgs,shd->hgd", weights / total, cached(values))
    return out.reshape(shape.heads, shape.d)


def rates(shape: Shape, us: float, limits: dict[str, float]) -> dict:
    """Time, rates of the keys and values seen, and their share of the copy rate."""
    gbps = shape.bytes() / us / 1e3
    return {
        "us": round(us, 1),
        "gbps": round(gbps),
        "tflops": round(shape.flops() / us / 1e6, 1),
        "roofline_pct": round(100 * gbps / limits["copy_gbps"], 1),
    }
