"""The engine: requests in, tokens out, one step at a time."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from llmjax.config import ConfigError
from llmjax.engine.compile import CompileWatch
from llmjax.engine.interrupts import uninterrupted
from llmjax.engine.request import Request
from llmjax.engine.runner import Dispatched, Runner
from llmjax.engine.sampler_slots import MAX_BIAS, MAX_STOP_IDS
from llmjax.engine.schedule import Schedule, Work
from llmjax.engine.scheduler import Scheduler
from llmjax.engine.stats import EngineStats, Tick


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities at one position, under the unmodified logits."""

    token: int
    """The token that stands there."""
    logprob: float
    """Its log-probability."""
    rank: int
    """One more than the number of likelier tokens."""
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens with their log-probabilities."""


@dataclass(kw_only=True)
class _Collected:
    """Log-probabilities of a request so far."""

    generated: list[TokenLogprobs] = field(default_factory=list)
    prompt: list[TokenLogprobs] = field(default_factory=list)


class Engine:
    """Continuous batching over one runner.

    `step` dispatches the next step and then reads the one before, so that the devices always have
    work while the host prepares more; with overlap off, it reads what it dispatched.
    """

    def __init__(self, runner: Runner):
        self.runner = runner
        self.scheduler = Scheduler(runner.scheduler_config)
        self.stats = EngineStats()
        self.watchers: list[Callable[[Tick], None]] = []
        """Called with each step once it is read."""
        self._ahead = 0 if runner.engine.disable_overlap_scheduler else 1
        self._watch = CompileWatch()
        self._in_flight: deque[Dispatched] = deque()
        stages = runner.num_stages
        self._stages: deque[Schedule | None] = deque([None] * stages, maxlen=stages)
        """What each pipeline stage computed in the last tick, the first stage first."""
        self._collected: dict[int, _Collected] = {}

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished or a step is unread."""
        return self.scheduler.has_work

    def submit(self, request: Request) -> None:
        """Queues a request.

        Raises:
            ConfigError: it asks for what this engine was not built for, or does not fit.
        """
        self._check(request)
        try:
            self.scheduler.add(request)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self._collected[request.id] = _Collected()

    def step(self) -> list[Request]:
        """Runs the engine one step further and returns the requests that got a token."""
        with self._watch, uninterrupted():
            updated = self._step()
        self.stats.compilations = self._watch.count
        return updated

    def _step(self) -> list[Request]:
        schedule = self.scheduler.schedule()
        ticks = schedule is not None or self._has_passengers
        if ticks:
            self._tick(schedule)
        if self._in_flight and (not ticks or len(self._in_flight) > self._ahead):
            return self._read_oldest()
        return []

    @property
    def _has_passengers(self) -> bool:
        """Whether a micro-batch has still stages to pass."""
        return any(list(self._stages)[:-1])

    def _tick(self, schedule: Schedule | None) -> None:
        """Lets a micro-batch enter, or none, and moves those in the pipeline one stage on."""
        self.stats.overlapped_steps += bool(self._in_flight)
        self._stages.appendleft(schedule)
        dispatched = self.runner.dispatch(tuple(self._stages))
        self._in_flight.append(dispatched)
        self._count(schedule, dispatched)

    def finish(self, request: Request, stop_text: str) -> None:
        """Ends a request whose text reached a stop text."""
        self.scheduler.finish(request.id, "stop", stop_text)

    def cancel(self, request: Request) -> list[Request]:
        """Aborts a request; its pages are free when this returns.

        Returns the other requests that got a token from the steps that had to be read for it.
        """
        updated: list[Request] = []
        with uninterrupted():
            self.scheduler.cancel(request.id)
            while request.in_flight and (self._in_flight or self._has_passengers):
                if not self._in_flight:
                    self._tick(None)
                updated += self._read_oldest()
            self.forget(request)
        return updated

    def forget(self, request: Request) -> None:
        """Drops what the engine keeps of a finished request."""
        self._collected.pop(request.id, None)
        self.runner.forget(request)

    def logprobs(self, request: Request) -> tuple[list[TokenLogprobs], list[TokenLogprobs]]:
        """Log-probabilities of the generated tokens and of the prompt's from its second on."""
        collected = self._collected[request.id]
        return collected.generated, collected.prompt

    def _check(self, request: Request) -> None:
        params, engine = request.params, self.runner.engine
        limit, vocab = self.runner.maker.max_logprobs, self.runner.config.vocab_size
        for key in ("logprobs", "prompt_logprobs"):
            if (getattr(params, key) or 0) > limit:
                raise ConfigError(
                    f"{key}={getattr(params, key)} is above max_logprobs={limit}: "
                    f"ask for at most {limit}, or give LLM(max_logprobs=...) a larger number."
                )
        for name in params.logits_processors:
            if name not in engine.logits_processors:
                raise ConfigError(
                    f"No logits processor is called {name!r}: pass the function when the engine is "
                    f"built, LLM(..., logits_processors={{{name!r}: function}})."
                )
        ids = {
            "prompt": request.prompt_ids,
            "logit_bias": params.logit_bias,
            "stop_token_ids": params.stop_token_ids,
        }
        for key, tokens in ids.items():
            wrong = [token for token in tokens if not 0 <= token < vocab]
            if wrong:
                raise ConfigError(
                    f"The {key} holds the token id {wrong[0]}: "
                    f"this model's ids are 0 to {vocab - 1}."
                )
        if len(params.logit_bias) > MAX_BIAS:
            raise ConfigError(
                f"logit_bias has {len(params.logit_bias)} entries: use at most {MAX_BIAS}."
            )
        if params.min_tokens and len(request.stop_ids) > MAX_STOP_IDS:
            raise ConfigError(
                f"min_tokens holds back {len(request.stop_ids)} stop tokens: use at most "
                f"{MAX_STOP_IDS} stop_token_ids."
            )

    def _count(self, schedule: Schedule | None, dispatched: Dispatched) -> None:
        prefills = [work for _, works in schedule.rows for work in works] if schedule else []
        fed = schedule.num_tokens if schedule else 0
        self.stats.steps += 1
        self.stats.tokens += fed
        self.stats.padded_tokens += self._room(dispatched) - fed
        self.stats.chunked_prefills += sum(not work.samples for work in prefills)

    def _room(self, dispatched: Dispatched) -> int:
        return dispatched.bucket.tokens * self.runner.num_ranks

    def _count_tick(self, dispatched: Dispatched) -> None:
        """Reads what the stages counted; a single stage computes what it was fed."""
        counted = dispatched.output.stage_tokens
        if counted is None:
            fed = [schedule.num_tokens if schedule else 0 for schedule in dispatched.stages]
        else:
            fed = np.asarray(counted).tolist()
        room = self._room(dispatched)
        tick = Tick(stages=dispatched.stages, tokens=tuple(fed), room=room)
        self.stats.count_tick(tick)
        for watch in self.watchers:
            watch(tick)

    def _read_oldest(self) -> list[Request]:
        updated = self._read(self._in_flight[0])
        # Only now: a step that cannot be read stays in flight, and its error is the one raised.
        self._in_flight.popleft()
        return updated

    def _read(self, dispatched: Dispatched) -> list[Request]:
        """Waits for a step's tokens and hands them to the scheduler."""
        schedule = dispatched.schedule
        self._count_tick(dispatched)
        if schedule is None:
            return []
        tokens = np.asarray(dispatched.output.sampled.tokens).tolist()
        self._collect_prompts(dispatched)
        sampled = {
            work.request.id: token
            for first, works in _rows(dispatched)
            for work, token in zip(works, tokens[first:], strict=False)
            if work.samples
        }
        updated = self.scheduler.retire(schedule, sampled)
        self.stats.sampled_tokens += len(updated)
        self._collect_generated(dispatched, updated)
        return updated

    def _collect_generated(self, dispatched: Dispatched, updated: list[Request]) -> None:
        wanting = {request.id for request in updated if request.params.logprobs is not None}
        if not wanting:
            return
        sampled = [np.asarray(part) for part in dispatched.output.sampled]
        for first, works in _rows(dispatched):
            for row, work in enumerate(works, first):
                if work.samples and work.request.id in wanting:
                    entry = _entry(sampled, row, work.request.params.logprobs)
                    self._collected[work.request.id].generated.append(entry)

    def _collect_prompts(self, dispatched: Dispatched) -> None:
        scores = dispatched.output.prompt
        if scores is None:
            return
        arrays = None
        for first, work in _prefill_places(dispatched):
            request = work.request
            if request.params.prompt_logprobs is None or request.id not in self._collected:
                continue
            arrays = arrays or [np.asarray(part) for part in scores]
            following = request.prompt_ids[work.start + 1 : work.start + work.count + 1]
            collected = self._collected[request.id].prompt
            for offset, token in enumerate(following):
                # A preempted request computes its prompt again.
                if len(collected) == work.start + offset:
                    scored = [np.full(len(arrays[0]), token), *arrays]
                    wanted = request.params.prompt_logprobs
                    collected.append(_entry(scored, first + offset, wanted))


def _rows(dispatched: Dispatched) -> list[tuple[int, list[Work]]]:
    """First row in the step's output of works whose rows follow each other, and the works."""
    bucket, groups = dispatched.bucket, []
    for rank, (decodes, prefills) in enumerate(dispatched.rows):
        first = rank * bucket.rows
        groups += [(first, decodes), (first + bucket.decodes, prefills)]
    return groups


def _prefill_places(dispatched: Dispatched) -> list[tuple[int, Work]]:
    """First token of each prefill in the step's tokens, and its work."""
    bucket, places = dispatched.bucket, []
    for rank, (_, prefills) in enumerate(dispatched.rows):
        first = rank * bucket.tokens + bucket.decodes
        for work in prefills:
            places.append((first, work))
            first += work.count
    return places


def _entry(arrays: list[np.ndarray], row: int, count: int | None) -> TokenLogprobs:
    tokens, logprob, rank, top_ids, top_logprobs = arrays
    top = zip(top_ids[row, :count].tolist(), top_logprobs[row, :count].tolist(), strict=True)
    return TokenLogprobs(
        token=int(tokens[row]), logprob=float(logprob[row]), rank=int(rank[row]), top=tuple(top)
    )
