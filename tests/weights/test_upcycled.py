"""A dense model as a mixture of its own copies."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from llmjax import LLM, ConfigError, SamplingParams
from llmjax.models.registry import find_family
from llmjax.weights import open_checkpoint, upcycle
from llmjax.weights.model import load_model
from meshes import ParallelPlan, Rules, make_mesh

GOLDEN = Path(__file__).parent.parent / "golden"


def load(family_name, experts, plan):
    """(weights, the dense model's weights) on a plan."""
    checkpoint = open_checkpoint(GOLDEN / family_name)
    family = find_family(checkpoint.config)
    rules, mesh, dtype = Rules(plan), make_mesh(plan), jnp.dtype("float32")
    weights = []
    for opened, its_family in (upcycle(checkpoint, family, experts), (checkpoint, family)):
        config = its_family.read_config(opened.config)
        weights.append(
            load_model(opened, its_family, config, rules, mesh, dtype=dtype, progress=False)
        )
    return weights


@pytest.mark.parametrize("family_name", ["llama_odd_llama3rope", "llama_bias_linear_rope"])
def test_every_expert_is_the_feed_forward_part_and_empty_slots_stay_empty(family_name):
    sparse, dense = load(family_name, "6x2", ParallelPlan(ep=4, tp=2))
    assert "mlp" not in sparse
    for name, values in dense["mlp"].items():
        copies, part = np.asarray(sparse["experts"][name]), np.asarray(values)
        # Padded for other ranks, an expert may be narrower than the whole part was.
        part = part[tuple(slice(size) for size in (copies.shape[0], *copies.shape[2:]))]
        np.testing.assert_array_equal(copies[:, :6], np.stack([part] * 6, axis=1))
        assert copies.shape[1] == 8 and not np.any(copies[:, 6:])


def test_routers_are_random_and_the_same_each_time():
    plan = ParallelPlan()
    first, again = (np.asarray(load("llama", "4x1", plan)[0]["moe"]["router"]) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (3, 64, 4)
    assert 0.8 < np.std(first) * 8 < 1.2
    assert not np.allclose(first[0], first[1])


@pytest.mark.parametrize("text", ["8", "8x", "x2", "2x8", "8x0", "0x0", "8x2x1", "a x b"])
def test_experts_are_asked_for_as_8x2(text):
    checkpoint = open_checkpoint(GOLDEN / "llama")
    with pytest.raises(ConfigError, match='such as "8x2"'):
        upcycle(checkpoint, find_family(checkpoint.config), text)


@pytest.mark.parametrize(
    ("family_name", "reason"),
    [
        ("mixtral", "MixtralForCausalLM already has 8 of them: leave it out"),
        ("gemma3_text", "needs a feed-forward part with silu, and Gemma3ForCausalLM has gelu_tanh"),
    ],
)
def test_a_model_that_cannot_have_experts_says_why(family_name, reason):
    checkpoint = open_checkpoint(GOLDEN / family_name)
    with pytest.raises(ConfigError, match=reason):
        upcycle(checkpoint, find_family(checkpoint.config), "8x2")


def test_a_model_continues_as_before_when_its_tokens_are_sent_to_experts():
    stored = np.load(GOLDEN / "llama" / "io.npz")
    greedy, count = stored["greedy"][0].tolist(), stored["prompt"].shape[1]
    llm = LLM(
        GOLDEN / "llama",
        plan=ParallelPlan(ep=2, tp=2, attention_dp=True),
        upcycle="6x3",
        moe_dispatch="all_to_all",
        progress=False,
        max_batch_size=1,
        batch_buckets=(1,),
        max_num_tokens=16,
        max_seq_len=32,
        token_buckets=(16,),
        kv_cache_max_tokens=64,
    )
    params = SamplingParams(temperature=0, max_tokens=len(greedy) - count, ignore_eos=True)
    output = llm.generate([greedy[:count]], params)[0]
    assert list(output.outputs[0].token_ids) == greedy[count:]


SMOLLM2 = json.loads((GOLDEN / "smollm2_greedy.json").read_text())["cases"][0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "dispatch"),
    [
        (ParallelPlan(tp=2), "allreduce"),
        (ParallelPlan(ep=2), "allreduce"),
        (ParallelPlan(ep=2, attention_dp=True), "allgather"),
        (ParallelPlan(ep=2, tp=2, attention_dp=True), "all_to_all"),
    ],
    ids=str,
)
def test_smollm2_says_the_same_through_experts(plan, dispatch):
    llm = LLM(
        plan=plan,
        upcycle="8x2",
        dtype="float32",
        progress=False,
        moe_dispatch=dispatch,
        max_batch_size=1,
        batch_buckets=(1,),
        max_num_tokens=40,
        token_buckets=(40,),
        max_seq_len=64,
        kv_cache_max_tokens=128,
    )
    output = llm.generate(SMOLLM2["messages"], SamplingParams(temperature=0, max_tokens=8))[0]
    assert list(output.outputs[0].token_ids) == SMOLLM2["greedy_ids"]
