"""Plans really split things: bytes on each device, specs, and what the compiled step sends."""

import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from small_engine import count_sent

from llmjax.explore import read_collectives
from llmjax.weights.model import declared_params, nest
from meshes import ParallelPlan

ODD = "llama_odd_llama3rope"
"""6 query heads, 1 key/value head of 14 features, 60 in the stream, 100 in the MLP, 160 tokens."""
ONE_DEVICE = ParallelPlan()
MIXED = ParallelPlan(dp=2, ep=2, tp=2, attention_dp="partial")
SPLITS = {
    ONE_DEVICE: (1, 1),
    ParallelPlan(tp=2): (1, 2),
    ParallelPlan(tp=4): (1, 4),
    ParallelPlan(tp=8): (1, 8),
    ParallelPlan(dp=8): (8, 1),
    ParallelPlan(dp=4, tp=2): (4, 2),
    ParallelPlan(ep=2, tp=4): (1, 8),
    ParallelPlan(tp=8, attention_dp=True): (8, 1),
    MIXED: (4, 2),
}
"""Plan -> over how many ranks it splits the batch, and over how many the heads."""


def device_shape(array: jax.Array) -> tuple[int, ...]:
    """Shape of the part that each device holds."""
    (shape,) = {shard.data.shape for shard in array.addressable_shards}
    return shape


def distinct_parts(array: jax.Array) -> int:
    """How many different parts of an array the devices hold."""
    return len({str(shard.index) for shard in array.addressable_shards})


def device_bytes(tree: Any) -> int:
    """Bytes that the arrays of a tree take on a device."""
    held: Counter[Any] = Counter()
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    (size,) = set(held.values())
    return size


@pytest.mark.parametrize(
    ("tp", "group", "ffn", "vocab"),
    [
        # On a device, beside its one key/value slot. The 6 query heads become 8 on 4 and 8 ranks,
        # and 100 features 104 on 8; nothing else is padded.
        (1, 6, 100, 160),
        (2, 3, 50, 80),
        (4, 2, 25, 40),
        (8, 1, 13, 20),
    ],
)
def test_weights_on_a_device_shrink_with_tensor_ranks_up_to_padding(tp, group, ffn, vocab, llm_on):
    weights = llm_on(ODD, ParallelPlan(tp=tp)).engine.runner.weights
    attention, mlp = weights["layers"]["attention"], weights["mlp"]
    assert device_shape(attention["qkv"]) == (3, 60, 1, group + 2, 14)
    assert device_shape(attention["out"]) == (3, 1, group, 14, 60)
    assert device_shape(mlp["gate_up"]) == (3, 60, 2, ffn)
    assert device_shape(mlp["down"]) == (3, ffn, 60)
    assert device_shape(weights["embedding"]) == (vocab, 60)
    assert device_shape(weights["output"]) == (vocab, 60)
    split = [attention["qkv"], attention["out"], mlp["gate_up"], mlp["down"], weights["embedding"]]
    assert [distinct_parts(leaf) for leaf in split] == [tp] * len(split)


def test_a_model_that_divides_takes_half_the_bytes_on_two_tensor_ranks(llm_on):
    whole = llm_on("llama", ONE_DEVICE).engine.runner
    split = llm_on("llama", ParallelPlan(dp=4, tp=2)).engine.runner
    vocabulary, attention, mlp = 2 * 160 * 64, 64 * (64 + 32 + 32 + 64), 3 * 64 * 96
    matrices, norms = 4 * (vocabulary + 3 * (attention + mlp)), 4 * (2 * 3 + 1) * 64
    assert device_bytes(whole.weights) == matrices + norms
    assert device_bytes(split.weights) == matrices // 2 + norms
    assert device_bytes(split.state.cache) == device_bytes(whole.state.cache) / 2
    assert device_shape(whole.state.cache.k) == (3, 64, 4, 2, 16)
    assert device_shape(split.state.cache.k) == (3, 64, 4, 1, 16)


@pytest.mark.parametrize("plan", SPLITS, ids=str)
def test_pages_and_rows_are_split_over_batch_ranks_and_head_slots_over_the_others(plan, llm_on):
    (ranks, heads), runner = SPLITS[plan], llm_on(ODD, plan).engine.runner
    for pages in runner.state.cache:
        assert pages.shape == (3, 64 * ranks, 4, heads, 14)
        assert device_shape(pages) == (3, 64, 4, 1, 14)
        assert distinct_parts(pages) == ranks * heads
    assert runner.state.last_tokens.shape == (ranks, 4)
    assert device_shape(runner.state.last_tokens) == (1, 4)
    for bucket, step in runner._steps.items():
        packed = step.input_shardings[0][-1]
        assert packed.shard_shape((1, ranks, bucket.num_numbers)) == (1, 1, bucket.num_numbers)


@pytest.mark.parametrize("plan", SPLITS, ids=str)
def test_every_weight_lies_as_it_was_declared(plan, llm_on):
    llm = llm_on(ODD, plan)
    declared = nest(declared_params(llm.config, llm.rules, jnp.dtype("float32")))

    def check(weight: jax.Array, param: Any) -> None:
        sharding = NamedSharding(llm.mesh, param.out_sharding)
        assert weight.sharding.is_equivalent_to(sharding, weight.ndim)

    jax.tree.map(check, llm.engine.runner.weights, declared)


LAYERS = 3
EP, TP, BOTH = ("ep",), ("tp",), ("ep", "tp")


def summed_over(*axes: str) -> dict[tuple[str, str, tuple[str, ...]], int]:
    """What tensor parallelism sends: a sum of the embedding, and two in each layer."""
    return {
        ("embed", "all-reduce", axes): 1,
        ("attention", "all-reduce", axes): LAYERS,
        ("mlp", "all-reduce", axes): LAYERS,
    }


SENT = {
    ONE_DEVICE: {},
    ParallelPlan(tp=2): summed_over("tp"),
    ParallelPlan(tp=8): summed_over("tp"),
    ParallelPlan(ep=2, tp=4): summed_over("ep", "tp"),
    ParallelPlan(dp=4, tp=2): summed_over("tp"),
    ParallelPlan(dp=8): {},
    # Attention sends nothing. The MLP's result goes back by a reduction of all rows, of which a
    # device keeps its own: XLA makes a reduce-scatter of it on a GPU.
    ParallelPlan(tp=8, attention_dp=True): {
        ("embed", "all-gather", TP): 1,
        ("embed", "reduce-scatter", TP): 1,
        ("mlp", "all-gather", TP): LAYERS,
        ("mlp", "all-reduce", TP): LAYERS,
    },
    # The same over ep; attention's sums, and the embedding's, over tp.
    MIXED: {
        ("embed", "all-gather", EP): 1,
        ("embed", "all-reduce", TP): 1,
        ("embed", "reduce-scatter", EP): 1,
        ("attention", "all-reduce", TP): LAYERS,
        ("mlp", "all-gather", EP): LAYERS,
        ("mlp", "all-reduce", BOTH): LAYERS,
    },
}


@pytest.mark.parametrize("plan", SENT, ids=str)
def test_a_decode_step_sends_what_the_plan_needs_and_no_more(plan, llm_on):
    runner = llm_on(ODD, plan).engine.runner
    (decode,) = [bucket for bucket in runner.buckets if not bucket.prefill_tokens]
    sent = read_collectives(runner.compiled_text(decode), plan.sizes)
    assert count_sent(sent) == SENT[plan]
    if plan.tensor_parallel_size > 1:
        merges = {each.ranks for each in sent if each.part == "sample"}
        assert plan.tensor_parallel_size in merges, "nobody merges the vocabulary's parts"


def test_one_device_sends_nothing(llm_on):
    runner = llm_on(ODD, ONE_DEVICE).engine.runner
    for bucket in runner.buckets:
        assert not read_collectives(runner.compiled_text(bucket), ONE_DEVICE.sizes)


@pytest.mark.parametrize("plan", SPLITS, ids=str)
def test_the_cache_is_updated_in_place(plan, llm_on):
    runner = llm_on(ODD, plan).engine.runner
    layers, *pages = device_shape(runner.state.cache.k)
    shapes = [",".join(map(str, [*lead, *pages])) for lead in ([layers], [1], [])]
    for bucket, step in runner._steps.items():
        program = step.as_text()
        assert f"= f32[{shapes[0]}]" in program, "the cache has another shape in the program"
        for shape in shapes:
            copies = re.findall(rf"= f32\[{shape}\]\S* copy\(", program)
            assert not copies, f"{bucket} copies the cache"
        # All that is donated is written where it lies.
        assert step.memory_analysis().alias_size_in_bytes == device_bytes(runner.state)
