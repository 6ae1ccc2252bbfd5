"""An engine compiles what it needs at the start, and refuses what it cannot serve."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from llmjax import LLM, SamplingParams
from llmjax.config import ConfigError
from llmjax.engine.engine import Engine
from llmjax.engine.request import Request
from meshes import ParallelPlan

FAMILY = "llama_odd_llama3rope"
LONGEST = 40
PLANS = (ParallelPlan(), ParallelPlan(dp=2, tp=2))
FIVE_BUCKETS = {
    "max_batch_size": 4,
    "batch_buckets": (1, 2, 4),
    "max_num_tokens": 32,
    "token_buckets": (8, 32),
    "max_seq_len": LONGEST,
    "kv_cache_max_tokens": 4 * LONGEST,
    "tokens_per_block": 4,
}
GREEDY = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Names of the functions that JAX has traced, lowered or compiled since the test began."""
    names: list[str] = []

    def listen(event: str, duration_secs: float, **details: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            names.append(str(details.get("fun_name", event)))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def test_the_count_of_compilations_sees_a_compilation(compilations):
    numbers = jnp.arange(3)
    compilations.clear()
    double = jax.jit(_double)
    double(numbers)
    assert any("_double" in name for name in compilations)
    compilations.clear()
    double(numbers)
    assert not compilations


def _double(x: jax.Array) -> jax.Array:
    return x * 2


def prompt(length: int, first: int = 0) -> list[int]:
    return [(7 * first + 3 * i) % 160 for i in range(length)]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_nothing_is_compiled_for_any_prompt_or_batch(plan, llm_on, compilations, monkeypatch):
    llm = llm_on(FAMILY, plan, **FIVE_BUCKETS)
    used = record_buckets(llm, monkeypatch)
    ranks = llm.rules.size("requests")
    compilations.clear()
    for length in range(1, LONGEST):
        llm.generate([prompt(length)], GREEDY)
    for batch in range(1, 4 * ranks + 1):
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        llm.generate([prompt(3 + index, index) for index in range(batch)], params)
    assert not compilations
    assert llm.engine.stats.compilations == 0
    assert used == set(llm.engine.runner.buckets)
    assert len(used) == 5


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_nothing_is_compiled_for_any_sampling_option(plan, llm_on, compilations):
    llm = llm_on(FAMILY, plan, **FIVE_BUCKETS)
    options: list[dict[str, Any]] = [
        {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.01},
        {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"logit_bias": {3: 1.0, 5: -1.0}, "seed": 3},
        {"logprobs": 5, "prompt_logprobs": 3},
        {"logprobs": 0, "prompt_logprobs": 0, "temperature": 0},
        {"min_tokens": 3, "stop_token_ids": [4, 5], "n": 2},
    ]
    params = [SamplingParams(max_tokens=5, **option) for option in options]
    compilations.clear()
    for one in params:
        llm.generate([prompt(20)], one)
    llm.generate([prompt(4 * i + 1, i) for i in range(len(params))], params)
    assert not compilations
    assert llm.engine.stats.compilations == 0


def test_a_compilation_inside_a_step_is_counted_as_a_fault(llm_on, monkeypatch):
    engine = Engine(llm_on(FAMILY, PLANS[0], **FIVE_BUCKETS).engine.runner)
    dispatch = engine.runner.dispatch

    def compile_and_dispatch(stages: Any) -> Any:
        jax.jit(_double)(jnp.arange(stages[0].index + 100))
        return dispatch(stages)

    monkeypatch.setattr(engine.runner, "dispatch", compile_and_dispatch)
    engine.submit(request(max_tokens=2))
    while engine.has_work:
        engine.step()
    assert engine.stats.compilations >= 2


def record_buckets(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> set[Any]:
    """The buckets that steps run in from here on."""
    used = set()
    dispatch = llm.engine.runner.dispatch

    def record(stages: Any) -> Any:
        dispatched = dispatch(stages)
        used.add(dispatched.bucket)
        return dispatched

    monkeypatch.setattr(llm.engine.runner, "dispatch", record)
    return used


def test_the_engine_counts_its_steps_and_the_tokens_they_feed(llm_on):
    engine = Engine(llm_on(FAMILY, PLANS[0], **FIVE_BUCKETS).engine.runner)
    engine.submit(request(length=38, max_tokens=2))
    while engine.has_work:
        engine.step()
    # 32 tokens of the prompt, then 6, then the first generated token; the second is never fed.
    assert (engine.stats.steps, engine.stats.tokens, engine.stats.chunked_prefills) == (3, 39, 1)
    assert engine.stats.padded_tokens == (4 + 0) + (4 + 2) + 0


def request(*, length: int = 5, max_tokens: int = 4, stops: int = 0, **params: Any) -> Request:
    return Request(
        id=10**6,
        prompt_ids=tuple(prompt(length)),
        params=SamplingParams(**params),
        max_tokens=max_tokens,
        stop_ids=frozenset(range(stops)),
    )


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (
            request(length=40),
            "the prompt has 40 tokens and max_seq_len=40 counts the generated ones too: "
            "use at most 39 prompt tokens",
        ),
        (
            request(logit_bias={160: 1.0}),
            "The logit_bias holds the token id 160: this model's ids are 0 to 159.",
        ),
        (
            request(stop_token_ids=[3, 500]),
            "The stop_token_ids holds the token id 500: this model's ids are 0 to 159.",
        ),
        (
            request(logprobs=21),
            "logprobs=21 is above max_logprobs=20: ask for at most 20, or give "
            "LLM(max_logprobs=...) a larger number.",
        ),
        (
            request(prompt_logprobs=30),
            "prompt_logprobs=30 is above max_logprobs=20: ask for at most 20, or give "
            "LLM(max_logprobs=...) a larger number.",
        ),
        (
            request(logits_processors=["ban"]),
            "No logits processor is called 'ban': pass the function when the engine is built, "
            "LLM(..., logits_processors={'ban': function}).",
        ),
        (
            request(min_tokens=2, stops=65),
            "min_tokens holds back 65 stop tokens: use at most 64 stop_token_ids.",
        ),
    ],
    ids="length bias stop logprobs prompt_logprobs processor min_tokens".split(),
)
def test_what_the_engine_cannot_serve_is_refused_with_the_limit(refused, message, llm_on):
    engine = llm_on(FAMILY, PLANS[0], **FIVE_BUCKETS).engine
    with pytest.raises(ConfigError) as error:
        engine.submit(refused)
    assert str(error.value) == message
    assert not engine.has_work


def test_a_context_that_the_cache_cannot_hold_is_refused_before_anything_is_compiled(
    golden, compilations
):
    with pytest.raises(ConfigError) as error:
        LLM(
            golden(FAMILY).folder,
            progress=False,
            max_seq_len=100,
            kv_cache_max_tokens=64,
            tokens_per_block=16,
        )
    assert str(error.value) == (
        "max_seq_len=100 takes 7 pages of KV cache for a request, and a batch rank holds 4: use "
        "max_seq_len=64 or less, or more memory for the cache."
    )
    assert not any("step" in name for name in compilations)


def test_without_max_seq_len_the_context_is_what_the_cache_holds(llm_on):
    llm = llm_on(
        FAMILY,
        PLANS[0],
        max_seq_len=None,
        kv_cache_max_tokens=30,
        max_batch_size=1,
        batch_buckets=(1,),
    )
    assert llm.engine.runner.max_seq_len == 32, "8 pages of 4 tokens"
    output = llm.generate([prompt(20)], SamplingParams(max_tokens=None, ignore_eos=True))[0]
    assert len(output.outputs[0].token_ids) == 12
    assert output.outputs[0].finish_reason == "length"


def test_a_look_at_logits_changes_no_request(golden):
    stored = golden(FAMILY)
    llm = LLM(stored.folder, progress=False, **FIVE_BUCKETS)
    prompt = stored.greedy[: stored.prompt_length]
    llm.logits(prompt[:3])
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    (output,) = llm.generate([prompt], params)
    expected = stored.greedy[stored.prompt_length :][:4]
    assert list(output.outputs[0].token_ids) == expected
