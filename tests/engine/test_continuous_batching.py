"""Whatever a request shares its steps with, it gets the tokens that it gets alone."""

import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import pytest

from llmjax import LLM, SamplingParams
from llmjax.engine.engine import Engine
from llmjax.engine.request import Request
from meshes import ParallelPlan

FAMILY = "llama_odd_llama3rope"
ONE_DEVICE, TWO_REPLICAS = ParallelPlan(), ParallelPlan(dp=2)
PAGES = 30
TIGHT = {
    "max_batch_size": 8,
    "batch_buckets": (8,),
    "max_num_tokens": 16,
    "token_buckets": (16,),
    "max_seq_len": 96,
    "kv_cache_max_tokens": 4 * PAGES,
    "tokens_per_block": 4,
}
"""A pool of 30 pages, of which a request may need 24; a step shorter than most prompts."""


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """What is asked, and after how many steps of the engine."""

    step: int
    prompt: tuple[int, ...]
    params: SamplingParams
    max_tokens: int

    def request(self, id: int) -> Request:
        return Request(
            id=id,
            prompt_ids=self.prompt,
            params=self.params,
            max_tokens=self.max_tokens,
            stop_ids=frozenset(),
            seed=id,
        )


def draw_arrivals(count: int) -> list[Arrival]:
    """Requests of random lengths at random times, half of them with a prefix that others have."""
    draw = random.Random(11)
    # Pages with the same tokens behind different ones: they may not be taken for each other.
    a, b, c = (_tokens(draw, 4) for _ in "abc")
    prefixes = [(*a, *b, *c, *a, 7), (*b, *a, *c, *b), (*c, *c, *c, *c, *c, *c, *c)]
    arrivals = []
    for index in range(count):
        prefix = draw.choice(prefixes) if index % 2 else ()
        longest = 60 - len(prefix) if index % 3 == 0 else 12
        prompt = (*prefix, *_tokens(draw, draw.randint(1, longest)))
        # Mostly greedy; the others show that what the device remembers follows its request.
        params = SamplingParams(temperature=0)
        if index % 8 == 3:
            params = SamplingParams(temperature=0, repetition_penalty=1.5, frequency_penalty=0.3)
        if index % 8 == 6:
            params = SamplingParams(temperature=1.2, top_p=0.95)
        arrivals.append(
            Arrival(
                step=draw.randint(0, 120),
                prompt=prompt,
                params=params,
                max_tokens=draw.randint(1, 30),
            )
        )
    return arrivals


def _tokens(draw: random.Random, count: int) -> tuple[int, ...]:
    return tuple(draw.randrange(160) for _ in range(count))


ARRIVALS = draw_arrivals(64)


def serve(engine: Engine, arrivals: Mapping[int, Arrival]) -> dict[int, Request]:
    """Submits requests between the engine's steps, and runs until all are finished."""
    waiting = sorted(arrivals, key=_step_of(arrivals))
    requests = {}
    steps = 0
    while waiting or engine.has_work:
        while waiting and arrivals[waiting[0]].step <= steps:
            id = waiting.pop(0)
            requests[id] = arrivals[id].request(id)
            engine.submit(requests[id])
        engine.step()
        steps += 1
        assert steps < 5000, "requests starve"
    return requests


def _step_of(arrivals: Mapping[int, Arrival]) -> Callable[[int], int]:
    def step(id: int) -> int:
        return arrivals[id].step

    return step


def output_ids(requests: Mapping[int, Request]) -> dict[int, list[int]]:
    return {id: requests[id].output_ids for id in sorted(requests)}


@pytest.fixture(scope="module")
def alone(llm_on: Callable[..., LLM]) -> dict[int, list[int]]:
    """Tokens of each request when nothing else runs, nothing is shared and nothing overlaps."""
    llm = llm_on(
        FAMILY, ONE_DEVICE, **TIGHT, enable_block_reuse=False, disable_overlap_scheduler=True
    )
    engine = Engine(llm.engine.runner)
    tokens = {}
    for id, arrival in enumerate(ARRIVALS):
        request = arrival.request(id)
        engine.submit(request)
        while engine.has_work:
            engine.step()
        tokens[id] = request.output_ids
    assert engine.scheduler.num_preemptions == 0
    return tokens


def test_the_requests_differ_as_they_should(alone):
    lengths = [len(arrival.prompt) for arrival in ARRIVALS]
    assert min(lengths) < 4 and max(lengths) > 50
    assert [len(tokens) for tokens in alone.values()] == [each.max_tokens for each in ARRIVALS]
    assert len({tuple(tokens) for tokens in alone.values()}) > 55
    assert len({token for tokens in alone.values() for token in tokens}) > 100


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no overlap"])
@pytest.mark.parametrize("sharing", [True, False], ids=["sharing", "no sharing"])
@pytest.mark.parametrize("plan", [ONE_DEVICE, TWO_REPLICAS], ids=str)
def test_continuous_batching_changes_no_token(plan, sharing, overlap, alone, llm_on):
    llm = llm_on(
        FAMILY,
        plan,
        **TIGHT,
        enable_block_reuse=sharing,
        disable_overlap_scheduler=not overlap,
    )
    engine = Engine(llm.engine.runner)
    requests = serve(engine, dict(enumerate(ARRIVALS)))
    assert output_ids(requests) == alone

    blocks = engine.scheduler.blocks
    hits = [request.num_cached for request in requests.values()]
    assert engine.scheduler.num_preemptions > 5
    assert engine.stats.chunked_prefills > 20
    assert (sum(hits) > 100) == sharing
    assert any(rank.prefix_hit_tokens for rank in blocks) == sharing
    assert [rank.num_available for rank in blocks] == [PAGES] * len(blocks), "pages are lost"
    # A step is dispatched while another is unread, but for a few at the end of the work.
    assert (engine.stats.overlapped_steps > 0.9 * engine.stats.steps) == overlap
    assert overlap or engine.stats.overlapped_steps == 0


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no overlap"])
def test_a_step_is_dispatched_before_the_tokens_of_the_one_before_are_read(
    overlap, llm_on, monkeypatch
):
    llm = llm_on(
        FAMILY,
        ONE_DEVICE,
        **TIGHT,
        enable_block_reuse=False,
        disable_overlap_scheduler=not overlap,
    )
    engine = Engine(llm.engine.runner)
    dispatch, read = engine.runner.dispatch, engine._read
    order: list[tuple[str, int]] = []

    def record_dispatch(stages):
        order.append(("dispatch", stages[0].index))
        return dispatch(stages)

    def record_read(dispatched):
        order.append(("read", dispatched.schedule.index))
        return read(dispatched)

    monkeypatch.setattr(engine.runner, "dispatch", record_dispatch)
    monkeypatch.setattr(engine, "_read", record_read)
    arrival = Arrival(step=0, prompt=(5, 6, 7), params=SamplingParams(temperature=0), max_tokens=6)
    serve(engine, {0: arrival})
    ahead = 1 if overlap else 0
    assert order == _expected_order(steps=6, ahead=ahead)


def test_the_host_goes_on_while_a_step_takes_its_time_to_start(llm_on, monkeypatch):
    llm = llm_on(
        FAMILY, ONE_DEVICE, **TIGHT, enable_block_reuse=True, disable_overlap_scheduler=False
    )
    engine = Engine(llm.engine.runner)
    steps, ready = engine.runner._steps, threading.Event()

    def start_late(step, *arguments):
        assert ready.wait(timeout=20), "the host waits for the step that waits for it"
        return step(*arguments)

    arrival = Arrival(step=0, prompt=(5, 6, 7), params=SamplingParams(temperature=0), max_tokens=6)
    expected = serve(engine, {0: arrival})[0].output_ids
    late = {bucket: partial(start_late, step) for bucket, step in steps.items()}
    monkeypatch.setattr(engine.runner, "_steps", late)
    request = arrival.request(1)
    engine.submit(request)
    assert engine.step() == [], "it has no token yet, and still the call returned"
    ready.set()
    while engine.has_work:
        engine.step()
    assert request.output_ids == expected


def _expected_order(*, steps: int, ahead: int) -> Sequence[tuple[str, int]]:
    order = []
    for step in range(steps):
        order.append(("dispatch", step))
        if step >= ahead:
            order.append(("read", step - ahead))
    return [*order, *(("read", step) for step in range(steps - ahead, steps))]


def test_a_request_that_meets_its_own_prefix_reads_it_from_the_cache(llm_on):
    llm = llm_on(
        FAMILY, ONE_DEVICE, **TIGHT, enable_block_reuse=True, disable_overlap_scheduler=False
    )
    engine = Engine(llm.engine.runner)
    prompt = _tokens(random.Random(3), 22)
    arrival = Arrival(step=0, prompt=prompt, params=SamplingParams(temperature=0), max_tokens=10)
    first = serve(engine, {0: arrival})[0]
    fed = engine.stats.tokens
    second = serve(engine, {1: arrival})[1]
    assert (first.num_cached, second.num_cached) == (0, 20)
    assert engine.stats.tokens - fed == fed - 20
    assert second.output_ids == first.output_ids
