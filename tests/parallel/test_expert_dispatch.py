"""Every dispatch, on every placement of tokens and experts, gives what a plain loop gives."""

import re
from functools import cache, cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from llmjax.parallel.expert_dispatch import Dispatch, dispatch_experts
from meshes import ParallelPlan, Rules, make_mesh
from pallas_kernels import grouped_gemm
from pallas_kernels.groups import group_begin

EMBED, FFN, EXPERTS, TOP_K = 16, 8, 9, 4
METHODS: tuple[Dispatch, ...] = ("allreduce", "allgather", "all_to_all")
PLACEMENTS: tuple[Any, ...] = (False, True, "partial")
MIXED = [ParallelPlan(dp=2, ep=2, tp=2, attention_dp=dp) for dp in PLACEMENTS]
PLANS = [
    *MIXED,
    *(ParallelPlan(ep=4, tp=2, attention_dp=dp) for dp in PLACEMENTS),
    # Where one of ep and tp is 1, partial attention DP is one of the other two.
    *(ParallelPlan(ep=8, attention_dp=dp) for dp in (False, True)),
    *(ParallelPlan(dp=2, tp=4, attention_dp=dp) for dp in (False, True)),
]


class Layer:
    """Two layers of experts, of which the first must not be read, in slots that ep divides."""

    def __init__(
        self, plan: ParallelPlan, *, dtype: Any = jnp.float32, rules: Rules | None = None
    ) -> None:
        self.rules, self.mesh, self.dtype = rules or Rules(plan), make_mesh(plan), dtype
        ranks = self.rules.size("experts")
        rng, slots = np.random.default_rng(0), -(-EXPERTS // ranks) * ranks
        self.slots_a_rank = slots // ranks
        # Reading the other layer, or a slot that holds no expert, shows as NaN.
        self.up = np.full((2, slots, EMBED, FFN), np.nan, np.float32)
        self.bias = np.full((2, slots, FFN), np.nan, np.float32)
        self.down = np.full((2, slots, FFN, EMBED), np.nan, np.float32)
        for weight in (self.up, self.bias, self.down):
            weight[1, :EXPERTS] = rng.normal(size=weight[1, :EXPERTS].shape) * 0.3

    @property
    def specs(self) -> dict[str, PartitionSpec]:
        """Specs of the weights inside a stage."""
        spec = self.rules.spec
        return {
            "up": spec(None, "experts", None, "expert_ffn"),
            "bias": spec(None, "experts", "expert_ffn"),
            "down": spec(None, "experts", "expert_ffn", None),
        }

    @cached_property
    def params(self) -> dict[str, jax.Array]:
        """The weights on the mesh."""
        weights = {"up": self.up, "bias": self.bias, "down": self.down}
        return {
            name: jax.device_put(
                weight.astype(self.dtype), jax.NamedSharding(self.mesh, self.specs[name])
            )
            for name, weight in weights.items()
        }

    def arguments(self, x: np.ndarray, slots: np.ndarray, gates: np.ndarray) -> tuple:
        """What the dispatch takes, on the mesh."""
        tokens = self.rules.sharding(self.mesh, "tokens", None)
        placed = [
            jax.device_put(jnp.asarray(array, dtype), tokens)
            for array, dtype in ((x, self.dtype), (slots, jnp.int32), (gates, jnp.float32))
        ]
        return *placed, self.params, jnp.int32(1)

    def expected(
        self, x: np.ndarray, slots: np.ndarray, gates: np.ndarray, *, scale_inputs: bool = False
    ) -> np.ndarray:
        """A loop over tokens and their slots."""
        out = np.zeros_like(x)
        for index in range(len(x)):
            for slot, gate in zip(slots[index], gates[index], strict=True):
                if slot >= 0:
                    before, after = (gate, 1) if scale_inputs else (1, gate)
                    hidden = x[index] * before @ self.up[1, slot] + self.bias[1, slot]
                    out[index] += np.maximum(hidden, 0) @ self.down[1, slot] * after
        return out


def compute(x, x_of_row, group_sizes, slot_of_row, params, layer, row_alignment=1):
    """Two products; padding comes back as NaN."""
    multiply = partial(grouped_gemm, row_alignment=row_alignment)
    hidden = multiply(x, params["up"], group_sizes, layer, row_index=x_of_row)
    hidden = jax.nn.relu(hidden + params["bias"][layer, slot_of_row])
    out = multiply(hidden, params["down"], group_sizes, layer)
    before = jnp.cumsum(group_sizes) - group_sizes
    begins = group_begin(before, jnp.arange(group_sizes.size), row_alignment)[:, None]
    row = jnp.arange(hidden.shape[0])
    real = ((row >= begins) & (row < begins + group_sizes[:, None])).any(0)
    return jnp.where(real[:, None], out, jnp.nan)


def compute_unsorted(x, slots, params, layer):
    """The same pair by pair; pairs without a slot come back as NaN."""
    up, bias, down = (params[name][layer, slots] for name in ("up", "bias", "down"))
    hidden = jax.nn.relu(jnp.einsum("te,tkef->tkf", x, up) + bias)
    out = jnp.einsum("tkf,tkfe->tke", hidden, down)
    return jnp.where(slots[..., None] >= 0, out, jnp.nan)


layer_on = cache(Layer)


@cache
def jitted(layer: Layer, method: Dispatch, **options: Any) -> Any:
    """The dispatch on the layer's plan: (x, slots, gates, params, layer) -> results."""

    def run(x, slots, gates, params, index):
        alignment = options.get("row_alignment", 1)
        return dispatch_experts(
            *(x, slots, gates, params, layer.specs, index),
            partial(compute, row_alignment=alignment),
            method=method,
            rules=layer.rules,
            **options,
        )

    return jax.jit(run)


def check(layer: Layer, method: Dispatch, inputs: tuple, *, kind: str = "", **options: Any) -> None:
    """Compares the dispatch with the loop."""
    with jax.set_mesh(layer.mesh):
        out = jitted(layer, method, **options)(*layer.arguments(*inputs))
    scaled = options.get("scale_inputs", False)
    expected = layer.expected(*inputs, scale_inputs=scaled)
    np.testing.assert_allclose(out, expected, atol=1e-5, err_msg=kind)


def routing(kind: str, tokens: int, slots_a_rank: int, top_k: int = TOP_K) -> tuple:
    """Tokens, slots and gates of one kind of routing."""
    rng = np.random.default_rng(len(kind))
    x = rng.normal(size=(tokens, EMBED)).astype(np.float32)
    gates = rng.uniform(0.1, 1, size=(tokens, top_k)).astype(np.float32)
    slots = np.array([rng.permutation(EXPERTS)[:top_k] for _ in range(tokens)])
    if kind == "one expert":
        slots = np.where(np.arange(top_k) == 0, 5, -1) * np.ones((tokens, 1), np.int64)
    elif kind == "one rank":
        held = np.arange(top_k) + slots_a_rank
        last = min(2 * slots_a_rank, EXPERTS)
        slots = np.where(held < last, held, -1) * np.ones((tokens, 1), np.int64)
    elif kind == "not the first rank":
        slots = np.where(slots < slots_a_rank, -1, slots)
    elif kind == "some tokens unused":
        slots[::3] = -1
        gates[::3] = x[::3] = np.nan
    return x, slots, gates


KINDS = ("random", "one expert", "one rank", "not the first rank", "some tokens unused")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_every_dispatch_equals_the_loop_for_every_routing(plan, method):
    layer = layer_on(plan)
    for kind in KINDS:
        check(layer, method, routing(kind, 16, layer.slots_a_rank), kind=kind)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("plan", "tokens"),
    [
        (ParallelPlan(ep=4, tp=2), 1),
        (ParallelPlan(ep=4, tp=2, attention_dp=True), 8),
    ],
    ids=str,
)
def test_a_single_token_on_a_rank_finds_its_experts(plan, tokens, method):
    layer = layer_on(plan)
    check(layer, method, routing("random", tokens, layer.slots_a_rank))


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_a_slot_may_begin_at_multiples_of_eight(method):
    layer = layer_on(MIXED[1])
    for kind in KINDS:
        inputs = routing(kind, 16, layer.slots_a_rank)
        check(layer, method, inputs, kind=kind, row_alignment=8)


@pytest.mark.parametrize("method", METHODS)
def test_one_slot_a_token_is_enough(method):
    layer = layer_on(MIXED[2])
    check(layer, method, routing("random", 16, layer.slots_a_rank, top_k=1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("plan", MIXED[:2], ids=str)
def test_rounds_of_fewer_tokens_give_the_same(plan, method):
    layer = layer_on(plan)
    tokens = 7 * layer.rules.size("tokens")
    inputs = routing("some tokens unused", tokens, layer.slots_a_rank)
    # 7 tokens a rank in rounds of 3: three of them, the last with two tokens that are padding.
    check(layer, method, inputs, max_num_tokens=3)


@pytest.mark.parametrize("method", METHODS)
def test_gates_can_scale_what_the_experts_get(method):
    layer = layer_on(MIXED[0])
    inputs = routing("random", 16, layer.slots_a_rank)
    check(layer, method, inputs, scale_inputs=True)
    plain, scaled = layer.expected(*inputs), layer.expected(*inputs, scale_inputs=True)
    assert np.abs(plain - scaled).max() > 0.01, "the bias must make the two differ"


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_stays_near_the_loop(method):
    layer = Layer(MIXED[1], dtype=jnp.bfloat16)
    inputs = routing("random", 16, layer.slots_a_rank)
    with jax.set_mesh(layer.mesh):
        out = jitted(layer, method)(*layer.arguments(*inputs))
    assert out.dtype == jnp.bfloat16
    expected = layer.expected(*inputs)
    np.testing.assert_allclose(
        out.astype(jnp.float32), expected, atol=0.02 * np.abs(expected).max()
    )


class WideRules(Rules):
    """Experts over data replicas too."""

    @cached_property
    def table(self) -> dict[str, tuple[str, ...]]:
        return {**super().table, "experts": ("dp", "ep")}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("plan", MIXED[:2], ids=str)
def test_experts_may_lie_over_data_replicas_too(plan, method):
    layer = Layer(plan, rules=WideRules(plan))
    for kind in ("random", "one rank"):
        check(layer, method, routing(kind, 16, layer.slots_a_rank), kind=kind)


@pytest.mark.parametrize("method", METHODS)
def test_few_tokens_may_go_to_their_slots_unsorted(method):
    layer = layer_on(ParallelPlan(ep=4, tp=2))
    asked = []

    def unsorted(*arguments):
        asked.append(arguments)
        return compute_unsorted(*arguments)

    check(layer, method, routing("random", 16, layer.slots_a_rank), compute_unsorted=unsorted)
    assert asked


@pytest.mark.parametrize("method", METHODS)
def test_a_stage_of_a_pipeline_dispatches_over_the_axes_that_are_left(method):
    layer = layer_on(ParallelPlan(pp=2, ep=2, tp=2, attention_dp=True))
    inputs = routing("random", 16, layer.slots_a_rank)

    def stage(x, slots, gates, params):
        own = (x, slots, gates, params, layer.specs, jnp.int32(0), compute)
        return dispatch_experts(*own, method=method, rules=layer.rules)[None]

    def run(x, slots, gates, params, index):
        # Each stage has one layer; the second stage has the one that must be read.
        stacked = {name: PartitionSpec("pp", *spec[1:]) for name, spec in layer.specs.items()}
        whole, per_stage = PartitionSpec(), PartitionSpec("pp")
        return jax.shard_map(
            stage,
            in_specs=(whole, whole, whole, per_stage),
            out_specs=per_stage,
            axis_names={"pp"},
            check_vma=False,
        )(x, slots, gates, jax.sharding.reshard(params, stacked))

    with jax.set_mesh(layer.mesh):
        out = np.asarray(jax.jit(run)(*layer.arguments(*inputs)))
    assert np.isnan(out[0]).all()
    np.testing.assert_allclose(out[1], layer.expected(*inputs), atol=1e-5)


SENT = {
    # Attention TP: tokens are everywhere.
    ("allreduce", False): [("all-reduce", "ep tp")],
    ("allgather", False): [("reduce-scatter", "ep tp"), ("all-gather", "ep tp")],
    ("all_to_all", False): [
        ("all-to-all", "ep"),
        ("all-to-all", "ep"),
        ("all-reduce", "tp"),
        ("all-gather", "ep"),
    ],
    # Full attention DP: nothing but the all-to-alls goes over ep.
    ("allreduce", True): [("all-gather", "ep tp"), ("reduce-scatter", "ep tp")],
    ("allgather", True): [("all-gather", "ep tp"), ("reduce-scatter", "ep tp")],
    ("all_to_all", True): [
        ("all-gather", "tp"),
        ("all-to-all", "ep"),
        ("all-to-all", "ep"),
        ("reduce-scatter", "tp"),
    ],
    # Partial attention DP: tokens are split over ep alone.
    ("allreduce", "partial"): [
        ("all-gather", "ep"),
        ("reduce-scatter", "ep"),
        ("all-reduce", "tp"),
    ],
    ("allgather", "partial"): [
        ("all-gather", "ep"),
        ("reduce-scatter", "ep"),
        ("reduce-scatter", "tp"),
        ("all-gather", "tp"),
    ],
    ("all_to_all", "partial"): [
        ("all-to-all", "ep"),
        ("all-to-all", "ep"),
        ("all-reduce", "tp"),
    ],
}
"""Dispatch and placement of tokens -> collectives of the compiled program, in order."""


@pytest.mark.parametrize(("method", "attention_dp"), SENT, ids=str)
def test_a_dispatch_sends_what_it_promises_and_no_more(method, attention_dp):
    layer = layer_on(ParallelPlan(dp=2, ep=2, tp=2, attention_dp=attention_dp))
    arguments = layer.arguments(*routing("random", 16, layer.slots_a_rank))
    with jax.set_mesh(layer.mesh):
        program = jitted(layer, method).lower(*arguments).compile().as_text()
    assert collectives(program) == SENT[method, attention_dp]


def collectives(program: str) -> list[tuple[str, str]]:
    """Each collective of a compiled program with its mesh axes."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(
        rf" ({kinds})(?:-start)?\(.*replica_groups=mesh\[[^]]*\] {{([^}}]*)}}", program
    )
    assert len(found) == len(re.findall(rf" (?:{kinds})(?:-start)?\(", program))
    return [(kind, " ".join(re.findall(r"'(\w+)'", axes))) for kind, axes in found]


@pytest.mark.parametrize("plan", MIXED, ids=str)
def test_the_ragged_exchange_lowers_for_cuda_without_a_gpu(plan):
    layer = layer_on(plan)
    arguments = layer.arguments(*routing("random", 16, layer.slots_a_rank))
    with jax.set_mesh(layer.mesh):
        traced = jitted(layer, "all_to_all", exchange="ragged").trace(*arguments)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("ragged_all_to_all") == 2


def ragged_all_to_all(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
    """What the documentation of `lax.ragged_all_to_all` says that it does, by gathering it all."""
    me, rows = jax.lax.axis_index(axis_name), jnp.arange(output.shape[0])
    every = [
        jax.lax.all_gather(array, axis_name)
        for array in (operand, input_offsets, send_sizes, output_offsets)
    ]
    for source in range(every[0].shape[0]):
        data, start, size, target = (array[source] for array in every)
        start, size, target = start[me], size[me], target[me]
        size = jnp.where(size == recv_sizes[source], size, 0)
        read = jnp.clip(rows - target + start, 0, len(data) - 1)
        here = (rows >= target) & (rows < target + size)
        output = jnp.where(here[:, None], data[read], output)
    return output


@pytest.mark.parametrize("plan", MIXED[:2], ids=str)
def test_the_ragged_exchange_equals_the_loop_for_every_routing(plan, monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    layer = layer_on(plan)
    for kind in KINDS:
        inputs = routing(kind, 16, layer.slots_a_rank)
        check(layer, "all_to_all", inputs, kind=kind, exchange="ragged")
