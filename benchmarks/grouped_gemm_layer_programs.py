"""The expert layers that `grouped_gemm_layer` measures, as functions of arrays."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import QuantizedMatrices, QuantizedRows
from pallas_kernels.activation import ACTIVATIONS
from pallas_kernels.grouped_gemm import (
    Router,
    choose_kernel,
    few_rows_sm90,
    quantize_sm90,
    route_sm90,
    sort_sm90,
)
from pallas_kernels.grouped_gemm.configs import go_unsorted, row_alignment_for
from pallas_kernels.grouped_gemm.quantize import quantize_rows_by_xla, take_rows, values_of
from pallas_kernels.grouped_gemm.route import route_tokens_by_xla
from pallas_kernels.grouped_gemm.sort import sort_rows_by_xla
from pallas_kernels.grouped_gemm.tiles import BLOCK
from pallas_kernels.groups import rows_held

CHAIN = 8
"""Layers in a program."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run the layer."""

    name: str
    fused: bool = True
    """Whether the activation is part of the first product."""
    gathered: bool = False
    """Whether XLA gathers rows before the first product, also where that could do so itself."""
    unsorted: bool = True
    """Whether a few tokens go to their experts in one launch for both products."""
    float8: bool = False
    routed: bool = False
    """Whether a router chooses the experts; else they are given."""
    ordered: bool = True
    """Whether kernels of ours route and sort, not XLA."""
    aligned: bool | None = None
    """Whether each expert's rows begin at a multiple of what tiles begin at; None: if many."""

    def row_alignment(self, rows: int, groups: int) -> int:
        """What the rows of each group begin at a multiple of."""
        if self.aligned is None:
            return row_alignment_for(rows / groups)
        return BLOCK if self.aligned else 1


SHIPPED = (
    Variant(name="llmjax"),
    Variant(name="llmjax, with router", routed=True),
    Variant(name="llmjax, float8", float8=True),
)
VARIANTS = (
    *SHIPPED,
    Variant(name="llmjax, activation apart", fused=False),
    Variant(name="llmjax, gathered first", gathered=True),
    Variant(name="llmjax, rows sorted", unsorted=False),
    Variant(name="llmjax, experts side by side", aligned=False),
    Variant(name="llmjax, experts aligned", aligned=True),
    Variant(name="llmjax, float8, gathered first", float8=True, gathered=True),
    Variant(name="llmjax, sort by XLA", ordered=False),
    Variant(name="llmjax, with router, router and sort by XLA", routed=True, ordered=False),
)


def chain_layers(x, *arrays, variant: Variant, num_sms: int) -> tuple[jax.Array, jax.Array]:
    """Runs `CHAIN` layers with residuals; returns what the first and the last of them give.

    `arrays` are experts and gates [CHAIN, tokens, top_k], or for a router its matrices and an array
    whose last axis is top_k; then the weights, each with its scales for float8.
    """
    first_routing, second_routing, *weights = arrays
    if variant.float8:
        weights = [QuantizedMatrices(*weights[:2]), QuantizedMatrices(*weights[2:])]

    @jax.jit  # Compiled once: the layers of the chain call the same function.
    def one_layer(x, a, b):
        experts, gates = (a, b) if not variant.routed else route(x, a, b.shape[-1], variant)
        return x + expert_layer(x, experts, gates, *weights, variant=variant, num_sms=num_sms)

    outputs = []
    for index in range(CHAIN):
        x = one_layer(x, first_routing[index], second_routing[index])
        outputs.append(x)
    return outputs[0], outputs[-1]


def route(x, router, count: int, variant: Variant) -> tuple[jax.Array, jax.Array]:
    """Experts of each token and their gates, as Mixtral and Qwen3 have them."""
    logits = jnp.dot(x, router, preferred_element_type=jnp.float32)
    choose = route_sm90.route_tokens if variant.ordered else route_tokens_by_xla
    return choose(logits, None, None, Router(top_k=count, normalize=True))


def expert_layer(x, experts, gates, gate_up, down, *, variant: Variant, num_sms: int) -> jax.Array:
    """The gated sum over each token's experts."""
    groups = (gate_up.values if variant.float8 else gate_up).shape[1]
    if _goes_unsorted(x, experts, gate_up, down, variant):
        pairs = few_rows_sm90.expert_rows(
            x, experts, gate_up, down, 0, activation="silu", num_sms=num_sms
        )
        return jnp.sum(pairs.astype(jnp.float32) * gates[..., None], axis=1).astype(x.dtype)
    sort = sort_sm90.sort_rows if variant.ordered else sort_rows_by_xla
    row_alignment = variant.row_alignment(experts.size, groups)
    order = sort(experts.reshape(-1), groups, row_alignment=row_alignment)
    multiply = partial(_multiply, sizes=order.sizes, num_sms=num_sms, row_alignment=row_alignment)
    rows, index = _quantize(x) if variant.float8 else x, order.row // experts.shape[1]
    if variant.gathered or row_alignment == 1:
        rows, index = take_rows(rows, index), None
    if variant.fused:
        hidden = multiply(rows, gate_up, row_index=index, activation="silu")
    else:
        hidden = multiply(rows, gate_up, row_index=index).astype(jnp.float32)
        hidden = ACTIVATIONS["silu"](*jnp.split(hidden, 2, axis=1)).astype(x.dtype)
    results = multiply(_quantize(hidden) if variant.float8 else hidden, down)
    place = order.place.reshape(experts.shape)
    # One choice after the other: XLA then reads the rows as it adds them up.
    sums = jnp.zeros(x.shape, jnp.float32)
    for choice in range(experts.shape[1]):
        sums += results[place[:, choice]] * gates[:, choice, None]
    return sums.astype(x.dtype)


def _goes_unsorted(x, experts, gate_up, down, variant: Variant) -> bool:
    if variant.float8 or not (variant.fused and variant.unsorted):
        return False
    try:
        few_rows_sm90.check_covered(x, gate_up, down)
    except NotImplementedError:
        return False
    return go_unsorted(*experts.shape, experts=gate_up.shape[1])


def _quantize(x: jax.Array) -> QuantizedRows:
    if x.shape[0] % quantize_sm90.BLOCK_ROWS:
        return quantize_rows_by_xla(x)
    return quantize_sm90.quantize_rows(x)


def _multiply(
    lhs, rhs, sizes, num_sms: int, row_alignment: int, activation: str | None = None, row_index=None
) -> jax.Array:
    room = values_of(lhs).shape[0] if row_index is None else row_index.size
    rows_a_group = rows_held(room, sizes.size, row_alignment) / sizes.size
    kernel = choose_kernel(lhs, rhs, sizes.size, activation, rows_a_group, num_sms=num_sms)
    return kernel(
        lhs, rhs, sizes, 0,
        row_index=row_index, activation=activation, row_alignment=row_alignment,
    )  # fmt: skip
