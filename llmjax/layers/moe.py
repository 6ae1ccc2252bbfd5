"""Mixture of experts: a router, the experts that a token is sent to, and one that all pass."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from llmjax.config import ExpertConfig, ModelConfig
from llmjax.layers.mlp import GatedMLP
from llmjax.layers.params import Declare
from llmjax.parallel.collectives import axis_index, island
from llmjax.parallel.dispatch_cost import ExpertLoad, choose_dispatch, rows_a_slot
from llmjax.parallel.expert_dispatch import Dispatch, dispatch_experts
from meshes import Rules
from pallas_kernels import (
    Router,
    expert_rows,
    grouped_gemm,
    preferred_row_alignment,
    route_tokens,
)

DEPTH_PARTS = 8
"""Parts of the depth of a router's product, which is too narrow to occupy a GPU otherwise."""
MAX_SPLIT_TOKENS = 256
"""Tokens up to which it is cut so."""
FFN_UNIT = 64
"""What a rank's features of an expert are a multiple of, unless they are fewer."""


@dataclass(frozen=True, kw_only=True)
class DispatchOptions:
    """How tokens reach their experts; the results are the same."""

    method: Dispatch | Literal["auto"] = "auto"
    """auto: what moves the fewest bytes in a step of that many tokens."""
    max_num_tokens: int | None = None
    """Tokens that a rank sends at once; more go in rounds."""


class ExpertWeights(NamedTuple):
    """Weights of all experts, or in their places what goes with each; biases may be None."""

    gate_up: Float[Array, "layers experts embed 2 ffn"]
    down: Float[Array, "layers experts ffn embed"]
    gate_up_bias: Float[Array, "layers experts 2 ffn"] | None
    down_bias: Float[Array, "layers experts embed"] | None


class Experts(nnx.Module):
    """The weights of routed experts, by expert slot; slots beyond the experts stay empty.

    The stack of all layers stays whole: kernels index it themselves, a slice would be a copy.
    """

    def __init__(self, config: ModelConfig, *, declare: Declare):
        assert config.experts is not None
        experts, embed, rules = config.experts, config.hidden_size, declare.rules
        slots, ffn = num_slots(experts, rules), padded_ffn(experts, rules)
        bias = experts.bias
        self.gate_up = declare.param(
            (slots, embed, 2, ffn), ("experts", None, None, "expert_ffn"), fan_in=embed
        )
        self.down = declare.param(
            (slots, ffn, embed), ("experts", "expert_ffn", None), fan_in=experts.ffn
        )
        self.gate_up_bias = (
            declare.param((slots, 2, ffn), ("experts", None, "expert_ffn"), init="zeros")
            if bias
            else None
        )
        self.down_bias = (
            declare.param((slots, embed), ("experts", None), init="zeros") if bias else None
        )

    @property
    def weights(self) -> ExpertWeights:
        """The stacks as they are."""
        bias, down_bias = self.gate_up_bias, self.down_bias
        return ExpertWeights(
            gate_up=self.gate_up[...],
            down=self.down[...],
            gate_up_bias=None if bias is None else bias[...],
            down_bias=None if down_bias is None else down_bias[...],
        )


class MoE(nnx.Module):
    """Sends each token to its experts and adds what they return."""

    def __init__(self, config: ModelConfig, *, declare: Declare):
        assert config.experts is not None
        experts, embed = config.experts, config.hidden_size
        self.config, self.rules = experts, declare.rules
        count = (experts.num_experts,)
        self.router = declare.param((embed, *count), (None, None), fan_in=embed)
        self.router_bias = (
            declare.param(count, (None,), init="zeros") if experts.router_bias else None
        )
        self.correction_bias = (
            declare.param(count, (None,), init="zeros", dtype=jnp.float32)
            if experts.correction_bias
            else None
        )
        self.shared = (
            GatedMLP(embed, experts.shared_ffn, activation=config.activation, declare=declare)
            if experts.shared_ffn
            else None
        )

    def __call__(
        self,
        x: Float[Array, "tokens embed"],
        weights: ExpertWeights,
        layer: Int[Array, ""],
        is_real: Bool[Array, "tokens"],
        options: DispatchOptions,
    ) -> Float[Array, "tokens embed"]:
        """`weights` are those of all layers, of which `layer` is used; padding has no expert."""
        experts, gates = self._route(x, is_real)
        load = expert_load(
            self.config,
            self.rules,
            tokens=x.shape[0] // self.rules.size("tokens"),
            embed=x.shape[1],
            itemsize=x.dtype.itemsize,
            max_num_tokens=options.max_num_tokens,
        )
        rows_a_group = rows_a_slot(load, rules=self.rules)
        compute = _ComputeExperts(
            self.config.activation,
            self.rules,
            rows_a_group,
            preferred_row_alignment(rows_a_group),
        )
        with jax.named_scope("experts"):
            out = dispatch_experts(
                x,
                experts,
                gates,
                weights,
                expert_specs(weights, self.rules),
                layer,
                compute,
                method=choose_method(options.method, load, self.rules),
                max_num_tokens=options.max_num_tokens,
                rules=self.rules,
                scale_inputs=self.config.scale_inputs,
                compute_unsorted=compute.unsorted,
                row_alignment=compute.row_alignment,
            )
        return out if self.shared is None else out + self.shared(x)

    @jax.named_scope("route")
    def _route(
        self, x: Float[Array, "tokens embed"], is_real: Bool[Array, "tokens"]
    ) -> tuple[Int32[Array, "tokens top_k"], Float32[Array, "tokens top_k"]]:
        logits = self._logits(x)
        if self.router_bias is not None:
            logits = logits + self.router_bias[...].astype(jnp.float32)
        correction = None if self.correction_bias is None else self.correction_bias[...]
        tokens = self.rules.spec("tokens", None)

        def body(logits: Array, correction: Array | None, is_real: Array) -> tuple[Array, Array]:
            return choose_experts(logits, correction, self.config, is_real)

        in_specs = (tokens, self.rules.spec(None), self.rules.spec("tokens"))
        return island(body, in_specs=in_specs, out_specs=(tokens, tokens))(
            logits, correction, is_real
        )

    def _logits(self, x: Float[Array, "tokens embed"]) -> Float32[Array, "tokens experts"]:
        """In float32, as the families have them: experts are chosen by small differences."""
        (tokens, embed), experts = x.shape, self.config.num_experts
        few = tokens // self.rules.size("tokens") <= MAX_SPLIT_TOKENS
        parts = math.gcd(DEPTH_PARTS, embed) if few else 1
        sums = jnp.einsum(
            "tpe,pex->ptx",
            x.reshape(tokens, parts, embed // parts),
            self.router[...].astype(x.dtype).reshape(parts, embed // parts, experts),
            out_sharding=self.rules.spec(None, "tokens", None),
            preferred_element_type=jnp.float32,
        )
        return jnp.sum(sums, axis=0)


def choose_experts(
    logits: Float32[Array, "tokens experts"],
    correction: Float32[Array, " experts"] | None,
    config: ExpertConfig,
    is_real: Bool[Array, " tokens"] | None = None,
) -> tuple[Int32[Array, "tokens top_k"], Float32[Array, "tokens top_k"]]:
    """Experts of each token, in falling order of choice, and their gates; padding has expert -1."""
    router = Router(
        top_k=config.top_k,
        scoring=config.scoring,
        normalize=config.normalize,
        scaling_factor=config.scaling_factor,
        num_groups=config.num_groups,
        top_groups=config.top_groups,
        group_best=config.group_best,
    )
    return route_tokens(logits, router, correction=correction, is_real=is_real)


def expert_load(
    config: ExpertConfig,
    rules: Rules,
    *,
    tokens: int,
    embed: int,
    itemsize: int,
    max_num_tokens: int | None,
) -> ExpertLoad:
    """What a layer of experts has to do in a step of so many tokens a rank."""
    return ExpertLoad(
        tokens=tokens,
        embed=embed,
        ffn=padded_ffn(config, rules),
        num_slots=num_slots(config, rules),
        top_k=config.top_k,
        itemsize=itemsize,
        max_num_tokens=max_num_tokens,
    )


def choose_method(asked: Dispatch | Literal["auto"], load: ExpertLoad, rules: Rules) -> Dispatch:
    """The dispatch that was asked for, or the cheapest for the load."""
    return choose_dispatch(load, rules=rules) if asked == "auto" else asked


def num_slots(config: ExpertConfig, rules: Rules) -> int:
    """Expert slots: the experts, padded to divide over the ranks that hold them."""
    return config.num_experts + -config.num_experts % rules.size("experts")


def padded_ffn(config: ExpertConfig, rules: Rules) -> int:
    """Features inside an expert, padded to divide over the ranks that hold them.

    A rank of `FFN_UNIT` features or more has a multiple of it, which the kernel of the products
    needs: gpt-oss's 2880 become 1472 on each of two ranks. What is added is zero on both sides of
    the activation.
    """
    ranks = rules.size("expert_ffn")
    unit = FFN_UNIT if ranks > 1 and config.ffn >= ranks * FFN_UNIT else 1
    return config.ffn + -config.ffn % (ranks * unit)


def expert_specs(weights: ExpertWeights, rules: Rules) -> ExpertWeights:
    """PartitionSpecs in the places of the weights, inside a pipeline stage."""
    axes = (
        ("experts", None, None, "expert_ffn"),
        ("experts", "expert_ffn", None),
        ("experts", None, "expert_ffn"),
        ("experts", None),
    )
    return ExpertWeights._make(
        None if weight is None else rules.spec(None, *logical)
        for weight, logical in zip(weights, axes, strict=True)
    )


class _ComputeExperts(NamedTuple):
    """What a rank does with the rows that its experts got; runs inside an island."""

    activation: str
    rules: Rules
    rows_a_group: float
    """Rows that an expert gets on average."""
    row_alignment: int
    """What the rows of each expert begin at a multiple of."""

    def __call__(
        self,
        x: Float[Array, "tokens embed"],
        token_of_row: Int32[Array, " rows"] | None,
        group_sizes: Int32[Array, " experts"],
        expert_of_row: Int32[Array, " rows"],
        weights: ExpertWeights,
        layer: Int[Array, ""],
    ) -> Float[Array, "rows embed"]:
        """Sums over this rank's part of the experts' features; the caller adds the parts."""
        gate_up, bias = _flatten_parts(weights)
        multiply = partial(
            grouped_gemm, rows_a_group=self.rows_a_group, row_alignment=self.row_alignment
        )
        hidden = multiply(
            x, gate_up, group_sizes, layer,
            row_index=token_of_row, bias=bias, activation=self.activation,
        )  # fmt: skip
        out = multiply(hidden, weights.down, group_sizes, layer)
        return self._add_down_bias(out, expert_of_row, weights, layer)

    def unsorted(
        self,
        x: Float[Array, "tokens embed"],
        experts: Int32[Array, "tokens top_k"],
        weights: ExpertWeights,
        layer: Int[Array, ""],
    ) -> Float[Array, "tokens top_k embed"] | None:
        """The same for a few tokens as they come; None where sorted rows are the better way."""
        gate_up, bias = _flatten_parts(weights)
        out = expert_rows(
            x, experts, gate_up, weights.down, layer, gate_up_bias=bias, activation=self.activation
        )
        return out if out is None else self._add_down_bias(out, experts, weights, layer)

    def _add_down_bias(
        self, out: Array, experts: Array, weights: ExpertWeights, layer: Int[Array, ""]
    ) -> Array:
        if weights.down_bias is None:
            return out
        # Ranks that share an expert add their results: one of them brings the bias.
        first = axis_index(self.rules.axes("expert_ffn")) == 0
        return out + jnp.where(first, weights.down_bias[layer], 0)[experts]


def _flatten_parts(weights: ExpertWeights) -> tuple[Array, Array | None]:
    """The gates' columns and then those of what they gate, of the weights and of their bias."""
    layers, experts, embed, _, ffn = weights.gate_up.shape
    bias = weights.gate_up_bias
    return (
        weights.gate_up.reshape(layers, experts, embed, 2 * ffn),
        None if bias is None else bias.reshape(layers, experts, 2 * ffn),
    )
