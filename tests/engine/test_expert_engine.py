"""With experts, latent attention and windows, a crowded engine gives the tokens of a calm one."""

import random
from collections.abc import Mapping
from typing import Any

import pytest

from llmjax import SamplingParams
from llmjax.layers import moe
from meshes import ParallelPlan

ONE_DEVICE = ParallelPlan()
TIGHT = {
    "max_batch_size": 6,
    "batch_buckets": (6,),
    "max_num_tokens": 16,
    "token_buckets": (16,),
    "max_seq_len": 64,
    "kv_cache_max_tokens": 64,
    "tokens_per_block": 4,
}
"""A pool of 16 pages a batch rank, of which a request may need 14; steps shorter than prompts."""
CELLS = [
    ("qwen3_moe_odd", ParallelPlan(ep=2, tp=2), "all_to_all"),
    ("deepseek_v3", ParallelPlan(dp=2, ep=2, tp=2, attention_dp=True), "all_to_all"),
    ("gpt_oss", ParallelPlan(tp=4), "allreduce"),
    ("llama4_text", ParallelPlan(ep=4), "allgather"),
]
CLEAR = 5e-5
"""Differences of log-probabilities that no plan's rounding turns round."""


def draw_prompts(count: int) -> list[list[int]]:
    """Prompts of random lengths, half of them with a beginning that others have."""
    draw = random.Random(6)
    beginnings = [[draw.randrange(160) for _ in range(length)] for length in (9, 17)]
    return [
        [
            *(draw.choice(beginnings) if index % 2 else ()),
            *(draw.randrange(160) for _ in range(draw.randint(1, 24))),
        ]
        for index in range(count)
    ]


PROMPTS = draw_prompts(64)
PARAMS = [
    SamplingParams(temperature=0, max_tokens=4 + index % 9, ignore_eos=True, logprobs=2)
    for index in range(len(PROMPTS))
]


def margin_of(likeliest: Mapping[int, Any]) -> float:
    """How much likelier, in logarithms, the first of a position's tokens is than the second."""
    first, second = sorted((each.logprob for each in likeliest.values()), reverse=True)
    return first - second


@pytest.mark.parametrize(("family", "plan", "dispatch"), CELLS, ids=str)
def test_a_crowded_engine_gives_the_tokens_of_one_device(family, plan, dispatch, llm_on):
    calm = llm_on(family, ONE_DEVICE, enable_block_reuse=False)
    expected = [each.outputs[0] for each in calm.generate(PROMPTS, PARAMS)]
    assert calm.engine.scheduler.num_preemptions == 0
    margins = [margin_of(likeliest) for one in expected for likeliest in one.logprobs]
    assert min(margins) > CLEAR, "rounding decides: draw other prompts"

    crowded = llm_on(family, plan, **TIGHT, moe_dispatch=dispatch)
    found = [each.outputs[0] for each in crowded.generate(PROMPTS, PARAMS)]
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]

    engine = crowded.engine
    blocks = engine.scheduler.blocks
    assert engine.scheduler.num_preemptions > 2
    assert engine.stats.chunked_prefills > 20
    assert sum(rank.prefix_hit_tokens for rank in blocks) > 100
    assert [rank.num_available for rank in blocks] == [16] * len(blocks), "pages are lost"


def test_aligned_experts_give_the_tokens_of_experts_side_by_side(llm_on, monkeypatch):
    calm = llm_on("qwen3_moe_odd", ONE_DEVICE, enable_block_reuse=False)
    expected = [each.outputs[0].token_ids for each in calm.generate(PROMPTS[:8], PARAMS[:8])]

    def align(rows_a_group: float) -> int:
        del rows_a_group
        return 8

    # Only a Hopper prefers it, and only for many rows.
    monkeypatch.setattr(moe, "preferred_row_alignment", align)
    aligned = llm_on("qwen3_moe_odd", ParallelPlan(ep=2, tp=2), **TIGHT, moe_dispatch="allgather")
    found = [each.outputs[0].token_ids for each in aligned.generate(PROMPTS[:8], PARAMS[:8])]
    assert found == expected
