"""A whole expert layer after its router: sort, gate and up, activation, down, combine.

`CHAIN` layers run one after the other in one program, each with its own routing and a residual, as
in a model; times are those of one layer. `us` is the wall clock, launches and gaps included,
`kernel_us` the sum of its kernels. The floor is that of the two products alone.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.grouped_gemm import Shape, compile_all
from pallas_kernels.activation import ACTIVATIONS
from pallas_kernels.grouped_gemm import mosaic_sm90
from pallas_kernels.grouped_gemm.configs import config_for
from pallas_kernels.grouped_gemm.sort import sort_rows

__all__ = ["SHAPES", "compile_all", "lower", "measure"]

CHAIN = 8
CHECKED = 8
"""Tokens whose results are compared with float32."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The experts of one model's layer, and the tokens that visit them."""

    model: str
    experts: int
    top_k: int
    embed: int
    ffn: int
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.model}, {self.tokens} tokens"

    def products(self) -> tuple[Shape, Shape]:
        """The two products of the layer."""
        common = partial(
            Shape,
            name=self.name,
            groups=self.experts,
            rows=self.tokens * self.top_k,
            top_k=self.top_k,
        )
        return common(k=self.embed, n=2 * self.ffn), common(k=self.ffn, n=self.embed)

    def choose_experts(self, seed: int) -> np.ndarray:
        """Uniform routing: [CHAIN, tokens, top_k], without repeats in a token."""
        noise = np.random.default_rng(seed).random((CHAIN, self.tokens, self.experts))
        return np.argpartition(noise, self.top_k - 1)[..., : self.top_k].astype(np.int32)

    def floor_us(self, experts: np.ndarray, limits: dict[str, float]) -> float:
        """Mean over the chain of max(FLOP / rate, bytes / copy rate), product by product."""
        floors = []
        for chosen in experts:
            sizes = np.bincount(chosen.ravel(), minlength=self.experts)
            for product in self.products():
                floors.append(product.floor_us(sizes, limits))
        return sum(floors) / len(experts)

    def arguments(self) -> list[jax.ShapeDtypeStruct]:
        up, down = self.products()
        return [
            jax.ShapeDtypeStruct((self.tokens, self.embed), jnp.bfloat16),
            jax.ShapeDtypeStruct((CHAIN, self.tokens, self.top_k), jnp.int32),
            jax.ShapeDtypeStruct((CHAIN, self.tokens, self.top_k), jnp.float32),
            jax.ShapeDtypeStruct((1, self.experts, up.k, up.n), jnp.bfloat16),
            jax.ShapeDtypeStruct((1, self.experts, down.k, down.n), jnp.bfloat16),
        ]


QWEN = {"model": "Qwen3-30B-A3B", "experts": 128, "top_k": 8, "embed": 2048, "ffn": 768}
MIXTRAL = {"model": "Mixtral", "experts": 8, "top_k": 2, "embed": 4096, "ffn": 14336}
SHAPES = tuple(
    Layer(**model, tokens=tokens)
    for model in (QWEN, MIXTRAL)
    for tokens in (1, 16, 64, 256, 2048, 8192)
)


def expert_layer(x, experts, gates, gate_up, down, *, fused: bool, num_sms: int) -> jax.Array:
    """The gated sum over each token's experts."""
    order = sort_rows(experts.reshape(-1), gate_up.shape[1])
    multiply = partial(_multiply, sizes=order.sizes, num_sms=num_sms)
    rows = x[order.row // experts.shape[1]]
    if fused:
        hidden = multiply(rows, gate_up, activation="silu")
    else:
        hidden = multiply(rows, gate_up).astype(jnp.float32)
        hidden = ACTIVATIONS["silu"](*jnp.split(hidden, 2, axis=1)).astype(x.dtype)
    results = multiply(hidden, down)
    place = order.place.reshape(experts.shape)
    # One choice after the other: XLA then reads the rows as it adds them up.
    sums = jnp.zeros(x.shape, jnp.float32)
    for choice in range(experts.shape[1]):
        sums += results[place[:, choice]] * gates[:, choice, None]
    return sums.astype(x.dtype)


def _multiply(lhs, rhs, sizes, num_sms: int, activation: str | None = None) -> jax.Array:
    groups, k, n = rhs.shape[1:]
    gated = activation is not None
    config = config_for(rows=lhs.shape[0], groups=groups, k=k, n=n, num_sms=num_sms, gated=gated)
    return mosaic_sm90.grouped_gemm(
        lhs, rhs, sizes, 0, activation=activation, config=config, num_sms=num_sms
    )


def programs(layer: Layer, num_sms: int) -> Iterator[tuple[str, Callable]]:
    """Name and program of each way to run the layer; `llmjax` is what ships."""
    for name, fused in (("llmjax", True), ("llmjax, activation apart", False)):
        # Compiled once: the layers of the chain call the same function.
        one_layer = jax.jit(partial(expert_layer, fused=fused, num_sms=num_sms))

        def chain(x, experts, gates, gate_up, down, one_layer=one_layer):
            first = x
            for index in range(CHAIN):
                x = x + one_layer(x, experts[index], gates[index], gate_up, down)
                first = x if index == 0 else first
            return first, x

        yield name, chain


def lower(folder: Path, *, tune: bool, num_sms: int) -> None:
    """Writes every program of the benchmark into a folder; there is nothing to tune."""
    for index, layer in enumerate(SHAPES):
        for name, program in programs(layer, num_sms):
            path = folder / f"{index:02d}~{name}.bin"
            if not path.exists():
                path.write_bytes(timing.lower_program(program, layer.arguments()))


def measure(compiled: dict, limits: dict[str, float], *, seconds: float) -> list[dict]:
    """A row for every program, while time is left."""
    deadline = time.monotonic() + seconds
    rows = []
    for index, layer in enumerate(SHAPES):
        mine = {name: program for (i, name), program in compiled.items() if i == index}
        if mine and time.monotonic() < deadline:
            rows += _measure_layer(layer, mine, limits)
    return rows


def _measure_layer(layer: Layer, compiled: dict, limits: dict[str, float]) -> list[dict]:
    seed = time.time_ns() % 2**31
    keys = jax.random.split(jax.random.key(seed), 4)
    x, _, _, gate_up, down = layer.arguments()
    experts = layer.choose_experts(seed)
    gates = jax.nn.softmax(jax.random.normal(keys[0], experts.shape))
    arguments = (
        jax.random.normal(keys[1], x.shape, x.dtype),
        jnp.asarray(experts),
        gates,
        jax.random.normal(keys[2], gate_up.shape, x.dtype) * jnp.bfloat16(layer.embed**-0.5),
        jax.random.normal(keys[3], down.shape, x.dtype) * jnp.bfloat16(layer.ffn**-0.5),
    )
    want = _exact_tokens(*arguments)
    floor = layer.floor_us(experts, limits)
    rows = []
    for name, program in compiled.items():
        row: dict = {"shape": layer.name, "distribution": "uniform", "contender": name}
        try:
            if isinstance(program, Exception):
                raise program
            first, last = program(*arguments)
            difference = first[: len(want)].astype(jnp.float32) - want
            error = jnp.linalg.norm(difference) / jnp.linalg.norm(want)
            row["error"] = float(jnp.where(jnp.isfinite(last).all(), error, jnp.nan))
            us = _wall_microseconds(program, arguments)
            row |= {"us": round(us, 1), **_rates(layer, experts, us)}
            kernels = timing.kernel_microseconds(program, *arguments, repeats=5) / CHAIN
            row |= {"roofline_pct": round(100 * floor / us, 1), "kernel_us": round(kernels, 1)}
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
        print(*row.values(), flush=True)
        rows.append(row)
    return rows


def _rates(layer: Layer, experts: np.ndarray, us: float) -> dict[str, float]:
    sizes = [np.bincount(chosen.ravel(), minlength=layer.experts) for chosen in experts]
    products = layer.products()
    moved = sum(product.bytes(each) for product in products for each in sizes) / len(sizes)
    flops = sum(product.flops() for product in products)
    return {"gbps": round(moved / us / 1e3), "tflops": round(flops / us / 1e6, 1)}


@jax.jit
def _exact_tokens(x, experts, gates, gate_up, down):
    """What the first layer of the chain makes of the first tokens, in float32."""
    dot = partial(jnp.dot, precision="highest", preferred_element_type=jnp.float32)

    def one_row(row):
        vector, expert = row
        gate, up = jnp.split(dot(vector, gate_up[0, expert].astype(jnp.float32)), 2)
        return dot(ACTIVATIONS["silu"](gate, up), down[0, expert].astype(jnp.float32))

    x, top_k = x[:CHECKED].astype(jnp.float32), experts.shape[2]
    rows = (jnp.repeat(x, top_k, axis=0), experts[0, :CHECKED].reshape(-1))
    results = jax.lax.map(one_row, rows).reshape(*x.shape[:1], top_k, -1)
    return x + jnp.sum(results * gates[0, :CHECKED, :, None], axis=1)


def _wall_microseconds(program, arguments: tuple, repeats: int = 20) -> float:
    """Median over rounds of the time of one layer, calls following each other without a pause."""
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(repeats):
            out = program(*arguments)
        jax.block_until_ready(out)
        times.append(1e6 * (time.perf_counter() - begin) / repeats / CHAIN)
    return statistics.median(times)
