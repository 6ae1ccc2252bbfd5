"""The Hopper kernels in every configuration that ships, and those that the tuner tries beside them,
as functions of abstract arguments."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_gemm import (
    QuantizedMatrices,
    QuantizedRows,
    Router,
    configs,
    few_rows_sm90,
    mosaic_sm90,
    quantize_sm90,
    quantized_sm90,
    route_sm90,
    sort_sm90,
)
from pallas_kernels.grouped_gemm.tiles import BLOCK
from pallas_kernels.paged_attention import (
    decode_sm90,
    mla_decode_sm90,
    prefill_sm90,
    store_sm90,
)
from pallas_kernels.paged_attention.configs import decode_config, mla_config, prefill_config

NUM_SMS = 132
ROWS, EXPERTS, K, N = 1024, 128, 2048, 1536
HEADS = (
    (32, 8, 128), (64, 8, 64), (64, 1, 128), (16, 8, 256),
    (32, 32, 80), (32, 32, 96), (64, 1, 96), (32, 8, 112), (32, 8, 192),
)  # fmt: skip
"""Query heads, KV heads and head dimension."""

ROUTERS = (
    ("Qwen3", Router(top_k=8, normalize=True), 128),
    ("Mixtral", Router(top_k=2, normalize=True), 8),
    ("DeepSeek-V2", Router(top_k=6, num_groups=8, top_groups=3, group_best=1), 160),
    ("DeepSeek-V3", Router(top_k=8, scoring="sigmoid", num_groups=8, top_groups=4), 256),
)
"""Name, how it chooses, and experts."""

type Program = tuple[str, Callable[..., Any], tuple[Any, ...]]


def shipped_kernels() -> Iterator[Program]:
    """Yields name, function and arguments of each."""
    for heads, kv_heads, d in HEADS:
        for limited in (False, True):
            yield _attention("decode", heads, kv_heads, d, limited)
            yield _attention("prefill", heads, kv_heads, d, limited)
            if d % 32 == 0:
                yield _attention("float8 decode", heads, kv_heads, d, limited)
                yield _attention("float8 prefill", heads, kv_heads, d, limited)
    yield _latent_decode()
    for activation in (None, "silu", "clamped_swiglu"):
        for name, config in configs.NAMED.items():
            if activation is None or config.width % 128 == 0:
                yield from _as_rows_lie(*_grouped_gemm(name, activation))
        for name, config in configs.QUANTIZED.items():
            if activation is None or config.width == 128:
                yield from _as_rows_lie(*_quantized_gemm(name, activation))
    yield _expert_rows()
    yield "quantize_rows", quantize_sm90.quantize_rows, (_shape((256, 7168)),)
    for tokens in (1, 64, 8192):
        for name, router, experts in ROUTERS:
            yield _route_tokens(f"route_tokens, {name}, {tokens} tokens", router, experts, tokens)
        for alignment in (1, BLOCK):
            sort = functools.partial(sort_sm90.sort_rows, groups=EXPERTS, row_alignment=alignment)
            name = f"sort_rows, {8 * tokens} rows, aligned to {alignment}"
            yield name, sort, (_shape((8 * tokens,), jnp.int32),)
        yield _store_rows(tokens)


def _shape(shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def _attention(kind: str, heads: int, kv_heads: int, d: int, limited: bool) -> Program:
    options: dict[str, Any] = dict(scale=d**-0.5)
    if limited:
        sinks = jnp.zeros(heads)
        options |= dict(window=jnp.int32(9), chunk=jnp.int32(0), soft_cap=3.0, sinks=sinks)
    dtype = jnp.float8_e4m3fn if "float8" in kind else jnp.bfloat16
    pages, integer = _shape((2, 100, 64, kv_heads, d), dtype), _shape((), jnp.int32)
    ragged = _shape((4, 10), jnp.int32), _shape((5,), jnp.int32), _shape((4,), jnp.int32)
    if "decode" in kind:
        config = decode_config(
            heads=heads, kv_heads=kv_heads, d=d, dv=d,
            num_sms=NUM_SMS, stored=pages.dtype.itemsize,
        )  # fmt: skip
        run = functools.partial(decode_sm90.paged_decode, **options, config=config)
        arguments = _shape((4, heads, d)), pages, pages, integer, ragged[0], ragged[2]
    else:
        config = prefill_config(d=d, dv=d, num_sms=NUM_SMS, stored=pages.dtype.itemsize)
        run = functools.partial(prefill_sm90.paged_prefill, **options, config=config)
        arguments = _shape((100, heads, d)), pages, pages, integer, *ragged
    name = f"{kind}, {heads}/{kv_heads} heads of {d}" + ", all options" * limited
    return name, run, arguments


def _expert_rows() -> Program:
    weights = _shape((2, EXPERTS, K, N)), _shape((2, EXPERTS, N // 2, K))
    run = functools.partial(few_rows_sm90.expert_rows, activation="silu", num_sms=NUM_SMS)
    arguments = _shape((4, K)), _shape((4, 8), jnp.int32), *weights, _shape((), jnp.int32)
    return "expert_rows", run, arguments


def _route_tokens(name: str, router: Router, experts: int, tokens: int) -> Program:
    correction = jnp.zeros(experts) if router.scoring == "sigmoid" else None

    def run(logits: Any, is_real: Any) -> Any:
        return route_sm90.route_tokens(logits, correction, is_real, router)

    arguments = _shape((tokens, experts), jnp.float32), _shape((tokens,), jnp.bool_)
    return name, run, arguments


def _store_rows(tokens: int) -> Program:
    pool, rows = _shape((2, 100, 64, 8, 128)), _shape((tokens, 8, 128))

    def run(keys: Any, values: Any, layer: Any, k: Any, v: Any, slots: Any) -> Any:
        return store_sm90.store_rows((keys, values), layer, (k, v), slots, num_sms=NUM_SMS)

    integers = _shape((), jnp.int32), _shape((tokens,), jnp.int32)
    return f"store_rows, {tokens} tokens", run, (pool, pool, integers[0], rows, rows, integers[1])


def _latent_decode() -> Program:
    config = mla_config(num_sms=NUM_SMS)
    run = functools.partial(mla_decode_sm90.mla_decode, scale=0.1, value_dim=512, config=config)
    integers = [_shape(shape, jnp.int32) for shape in ((), (4, 10), (4,))]
    arguments = _shape((4, 128, 576)), _shape((2, 100, 64, 1, 576)), *integers
    return "latent decode, 128 heads of 512", run, arguments


def _grouped_gemm(name: str, activation: str | None) -> Program:
    kernel = mosaic_sm90.grouped_gemm
    run = functools.partial(kernel, activation=activation, config=configs.NAMED[name])
    arguments = _shape((ROWS, K)), _shape((2, EXPERTS, K, N)), *_groups()
    return f"grouped GEMM, {name}, {activation}", run, arguments


def _quantized_gemm(name: str, activation: str | None) -> Program:
    kernel = quantized_sm90.grouped_gemm
    run = functools.partial(kernel, activation=activation, config=configs.QUANTIZED[name])
    narrow, wide = jnp.float8_e4m3fn, jnp.float32
    rows = QuantizedRows(_shape((ROWS, K), narrow), _shape((K // 128, ROWS), wide))
    matrices = QuantizedMatrices(
        _shape((2, EXPERTS, N, K), narrow), _shape((2, EXPERTS, N // 128, K // 128), wide)
    )
    return f"grouped GEMM in float8, {name}, {activation}", run, (rows, matrices, *_groups())


def _as_rows_lie(name: str, kernel: Callable[..., Any], arguments: tuple) -> Iterator[Program]:
    """A grouped product of groups side by side, of aligned ones, and of rows that lie anywhere."""
    side_by_side = functools.partial(kernel, num_sms=NUM_SMS)
    aligned = functools.partial(side_by_side, row_alignment=BLOCK)

    def scattered(lhs: Any, rhs: Any, sizes: Any, layer: Any, index: Any) -> Any:
        return aligned(lhs, rhs, sizes, layer, row_index=index)

    yield name, side_by_side, arguments
    yield f"{name}, aligned", aligned, arguments
    yield f"{name}, scattered rows", scattered, (*arguments, _shape((8 * ROWS,), jnp.int32))


def _groups() -> tuple[Any, Any]:
    return _shape((EXPERTS,), jnp.int32), _shape((), jnp.int32)
