"""What every batch rank computes in each step: continuous batching in pure, deterministic Python.

A step is scheduled, dispatched and, after later ones may have been scheduled too, retired. Until
then its pages and slots stay where they are, whatever becomes of its requests.
"""

import bisect
import hashlib
import struct
from collections.abc import Mapping
from operator import attrgetter

from llmjax.engine.alignment import PrefillAlignment
from llmjax.engine.block_manager import BlockManager
from llmjax.engine.rank import Rank
from llmjax.engine.rank_step import RankStep, share_of_prefill
from llmjax.engine.request import FinishReason, Request, RequestStatus
from llmjax.engine.schedule import Schedule, SchedulerConfig, Work


class Scheduler:
    """Decide what each step computes, and take in what it sampled.

    The engine calls `schedule`, dispatches the step, and calls `retire` in the same order once it
    has read the sampled tokens; it may schedule further steps in between.
    """

    def __init__(self, config: SchedulerConfig):
        self.config = config
        self.num_preemptions = 0
        self._ranks = [Rank.empty(index, config) for index in range(config.num_ranks)]
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
        if request.id in self._unfinished:
            raise ValueError(f"request id {request.id} is in use: give each request its own id")
        self.config.check_fits(request)
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
        prefill_tokens = share_of_prefill(self._ranks, self._waiting, self.config)
        steps = [
            RankStep(
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
            step.rank.recent_prefills.append(step.num_prefilled)
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

    def _schedule_decodes(self, step: RankStep) -> None:
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

    def _schedule_chunks(self, step: RankStep) -> None:
        for request in step.rank.running:
            if not step.takes_prefill:
                return
            if request.num_uncomputed > 1:
                step.add(request)

    def _reserve_next_page(self, request: Request, rank: Rank) -> bool:
        """Make room for the request's next token, preempting the latest arrivals if need be."""
        while not rank.blocks.extend(request.pages, request.num_computed + 1):
            latest = rank.running[-1]
            # Pages about to be free are cheaper than a recomputation, and so is a short wait of
            # the latest arrival itself: those before it finish, or preempt it.
            if rank.draining or latest is request:
                return False
            self._preempt(latest, rank)
        return True

    def _preempt(self, request: Request, rank: Rank) -> None:
        rank.drop(request)
        request.status = RequestStatus.WAITING
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._preempted.append(request)
        bisect.insort(self._waiting, request, key=attrgetter("arrival"))

    def _ranks_are_aligned(self, steps: list[RankStep]) -> bool:
        """Whether new requests may start now, or wait for those of other ranks."""
        if self._alignment is None:
            return True
        idle = [step for step in steps if not step.prefills and step.rank.free_slots]
        served = sorted(idle, key=_num_tokens)[: len(self._waiting)]
        return self._alignment.lets_in(
            decoding=[bool(step.decodes) for step in steps],
            prefilling=[bool(step.prefills) or step in served for step in steps],
        )

    def _admit(self, steps: list[RankStep]) -> list[Request]:
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

    def _admit_to(self, step: RankStep, request: Request) -> bool:
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
        rank.hold(request, pages, num_cached=num_cached)
        if request.num_preemptions == 0:
            request.num_cached = num_cached
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

    def _retire_work(self, work: Work, rank: Rank, tokens: Mapping[int, int]) -> bool:
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
        if rank.draining:
            rank.release_drained(request)
        if got_token and request.is_finished:
            self._remove_finished(request, was_running=was_running)
        return got_token

    def _remove_finished(self, request: Request, *, was_running: bool) -> None:
        del self._unfinished[request.id]
        if was_running:
            assert request.rank is not None
            self._ranks[request.rank].drop(request)
        else:
            self._waiting.remove(request)

    def _record(self, schedule: Schedule) -> None:
        numbers = [schedule.index]
        for works in schedule.ranks:
            numbers.append(len(works))
            for request, start, count, _, pages, _ in works:
                numbers += (request.id, request.slot or 0, start, count, pages[-1])
        self._digest.update(struct.pack(f"<{len(numbers)}q", *numbers))


def _num_tokens(step: RankStep) -> int:
    return step.rank.num_tokens


def _load(step: RankStep) -> tuple[int, int]:
    """What the step prefills comes first: its fullest rank is what all others wait for."""
    return step.num_prefilled, step.rank.num_tokens
