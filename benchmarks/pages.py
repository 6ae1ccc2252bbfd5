"""What benchmarks of attention over pages share: pages anywhere in a pool, and exact results."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import timing

COLD_BYTES = 200e6
"""Bytes of different places to read in turn: more than three times the L2 cache."""


class Cost(Protocol):
    """A step of which one knows what it needs."""

    def bytes(self) -> float: ...

    def flops(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class DecodeStep:
    """One decode step of one layer."""

    rows: int
    context: int
    page: int = 64

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


@functools.partial(jax.jit, static_argnums=1)
def random_pool(key: jax.Array, elements: int) -> jax.Array:
    """Random values at distinct addresses: one block of them, 32 times over."""
    block = jax.random.normal(key, (elements // 32,), jnp.bfloat16)
    return lax.broadcast_in_dim(block, (32, block.size), (1,)).reshape(-1)


def random_table(rng: np.random.Generator, pages: int, rows: int, width: int) -> jax.Array:
    """The pages of each row, anywhere among so many."""
    table = rng.permutation(pages)[: rows * width].reshape(rows, width)
    return jnp.asarray(table, jnp.int32)


def num_places(step: Cost) -> int:
    """Places to read in turn, so that the L2 cache does not serve a small step."""
    if step.bytes() > 0.75 * COLD_BYTES:
        return 1
    return max(1, min(16, math.ceil(COLD_BYTES / step.bytes())))


def decode_error(
    program: Callable,
    case: tuple,
    *,
    shape: tuple[int, int, int],
    exact_row: Callable[[int], np.ndarray],
) -> float:
    """Relative error of the first and the last row, NaN if anything is not finite.

    Args:
        shape: of the output: rows, heads and features of a head.
        exact_row: computes what a row should be.
    """
    out = timing.run_over_nan(program, case, shape).reshape(shape)
    if not timing.all_finite(out):
        return math.nan
    picked = np.unique([0, shape[0] - 1])
    want = np.stack([exact_row(row) for row in picked])
    return relative_error(np.asarray(out[picked], np.float64), want)


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def exact_attention(
    q: jax.Array, keys: np.ndarray, values: np.ndarray, *, scale: float, sink: bool = False
) -> np.ndarray:
    """One query in float64, [heads, d], over keys and values [positions, kv_heads, d].

    With `sink` every head has a logit of 0 beside those of the keys.
    """
    grouped = np.asarray(q, np.float64).reshape(keys.shape[1], -1, keys.shape[2])
    scores = np.einsum("hgd,shd->hgs", grouped, keys) * scale
    highest = np.maximum(scores.max(-1, keepdims=True), 0 if sink else -np.inf)
    weights = np.exp(scores - highest)
    total = weights.sum(-1, keepdims=True) + (np.exp(-highest) if sink else 0)
    out = np.einsum("hgs,shd->hgd", weights / total, values)
    return out.reshape(-1, values.shape[2])


def rates(step: Cost, us: float, limits: dict[str, float]) -> dict[str, float]:
    """Time, rates of what the queries need, and the share of the nearer bound."""
    gbps, tflops = step.bytes() / us / 1e3, step.flops() / us / 1e6
    share = max(gbps / limits["copy_gbps"], tflops / limits["tflops"])
    return {
        "us": round(us, 1),
        "gbps": round(gbps),
        "tflops": round(tflops, 1),
        "roofline_pct": round(100 * share, 1),
    }
