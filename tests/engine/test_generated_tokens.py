"""A plan changes no token: greedy ones are Hugging Face's, seeded ones those of one device."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmjax import LLM, SamplingParams
from meshes import ParallelPlan

ODD = "llama_odd_llama3rope"
"""6 query heads, 1 key/value head, 100 features between: nothing divides over 8 ranks."""
ONE_DEVICE = ParallelPlan()
MIXED = ParallelPlan(dp=2, ep=2, tp=2, attention_dp="partial")
"""All axes at once."""
PLANS = (
    ONE_DEVICE,
    ParallelPlan(tp=2),
    ParallelPlan(tp=4),
    ParallelPlan(tp=8),
    ParallelPlan(dp=8),
    ParallelPlan(dp=4, tp=2),
    ParallelPlan(ep=2, tp=4),
    ParallelPlan(tp=8, attention_dp=True),
    ParallelPlan(ep=2, tp=4, attention_dp="partial"),
    MIXED,
)


@pytest.mark.parametrize(
    ("family", "plan"),
    [
        (ODD, ONE_DEVICE),
        (ODD, ParallelPlan(tp=8)),
        (ODD, MIXED),
        ("gemma3_text", ParallelPlan(tp=2)),
        ("glm4_moe", ParallelPlan(ep=2, tp=2, attention_dp=True)),
    ],
    ids=str,
)
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


@pytest.mark.parametrize("plan", PLANS, ids=str)
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
