"""Latent attention at the batch sizes and contexts of serving, ours beside XLA's.

Lengths of decode are ragged, from half the context to all of it; pages lie anywhere in a pool.
Small caches are read from several places in turn, so that the L2 cache cannot serve them. Outputs
of the first and the last query are compared with float64 after the memory they will land in was
filled with NaN, and must be finite everywhere.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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
from benchmarks.timing import compile_all
from pallas_kernels import reference
from pallas_kernels.paged_attention import configs
from pallas_kernels.paged_attention.mla_decode_sm90 import mla_decode
from pallas_kernels.paged_attention.mla_shape import MlaConfig
from pallas_kernels.paged_attention.single_rows import split_rows

__all__ = ["SHAPES", "compile_all", "lower", "measure"]

D, DV = 576, 512
SCALE = 192**-0.5
POOL_POSITIONS = 2**21
"""Positions of the pool: twice those of 64 rows of 16k."""


@dataclass(frozen=True, kw_only=True)
class Shape(DecodeStep):
    """One step of one layer."""

    heads: int = 128
    queries: int = 1
    """Queries of a row, at its end: more than one is prefill, and all rows are of full length."""

    @property
    def name(self) -> str:
        prefill = f", last {self.queries} are queries" if self.queries > 1 else ""
        return f"{self.rows} x {self.context}{prefill}, {self.heads} heads"

    @property
    def distribution(self) -> str:
        return f"even, page {self.page}" if self.queries > 1 else super().distribution

    @property
    def tokens(self) -> int:
        return self.rows * self.queries

    def lengths(self) -> np.ndarray:
        if self.queries == 1:
            return super().lengths()
        return np.full(self.rows, self.context, np.int32)

    def bytes(self) -> float:
        return 2.0 * D * int(self.lengths().sum())

    def flops(self) -> float:
        later = self.rows * self.queries * (self.queries - 1) // 2
        visible = self.queries * int(self.lengths().sum()) - later
        return 2.0 * (D + DV) * self.heads * visible

    def arguments(self) -> list[jax.ShapeDtypeStruct]:
        return [
            jax.ShapeDtypeStruct((self.tokens, self.heads, D), jnp.bfloat16),
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
    *(
        Shape(rows=1, context=context, queries=queries, heads=heads)
        for context, queries in ((4096, 4096), (8704, 512))
        for heads in (16, 128)
    ),
)
TUNED = (SHAPES[0], SHAPES[1], SHAPES[2], SHAPES[4])
CANDIDATES = (("4 tiles at least", MlaConfig(blocks=132, min_tiles=4)),)
"""What the tuner tries."""


def _ours(config: MlaConfig) -> Callable:
    def run(q, pages, table, lengths):
        if len(q) > len(lengths):
            table, lengths = split_rows(table, _query_start(q, lengths), lengths, tokens=len(q))
        return mla_decode(
            q, pages, 0, table, lengths, scale=SCALE, value_dim=DV, config=config
        )[0]  # fmt: skip

    return run


def _reference(q, pages, table, lengths):
    return reference.paged_attention(
        q, pages, None, 0, table, _query_start(q, lengths), lengths,
        scale=SCALE, max_query_length=len(q) // len(lengths), value_dim=DV,
    )[0]  # fmt: skip


def _query_start(q, lengths):
    return jnp.arange(len(lengths) + 1) * (len(q) // len(lengths))


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
        if shape.queries == 1:
            yield "XLA, gather", _gather


def lower(folder: Path, *, tune: bool, num_sms: int) -> None:
    """Writes the programs into a folder."""
    timing.lower_all(folder, SHAPES, partial(programs, tune=tune, num_sms=num_sms))


def measure(compiled: dict, limits: dict[str, float], *, seconds: float) -> Iterator[dict]:
    """A row for every program, while time is left."""
    deadline = time.monotonic() + seconds
    pool = random_pool(jax.random.key(time.time_ns() % 2**31), POOL_POSITIONS * D)
    for index, shape in enumerate(SHAPES):
        # Outside of a program a reshape copies: once here, not once for every place.
        pool = pool.reshape(shape.arguments()[1].shape)
        for name, program in [(n, p) for (i, n), p in compiled.items() if i == index]:
            if time.monotonic() < deadline:
                yield _measure_program(shape, name, program, pool, limits)


def _measure_program(
    shape: Shape, name: str, program: Any, pool: jax.Array, limits: dict[str, float]
) -> dict:
    row: dict = {"shape": shape.name, "distribution": shape.distribution, "contender": name}
    with timing.noting_failure(row):
        if isinstance(program, Exception):
            raise program
        cases = [_arguments(shape, pool, place) for place in range(num_places(shape))]
        row["error"] = decode_error(
            program,
            cases[0],
            shape=(shape.tokens, shape.heads, DV),
            exact_row=partial(_exact_row, shape, cases[0]),
        )
        us = timing.rotating_microseconds(program, cases, repeats=max(len(cases), 20))
        row |= rates(shape, us, limits)
    return row


def _arguments(shape: Shape, pool: jax.Array, place: int) -> tuple:
    rng = np.random.default_rng(place)
    q = jax.random.normal(jax.random.key(place), (shape.tokens, shape.heads, D), jnp.bfloat16)
    table = random_table(rng, POOL_POSITIONS // shape.page, shape.rows, shape.width)
    return q, pool, table, jnp.asarray(shape.lengths())


def _exact_row(shape: Shape, case: tuple, token: int) -> np.ndarray:
    q, pool, table, lengths = case
    row, query = divmod(token, shape.queries)
    visible = int(lengths[row]) - (shape.queries - 1 - query)
    keys = np.asarray(pool[0, table[row]].reshape(-1, 1, D)[:visible], np.float64)
    return exact_attention(q[token], keys, keys[..., :DV], scale=SCALE)
