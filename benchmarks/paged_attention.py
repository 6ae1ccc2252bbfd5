"""Paged decode at the batch sizes and contexts of serving, ours beside the contenders.

Lengths are ragged, from half the context to all of it; pages lie anywhere in a pool. Small caches
are read from several places in turn, so that the L2 cache cannot serve them. Outputs of the first
and the last row are compared with float64 after the memory they will land in was filled with NaN,
and must be finite everywhere.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.pages import (
    DecodeStep,
    decode_error,
    exact_attention,
    num_places,
    random_pool,
    random_table,
    rates,
)
from pallas_kernels.paged_attention import configs, decode_sm90
from pallas_kernels.paged_attention.decode_shape import DecodeConfig

POOL_ELEMENTS = 2**31
"""Keys of the pool, and as many values: room for 64 rows of 32k."""


@dataclass(frozen=True, kw_only=True)
class Shape(DecodeStep):
    """One decode step of one layer."""

    heads: int = 32
    kv_heads: int = 8
    d: int = 128
    window: int | None = None
    sinks: bool = False
    float8: bool = False
    """Whether pages hold float8; queries and outputs do not."""

    @property
    def name(self) -> str:
        extras = f", window {self.window}" if self.window else ""
        extras += ", sinks" if self.sinks else ""
        extras += ", float8" if self.float8 else ""
        heads = f"{self.heads}/{self.kv_heads} heads of {self.d}"
        return f"{self.rows} x {self.context}, {heads}{extras}"

    def seen(self) -> int:
        lengths = self.lengths()
        return int((np.minimum(lengths, self.window) if self.window else lengths).sum())

    def bytes(self) -> float:
        """Bytes of the keys and values that the queries see."""
        return 2.0 * self.dtype.itemsize * self.seen() * self.kv_heads * self.d

    @property
    def dtype(self) -> np.dtype:
        """Type of the pages."""
        return jnp.dtype(jnp.float8_e4m3fn if self.float8 else jnp.bfloat16)

    def flops(self) -> float:
        return 4.0 * self.seen() * self.heads * self.d

    def pool(self) -> tuple[int, ...]:
        pages = POOL_ELEMENTS // (self.page * self.kv_heads * self.d)
        return (1, pages, self.page, self.kv_heads, self.d)

    def arguments(self) -> list[jax.ShapeDtypeStruct]:
        pool = jax.ShapeDtypeStruct(self.pool(), self.dtype)
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
    *(Shape(rows=64, context=4096, d=d) for d in (80, 96, 112, 192, 256)),
    *(Shape(rows=rows, context=4096, float8=True) for rows in (1, 16, 64, 256)),
    Shape(rows=64, context=32768, float8=True),
    Shape(rows=64, context=4096, heads=64, d=64, float8=True),
    Shape(rows=64, context=4096, heads=64, d=64, window=128, sinks=True, float8=True),
    Shape(rows=64, context=32768, window=4096, float8=True),
)
TUNED = (
    *(Shape(rows=rows, context=context) for rows, context in ((1, 4096), (16, 4096), (256, 1024))),
    Shape(rows=64, context=4096, heads=64, d=64),
)
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
        heads=shape.heads, kv_heads=shape.kv_heads, d=d, dv=d, num_sms=num_sms,
        stored=shape.dtype.itemsize,
    )  # fmt: skip
    yield "llmjax", _ours(shape, shipped)
    for config in CANDIDATES[shape.d] if tune and shape in TUNED else ():
        size = f"{config.blocks} blocks, {config.kv_block} x {config.stages}"
        extra = f", {config.min_tiles} tiles" if config.min_tiles > 1 else ""
        yield f"llmjax, {size}{extra}", _ours(shape, config)


def lower(folder: Path, *, tune: bool, num_sms: int) -> None:
    """Writes our programs into a folder; those of JAX itself need a GPU to lower."""
    timing.lower_all(folder, SHAPES, partial(programs, tune=tune, num_sms=num_sms))


def compile_all(folder: Path) -> dict[tuple[int, str], jax.stages.Compiled | Exception]:
    """Compiles every program side by side, by number of the shape and name."""
    others: dict[tuple[int, str], timing.Job] = {}
    for index, shape in enumerate(SHAPES):
        if not (shape.window or shape.sinks or shape.float8):
            others[index, "cuDNN paged"] = partial(_compile_cudnn, shape)
            if shape.page == 64 and shape.rows * shape.context <= 2**20:
                others[index, "JAX paged_attention"] = partial(_compile_jax_own, shape)
    return timing.compile_all(folder, others)


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


def measure(compiled: dict, limits: dict[str, float], *, seconds: float) -> Iterator[dict]:
    """A row for every program, while time is left."""
    deadline = time.monotonic() + seconds
    keys = [jax.random.key(time.time_ns() % 2**31 + i) for i in range(2)]
    pools = [random_pool(key, POOL_ELEMENTS) for key in keys]
    for index, shape in enumerate(SHAPES):
        # Outside of a program a reshape copies: once here, not once for every place.
        pages = [_as_pages(shape, pool) for pool in pools]
        for name, program in [(n, p) for (i, n), p in compiled.items() if i == index]:
            if time.monotonic() < deadline:
                yield _measure_program(shape, name, program, pages, limits)


@partial(jax.jit, static_argnums=0)
def _as_pages(shape: Shape, pool: jax.Array) -> jax.Array:
    return pool[: math.prod(shape.pool())].reshape(shape.pool()).astype(shape.dtype)


def _measure_program(
    shape: Shape, name: str, program, pools: list[jax.Array], limits: dict[str, float]
) -> dict:
    row: dict = {"shape": shape.name, "distribution": shape.distribution, "contender": name}
    with timing.noting_failure(row):
        if isinstance(program, Exception):
            raise program
        cases = [_arguments(shape, name, pools, place) for place in range(num_places(shape))]
        row["error"] = decode_error(
            program,
            cases[0],
            shape=(shape.rows, shape.heads, shape.d),
            exact_row=partial(_exact_row, shape, name, cases[0]),
        )
        us = timing.rotating_microseconds(program, cases, repeats=max(len(cases), 20))
        row |= rates(shape, us, limits)
    return row


def _arguments(shape: Shape, name: str, pools: list[jax.Array], place: int) -> tuple:
    """Operands of one place: ours takes any pages of the pool, the others their own few."""
    rng = np.random.default_rng(place)
    q = jax.random.normal(jax.random.key(place), (shape.rows, shape.heads, shape.d), jnp.bfloat16)
    needed = shape.rows * shape.width
    if name.startswith("llmjax"):
        table = random_table(rng, shape.pool()[1], shape.rows, shape.width)
        keys, values = pools
    else:
        table = random_table(rng, needed, shape.rows, shape.width)
        keys, values = (pool[0, place * needed : (place + 1) * needed] for pool in pools)
        if name.startswith("JAX"):
            keys, values = (
                x.reshape(shape.kv_heads, needed, shape.page, shape.d) for x in (keys, values)
            )
    return q, keys, values, table, jnp.asarray(shape.lengths())


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

    return exact_attention(
        q[row], cached(keys), cached(values), scale=shape.d**-0.5, sink=shape.sinks
    )
