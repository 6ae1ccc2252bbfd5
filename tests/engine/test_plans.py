"""Every plan computes what one device computes, and that is what Hugging Face computes."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmjax import LLM, SamplingParams
from llmjax.models.decoder import RunOptions
from meshes import ParallelPlan, Rules, presets

TOLERANCE = 2e-4
ODD = "llama_odd_llama3rope"
"""6 query heads, 1 key/value head, 100 features between: nothing divides over 8 ranks."""
FAMILIES = ("llama", ODD, "qwen2", "qwen3")
VARIANTS = (
    "llama_bias_linear_rope",
    "llama_yarn_rope",
    "mistral_window",
    "qwen2_window",
    "qwen3_bias_odd",
)
"""What other checkpoints of the families switch on."""
ONE_DEVICE = ParallelPlan()
MIXED = ParallelPlan(dp=2, ep=2, tp=2, attention_dp="partial")
"""All axes of a dense plan at once."""
FEW_PLANS = (
    ParallelPlan(tp=8),
    ParallelPlan(dp=8),
    ParallelPlan(dp=4, tp=2),
    ParallelPlan(ep=2, tp=4),
    ParallelPlan(tp=8, attention_dp=True),
    ParallelPlan(ep=2, tp=4, attention_dp="partial"),
    MIXED,
)
PART_OF_A_MESH = (ONE_DEVICE, ParallelPlan(tp=2), ParallelPlan(tp=4))


def dense_plans(devices: int) -> list[ParallelPlan]:
    """Every plan of dp, ep, tp and attention DP that differs from the ones before it."""
    plans = []
    for dp, ep, tp in product(range(1, devices + 1), repeat=3):
        if dp * ep * tp == devices:
            plans.append(ParallelPlan(dp=dp, ep=ep, tp=tp))
            if ep * tp > 1:
                plans.append(ParallelPlan(dp=dp, ep=ep, tp=tp, attention_dp=True))
            if ep > 1 and tp > 1:
                plans.append(ParallelPlan(dp=dp, ep=ep, tp=tp, attention_dp="partial"))
    return plans


EVERY_CASE = [
    *((ODD, plan) for plan in (*PART_OF_A_MESH, *dense_plans(8))),
    *product((family for family in FAMILIES if family != ODD), (ONE_DEVICE, *FEW_PLANS)),
    *product(VARIANTS, (MIXED,)),
]
GREEDY_CASES = [
    *((ODD, plan) for plan in (*PART_OF_A_MESH, *FEW_PLANS)),
    *product(("llama",), (ONE_DEVICE, ParallelPlan(dp=4, tp=2))),
    *product(("qwen2", "qwen3"), (ONE_DEVICE, MIXED)),
]


def assert_logits_are_golden(golden: Any, logits_of: Any, plan: ParallelPlan) -> None:
    # Odd ranks hold the rows the other way round, so that a rank cannot pass with another's.
    orders = [(0, 1) if rank % 2 == 0 else (1, 0) for rank in range(Rules(plan).size("requests"))]
    prompts = [[golden.input_ids[row].tolist() for row in order] for order in orders]
    logits, expected = logits_of(prompts), golden.logits[np.array(orders)]
    assert logits.shape == expected.shape
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.matrix
@pytest.mark.parametrize(("family", "plan"), EVERY_CASE, ids=str)
def test_logits_are_hugging_faces_on_every_plan(family, plan, golden, logits_on):
    logits_of = logits_on(golden(family).folder, plan)
    assert_logits_are_golden(golden(family), logits_of, plan)


@pytest.mark.matrix
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", [ONE_DEVICE, MIXED], ids=str)
def test_unrolled_layers_give_the_same_logits(family, plan, golden, logits_on):
    logits_of = logits_on(golden(family).folder, plan, RunOptions(layer_loop="unroll"))
    assert_logits_are_golden(golden(family), logits_of, plan)


def test_every_preset_is_one_of_the_plans_of_these_tests():
    tested = {plan for _, plan in EVERY_CASE}
    assert {ParallelPlan.from_yaml(name) for name in presets()} <= tested


@pytest.mark.parametrize("family", ["llama", ODD])
def test_rope_in_its_old_spelling_gives_the_same_logits(family, golden, logits_on, tmp_path):
    folder = golden(family).folder
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    assert_logits_are_golden(golden(family), logits_on(tmp_path, ONE_DEVICE), ONE_DEVICE)


@pytest.mark.matrix
@pytest.mark.parametrize(("family", "plan"), GREEDY_CASES, ids=str)
def test_greedy_ids_are_hugging_faces_on_every_plan(family, plan, golden, llm_on):
    # Every beginning of the text is a prompt, so that all batch ranks have several requests.
    greedy, first = golden(family).greedy, golden(family).prompt_length
    lengths = range(first, len(greedy))
    params = [
        SamplingParams(temperature=0, max_tokens=len(greedy) - length, ignore_eos=True)
        for length in lengths
    ]
    outputs = llm_on(family, plan).generate([greedy[:length] for length in lengths], params)
    for length, output in zip(lengths, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == greedy[length:]


SAMPLED = (
    SamplingParams(seed=1, max_tokens=12, ignore_eos=True),
    SamplingParams(seed=2, max_tokens=12, ignore_eos=True, temperature=1.5, top_k=40, top_p=0.9),
    SamplingParams(seed=3, max_tokens=12, ignore_eos=True, temperature=0.8, min_p=0.02),
    SamplingParams(seed=4, max_tokens=12, ignore_eos=True, n=3, repetition_penalty=1.3),
    SamplingParams(seed=5, max_tokens=12, ignore_eos=True, logit_bias={7: 4.0, 9: -50.0}),
)


def sample(llm: LLM, prompt: list[int], params: list[SamplingParams]) -> list[list[Any]]:
    """The tokens of each completion of each request."""
    outputs = llm.generate([prompt] * len(params), params)
    return [[one.token_ids for one in output.outputs] for output in outputs]


@pytest.mark.matrix
@pytest.mark.parametrize("plan", [*PART_OF_A_MESH, *FEW_PLANS], ids=str)
def test_seeded_tokens_are_the_same_on_every_plan(plan, golden, llm_on):
    prompt = golden(ODD).greedy[:9]
    expected = sample(llm_on(ODD, ONE_DEVICE), prompt, list(SAMPLED))
    completions = [tokens for group in expected for tokens in group]
    assert len(set(completions)) == len(completions), "some seeds draw the same noise"
    assert sample(llm_on(ODD, plan), prompt, list(SAMPLED)) == expected


@pytest.mark.parametrize("plan", [ONE_DEVICE, MIXED], ids=str)
def test_seeded_tokens_are_the_same_in_every_batch(plan, golden, llm_on):
    llm, prompt = llm_on(ODD, plan), golden(ODD).greedy[:9]
    together = sample(llm, prompt, list(SAMPLED))
    assert [sample(llm, prompt, [params])[0] for params in SAMPLED] == together
    assert sample(llm, prompt, list(SAMPLED[::-1]))[::-1] == together
    others = [SamplingParams(max_tokens=5 + i, ignore_eos=True, seed=50 + i) for i in range(6)]
    mixed = sample(llm, prompt, [*others[:3], *SAMPLED, *others[3:]])
    assert mixed[3:-3] == together


SMOLLM2 = json.loads((Path(__file__).parent.parent / "golden/smollm2_greedy.json").read_text())
CHOSEN = [SMOLLM2["cases"][index] for index in (0, 2, 4)]
"""Two conversations and a plain text; the first two end within the tokens that are compared."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan",
    [
        ONE_DEVICE,
        ParallelPlan(tp=2),
        ParallelPlan(tp=4),
        ParallelPlan(tp=8),
        ParallelPlan(dp=4, tp=2),
        ParallelPlan(tp=8, attention_dp=True),
    ],
    ids=str,
)
def test_smollm2_says_what_it_says_in_hugging_face(plan):
    llm = LLM(
        plan=plan,
        dtype="float32",
        progress=False,
        max_batch_size=2,
        batch_buckets=(2,),
        max_num_tokens=40,
        token_buckets=(40,),
        max_seq_len=64,
        kv_cache_max_tokens=128,
    )
    prompts = [case["messages"] or case["prompt"] for case in CHOSEN]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16))
    for case, output in zip(CHOSEN, outputs, strict=True):
        assert list(output.prompt_token_ids) == case["prompt_ids"]
        assert list(output.outputs[0].token_ids) == case["greedy_ids"][:16]
    assert "Paris" in outputs[0].outputs[0].text
