"""The Python API: every way in, every sampling option, and nothing left behind."""

import asyncio
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from llmjax import LLM, ConfigError, Delta, SamplingParams
from llmjax.tokenizer import load_tokenizer
from llmjax.weights import open_checkpoint

GOLDEN = Path(__file__).resolve().parent / "golden"
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
STORY = "Once upon a time, a small robot"
SCRIPT = "Hi 👩‍👩‍👧 世界! 🇫🇷 naïve done"
"""Characters of several tokens, and tokens of several characters."""
GREEDY = SamplingParams(temperature=0, max_tokens=12)
NUM_PAGES = 64


def ban_even(logits: Array, counts: Array, position: Array) -> Array:
    """A logits processor: only odd token ids."""
    return jnp.where(jnp.arange(logits.shape[0]) % 2 == 0, -jnp.inf, logits)


def make_speaker(ids: list[int]):
    """A logits processor that lets the model say only these tokens, one after the other."""

    def speak(logits: Array, counts: Array, position: Array) -> Array:
        said = jnp.minimum(counts.sum(), len(ids) - 1)
        return jnp.where(jnp.arange(logits.shape[0]) == jnp.array(ids)[said], 0.0, -jnp.inf)

    return speak


@pytest.fixture(scope="module")
def llm() -> LLM:
    """The embedded model, with a processor that makes it say `SCRIPT`."""
    tokenizer = load_tokenizer(open_checkpoint("smollm2-135m-instruct").path)
    assert tokenizer is not None
    return LLM(
        max_batch_size=4,
        batch_buckets=(4,),
        max_num_tokens=64,
        token_buckets=(64,),
        max_seq_len=256,
        kv_cache_max_tokens=NUM_PAGES * 16,
        max_logprobs=5,
        logits_processors={
            "script": make_speaker(tokenizer.encode(SCRIPT)),
            "odd": ban_even,
        },
    )


@pytest.fixture(autouse=True)
def check_nothing_is_left(request):
    """After every test all pages and slots are free, whatever became of its requests."""
    yield
    if "llm" in request.fixturenames:
        assert_idle(request.getfixturevalue("llm"))


def assert_idle(llm: LLM) -> None:
    scheduler = llm.engine.scheduler
    assert [blocks.num_available for blocks in scheduler.blocks] == [NUM_PAGES]
    assert scheduler.num_running == scheduler.num_waiting == 0
    assert len(scheduler._ranks[0].free_slots) == 4
    assert not llm._live and not llm.engine._collected


def logits_after(llm: LLM, prompt_ids, output_ids) -> np.ndarray:
    """The logits from which each output token was chosen, from one look at the whole sequence."""
    ids = [*prompt_ids, *output_ids]
    # Padding that comes later changes nothing, and one length is compiled once.
    whole = llm.logits(ids + [0] * (64 - len(ids)))
    return whole[len(prompt_ids) - 1 : len(ids) - 1]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def script(**options: Any) -> SamplingParams:
    """Says `SCRIPT`, and then its last token again."""
    always: dict[str, Any] = dict(temperature=0, logits_processors=["script"], ignore_eos=True)
    values: dict[str, Any] = always | {"max_tokens": 60} | options
    return SamplingParams(**values)


# Ways in.


def test_messages_text_and_ids_of_one_prompt_give_one_answer(llm):
    [chatted] = llm.chat(FRANCE, GREEDY)
    assert chatted.outputs[0].text == "The capital of France is Paris."
    assert chatted.outputs[0].finish_reason == "stop"
    assert chatted.outputs[0].stop_reason is None
    assert chatted.prompt.endswith("<|im_start|>assistant\n")
    prompts = [FRANCE, chatted.prompt, chatted.prompt_token_ids, np.array(chatted.prompt_token_ids)]
    for output in llm.generate(prompts, GREEDY, use_tqdm=False):
        assert output.outputs[0].token_ids == chatted.outputs[0].token_ids
        assert output.prompt_token_ids == chatted.prompt_token_ids
    [from_ids] = llm.generate(list(chatted.prompt_token_ids), GREEDY)
    assert from_ids.prompt is None and from_ids.num_cached_tokens > 0


def test_each_prompt_has_its_own_sampling_params(llm):
    lengths = [3, 1, 5, 2, 4]
    params = [SamplingParams(max_tokens=length, ignore_eos=True) for length in lengths]
    outputs = llm.generate([STORY] * 5, params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
    assert {output.outputs[0].finish_reason for output in outputs} == {"length"}


def test_no_prompts_give_no_outputs(llm):
    assert llm.generate([]) == []


def test_max_tokens_none_goes_on_to_the_end_of_the_context(llm):
    prompt = [5] * 250
    params = SamplingParams(max_tokens=None, ignore_eos=True)
    [output] = llm.generate([prompt], params)
    assert len(output.outputs[0].token_ids) == 6
    assert output.outputs[0].finish_reason == "length"


# Ends.


def test_ignore_eos_goes_on_and_min_tokens_makes_the_end_impossible(llm):
    [ended] = llm.chat(FRANCE, GREEDY)
    ids = ended.outputs[0].token_ids
    assert ids[-1] == 2 and len(ids) == 8
    ignoring = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    at_least = SamplingParams(temperature=0, max_tokens=12, min_tokens=12)
    ignored, forced = llm.generate([FRANCE] * 2, [ignoring, at_least])
    assert ignored.outputs[0].token_ids[:8] == ids
    assert len(ignored.outputs[0].token_ids) == 12
    assert forced.outputs[0].token_ids[:7] == ids[:7]
    assert 2 not in forced.outputs[0].token_ids and len(forced.outputs[0].token_ids) == 12


def test_a_stop_token_ends_generation_and_is_named(llm):
    [free] = llm.chat(FRANCE, GREEDY)
    stop = free.outputs[0].token_ids[4]
    params = [
        SamplingParams(
            temperature=0, max_tokens=12, stop_token_ids=[stop], include_stop_str_in_output=kept
        )
        for kept in (False, True)
    ]
    without, kept = (output.outputs[0] for output in llm.generate([FRANCE] * 2, params))
    for output in (without, kept):
        assert output.token_ids == free.outputs[0].token_ids[:5]
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert without.text == "The capital of France"
    assert kept.text == "The capital of France is"


def test_stream_deltas_join_to_the_text_up_to_the_stop_text(llm):
    stops = ["世界", "👧", "i 👩", "! 🇫", "🇫🇷 naïve d", "done", "absent"]
    length = len(llm.tokenizer.encode(SCRIPT))
    cases = [(stop, kept) for stop in stops for kept in (False, True)]

    def params_of(stop: str, kept: bool) -> SamplingParams:
        stop_texts = ["absent too", stop]
        return script(max_tokens=length, stop=stop_texts, include_stop_str_in_output=kept)

    async def stream(stop: str, kept: bool) -> list[Delta]:
        return [delta async for delta in llm.generate_async(STORY, params_of(stop, kept))]

    async def stream_all() -> list[list[Delta]]:
        return list(await asyncio.gather(*(stream(*case) for case in cases)))

    whole = llm.generate([STORY] * len(cases), [params_of(*case) for case in cases])
    for (stop, kept), deltas, output in zip(cases, asyncio.run(stream_all()), whole, strict=True):
        found = stop in SCRIPT
        text = SCRIPT[: SCRIPT.find(stop) + len(stop) * kept] if found else SCRIPT
        completion = output.outputs[0]
        assert "".join(delta.text for delta in deltas) == completion.text == text, stop
        tokens = [token for delta in deltas for token in delta.token_ids]
        assert tokens == list(completion.token_ids)
        reasons = [delta.finish_reason for delta in deltas]
        assert reasons == [None] * (len(deltas) - 1) + ["stop" if found else "length"]
        assert completion.stop_reason == (stop if found else None)
        # Text comes as soon as it is certain, not all at the end.
        assert found or sum(bool(delta.text) for delta in deltas) > 8


def test_a_stop_text_within_min_tokens_does_not_count(llm):
    [output] = llm.generate(STORY, script(stop="Hi", min_tokens=2, max_tokens=4))
    assert output.outputs[0].finish_reason == "length"


# Numbers.


def test_logprobs_are_the_log_softmax_of_the_logits(llm):
    params = SamplingParams(
        max_tokens=8, seed=3, logprobs=4, prompt_logprobs=2, ignore_eos=True, logit_bias={7: 5.0}
    )
    [output] = llm.generate(STORY, params)
    completion = output.outputs[0]
    whole = [*output.prompt_token_ids, *completion.token_ids]
    expected = log_softmax(logits_after(llm, whole[:1], whole[1:]))
    assert output.prompt_logprobs[0] is None
    listed = [*output.prompt_logprobs[1:], *completion.logprobs]
    assert len(listed) == len(whole) - 1
    num_prompt = len(output.prompt_token_ids)
    for position, (token, entries, row) in enumerate(zip(whole[1:], listed, expected, strict=True)):
        order = np.argsort(-row)
        asked = 2 if position < num_prompt - 1 else 4
        assert set(order[:asked].tolist()) | {token} == set(entries)
        for other, entry in entries.items():
            assert entry.logprob == pytest.approx(row[other], abs=2e-4)
            assert entry.rank == 1 + int((row > row[other]).sum())
            assert entry.decoded_token == llm.tokenizer.token_text(other)
    total = sum(
        entries[token].logprob
        for token, entries in zip(completion.token_ids, completion.logprobs, strict=True)
    )
    assert completion.cumulative_logprob == pytest.approx(total)


def test_logprobs_stop_where_the_text_stops(llm):
    [output] = llm.generate(STORY, script(stop="世", logprobs=0))
    completion = output.outputs[0]
    assert len(completion.logprobs) == len(completion.token_ids)


@pytest.mark.parametrize(
    "options",
    [
        dict(repetition_penalty=1.7),
        dict(presence_penalty=2.0, frequency_penalty=1.5),
        dict(logit_bias={504: 4.0, 28: -100.0}, min_tokens=12),
    ],
    ids=str,
)
def test_penalties_and_bias_choose_what_numpy_chooses(llm, options):
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, **options)
    [output] = llm.generate("a a a b b, a a b", params)
    ids = list(output.outputs[0].token_ids)
    prompt = list(output.prompt_token_ids)
    rows = logits_after(llm, prompt, ids).copy()
    plain = rows.argmax(-1).tolist()
    for step, row in enumerate(rows):
        for token, bias in params.logit_bias.items():
            row[token] += bias
        seen = np.unique(prompt + ids[:step])
        penalty = params.repetition_penalty
        row[seen] = np.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
        counts = np.bincount(ids[:step], minlength=len(row))
        row -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
        assert row[ids[step]] == pytest.approx(row.max(), abs=2e-4)
    assert ids != plain, "the options changed nothing, so this test proves nothing"


def test_a_jax_logits_processor_runs_in_the_step_for_the_requests_that_name_it(llm):
    params = [SamplingParams(max_tokens=8, seed=1, logits_processors=["odd"]), GREEDY]
    odd, free = llm.generate([FRANCE, FRANCE], params)
    assert all(token % 2 for token in odd.outputs[0].token_ids)
    assert any(token % 2 == 0 for token in free.outputs[0].token_ids)


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch_and_n_differ(llm):
    seeded = SamplingParams(seed=11, n=3, max_tokens=8, ignore_eos=True)
    [alone] = llm.generate(STORY, seeded)
    together = llm.generate([FRANCE, STORY, "x"], [GREEDY, seeded, SamplingParams(max_tokens=5)])
    tokens = [completion.token_ids for completion in alone.outputs]
    assert tokens == [completion.token_ids for completion in together[1].outputs]
    assert len(set(tokens)) == 3
    assert [completion.index for completion in alone.outputs] == [0, 1, 2]
    unseeded = llm.generate([STORY] * 2, SamplingParams(max_tokens=8, ignore_eos=True))
    assert unseeded[0].outputs[0].token_ids != unseeded[1].outputs[0].token_ids


# Streams and tasks.


def test_a_stream_of_n_completions_interleaves_them_by_index(llm):
    texts = {0: "", 1: ""}
    params = SamplingParams(n=2, seed=4, max_tokens=6, ignore_eos=True)
    for delta in llm.stream(STORY, params):
        texts[delta.index] += str(delta)
    [whole] = llm.generate(STORY, params)
    assert list(texts.values()) == [completion.text for completion in whole.outputs]


def test_closing_a_stream_frees_its_pages_and_its_slot(llm):
    stream = llm.stream(STORY, SamplingParams(max_tokens=200, ignore_eos=True))
    next(stream)
    assert llm.engine.scheduler.blocks[0].num_available < NUM_PAGES
    stream.close()
    assert_idle(llm)


@pytest.mark.parametrize("lead", [1, 2, 3, 4])
def test_closing_one_stream_while_another_ends_loses_no_token(llm, lead):
    long = llm.stream(STORY, SamplingParams(max_tokens=100, ignore_eos=True))
    next(long)
    short = llm.stream(STORY, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    deltas = [next(short) for _ in range(lead)]
    long.close()
    deltas += short
    assert sum(len(delta.token_ids) for delta in deltas) == 4
    assert deltas[-1].finish_reason == "length"


@pytest.mark.parametrize("place", ["dispatch", "forget"])
def test_an_interrupt_in_the_middle_of_a_step_leaves_nothing_behind(llm, monkeypatch, place):
    work = getattr(llm.engine.runner, place)
    calls = iter(range(100))

    def interrupt_third(argument):
        if next(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return work(argument)

    monkeypatch.setattr(llm.engine.runner, place, interrupt_third)
    # Tests that run side by side ignore Ctrl-C, which is for the process that started them.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            llm.generate([STORY] * 4, GREEDY)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert_idle(llm)
    [output] = llm.chat(FRANCE, GREEDY)
    assert output.outputs[0].text == "The capital of France is Paris."


def test_tasks_share_batches_inside_a_running_event_loop(llm):
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    prompts = [STORY, FRANCE, "One, two, three,", STORY]

    async def collect(prompt) -> tuple[int, ...]:
        tokens: tuple[int, ...] = ()
        async for delta in llm.generate_async(prompt, params):
            tokens += delta.token_ids
        return tokens

    async def collect_all() -> list[tuple[int, ...]]:
        return list(await asyncio.gather(*map(collect, prompts)))

    async def work() -> tuple[list, list, int]:
        # As in a notebook, where a cell runs inside a loop.
        alone = [llm.generate([prompt], params)[0].outputs[0].token_ids for prompt in prompts]
        before = llm.engine.stats.steps
        return alone, await collect_all(), llm.engine.stats.steps - before

    alone, together, steps = asyncio.run(work())
    assert together == alone
    assert steps < 2 * 10, "four requests of 10 tokens took about as many steps as one"


def test_a_cancelled_task_frees_its_pages(llm):
    async def work() -> None:
        first = asyncio.Event()

        async def read() -> None:
            params = SamplingParams(max_tokens=200, ignore_eos=True)
            async for _ in llm.generate_async(STORY, params):
                first.set()

        task = asyncio.create_task(read())
        await first.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert_idle(llm)

    asyncio.run(work())


def test_threads_generate_side_by_side(llm):
    texts = {}

    def work(number: int) -> None:
        texts[number] = llm.chat(FRANCE, GREEDY, use_tqdm=False)[0].outputs[0].text

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(texts.values()) == {"The capital of France is Paris."} and len(texts) == 3


# Other models, beside the first.


def test_a_folder_without_a_tokenizer_takes_and_gives_ids_beside_another_model(llm):
    stored = np.load(GOLDEN / "llama" / "io.npz")
    ids, count = stored["greedy"][0].tolist(), stored["prompt"].shape[1]
    tiny = open_tiny(GOLDEN / "llama")
    params = SamplingParams(temperature=0, max_tokens=len(ids) - count, logprobs=1)
    [output] = tiny.generate([ids[:count]], params)
    completion = output.outputs[0]
    assert list(completion.token_ids) == ids[count:]
    assert completion.text == "" and output.prompt is None
    assert completion.logprobs is not None
    assert completion.logprobs[0][ids[count]].decoded_token is None
    streamed = [token for delta in tiny.stream(ids[:count], params) for token in delta.token_ids]
    assert streamed == ids[count:]
    with pytest.raises(ConfigError, match="has no tokenizer: give token ids, not text"):
        tiny.generate("text", params)
    [other] = llm.chat(FRANCE, GREEDY)
    assert other.outputs[0].text == "The capital of France is Paris."


def test_dtype_is_that_of_weights_and_cache(tmp_path):
    tiny = open_tiny(GOLDEN / "llama", dtype="bfloat16")
    runner = tiny.engine.runner
    assert runner.dtype == runner.state.cache[0].dtype == jnp.bfloat16
    [output] = tiny.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=3))
    assert len(output.outputs[0].token_ids) == 3


def test_the_authors_sampling_is_the_default(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "llama", folder)
    (folder / "generation_config.json").write_text('{"temperature": 0.3, "top_k": 7, "top_p": 0.9}')
    tiny = open_tiny(folder)
    expected = SamplingParams(temperature=0.3, top_k=7, top_p=0.9)
    assert tiny.get_default_sampling_params() == expected


def open_tiny(folder: Path, **options) -> LLM:
    return LLM(
        folder,
        max_batch_size=2,
        batch_buckets=(2,),
        max_num_tokens=32,
        max_seq_len=64,
        kv_cache_max_tokens=128,
        max_logprobs=5,
        **options,
    )
