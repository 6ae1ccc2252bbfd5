"""A whole expert layer: sort, gate and up with activation, down, combine; router or not.

Layers run one after the other in one program, each with its own routing and a residual, as in a
model; times are those of one layer. `us` is the wall clock, launches and gaps included, `kernel_us`
the sum of its kernels. The floor is that of the two products alone. Errors are those against
float32, so those of float8 hold what rounding weights and rows costs.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.grouped_gemm import Shape
from benchmarks.grouped_gemm_float8 import QuantizedShape, float8_tflops
from benchmarks.grouped_gemm_layer_programs import (
    CHAIN,
    SHIPPED,
    VARIANTS,
    Variant,
    chain_layers,
    route,
)
from benchmarks.timing import compile_all
from pallas_kernels import quantize_matrices
from pallas_kernels.activation import ACTIVATIONS
from pallas_kernels.grouped_gemm.configs import MAX_UNSORTED_TOKENS, row_alignment_for

__all__ = ["SHAPES", "compile_all", "lower", "measure"]

ROUND_SECONDS = 0.05
"""How long calls follow each other in a round, at least three of them. A round that does not count
lets the clocks rise first."""
CHECKED = 8
"""Tokens whose results are compared with float32."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The experts of one model's layer, and the tokens that visit them."""

    model: str
    experts: int
    top_k: int
    """Experts that a token visits; 1 on one rank of many, where each row has its expert."""
    embed: int
    ffn: int
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.model}, {self.tokens} tokens"

    def products(self, variant: Variant) -> tuple[Shape, Shape]:
        """The two products of the layer."""
        common = partial(
            QuantizedShape if variant.float8 else Shape,
            name=self.name,
            groups=self.experts,
            rows=self.tokens * self.top_k,
            top_k=self.top_k,
        )
        return common(k=self.embed, n=2 * self.ffn), common(k=self.ffn, n=self.embed)

    def variants(self, *, tune: bool) -> Iterator[Variant]:
        """Those that differ for this layer: what ships and, to tune, what might be faster."""
        rows = self.tokens * self.top_k
        for variant in VARIANTS if tune else SHIPPED:
            differs = not variant.routed or self.top_k > 1
            many = row_alignment_for(rows / self.experts) > 1
            differs &= variant.aligned in (None, not many) and (many or not variant.gathered)
            differs &= variant.unsorted or self.tokens <= MAX_UNSORTED_TOKENS
            if differs:
                yield variant

    def choose_experts(self, seed: int) -> np.ndarray:
        """Uniform routing: [CHAIN, tokens, top_k], without repeats in a token."""
        noise = np.random.default_rng(seed).random((CHAIN, self.tokens, self.experts))
        return np.argpartition(noise, self.top_k - 1)[..., : self.top_k].astype(np.int32)

    def floor_us(self, variant: Variant, experts: np.ndarray, limits: dict[str, float]) -> float:
        """Mean over the chain of max(FLOP / rate, bytes / copy rate), product by product."""
        floors = []
        for chosen in experts:
            sizes = np.bincount(chosen.ravel(), minlength=self.experts)
            floors += [product.floor_us(sizes, limits) for product in self.products(variant)]
        return sum(floors) / len(experts)

    def arguments(self, variant: Variant) -> list[jax.ShapeDtypeStruct]:
        routing = [
            jax.ShapeDtypeStruct((CHAIN, self.tokens, self.top_k), jnp.int32),
            jax.ShapeDtypeStruct((CHAIN, self.tokens, self.top_k), jnp.float32),
        ]
        if variant.routed:
            routing[0] = jax.ShapeDtypeStruct((CHAIN, self.embed, self.experts), jnp.bfloat16)
        x = jax.ShapeDtypeStruct((self.tokens, self.embed), jnp.bfloat16)
        weights = [product.arguments()[1:-1] for product in self.products(VARIANTS[0])]
        if variant.float8:
            weights = [product.arguments()[2:-1] for product in self.products(variant)]
        return [x, *routing, *weights[0], *weights[1]]


QWEN = {"model": "Qwen3-30B-A3B", "experts": 128, "top_k": 8, "embed": 2048, "ffn": 768}
MIXTRAL = {"model": "Mixtral", "experts": 8, "top_k": 2, "embed": 4096, "ffn": 14336}
DEEPSEEK = {
    "model": "DeepSeek-V3 rank of 32", "experts": 8, "top_k": 1, "embed": 7168, "ffn": 2048,
}  # fmt: skip
SHAPES = (
    *(
        Layer(**model, tokens=tokens)
        for model in (QWEN, MIXTRAL)
        for tokens in (1, 16, 64, 256, 2048, 8192)
    ),
    *(Layer(**DEEPSEEK, tokens=8 * rows) for rows in (4, 32, 256, 1024)),
)


def lower(folder: Path, *, tune: bool, num_sms: int) -> None:
    """Writes every program of the benchmark into a folder."""
    for index, layer in enumerate(SHAPES):
        for variant in layer.variants(tune=tune):
            path = folder / f"{index:02d}~{variant.name}.bin"
            if not path.exists():
                program = partial(chain_layers, variant=variant, num_sms=num_sms)
                path.write_bytes(timing.lower_program(program, layer.arguments(variant)))


def measure(compiled: dict, limits: dict[str, float], *, seconds: float) -> Iterator[dict]:
    """A row for every program, while time is left."""
    deadline = time.monotonic() + seconds
    limits["float8_tflops"] = float8_tflops()
    for index, layer in enumerate(SHAPES):
        mine = {name: program for (i, name), program in compiled.items() if i == index}
        if mine and time.monotonic() < deadline:
            yield from _measure_layer(layer, mine, limits)


def _measure_layer(layer: Layer, compiled: dict, limits: dict[str, float]) -> Iterator[dict]:
    seed = time.time_ns() % 2**31
    experts = layer.choose_experts(seed)
    x, routers, gates, weights = _random_arrays(layer, seed)
    for variant in layer.variants(tune=True):
        program = compiled.get(variant.name)
        if program is None:
            continue
        row: dict = {"shape": layer.name, "distribution": "uniform", "contender": variant.name}
        with timing.noting_failure(row):
            if isinstance(program, Exception):
                raise program
            chosen = (jnp.asarray(experts), gates)
            routing = (routers, gates) if variant.routed else chosen
            if variant.routed:
                chosen = [each[None] for each in route(x, routers[0], layer.top_k, variant)]
            arrays = [w for m in weights for w in (quantize_matrices(m) if variant.float8 else [m])]
            arguments = (x, *routing, *arrays)
            want = _exact_tokens(x, *chosen, *weights)
            first, last = program(*arguments)
            difference = first[: len(want)].astype(jnp.float32) - want
            error = jnp.linalg.norm(difference) / jnp.linalg.norm(want)
            row["error"] = float(jnp.where(jnp.isfinite(last).all(), error, jnp.nan))
            us = _wall_microseconds(program, arguments)
            row |= {"us": round(us, 1), **_rates(layer, variant, experts, us)}
            floor = layer.floor_us(variant, experts, limits)
            kernels = timing.kernel_microseconds(program, *arguments, repeats=5) / CHAIN
            row |= {"roofline_pct": round(100 * floor / us, 1), "kernel_us": round(kernels, 1)}
        yield row


def _random_arrays(layer: Layer, seed: int) -> tuple[jax.Array, jax.Array, jax.Array, list]:
    """Tokens, a router for each layer, gates, and the two stacks of matrices."""
    keys = jax.random.split(jax.random.key(seed), 5)
    x = jax.random.normal(keys[0], (layer.tokens, layer.embed), jnp.bfloat16)
    routers = jax.random.normal(keys[1], (CHAIN, layer.embed, layer.experts), jnp.bfloat16)
    gates = jax.random.normal(keys[2], (CHAIN, layer.tokens, layer.top_k))
    weights = [
        jax.random.normal(key, (1, layer.experts, product.k, product.n), jnp.bfloat16)
        * jnp.bfloat16(product.k**-0.5)
        for key, product in zip(keys[3:], layer.products(VARIANTS[0]), strict=True)
    ]
    return x, routers * jnp.bfloat16(layer.embed**-0.5), jax.nn.softmax(gates), weights


def _rates(layer: Layer, variant: Variant, experts: np.ndarray, us: float) -> dict[str, float]:
    sizes = [np.bincount(chosen.ravel(), minlength=layer.experts) for chosen in experts]
    products = layer.products(variant)
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


def _wall_microseconds(program, arguments: tuple) -> float:
    """Median over rounds of the time of one layer, calls following each other without a pause."""

    def seconds_a_call(calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            out = program(*arguments)
        jax.block_until_ready(out)
        return (time.perf_counter() - begin) / calls

    calls = max(3, round(ROUND_SECONDS / seconds_a_call(3)))
    seconds_a_call(calls)
    return 1e6 * statistics.median(seconds_a_call(calls) for _ in range(5)) / CHAIN
