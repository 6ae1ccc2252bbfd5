"""The costs that choose a dispatch, against the compiled program and against worked examples."""

import re
from dataclasses import replace
from math import prod

import jax
import jax.numpy as jnp
import pytest

from llmjax.parallel.dispatch_cost import (
    ExpertLoad,
    buffer_bytes,
    choose_dispatch,
    largest_max_num_tokens,
    rows_a_slot,
    sent_bytes,
)
from llmjax.parallel.expert_dispatch import Dispatch, dispatch_experts
from meshes import ParallelPlan, Rules, make_mesh
from pallas_kernels import grouped_gemm

METHODS: tuple[Dispatch, ...] = ("allreduce", "allgather", "all_to_all")
DEEPSEEK = ExpertLoad(tokens=64, embed=7168, ffn=2048, num_slots=256, top_k=8)


@pytest.mark.parametrize(
    ("plan", "limit", "rows"),
    [
        (ParallelPlan(ep=8), None, 2),
        (ParallelPlan(ep=8, attention_dp=True), None, 16),
        (ParallelPlan(ep=8, attention_dp=True), 16, 4),
        (ParallelPlan(ep=4, tp=2, attention_dp="partial"), None, 8),
        (ParallelPlan(dp=2, ep=4), None, 2),
    ],
    ids=str,
)
def test_a_slot_gets_its_share_of_the_tokens_of_all_ranks_of_its_experts(plan, limit, rows):
    assert rows_a_slot(replace(DEEPSEEK, max_num_tokens=limit), rules=Rules(plan)) == rows


def compile_dispatch(method: Dispatch, load: ExpertLoad, plan: ParallelPlan) -> tuple[str, int]:
    """Program and bytes of temporaries of a dispatch to two products with a gate between."""
    placement, mesh = Rules(plan), make_mesh(plan)
    spec, tokens = placement.spec, load.tokens * placement.size("tokens")
    slots, embed, ffn = load.num_slots, load.embed, load.ffn
    specs = {
        "gate_up": spec(None, "experts", None, None, "expert_ffn"),
        "down": spec(None, "experts", "expert_ffn", None),
    }
    shapes = {"gate_up": (1, slots, embed, 2, ffn), "down": (1, slots, ffn, embed)}

    def compute(x, x_of_row, group_sizes, slot_of_row, params, layer):
        width = params["gate_up"].shape[-1]
        gate_up = params["gate_up"].reshape(*params["gate_up"].shape[:3], 2 * width)
        hidden = grouped_gemm(x, gate_up, group_sizes, layer, row_index=x_of_row)
        gated = hidden[:, :width] * hidden[:, width:]
        return grouped_gemm(gated, params["down"], group_sizes, layer)

    def run(x, slots, gates, params):
        return dispatch_experts(
            *(x, slots, gates, params, specs, jnp.int32(0), compute),
            method=method,
            rules=placement,
            max_num_tokens=load.max_num_tokens,
        )

    def abstract(shape, spec, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))

    by_token = spec("tokens", None)
    with jax.set_mesh(mesh):
        x = abstract((tokens, embed), by_token)
        slots_of = abstract((tokens, load.top_k), by_token, jnp.int32)
        gates = abstract((tokens, load.top_k), by_token)
        params = {name: abstract(shapes[name], specs[name]) for name in shapes}
        compiled = jax.jit(run).lower(x, slots_of, gates, params).compile()
    memory, program = compiled.memory_analysis(), compiled.as_text()
    assert memory and program
    return program, memory.temp_size_in_bytes


def moved_bytes(program: str) -> float:
    """Bytes that each device sends in the collectives of a compiled program, on rings."""
    total = 0.0
    line = r"= (.*) (all-reduce|all-gather|reduce-scatter|all-to-all)\(.*=mesh\[(.*)\] {([^}]*)}"
    for shapes, kind, mesh, axes in re.findall(line, program):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh))
        ranks = prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", axes))
        arrays = re.findall(r"[fu]32\[([\d,]*)\]", shapes)
        size = 4 * sum(prod(map(int, dims.split(","))) for dims in arrays)
        parts = {"all-reduce": 2 / ranks, "reduce-scatter": 1}.get(kind, 1 / ranks)
        total += size * parts * (ranks - 1)
    return total


SMALL = ExpertLoad(tokens=64, embed=256, ffn=64, num_slots=8, top_k=2, itemsize=4)
PLANS = [ParallelPlan(ep=4, tp=2, attention_dp=dp) for dp in (False, True, "partial")]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_compiled_dispatch_sends_and_holds_what_its_costs_say(plan, method):
    program, held = compile_dispatch(method, SMALL, plan)
    assert moved_bytes(program) == sent_bytes(method, SMALL, rules=Rules(plan))
    # XLA lets buffers share memory, but holds at least the rows of the experts.
    assert 0.5 < held / buffer_bytes(method, SMALL, rules=Rules(plan)) < 1


@pytest.mark.parametrize("method", METHODS)
def test_rounds_bound_the_buffers_of_a_compiled_dispatch(method):
    plan, load = PLANS[1], replace(SMALL, max_num_tokens=16)
    _, whole = compile_dispatch(method, SMALL, plan)
    _, held = compile_dispatch(method, load, plan)
    assert held < whole / 3
    assert 0.5 < held / buffer_bytes(method, load, rules=Rules(plan)) < 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_the_largest_round_that_fits_is_found(plan, method):
    rules, load = Rules(plan), replace(DEEPSEEK, tokens=4096)
    budget = 256 * 2**20
    found = largest_max_num_tokens(method, load, budget, rules=rules)
    assert 0 < found < 4096

    def needed(limit: int) -> int:
        return buffer_bytes(method, replace(load, max_num_tokens=limit), rules=rules)

    assert needed(found) <= budget < needed(found + 1)
    assert largest_max_num_tokens(method, load, 1000, rules=rules) == 0
    assert largest_max_num_tokens(method, load, 2**50, rules=rules) == 4096


@pytest.mark.parametrize(
    ("plan", "changes", "best"),
    [
        # Tokens are everywhere: one reduction, and with ragged sending still one for few tokens.
        (ParallelPlan(ep=8), {}, "allreduce"),
        (ParallelPlan(ep=32), {"exchange": "ragged"}, "allreduce"),
        (ParallelPlan(ep=32), {"exchange": "ragged", "tokens": 8192}, "all_to_all"),
        # Padded, an all-to-all sends as much as the other two, in more collectives.
        (ParallelPlan(ep=32, attention_dp=True), {"tokens": 8192}, "allreduce"),
        # 8 of 256 experts are on 7 of 31 other ranks.
        (ParallelPlan(ep=32, attention_dp=True), {"exchange": "ragged"}, "all_to_all"),
        (ParallelPlan(ep=32, attention_dp=True), {"exchange": "ragged", "tokens": 1}, "allreduce"),
        (ParallelPlan(tp=8), {"exchange": "ragged", "tokens": 8192}, "allreduce"),
    ],
    ids=str,
)
def test_the_cheapest_dispatch_is_chosen(plan, changes, best):
    load = replace(DEEPSEEK, **changes)
    assert choose_dispatch(load, rules=Rules(plan)) == best


def test_a_ragged_all_to_all_sends_a_token_to_the_ranks_that_it_needs():
    rules = Rules(ParallelPlan(ep=4, attention_dp=True))
    one_slot = replace(DEEPSEEK, top_k=1, exchange="ragged")
    # Three of four tokens leave their rank, there and back; four bytes a rank announce them.
    row = 7168 * 2
    assert sent_bytes("all_to_all", one_slot, rules=rules) == 48 * (row + 8 + row) + 3 * 4
    every_rank = replace(DEEPSEEK, num_slots=8, top_k=7, exchange="ragged")
    assert sent_bytes("all_to_all", every_rank, rules=rules) == 64 * 3 * (2 * row + 56) + 3 * 4
