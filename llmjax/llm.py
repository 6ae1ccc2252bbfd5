"""The Python API: text in, text out, over a plan's mesh."""

import asyncio
import hashlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Generator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32
from tqdm.auto import tqdm

from llmjax.config import ConfigError, EngineConfig, ModelConfig, SamplingParams
from llmjax.distributed import DistributedError, broadcast, check_agreement
from llmjax.engine.compile import enable_compile_cache
from llmjax.engine.engine import Engine
from llmjax.engine.interrupts import uninterrupted
from llmjax.engine.request import Request
from llmjax.engine.runner import Runner
from llmjax.models.registry import find_family
from llmjax.outputs import Completion, Delta, RequestOutput, describe_logprobs
from llmjax.plans import resolve
from llmjax.prompts import Prompt, as_batch, encode_prompt, prompt_text
from llmjax.tokenizer import load_tokenizer
from llmjax.weights import EMBEDDED_MODEL, open_checkpoint
from llmjax.weights import upcycle as upcycle_model
from llmjax.weights.model import load_model, random_model
from meshes import ParallelPlan, Rules, make_mesh


class LLM:
    """A model on a mesh, ready to generate.

    Args:
        model: a Hugging Face folder, a GGUF file, a hub id, or the embedded model's name.
        plan: a `ParallelPlan`, a YAML file of mesh axes or of TensorRT-LLM's keys, or a preset.
        tensor_parallel_size, data_parallel_size, enable_attention_dp: a plan in other words.
        load_format: "dummy" draws random weights and needs only a config.json.
        upcycle: "8x2" makes 8 experts of each layer of a dense model, of which a token takes 2;
            the text stays the same.
        progress: show bars for loading and generating.
        allow_unsupported: keys of TensorRT-LLM to drop, with a warning, where they are refused.
        options: see `llmjax.config.EngineConfig`; TensorRT-LLM's keys are in `docs/trtllm.md`.
            They beat those of a file, with a warning.

    Raises:
        CheckpointError, ConfigError, PlanError: what was asked for does not exist or does not fit;
            the sentence says what to do. Nothing large is allocated before.
    """

    def __init__(
        self,
        model: str | Path = EMBEDDED_MODEL,
        *,
        plan: ParallelPlan | str | Path | None = None,
        tensor_parallel_size: int | None = None,
        data_parallel_size: int | None = None,
        enable_attention_dp: bool | Literal["partial"] | None = None,
        load_format: Literal["auto", "dummy"] = "auto",
        upcycle: str | None = None,
        progress: bool = True,
        allow_unsupported: Sequence[str] = (),
        **options: Any,
    ):
        options |= dict(
            tensor_parallel_size=tensor_parallel_size,
            data_parallel_size=data_parallel_size,
            enable_attention_dp=enable_attention_dp,
        )
        self.plan, given = resolve(plan, options, allow_unsupported=allow_unsupported)
        engine_config = EngineConfig.from_keywords(given)
        if load_format not in ("auto", "dummy"):
            raise ConfigError(f'load_format={load_format!r} is unknown: use "auto" or "dummy".')
        reserve_memory()
        enable_compile_cache(engine_config.compile_cache)
        self.progress = progress and jax.process_index() == 0
        checkpoint = open_checkpoint(model, needs_weights=load_format != "dummy")
        family = find_family(checkpoint.config)
        if upcycle is not None:
            checkpoint, family = upcycle_model(checkpoint, family, upcycle)
        self.config: ModelConfig = family.read_config(checkpoint.config)
        self.plan.check_layers(self.config.num_layers)
        self.mesh: Mesh = make_mesh(self.plan)
        self.rules = Rules(self.plan)
        dtype = self._choose_dtype(engine_config.dtype)
        self.tokenizer = load_tokenizer(checkpoint.path)
        self._stop_ids = _read_stop_ids(checkpoint, self.tokenizer)
        self._generation_config = checkpoint.generation_config
        self._check_agreement(engine_config, dtype)
        if load_format == "dummy":
            weights = random_model(
                self.config, self.rules, self.mesh, dtype=dtype, seed=engine_config.seed
            )
        else:
            weights = load_model(
                checkpoint,
                family,
                self.config,
                self.rules,
                self.mesh,
                dtype=dtype,
                progress=self.progress,
            )
        runner = Runner(self.config, self.rules, self.mesh, weights, engine_config)
        runner.prepare()
        check_agreement({"the pages of the KV cache": str(runner.num_pages)})
        self.engine = Engine(runner)
        self._live: dict[int, Completion] = {}
        self._num_requests = 0
        # Threads and tasks share the engine: whoever waits for tokens steps it for all.
        self._lock = threading.RLock()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continues prompts, as many at a time as fit.

        Raises:
            ConfigError: a prompt is empty, too long or has ids the model does not know.
        """
        batch = as_batch(prompts)
        params = self._params_of_each(sampling_params, len(batch))
        requests = self._submit(batch, params, streams=False)
        completions = [completion for group in requests for completion in group]
        unfinished = deque(completions)
        bar = _ProgressBar(requests, shown=use_tqdm and self.progress)
        try:
            while unfinished:
                self._advance(unfinished[0])
                while unfinished and unfinished[0].is_finished:
                    unfinished.popleft()
                bar.update()
            check_agreement({"the steps computed": self.engine.scheduler.digest()})
            pairs = zip(batch, requests, strict=True)
            return [self._collect(prompt, group) for prompt, group in pairs]
        finally:
            bar.close()
            self._close(completions)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Generator[Delta, None, None]:
        """Yields text as it comes; closing the iterator ends the request and frees its memory."""
        group = self._submit([prompt], self._params_of_each(sampling_params, 1))[0]
        try:
            while unfinished := [one for one in group if not one.is_finished or one.deltas]:
                self._advance(unfinished[0])
                yield from _take_deltas(group)
        finally:
            self._close(group)

    async def generate_async(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> AsyncIterator[Delta]:
        """`stream` for coroutines; any number of them share the engine's batches.

        Raises:
            DistributedError: there are several processes, in which tasks would not run alike.
        """
        if jax.process_count() > 1:
            raise DistributedError(
                "generate_async runs in one process only: with several use generate or stream, "
                "in the same order in each."
            )
        group = self._submit([prompt], self._params_of_each(sampling_params, 1))[0]
        try:
            while unfinished := [one for one in group if not one.is_finished or one.deltas]:
                await asyncio.to_thread(self._advance, unfinished[0])
                for delta in _take_deltas(group):
                    yield delta
        finally:
            self._close(group)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers a conversation, or several, through the model's chat template."""
        return self.generate(messages, sampling_params, use_tqdm=use_tqdm)

    def get_default_sampling_params(self) -> SamplingParams:
        """What the checkpoint's authors recommend, where its generation_config.json says so."""
        keys = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        given = {key: self._generation_config.get(key) for key in keys}
        return SamplingParams(**{key: value for key, value in given.items() if value is not None})

    def logits(self, prompt: Prompt) -> Float32[np.ndarray, "tokens vocab"]:
        """Logits at every position of a prompt, for looking inside; compiles for each length."""
        return self.engine.runner.logits(encode_prompt(prompt, self.tokenizer))

    def _check_agreement(self, engine_config: EngineConfig, dtype: jnp.dtype) -> None:
        """Makes sure that all processes run the same program before they meet in it."""
        options = asdict(engine_config) | {"dtype": dtype.name, "compile_cache": None}
        options["logits_processors"] = list(engine_config.logits_processors)
        facts = {"jax": jax.__version__, "model": self.config, "plan": self.plan, **options}
        check_agreement({name: str(value) for name, value in facts.items()})

    def _choose_dtype(self, asked: str | None) -> jnp.dtype:
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        return jnp.dtype(asked or ("float32" if on_cpu else self.config.dtype))

    def _params_of_each(
        self, params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * count
        if len(params) != count:
            raise ConfigError(
                f"{len(params)} SamplingParams came with {count} prompts: "
                "give one, or one for each."
            )
        return list(params)

    def _submit(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], *, streams: bool = True
    ) -> list[list[Completion]]:
        """Queues all prompts or, if one of them is refused, none; deltas come if it `streams`."""
        encoded = [encode_prompt(prompt, self.tokenizer) for prompt in prompts]
        shared = broadcast([encoded, [asdict(one) for one in params]])
        encoded, params = shared[0], [_params_from_json(one) for one in shared[1]]
        groups: list[list[Completion]] = []
        with self._lock:
            try:
                for ids, one in zip(encoded, params, strict=True):
                    groups.append([])
                    for index in range(one.n):
                        groups[-1].append(self._start(ids, one, index, streams))
            except BaseException:
                for group in groups:
                    self._close(group)
                raise
        return groups

    def _start(
        self, ids: Sequence[int], params: SamplingParams, index: int, streams: bool
    ) -> Completion:
        number, self._num_requests = self._num_requests, self._num_requests + 1
        own_stops = () if params.ignore_eos else self._stop_ids
        room = self.engine.scheduler.config.max_seq_len
        request = Request(
            id=number,
            prompt_ids=tuple(ids),
            params=params,
            max_tokens=params.max_tokens or room,
            stop_ids=frozenset((*own_stops, *params.stop_token_ids)),
            seed=_noise_seed(params.seed, index, self.engine.runner.engine.seed, number),
        )
        self.engine.submit(request)
        interval = self.engine.runner.engine.stream_interval if streams else None
        completion = Completion(request, index, self.tokenizer, stream_interval=interval)
        self._live[number] = completion
        return completion

    def _advance(self, completion: Completion) -> None:
        """Steps the engine, unless someone else's step brought what is waited for."""
        with self._lock:
            if completion.deltas or completion.is_finished:
                return
            if not self.engine.has_work:
                raise RuntimeError(f"request {completion.request.id} is lost: nothing is running")
            started = time.perf_counter()
            updated = self.engine.step()
            if self.engine.runner.engine.print_iter_log and jax.process_index() == 0:
                print(_describe_step(self.engine, started), file=sys.stderr, flush=True)
            self._take_in(updated)

    def _take_in(self, requests: Sequence[Request]) -> None:
        """Turns the new tokens of requests into text, and ends those that reached a stop text."""
        for request in requests:
            one = self._live.get(request.id)
            if one is not None:
                one.update()
                if one.stop_text is not None:
                    self.engine.finish(request, one.stop_text)

    def _close(self, group: Sequence[Completion]) -> None:
        """Ends requests, wherever they are, and forgets them."""
        with self._lock, uninterrupted():
            for completion in group:
                self._live.pop(completion.request.id, None)
                # Reading the steps in flight brings tokens of other requests too.
                self._take_in(self.engine.cancel(completion.request))

    def _collect(self, prompt: Prompt, group: Sequence[Completion]) -> RequestOutput:
        first = group[0].request
        scored = None
        if first.params.prompt_logprobs is not None:
            entries = self.engine.logprobs(first)[1]
            scored = (None, *(describe_logprobs(entry, self.tokenizer) for entry in entries))
        return RequestOutput(
            prompt=prompt_text(prompt, first.prompt_ids, self.tokenizer),
            prompt_token_ids=first.prompt_ids,
            prompt_logprobs=scored,
            outputs=tuple(one.describe(self.engine.logprobs(one.request)[0]) for one in group),
            num_cached_tokens=first.num_cached,
        )


def reserve_memory() -> None:
    """Lets JAX take most of a GPU's memory, unless the user or a running backend decided."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")


def _read_stop_ids(checkpoint: Any, tokenizer: Any) -> tuple[int, ...]:
    """Stop tokens of the checkpoint's generation settings, its configuration and its tokenizer."""
    ids: list[int] = []
    for source in (checkpoint.generation_config, checkpoint.config):
        value = source.get("eos_token_id")
        ids += value if isinstance(value, list) else [] if value is None else [value]
    ids += tokenizer.stop_ids if tokenizer else ()
    return tuple(dict.fromkeys(ids))


def _params_from_json(values: dict[str, Any]) -> SamplingParams:
    # JSON turns the token ids of a bias into texts.
    bias = {int(token): value for token, value in values["logit_bias"].items()}
    return SamplingParams(**{**values, "logit_bias": bias})


def _noise_seed(seed: int | None, index: int, engine_seed: int, number: int) -> int:
    """32 bits: the same for the same seed and completion, else different for every request."""
    text = f"{engine_seed} {number}" if seed is None else f"{seed} {index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


def _describe_step(engine: Engine, started: float) -> str:
    milliseconds = 1e3 * (time.perf_counter() - started)
    scheduler, stats = engine.scheduler, engine.stats
    return (
        f"step {stats.steps}: {scheduler.num_running} running, {scheduler.num_waiting} waiting, "
        f"{stats.tokens} tokens so far, {milliseconds:.1f} ms"
    )


class _ProgressBar:
    """Prompts done and tokens a second, looked up a few times a second: counting takes its time."""

    def __init__(self, requests: Sequence[Sequence[Completion]], *, shown: bool):
        self._requests = requests
        self._bar = tqdm(total=len(requests), desc="generating", unit="prompt", disable=not shown)
        self._started = self._updated = time.perf_counter()

    def update(self) -> None:
        """Shows where the requests are, unless that was done a moment ago."""
        now = time.perf_counter()
        if not self._bar.disable and now > self._updated + 0.2:
            self._updated = now
            self._show()

    def close(self) -> None:
        """Shows where the requests are, and leaves it at that."""
        if not self._bar.disable:
            self._show()
        self._bar.close()

    def _show(self) -> None:
        done = sum(all(one.is_finished for one in group) for group in self._requests)
        tokens = sum(len(one.token_ids) for group in self._requests for one in group)
        rate = tokens / (time.perf_counter() - self._started)
        self._bar.set_postfix_str(f"{rate:.1f} tokens/s", refresh=False)
        self._bar.update(done - self._bar.n)


def _take_deltas(group: Sequence[Completion]) -> list[Delta]:
    return [one.deltas.popleft() for one in group for _ in range(len(one.deltas))]
