"""64 requests of all sorts at once: on every plan each gets the tokens that one device gives it."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from strategies import CROWDED, CROWDED_MODEL, ENGINE_FEATURES, FEATURES, ONE_DEVICE

from llmjax import LLM, SamplingParams
from llmjax.engine.engine import Engine
from llmjax.outputs import RequestOutput

TIGHT: dict[str, Any] = {
    "max_batch_size": 6,
    "batch_buckets": (6,),
    "max_num_tokens": 16,
    "token_buckets": (16,),
    "max_seq_len": 44,
    "kv_cache_max_tokens": 44,
}
"""A batch rank has room for 44 tokens, which a request may need; steps are shorter than prompts."""
NEAR = 1e-4
"""How far plans may differ in a log-probability."""


def draw_prompts(count: int) -> list[list[int]]:
    """Prompts of random lengths, half of them with a beginning that others have."""
    draw = random.Random(6)
    beginnings = [[draw.randrange(160) for _ in range(length)] for length in (9, 17)]
    return [
        [
            *(draw.choice(beginnings) if index % 2 else ()),
            *(draw.randrange(160) for _ in range(draw.randint(1, 16))),
        ]
        for index in range(count)
    ]


def sampling_of(index: int) -> SamplingParams:
    """A third greedy, the others seeded; some with penalties, some with log-probabilities."""
    return SamplingParams(
        temperature=0 if index % 3 == 0 else 1.0,
        seed=index,
        top_p=0.9 if index % 5 == 0 else 1.0,
        repetition_penalty=1.3 if index % 4 == 1 else 1.0,
        presence_penalty=0.5 if index % 4 == 2 else 0.0,
        logprobs=2 if index % 6 < 2 else None,
        prompt_logprobs=1 if index % 16 == 3 else None,
        max_tokens=2 + index % 10,
        ignore_eos=True,
    )


PROMPTS = draw_prompts(64)
PARAMS = [sampling_of(index) for index in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def expected(llm_on: Callable[..., LLM]) -> Sequence[RequestOutput]:
    """What one device says that has room for all, and reuses nothing."""
    calm = llm_on(CROWDED_MODEL, ONE_DEVICE.plan, enable_block_reuse=False)
    outputs = calm.generate(PROMPTS, PARAMS)
    assert calm.engine.scheduler.num_preemptions == 0
    return outputs


@pytest.mark.covering
@pytest.mark.parametrize("name", CROWDED)
def test_many_requests_get_the_tokens_of_one_device(name, expected, llm_on):
    strategy = CROWDED[name]
    plan, dispatch = strategy.plan_for(CROWDED_MODEL), strategy.dispatch
    # A block is a page on each context rank: blocks of four, so that all plans schedule alike.
    options = {**TIGHT, "tokens_per_block": 4 // plan.cp, "moe_dispatch": dispatch}
    crowded = llm_on(CROWDED_MODEL, plan, **options)
    for one, other in zip(expected, crowded.generate(PROMPTS, PARAMS), strict=True):
        assert other.outputs[0].token_ids == one.outputs[0].token_ids
        assert_near(other.outputs[0].logprobs, one.outputs[0].logprobs)
        assert_near(other.prompt_logprobs, one.prompt_logprobs)

    engine = crowded.engine
    uses = count_uses(engine)
    assert uses.keys() == set(ENGINE_FEATURES)
    assert all(uses.values()), "the requests leave a feature out"
    blocks = engine.scheduler.blocks
    held = [engine.runner.num_pages - rank.num_available for rank in blocks]
    assert held == [0] * len(blocks), "pages are lost"
    assert engine.stats.compilations == 0 and not engine.has_work


def count_uses(engine: Engine) -> dict[str, int]:
    """How often each feature of the engine was used."""
    penalties = [(params.repetition_penalty, params.presence_penalty) for params in PARAMS]
    return {
        "chunked prefill": engine.stats.chunked_prefills,
        "prefix caching": sum(rank.prefix_hit_tokens for rank in engine.scheduler.blocks),
        "preemption": engine.scheduler.num_preemptions,
        "overlap": engine.stats.overlapped_steps,
        "logprobs": sum(params.logprobs is not None for params in PARAMS),
        "prompt logprobs": sum(params.prompt_logprobs is not None for params in PARAMS),
        "penalties": sum(each != (1.0, 0.0) for each in penalties),
        "seeds": sum(params.temperature > 0 for params in PARAMS),
    }


def assert_near(found: Sequence[Any] | None, expected: Sequence[Any] | None) -> None:
    """The same tokens at every position, with the same log-probabilities but for rounding."""
    if found is None or expected is None:
        assert found is expected
        return
    for one, other in zip(found, expected, strict=True):
        assert_near_at(one, other)


def assert_near_at(found: Mapping[int, Any] | None, expected: Mapping[int, Any] | None) -> None:
    if found is None or expected is None:
        assert found is expected
        return
    assert found.keys() == expected.keys()
    differences = [abs(found[token].logprob - expected[token].logprob) for token in found]
    assert max(differences) < NEAR


def test_the_crowded_plans_have_every_feature_among_them():
    assert set().union(*[strategy.features for strategy in CROWDED.values()]) == set(FEATURES)
