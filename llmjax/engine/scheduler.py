"""What every batch rank computes in each step: continuous batching in pure, deterministic Python.

A step is scheduled, dispatched and, after later ones may have been scheduled too, retired. Until
then its pages and slots stay where they are, whatever becomes of its requests.
"""

import bisect
import hashlib
import struct
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from llmjax.engine.alignment import PrefillAlignment
from llmjax.engine.block_manager import BlockManager
from llmjax.engine.request import FinishReason, Request, RequestStatus
from llmjax.engine.schedule import Schedule, SchedulerConfig, Work


@dataclass(eq=False, kw_only=True)
class _Rank:
    """One batch rank: its pages, its slots and the requests that hold them."""

    index: int
    blocks: BlockManager
    free_slots: list[int]
    recent_prefills: deque[int]
    """Prompt tokens that the other stages of a pipeline carry, fed in the ticks before."""
    running: list[Request] = field(default_factory=list)
    """Ordered by arrival."""
    draining: list[Request] = field(default_factory=list)
    """Finished or preempted, but still in flight: their pages and slots cannot be reused yet."""

    @property
    def num_tokens(self) -> int:
        return sum(request.num_tokens for request in self.running)

    @property
    def num_prefill_tokens(self) -> int:
        """Prompt tokens in the pipeline and in prompts under way."""
        uncomputed = (request.num_uncomputed for request in self.running)
        return sum(self.recent_prefills) + sum(count for count in uncomputed if count > 1)


@dataclass(eq=False, kw_only=True)
class _RankStep:
    """The part of a step that one rank computes, while it is put together."""

    rank: _Rank
    token_budget: int
    prefill_budget: int
    prefill_tokens: int
    """Prompt tokens that the step may still take."""
    next_token_at: int
    """The tick in which tokens that this step samples can be fed."""
    decodes: list[Work] = field(default_factory=list)
    prefills: list[Work] = field(default_factory=list)

    def decode(self, request: Request) -> None:
        """Schedule the one token that is not computed yet, the last of the request's pages."""
        start = request.num_computed
        on_device = start >= len(request.token_ids)
        self.decodes.append(Work(request, start, 1, True, tuple(request.pages), on_device))
        self.token_budget -= 1
        request.ready_at = self.next_token_at
        request.num_computed += 1
        request.in_flight += 1
        request.pending_samples += 1

    @property
    def takes_prefill(self) -> bool:
        """Whether a prompt, or a part of one, still fits."""
        return bool(self.token_budget and self.prefill_budget and self.prefill_tokens)

    def add(self, request: Request) -> None:
        """Schedule as many of the request's next tokens as the budget allows."""
        start = request.num_computed
        count = min(request.num_uncomputed, self.token_budget, self.prefill_tokens)
        num_pages = self.rank.blocks.pages_for(start + count)
        work = Work(
            request=request,
            start=start,
            count=count,
            samples=count == request.num_uncomputed,
            pages=tuple(request.pages[:num_pages]),
            token_on_device=start >= request.num_tokens,
        )
        if work.is_decode:
            self.decodes.append(work)
        else:
            self.prefills.append(work)
            self.prefill_budget -= 1
            self.prefill_tokens -= count
        self.token_budget -= count
        if work.samples:
            request.ready_at = self.next_token_at
        request.num_computed += count
        request.in_flight += 1
        request.pending_samples += work.samples


class Scheduler:
    """Decide what each step computes, and take in what it sampled.

    The engine calls `schedule`, dispatches the step, and calls `retire` in the same order once it
    has read the sampled tokens; it may schedule further steps in between.
    """

    def __init__(self, config: SchedulerConfig):
        self.config = config
        self.num_preemptions = 0
        self._ranks = [
            _Rank(
                index=index,
                blocks=BlockManager(
                    num_pages=config.num_pages,
                    page_size=config.page_size,
                    enable_block_reuse=config.enable_block_reuse,
                ),
                free_slots=list(range(config.max_batch_size)),
                recent_prefills=deque(maxlen=config.num_stages - 1),
            )
            for index in range(config.num_ranks)
        ]
        self._alignment = None
        if config.attention_dp_balance:
            self._alignment = PrefillAlignment(
                timeout_iters=config.attention_dp_timeout_iters,
                batching_wait_iters=config.attention_dp_batching_wait_iters,
            )
        self._unfinished: dict[int, Request] = {}
        self._waiting: list[Request] = []
        self._preempted: list[Request] = []
        self._num_arrived = 0
        self._tick = 0
        self._num_scheduled = 0
        self._num_retired = 0
        self._digest = hashlib.sha256()

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished or a step is in flight."""
        return bool(self._unfinished) or self._num_scheduled > self._num_retired

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return sum(len(rank.running) for rank in self._ranks)

    @property
    def blocks(self) -> tuple[BlockManager, ...]:
        """The page bookkeeping of each batch rank."""
        return tuple(rank.blocks for rank in self._ranks)

    def digest(self) -> str:
        """Name the schedules so far: equal on all processes that scheduled alike."""
        return self._digest.hexdigest()

    # Requests come and go.

    def add(self, request: Request) -> None:
        """Queue a request; raises ValueError for one that could never finish."""
        self._check_fits(request)
        room = self.config.max_seq_len - len(request.prompt_ids)
        request.max_tokens = min(request.max_tokens, room)
        request.arrival = self._num_arrived
        self._num_arrived += 1
        self._unfinished[request.id] = request
        self._waiting.append(request)

    def cancel(self, request_id: int) -> Request | None:
        """Abort a request; None if it is unknown or has finished already."""
        return self.finish(request_id, "abort", None)

    def finish(
        self, request_id: int, reason: FinishReason, stop_reason: int | str | None
    ) -> Request | None:
        """End a request, keeping its tokens; None if it is unknown or has finished already."""
        request = self._unfinished.get(request_id)
        if request is not None:
            was_running = request.status is RequestStatus.RUNNING
            request.finish(reason, stop_reason)
            self._remove_finished(request, was_running=was_running)
        return request

    # A step begins.

    def schedule(self) -> Schedule | None:
        """Choose what enters in this tick; None if nothing can before a step in flight retires."""
        self._tick += 1
        prefill_tokens = self._share_of_prefill()
        steps = [
            _RankStep(
                rank=rank,
                token_budget=self.config.max_num_tokens,
                prefill_budget=self.config.max_prefill_requests,
                prefill_tokens=prefill_tokens,
                next_token_at=self._tick + self.config.num_stages,
            )
            for rank in self._ranks
        ]
        num_preemptions = self.num_preemptions
        for step in steps:
            self._schedule_decodes(step)
            self._schedule_chunks(step)
        # Pages that a preemption has freed belong to the requests it was made for.
        can_admit = num_preemptions == self.num_preemptions and self._ranks_are_aligned(steps)
        admitted = self._admit(steps) if can_admit else []
        for step in steps:
            step.rank.recent_prefills.append(sum(work.count for work in step.prefills))
        ranks = tuple((*step.decodes, *step.prefills) for step in steps)
        if not any(ranks):
            return None
        schedule = Schedule(
            index=self._num_scheduled,
            ranks=ranks,
            admitted=tuple(admitted),
            preempted=tuple(self._preempted),
        )
        self._preempted.clear()
        self._num_scheduled += 1
        self._record(schedule)
        return schedule

    def _share_of_prefill(self) -> int:
        """Prompt tokens that a rank may feed in this tick: the same for each stage of a pipeline.

        All stages of a tick are padded to the longest prefill among them. So the tokens that the
        other stages carry and those that wait are dealt out equally, up to the next size for which
        a step is compiled: below it nothing is saved.
        """
        config = self.config
        if config.num_stages == 1 or not config.enable_chunked_prefill:
            return config.max_num_tokens
        num_slots = sum(len(rank.free_slots) for rank in self._ranks)
        queued = [request.num_tokens for request in self._waiting[:num_slots]]
        # Ranks take prompts in turn, and none takes less than a whole one.
        per_rank = max(-(-sum(queued) // config.num_ranks), max(queued, default=0))
        prefill = per_rank + max(rank.num_prefill_tokens for rank in self._ranks)
        share = max(-(-prefill // config.num_stages), 1)
        if not config.prefill_sizes:
            return share
        return next((size for size in config.prefill_sizes if size >= share), config.max_num_tokens)

    def _schedule_decodes(self, step: _RankStep) -> None:
        # Micro-batches of the same size keep all stages of a pipeline busy.
        limit = -(-len(step.rank.running) // self.config.num_stages)
        # A preemption removes requests from the end of the list, never one that was passed.
        for request in list(step.rank.running):
            if step.token_budget == 0 or len(step.decodes) == limit:
                return
            if request.status is not RequestStatus.RUNNING or request.num_uncomputed != 1:
                continue
            if request.ready_at > self._tick:
                continue
            if request.wants_tokens and self._reserve_next_page(request, step.rank):
                step.decode(request)

    def _schedule_chunks(self, step: _RankStep) -> None:
        for request in step.rank.running:
            if not step.takes_prefill:
                return
            if request.num_uncomputed > 1:
                step.add(request)

    def _reserve_next_page(self, request: Request, rank: _Rank) -> bool:
        """Make room for the request's next token, preempting the latest arrivals if need be."""
        while not rank.blocks.extend(request.pages, request.num_computed + 1):
            latest = rank.running[-1]
            # Pages about to be free are cheaper than a recomputation, and so is a short wait of
            # the latest arrival itself: those before it finish, or preempt it.
            if rank.draining or latest is request:
                return False
            self._preempt(latest, rank)
        return True

    def _preempt(self, request: Request, rank: _Rank) -> None:
        rank.running.remove(request)
        request.status = RequestStatus.WAITING
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._preempted.append(request)
        bisect.insort(self._waiting, request, key=_arrival)
        self._release_when_idle(request)

    def _ranks_are_aligned(self, steps: list[_RankStep]) -> bool:
        """Whether new requests may start now, or wait for those of other ranks."""
        if self._alignment is None:
            return True
        idle = [step for step in steps if not step.prefills and step.rank.free_slots]
        served = sorted(idle, key=_num_tokens)[: len(self._waiting)]
        return self._alignment.lets_in(
            decoding=[bool(step.decodes) for step in steps],
            prefilling=[bool(step.prefills) or step in served for step in steps],
        )

    def _admit(self, steps: list[_RankStep]) -> list[Request]:
        """Move requests from the queue's front to the ranks that hold the fewest tokens."""
        admitted: list[Request] = []
        # The first one that cannot go holds up the rest, or small requests could starve it.
        while self._waiting and self._waiting[0].in_flight == 0:
            request = self._waiting[0]
            by_load = sorted(steps, key=_load if self._alignment else _num_tokens)
            if not any(self._admit_to(step, request) for step in by_load):
                break
            admitted.append(self._waiting.pop(0))
        return admitted

    def _admit_to(self, step: _RankStep, request: Request) -> bool:
        rank = step.rank
        if not (rank.free_slots and step.takes_prefill):
            return False
        # Prompt log-probabilities need the hidden state of every position.
        needs_all = request.params.prompt_logprobs is not None
        matched = [] if needs_all else rank.blocks.match(request.token_ids)
        num_cached = len(matched) * self.config.page_size
        if not self.config.enable_chunked_prefill:
            if request.num_tokens - num_cached > step.token_budget:
                return False
        # A prompt of one new token is a decode row, of which steps have but a share.
        is_decode = request.num_tokens - num_cached == 1
        if is_decode and len(step.decodes) == self.config.micro_batch_size:
            return False
        # All pages of the tokens known so far are taken here, so that a prefill never stops half
        # way; a page is left for each running request, or the newcomer would soon be preempted.
        pages = rank.blocks.admit(request.token_ids, matched=matched, spare=len(rank.running))
        if pages is None:
            return False
        request.status = RequestStatus.RUNNING
        request.rank = rank.index
        request.slot = rank.free_slots.pop(0)
        request.pages = pages
        request.num_computed = num_cached
        if request.num_preemptions == 0:
            request.num_cached = num_cached
        bisect.insort(rank.running, request, key=_arrival)
        step.add(request)
        return True

    # A step ends.

    def retire(self, schedule: Schedule, tokens: Mapping[int, int]) -> list[Request]:
        """Take in the sampled tokens of the oldest step in flight, by request id.

        Returns the requests that got a token. Tokens of requests that finished in the meantime
        are dropped.
        """
        if schedule.index != self._num_retired or schedule.index >= self._num_scheduled:
            raise RuntimeError(
                f"step {schedule.index} is retired but step {self._num_retired} is next: retire "
                f"each step once, in the order in which schedule() returned them"
            )
        self._num_retired += 1
        changed: list[Request] = []
        for rank, works in zip(self._ranks, schedule.ranks, strict=True):
            for work in works:
                if self._retire_work(work, rank, tokens):
                    changed.append(work.request)
        return changed

    def _retire_work(self, work: Work, rank: _Rank, tokens: Mapping[int, int]) -> bool:
        """Settle one request's part of a step; whether the request got a token."""
        request, start, count, samples, pages, _ = work
        request.in_flight -= 1
        request.pending_samples -= samples
        status = request.status
        got_token = samples and status is not RequestStatus.FINISHED
        was_running = status is RequestStatus.RUNNING
        if got_token:
            request.append(tokens[request.id])
        # A dropped token may have been fed already: what lies past the end is never reused.
        num_computed = min(start + count, len(request.token_ids))
        page_size = self.config.page_size
        if num_computed // page_size > start // page_size:
            rank.blocks.commit(request.token_ids, pages, num_computed)
        if rank.draining and request.in_flight == 0 and request in rank.draining:
            rank.draining.remove(request)
            self._release(request, rank)
        if got_token and request.is_finished:
            self._remove_finished(request, was_running=was_running)
        return got_token

    def _remove_finished(self, request: Request, *, was_running: bool) -> None:
        del self._unfinished[request.id]
        if was_running:
            self._rank_of(request).running.remove(request)
            self._release_when_idle(request)
        else:
            self._waiting.remove(request)

    def _release_when_idle(self, request: Request) -> None:
        rank = self._rank_of(request)
        if request.in_flight:
            rank.draining.append(request)
        else:
            self._release(request, rank)

    def _release(self, request: Request, rank: _Rank) -> None:
        assert request.slot is not None
        rank.blocks.release(request.pages)
        bisect.insort(rank.free_slots, request.slot)
        request.pages = []
        request.num_computed = 0
        request.rank = request.slot = None

    def _rank_of(self, request: Request) -> _Rank:
        assert request.rank is not None
        return self._ranks[request.rank]

    def _check_fits(self, request: Request) -> None:
        config = self.config
        num_prompt = len(request.prompt_ids)
        if request.id in self._unfinished:
            raise ValueError(f"request id {request.id} is in use: give each request its own id")
        if num_prompt == 0 or request.max_tokens < 1:
            raise ValueError(
                f"request {request.id} has {num_prompt} prompt tokens and "
                f"max_tokens={request.max_tokens}: each must be at least 1"
            )
        if num_prompt >= config.max_seq_len:
            raise ValueError(
                f"the prompt has {num_prompt} tokens and max_seq_len={config.max_seq_len} counts "
                f"the generated ones too: use at most {config.max_seq_len - 1} prompt tokens"
            )
        # The last sampled token is never fed.
        num_fed = min(num_prompt + request.max_tokens, config.max_seq_len) - 1
        num_slots = config.num_pages * config.page_size
        if num_fed > num_slots:
            raise ValueError(
                f"the request may need the keys and values of {num_fed} tokens and a batch rank "
                f"has room for {num_slots} (num_pages={config.num_pages} * "
                f"page_size={config.page_size}): use a shorter prompt, "
                f"max_tokens <= {max(num_slots + 1 - num_prompt, 0)}, or more KV cache"
            )

    def _record(self, schedule: Schedule) -> None:
        numbers = [schedule.index]
        for works in schedule.ranks:
            numbers.append(len(works))
            for request, start, count, _, pages, _ in works:
                numbers += (request.id, request.slot or 0, start, count, pages[-1])
        self._digest.update(struct.pack(f"<{len(numbers)}q", *numbers))


def _arrival(request: Request) -> int:
    return request.arrival


def _num_tokens(step: _RankStep) -> int:
    return step.rank.num_tokens


def _load(step: _RankStep) -> tuple[int, int]:
    """What the step prefills comes first: its fullest rank is what all others wait for."""
    return sum(work.count for work in step.prefills), step.rank.num_tokens
