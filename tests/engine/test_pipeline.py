"""Pipeline stages: the same logits and tokens, a permute a tick, and no stage that waits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmjax import LLM, SamplingParams
from llmjax.config import EngineConfig
from llmjax.engine.compile import choose_buckets
from llmjax.engine.engine import Engine
from llmjax.engine.request import Request
from llmjax.engine.schedule import SchedulerConfig
from llmjax.engine.scheduler import Scheduler
from llmjax.engine.stats import EngineStats, Tick
from llmjax.explore.collectives import read_collectives
from meshes import ParallelPlan, Rules

UNEVEN = ParallelPlan(pp=2, ep=2, pp_partition=(1, 2))
"""DeepSeek's first layer is dense: one stage holds it alone, the other one what has experts."""
CELLS = {
    "llama": ParallelPlan(pp=3, tp=2),
    "qwen3_moe_odd": ParallelPlan(pp=2, dp=2),
    "deepseek_v3": UNEVEN,
    "llama4_text": ParallelPlan(pp=2, ep=2, tp=2, attention_dp="partial"),
    "gemma3_text": ParallelPlan(pp=4, tp=2, attention_dp=True),
}
OCCUPIED = {"deepseek_v3": UNEVEN, "gemma3_text": ParallelPlan(pp=4, tp=2)}
TIGHT: dict[str, Any] = {
    "max_batch_size": 6,
    "batch_buckets": (6,),
    "max_num_tokens": 16,
    "token_buckets": (16,),
    "max_seq_len": 64,
    "kv_cache_max_tokens": 96,
    "tokens_per_block": 4,
}
"""A pool that holds two of the longest requests; a step shorter than most prompts."""


@pytest.mark.parametrize(("model", "plan"), CELLS.items(), ids=str)
def test_logits_behind_stages_are_hugging_faces(model, plan, golden, logits_on):
    expected = golden(model)
    orders = [(0, 1) if rank % 2 == 0 else (1, 0) for rank in range(Rules(plan).size("requests"))]
    prompts = [[expected.input_ids[row].tolist() for row in order] for order in orders]
    logits = logits_on(expected.folder, plan)(prompts)
    np.testing.assert_allclose(logits, expected.logits[np.array(orders)], rtol=0, atol=2e-4)


@pytest.fixture(scope="module")
def served(llm_on) -> dict[ParallelPlan, LLM]:
    plans = (ParallelPlan(), UNEVEN)
    return {plan: llm_on("deepseek_v3", plan, **TIGHT) for plan in plans}


def draw_prompts(count: int) -> list[list[int]]:
    """Prompts of random lengths, every other one with a prefix that others have."""
    draw = np.random.default_rng(5)
    prefix = draw.integers(3, 160, 14).tolist()
    prompts = [draw.integers(3, 160, draw.integers(1, 30)).tolist() for _ in range(count)]
    return [prefix + ids if index % 2 else ids for index, ids in enumerate(prompts)]


def test_requests_get_their_tokens_with_several_micro_batches_in_flight(served):
    prompts = draw_prompts(24)
    params = [
        SamplingParams(
            temperature=0 if index % 3 else 1.0,
            seed=index,
            repetition_penalty=1.3 if index % 4 == 0 else 1.0,
            max_tokens=1 + index % 17,
            logprobs=2 if index % 5 == 0 else None,
            prompt_logprobs=1 if index == 3 else None,
            ignore_eos=True,
        )
        for index in range(len(prompts))
    ]
    outputs = {plan: llm.generate(prompts, params) for plan, llm in served.items()}
    alone, staged = outputs[ParallelPlan()], outputs[UNEVEN]
    for one, other in zip(alone, staged, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert same_logprobs(one.outputs[0].logprobs, other.outputs[0].logprobs)
    assert same_logprobs(alone[3].prompt_logprobs[1:], staged[3].prompt_logprobs[1:])
    engine = served[UNEVEN].engine
    assert engine.scheduler.num_preemptions > 0, "the pool was never tight"
    assert max(output.num_cached_tokens for output in staged) > 0, "no prefix was reused"
    assert engine.stats.chunked_prefills > 0 and engine.stats.compilations == 0
    assert not engine.has_work


def same_logprobs(one: Any, other: Any) -> bool:
    """The same tokens with log-probabilities that differ by rounding."""
    if one is None or other is None:
        return one is other
    return all(
        left.keys() == right.keys()
        and all(abs(left[token].logprob - right[token].logprob) < 1e-4 for token in left)
        for left, right in zip(one, other, strict=True)
    )


def test_in_bfloat16_stages_give_the_logits_of_one_device(llm_on):
    (ids, *_), logits = draw_prompts(1), []
    for plan in (ParallelPlan(), ParallelPlan(pp=3)):
        llm = llm_on("llama", plan, **(TIGHT | {"dtype": "bfloat16"}))
        assert len(llm.generate([ids], SamplingParams(max_tokens=4, ignore_eos=True))) == 1
        logits.append(llm.logits(ids))
    # bfloat16 keeps 8 bits, and three layers add up their roundings.
    np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=2**-5 * np.abs(logits[0]).max())


def test_closing_a_stream_lets_its_micro_batch_pass_and_frees_its_pages(served):
    llm = served[UNEVEN]
    stream = llm.stream([5, 6, 7, 8, 9], SamplingParams(temperature=0, max_tokens=30))
    next(stream)
    stream.close()
    blocks = llm.engine.scheduler.blocks[0]
    assert not llm.engine.has_work and blocks.num_available == 24


def build_request(index: int, length: int, max_tokens: int) -> Request:
    return Request(
        id=index,
        prompt_ids=tuple((3 + 7 * index + 5 * place) % 160 for place in range(length)),
        params=SamplingParams(temperature=0),
        max_tokens=max_tokens,
        stop_ids=frozenset(),
    )


def run_ticks(engine: Engine, count: int) -> EngineStats:
    """What the engine counts in its next ticks."""
    engine.stats = EngineStats()
    for _ in range(count):
        engine.step()
    return engine.stats


def test_micro_batches_are_equal_and_no_tick_is_empty(served):
    engine = Engine(served[UNEVEN].engine.runner)
    ticks: list[Tick] = []
    engine.watchers.append(ticks.append)
    for index in range(4):
        engine.submit(build_request(index, 3, 12))
    while engine.has_work:
        engine.step()
    # All four prompts enter in one tick; two ticks later their first tokens are there.
    steady = ticks[4:-3]
    assert len(steady) > 16 and all(tick.tokens == (2, 2) for tick in steady)
    # Twelve tokens of four requests in batches of two, over two stages.
    assert len(ticks) == engine.stats.ticks == engine.stats.steps <= 2 * 12 + 2


@pytest.mark.parametrize(
    "plan", [UNEVEN, ParallelPlan(pp=2, ep=2, attention_dp=True), ParallelPlan(pp=2, dp=2)], ids=str
)
def test_each_stage_counts_the_tokens_that_it_was_fed(plan, llm_on):
    engine = Engine(llm_on("deepseek_v3", plan, **TIGHT).engine.runner)
    ticks: list[Tick] = []
    engine.watchers.append(ticks.append)
    for index in range(9):
        engine.submit(build_request(index, 1 + 4 * index, 6))
    while engine.has_work:
        engine.step()
    fed = [
        tuple(schedule.num_tokens if schedule else 0 for schedule in tick.stages) for tick in ticks
    ]
    assert [tick.tokens for tick in ticks] == fed
    assert {len(set(tokens)) for tokens in fed} == {1, 2}, "stages were always fed alike"
    # Each token that was fed has passed each stage.
    assert engine.stats.stage_tokens == [engine.stats.tokens] * 2


def build_scheduler(stages: int, **changes: Any) -> Scheduler:
    limits: dict[str, Any] = {
        "num_ranks": 1,
        "max_batch_size": 8,
        "max_num_tokens": 512,
        "max_prefill_requests": 4,
        "page_size": 16,
        "num_pages": 64,
        "max_seq_len": 512,
        "num_stages": stages,
        "prefill_sizes": (32, 128, 512),
    }
    return Scheduler(SchedulerConfig(**(limits | changes)))


def prefill_of_ticks(scheduler: Scheduler, count: int) -> list[int]:
    """Tokens that enter in the next ticks, none of which is read."""
    schedules = [scheduler.schedule() for _ in range(count)]
    return [schedule.num_tokens if schedule else 0 for schedule in schedules]


@pytest.mark.parametrize("stages", [2, 4])
def test_a_prompt_enters_in_equal_chunks_one_for_each_stage(stages):
    scheduler = build_scheduler(stages, prefill_sizes=())
    scheduler.add(build_request(0, 100, 4))
    assert prefill_of_ticks(scheduler, stages + 1) == [100 // stages] * stages + [0]


@pytest.mark.parametrize(
    ("length", "chunks"), [(30, [30]), (100, [32, 32, 32, 4]), (400, [128, 128, 128, 16])]
)
def test_a_chunk_is_no_smaller_than_the_steps_that_are_compiled(length, chunks):
    scheduler = build_scheduler(4)
    scheduler.add(build_request(0, length, 4))
    assert prefill_of_ticks(scheduler, len(chunks) + 1) == [*chunks, 0]


def test_the_last_token_of_a_prompt_follows_the_others_at_once():
    scheduler = build_scheduler(4)
    scheduler.add(build_request(0, 33, 4))
    assert prefill_of_ticks(scheduler, 3) == [32, 1, 0]


def test_without_chunked_prefill_a_prompt_enters_whole():
    scheduler = build_scheduler(4, enable_chunked_prefill=False)
    scheduler.add(build_request(0, 400, 4))
    assert prefill_of_ticks(scheduler, 2) == [400, 0]


def test_prompts_of_one_token_enter_in_micro_batches_of_a_stages_share():
    scheduler = build_scheduler(4)
    for index in range(8):
        scheduler.add(build_request(index, 1, 4))
    assert prefill_of_ticks(scheduler, 4) == [2, 2, 2, 2]


def test_buckets_of_a_pipeline_are_those_of_a_stages_share():
    found = choose_buckets(
        max_batch_size=8,
        max_num_tokens=512,
        prefill_rows=4,
        width=16,
        config=EngineConfig(),
        num_stages=2,
    )
    sizes = [(bucket.decodes, bucket.prefill_tokens) for bucket in found]
    assert sizes == [(1, 0), (4, 0), (4, 32), (4, 64), (4, 256), (4, 512)]


@pytest.mark.parametrize(("model", "plan"), OCCUPIED.items(), ids=str)
def test_with_a_micro_batch_for_each_stage_occupancy_and_ticks_per_token_are_ideal(
    model, plan, llm_on
):
    requests, chunk = 2 * plan.pp, 8
    llm = llm_on(
        model,
        plan,
        max_batch_size=requests + 1,
        batch_buckets=(2, requests + 1),
        max_num_tokens=2 + chunk,
        token_buckets=(chunk, 2 + chunk),
        max_seq_len=64,
        kv_cache_max_tokens=512,
    )
    engine = Engine(llm.engine.runner)
    for index in range(requests):
        engine.submit(build_request(index, 3, 40))
    run_ticks(engine, 5 * plan.pp)
    decoding = run_ticks(engine, 4 * plan.pp)
    assert decoding.stage_occupancy == (1.0,) * plan.pp
    assert decoding.ticks_per_token == plan.pp / requests
    # A prompt of six chunks: its ticks carry two decodes and a whole chunk at every stage.
    engine.submit(build_request(requests, 6 * chunk, 1))
    run_ticks(engine, plan.pp)
    mixed = run_ticks(engine, 6 - plan.pp + 1)
    # Every step has room for a third decode, which the new request would be in some of them.
    ideal = (2 + chunk) / (3 + chunk)
    assert mixed.stage_occupancy == (ideal,) * plan.pp
    assert mixed.ticks_per_token == plan.pp / requests


def test_a_tick_permutes_once_whatever_the_number_of_layers(served):
    runner = served[UNEVEN].engine.runner
    bucket = min(runner.buckets)
    found = read_collectives(runner.compiled_text(bucket), runner.rules.plan.sizes)
    permutes = [one for one in found if one.kind == "collective-permute"]
    assert [(one.axes, one.count) for one in permutes] == [(("pp",), 1)]
    over_stages = [one for one in found if "pp" in one.axes and one.kind != "collective-permute"]
    assert all(one.part not in ("attention", "mlp") for one in over_stages)


def test_more_stages_than_layers_are_refused(golden):
    folder: Path = golden("llama").folder
    with pytest.raises(ValueError, match="pp=4 is more pipeline stages .* use at most 3"):
        LLM(folder, pipeline_parallel_size=4, progress=False)
