# pyright: reportMissingImports=false
"""Grouped GEMM at the shapes of three mixture-of-experts models, ours beside the contenders.

Group sizes come from uniform and from Zipf routing, with the same seed for everyone. Outputs are
compared with float32 on sampled rows (the first and last of groups among them) after the memory
they will land in was filled with NaN, and must be finite everywhere.
"""

import functools
import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import timing
from benchmarks.timing import compile_all
from pallas_kernels.grouped_gemm import configs, mosaic_sm90
from pallas_kernels.grouped_gemm.quantize import take_rows
from pallas_kernels.groups import group_begin, room_for

__all__ = ["SHAPES", "compile_all", "lower", "measure", "rates"]

DISTRIBUTIONS = ("uniform", "zipf")
SIDE_BY_SIDE = "llmjax, groups side by side"
"""Ours as others take rows; else groups of many rows begin at a multiple of what tiles begin at."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One product of a model's expert layer."""

    name: str
    groups: int
    k: int
    n: int
    rows: int
    """Rows of all groups together."""
    top_k: int | None = None
    """Experts that a token visits; None where rows are drawn one by one (one rank of many)."""

    def group_sizes(self, distribution: str, seed: int = 0) -> np.ndarray:
        rng = np.random.default_rng(seed)
        weights = np.ones(self.groups)
        if distribution == "zipf":
            weights = rng.permutation(1 / np.arange(1, self.groups + 1))
        if self.top_k is None:
            return rng.multinomial(self.rows, weights / weights.sum()).astype(np.int32)
        noise = rng.gumbel(size=(self.rows // self.top_k, self.groups))
        chosen = np.argpartition(-np.log(weights) - noise, self.top_k - 1)[:, : self.top_k]
        return np.bincount(chosen.ravel(), minlength=self.groups).astype(np.int32)

    @property
    def row_alignment(self) -> int:
        """What the engine lets each group begin at a multiple of."""
        return configs.row_alignment_for(self.rows / self.groups)

    def flops(self) -> float:
        return 2.0 * self.rows * self.k * self.n

    def bytes(self, group_sizes: np.ndarray) -> float:
        used = int((group_sizes > 0).sum())
        return 2.0 * (used * self.k * self.n + self.rows * (self.k + self.n))

    def floor_us(self, group_sizes: np.ndarray, limits: dict[str, float]) -> float:
        arithmetic = self.flops() / limits["tflops"] / 1e6
        return max(arithmetic, self.bytes(group_sizes) / limits["copy_gbps"] / 1e3)

    def arguments(self, row_alignment: int = 1) -> list[Any]:
        room = room_for(self.rows, self.groups, row_alignment)
        return [
            jax.ShapeDtypeStruct((room, self.k), jnp.bfloat16),
            jax.ShapeDtypeStruct((1, self.groups, self.k, self.n), jnp.bfloat16),
            jax.ShapeDtypeStruct((self.groups,), jnp.int32),
        ]

    def operands(self, key: jax.Array) -> tuple[Any, Any]:
        """Random rows and matrices."""
        keys = jax.random.split(key, 2)
        lhs = jax.random.normal(keys[0], (self.rows, self.k), jnp.bfloat16)
        rhs = jax.random.normal(keys[1], (1, self.groups, self.k, self.n), jnp.bfloat16)
        return lhs, rhs * jnp.bfloat16(self.k**-0.5)

    @staticmethod
    def exact_row(lhs: Any, rhs: Any, row: jax.Array, group: jax.Array) -> jax.Array:
        """One row of the product, in float32."""
        weights = rhs[0, group].astype(jnp.float32)
        return jnp.dot(lhs[row].astype(jnp.float32), weights, precision="highest")


def _qwen(tokens: int, projection: str = "up") -> Shape:
    k, n = (2048, 1536) if projection == "up" else (768, 2048)
    name = f"Qwen3-30B-A3B {projection}, {tokens} tokens"
    return Shape(name=name, groups=128, k=k, n=n, rows=tokens * 8, top_k=8)


def _mixtral(tokens: int) -> Shape:
    name = f"Mixtral up, {tokens} tokens"
    return Shape(name=name, groups=8, k=4096, n=28672, rows=tokens * 2, top_k=2)


def _deepseek(rows: int, projection: str = "up") -> Shape:
    k, n = (7168, 4096) if projection == "up" else (2048, 7168)
    name = f"DeepSeek-V3 rank of 32 {projection}, {rows} rows an expert"
    return Shape(name=name, groups=8, k=k, n=n, rows=rows * 8)


SHAPES = (
    *(_qwen(tokens) for tokens in (16, 64, 256, 2048, 8192)),
    _qwen(64, "down"),
    _qwen(2048, "down"),
    *(_mixtral(tokens) for tokens in (16, 256, 8192)),
    *(_deepseek(rows) for rows in (4, 32, 256, 1024)),
    _deepseek(32, "down"),
)


def programs(shape: Shape, *, tune: bool, num_sms: int) -> Iterator[tuple[str, Callable]]:
    """Name and function of each JAX contender; `llmjax` is what ships, the rest of ours tuning."""
    mean = shape.rows / shape.groups
    shipped = configs.config_for(
        rows=shape.rows, groups=shape.groups, k=shape.k, n=shape.n, num_sms=num_sms
    )
    for name, config in configs.NAMED.items():
        plausible = config.max_rows <= 32 if mean <= 24 else config.max_rows > 32
        if config == shipped or (tune and plausible and shape.n % config.columns == 0):
            run = functools.partial(
                mosaic_sm90.grouped_gemm, layer=0, config=config, num_sms=num_sms
            )
            yield from with_alignment(shape, "" if config == shipped else f", {name} tiles", run)
    yield from _jax_own(mean)
    if importlib.util.find_spec("tokamax"):
        yield from _tokamax(mean, num_sms)


def with_alignment(shape: Shape, tiles: str, run: Callable) -> Iterator[tuple[str, Callable]]:
    """Ours with groups that begin where the engine has them begin, and side by side if not so."""
    yield f"llmjax{tiles}", functools.partial(run, row_alignment=shape.row_alignment)
    if not tiles and shape.row_alignment > 1:
        yield SIDE_BY_SIDE, run


def _jax_own(mean: float) -> Iterator[tuple[str, Callable]]:
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    tiles = (64, 128, 64, 6, 1) if mean <= 64 else (64, 256, 64, 4, 4)
    names = ("block_m", "block_n", "block_k", "max_concurrent_steps", "grid_block_n")

    def run(lhs, rhs, sizes):
        options = dict(zip(names, tiles, strict=True))
        return ragged_dot_mgpu.ragged_dot(lhs, rhs[0], group_sizes=sizes, **options)

    yield "JAX ragged_dot_mgpu " + "x".join(map(str, tiles)), run


def _tokamax(mean: float, num_sms: int) -> Iterator[tuple[str, Callable]]:
    from jax.extend import backend
    from tokamax._src.ops.ragged_dot import pallas_mosaic_gpu_common as common
    from tokamax._src.ops.ragged_dot import pallas_mosaic_gpu_kernel_sm90 as kernel

    small = [(64, 64, 128, 4, 1, 1), (64, 128, 64, 5, 0, 1)]
    large = [(128, 128, 64, 4, 1, 4), (64, 256, 64, 4, 1, 4)]
    for m, n, k, stages, minor, width in small if mean <= 64 else large:
        config = common.Config(
            block_m=m, block_n=n, block_k=k, num_stages=stages, split_k=1, persistent=True,
            grid_minor_dim=common.MatmulDimension(minor), grid_tile_width=width,
        )  # fmt: skip

        def run(lhs, rhs, sizes, config=config):
            # It asks the default device for its size, which a machine without a GPU cannot say.
            device = mock.Mock(core_count=num_sms, compute_capability="9.0", platform="gpu")
            with mock.patch.object(backend, "get_default_device", return_value=device):
                return kernel.ragged_dot_kernel(lhs, rhs[0], sizes, jnp.dtype(jnp.bfloat16), config)

        yield f"tokamax Mosaic {m}x{n}x{k}x{stages}", run


def lower(
    folder: Path,
    *,
    tune: bool,
    num_sms: int,
    shapes: Sequence[Shape] = SHAPES,
    programs: Callable = programs,
) -> None:
    """Writes every JAX program of the benchmark into a folder."""
    for index, shape in enumerate(shapes):
        for name, function in programs(shape, tune=tune, num_sms=num_sms):
            path = folder / f"{index:02d}~{name}.bin"
            if path.exists():
                continue
            try:
                arguments = shape.arguments(_row_alignment(shape, name))
                path.write_bytes(timing.lower_program(function, arguments))
            except Exception as error:  # A contender that does not lower is left out, aloud.
                print(f"{shape.name}: {name} does not lower: {str(error)[:200]}", flush=True)


def measure(
    compiled: dict, limits: dict[str, float], *, seconds: float, shapes: Sequence[Shape] = SHAPES
) -> Iterator[dict]:
    """A row for every program on every distribution, while time is left."""
    deadline = time.monotonic() + seconds
    for index, shape in enumerate(shapes):
        if time.monotonic() < deadline:
            mine = {name: program for (i, name), program in compiled.items() if i == index}
            yield from _measure_shape(shape, mine, limits)


def _measure_shape(shape: Shape, compiled: dict, limits: dict[str, float]) -> Iterator[dict]:
    lhs, rhs = shape.operands(jax.random.key(time.time_ns() % 2**31))
    for distribution in DISTRIBUTIONS:
        sizes = shape.group_sizes(distribution)
        picked, groups = sample_rows(sizes)
        want = _exact_rows(shape.exact_row, lhs, rhs, picked, groups)
        for name, program in compiled.items():
            row: dict = {"shape": shape.name, "distribution": distribution, "contender": name}
            with timing.noting_failure(row):
                if isinstance(program, Exception):
                    raise program
                alignment = _row_alignment(shape, name)
                places, rows_of_places = _places(sizes, alignment)
                placed = lhs if alignment == 1 else take_rows(lhs, jnp.asarray(rows_of_places))
                arguments = (*jax.tree.leaves((placed, rhs)), jnp.asarray(sizes))
                row["error"] = _error(program, arguments, shape, places, picked, want)
                us = timing.kernel_microseconds(program, *arguments)
                row |= rates(shape, sizes, us, limits)
            yield row


def _row_alignment(shape: Shape, contender: str) -> int:
    is_aligned = contender.startswith("llmjax") and contender != SIDE_BY_SIDE
    return shape.row_alignment if is_aligned else 1


def _places(sizes: np.ndarray, row_alignment: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each row stands, and which row stands at each place, the first where none does."""
    groups, rows = len(sizes), int(sizes.sum())
    before = jnp.asarray(np.cumsum(sizes) - sizes)
    moved = group_begin(before, jnp.arange(groups), row_alignment) - before
    places = np.arange(rows) + np.repeat(np.asarray(moved), sizes)
    rows_of_places = np.zeros(room_for(rows, groups, row_alignment), np.int32)
    rows_of_places[places] = np.arange(rows)
    return places, rows_of_places


def sample_rows(sizes: np.ndarray, count: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers and their groups: first and last of some groups, then any."""
    rng = np.random.default_rng(1)
    ends = np.cumsum(sizes)
    some = rng.permutation(np.flatnonzero(sizes))[: count // 2]
    edges = np.concatenate([(ends - sizes)[some], ends[some] - 1])
    rows = np.concatenate([edges, rng.integers(ends[-1], size=count - len(edges))])
    return rows, np.searchsorted(ends, rows, side="right")


@functools.partial(jax.jit, static_argnums=0)
def _exact_rows(one_row: Callable, lhs, rhs, rows, groups):
    return lax.map(lambda pair: one_row(lhs, rhs, *pair), (rows, groups))


def _error(
    program, arguments, shape: Shape, places: np.ndarray, picked: np.ndarray, want: jax.Array
) -> float:
    """Relative error of the sampled rows, NaN if any row is not finite."""
    out = timing.run_over_nan(program, arguments, (arguments[0].shape[0], shape.n))[places]
    difference = out[picked].astype(jnp.float32) - want
    error = jnp.linalg.norm(difference) / jnp.linalg.norm(want)
    return float(error) if timing.all_finite(out) else math.nan


def rates(shape: Shape, sizes: np.ndarray, us: float, limits: dict[str, float]) -> dict:
    """Time, rates, and the share of the roofline max(FLOP / rate, bytes / copy rate)."""
    flops, moved = shape.flops(), shape.bytes(sizes)
    return {
        "us": round(us, 1),
        "gbps": round(moved / us / 1e3),
        "tflops": round(flops / us / 1e6, 1),
        "roofline_pct": round(100 * shape.floor_us(sizes, limits) / us, 1),
    }
