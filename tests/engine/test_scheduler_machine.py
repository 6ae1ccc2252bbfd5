"""Drive the scheduler at random, and run its steps on a device that shows what pages hold.

With pipeline stages a step samples when it has passed them all, one a tick: what enters before
that cannot be fed what it samples.
"""

from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from llmjax.config import SamplingParams
from llmjax.engine.request import Request, RequestStatus
from llmjax.engine.schedule import Schedule, SchedulerConfig, Work
from llmjax.engine.scheduler import Scheduler

MAX_SEQ_LEN = 12
STOP = 6

type Feed = dict[int, list[int]]
"""The tokens of a step, by request id."""


def next_state(state: int, token: int) -> int:
    """What a page holds at a position: it depends on every token up to there."""
    return (state * 31 + token + 1) % 1_000_003


def sample(state: int) -> int:
    return state // 7 % 10


def generate_alone(request: Request) -> list[int]:
    """What the request must generate, whatever it is scheduled with."""
    state = 0
    for token in request.prompt_ids:
        state = next_state(state, token)
    tokens: list[int] = []
    while len(tokens) < request.max_tokens:
        tokens.append(sample(state))
        if tokens[-1] in request.stop_ids and len(tokens) > request.params.min_tokens:
            break
        state = next_state(state, tokens[-1])
    return tokens


class Device:
    """Compute steps as the model would: read the pages, write the pages, sample."""

    def __init__(self, config: SchedulerConfig):
        self.page_size = config.page_size
        self.pages: dict[tuple[int, int, int], int] = {}
        self.last_token: dict[tuple[int, int | None], int] = {}

    def embed(self, schedule: Schedule) -> Feed:
        """What a step reads when it enters the first stage."""
        return {
            work.request.id: self.read_tokens(rank, work)
            for rank, works in enumerate(schedule.ranks)
            for work in works
        }

    def read_tokens(self, rank: int, work: Work) -> list[int]:
        if work.token_on_device:
            return [self.last_token[rank, work.request.slot]]
        return list(work.request.token_ids[work.start : work.start + work.count])

    def run(self, schedule: Schedule, feed: Feed) -> dict[int, int]:
        sampled = {}
        for rank, works in enumerate(schedule.ranks):
            for work in works:
                state = self.compute(rank, work, feed[work.request.id])
                if work.samples:
                    sampled[work.request.id] = sample(state)
                    self.last_token[rank, work.request.slot] = sample(state)
        return sampled

    def compute(self, rank: int, work: Work, tokens: list[int]) -> int:
        state = self.pages[self.place(rank, work, work.start - 1)] if work.start else 0
        for position, token in enumerate(tokens, start=work.start):
            state = next_state(state, token)
            self.pages[self.place(rank, work, position)] = state
        return state

    def place(self, rank: int, work: Work, position: int) -> tuple[int, int, int]:
        page, offset = divmod(position, self.page_size)
        return rank, work.pages[page], offset


@st.composite
def configs(draw: st.DrawFn) -> SchedulerConfig:
    page_size = draw(st.integers(1, 3))
    max_batch_size = draw(st.integers(1, 4))
    chunked = draw(st.booleans())
    least_tokens = max_batch_size if chunked else MAX_SEQ_LEN
    least_pages = -(-(MAX_SEQ_LEN - 1) // page_size)
    return SchedulerConfig(
        num_ranks=draw(st.sampled_from([1, 1, 2])),
        num_stages=draw(st.sampled_from([1, 1, 2, 3])),
        max_batch_size=max_batch_size,
        max_num_tokens=least_tokens + draw(st.integers(0, 4)),
        max_prefill_requests=draw(st.integers(1, 3)),
        page_size=page_size,
        num_pages=least_pages + draw(st.integers(0, 2)),
        max_seq_len=MAX_SEQ_LEN,
        enable_block_reuse=draw(st.booleans()),
        enable_chunked_prefill=chunked,
        attention_dp_balance=draw(st.booleans()),
        attention_dp_timeout_iters=draw(st.integers(0, 4)),
        attention_dp_batching_wait_iters=draw(st.integers(0, 4)),
    )


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(config=configs())
    def start(self, config: SchedulerConfig) -> None:
        self.config = config
        self.scheduler = Scheduler(config)
        self.device = Device(config)
        self.requests: list[Request] = []
        self.in_flight: deque[Schedule] = deque()
        self.max_in_flight = 2 + config.num_stages
        self.passing: deque[tuple[Schedule, Feed] | None] = deque()
        """What the stages of a pipeline compute, the oldest first."""
        self.sampled: deque[dict[int, int]] = deque()
        """Of the oldest steps in flight, which have passed all stages."""
        self.end_of_feed: dict[int, int] = {}

    # A prompt repeats one token, so that many share prefixes and some are equal.
    @rule(
        length=st.integers(1, 4) | st.integers(1, MAX_SEQ_LEN - 1),
        token=st.integers(0, 1),
        max_tokens=st.just(MAX_SEQ_LEN) | st.integers(1, MAX_SEQ_LEN),
        min_tokens=st.integers(0, 3),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
    )
    def add(self, length, token, max_tokens, min_tokens, prompt_logprobs) -> None:
        request = Request(
            id=len(self.requests),
            prompt_ids=(token,) * length,
            params=SamplingParams(min_tokens=min_tokens, prompt_logprobs=prompt_logprobs),
            max_tokens=max_tokens,
            stop_ids=frozenset({STOP}),
        )
        self.scheduler.add(request)
        self.requests.append(request)

    @precondition(lambda self: len(self.in_flight) < self.max_in_flight)
    @rule()
    def schedule(self) -> None:
        num_preemptions = self.scheduler.num_preemptions
        before = {each.id: each.num_preemptions for each in self.earliest_of_each_rank()}
        schedule = self.scheduler.schedule()
        assert all(self.requests[id].num_preemptions == count for id, count in before.items())
        if schedule is not None and self.scheduler.num_preemptions > num_preemptions:
            assert schedule.admitted == ()
        if schedule is None:
            assert self.in_flight or not self.scheduler.has_work
        else:
            self.check_step(schedule)
            self.in_flight.append(schedule)
        self.pass_on(schedule)

    def pass_on(self, entering: Schedule | None) -> None:
        self.passing.append(entering and (entering, self.device.embed(entering)))
        if len(self.passing) == self.config.num_stages:
            leaving = self.passing.popleft()
            if leaving is not None:
                self.sampled.append(self.device.run(*leaving))

    @precondition(lambda self: self.sampled)
    @rule()
    def retire(self) -> None:
        schedule, tokens = self.in_flight.popleft(), self.sampled.popleft()
        unfinished = [request for request in self.requests if not request.is_finished]
        changed = self.scheduler.retire(schedule, tokens)
        assert {request.id for request in changed} == {
            request.id for request in unfinished if request.id in tokens
        }

    @rule(num_steps=st.integers(1, 6))
    def advance(self, num_steps: int) -> None:
        for _ in range(num_steps):
            num_in_flight = len(self.in_flight)
            if num_in_flight < self.max_in_flight:
                self.schedule()
            if self.sampled and len(self.in_flight) == num_in_flight:
                self.retire()

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), finish=st.booleans())
    def end_early(self, data: st.DataObject, finish: bool) -> None:
        request = data.draw(st.sampled_from(self.requests))
        was_finished, tokens = request.is_finished, list(request.token_ids)
        if finish:
            ended = self.scheduler.finish(request.id, "stop", "text")
        else:
            ended = self.scheduler.cancel(request.id)
        assert ended is (None if was_finished else request)
        assert request.is_finished
        assert request.token_ids == tokens

    def earliest_of_each_rank(self) -> list[Request]:
        running = [each for each in self.requests if each.status is RequestStatus.RUNNING]
        ranks = range(self.config.num_ranks)
        on_ranks = ([each for each in running if each.rank == rank] for rank in ranks)
        return [requests[0] for requests in on_ranks if requests]

    def check_step(self, schedule: Schedule) -> None:
        assert len(schedule.ranks) == self.config.num_ranks
        fed = [work.request.id for works in schedule.ranks for work in works]
        assert len(fed) == len(set(fed))
        for works in schedule.ranks:
            self.check_limits(works)
            for work in works:
                self.check_feed(work, is_new=work.request in schedule.admitted)

    def check_limits(self, works: tuple[Work, ...]) -> None:
        assert sum(work.count for work in works) <= self.config.max_num_tokens
        kinds = [work.is_decode for work in works]
        assert kinds == sorted(kinds, reverse=True)
        assert kinds.count(False) <= self.config.max_prefill_requests

    def check_feed(self, work: Work, *, is_new: bool) -> None:
        """Tokens are fed in order, without holes, from the start or from a cached prefix."""
        request = work.request
        assert request.status is RequestStatus.RUNNING
        if is_new:
            assert work.start % self.config.page_size == 0
            assert work.start == 0 or request.params.prompt_logprobs is None
        else:
            assert work.start == self.end_of_feed[request.id]
        self.end_of_feed[request.id] = work.start + work.count
        assert work.count > 0
        known_to_device = request.num_tokens + request.pending_samples - work.samples
        assert work.samples == (work.start + work.count == known_to_device)
        assert work.token_on_device == (work.start >= request.num_tokens)
        if not self.config.enable_chunked_prefill:
            assert work.samples

    def check_writes(self, rank: int, work: Work) -> None:
        """A page that is being written has one holder, and no prefix can match it."""
        page_size = self.config.page_size
        blocks = self.scheduler.blocks[rank]
        last_page = (work.start + work.count - 1) // page_size
        assert len(work.pages) == last_page + 1
        matched = blocks.match([*work.request.token_ids, 0])
        for page in work.pages[work.start // page_size :]:
            assert blocks.num_holders(page) == 1
            assert page not in matched

    @invariant()
    def pages_are_held_by_those_who_list_them(self) -> None:
        for rank, blocks in enumerate(self.scheduler.blocks):
            held = [page for each in self.requests if each.rank == rank for page in each.pages]
            holders = [blocks.num_holders(page) for page in range(blocks.num_pages)]
            assert holders == [held.count(page) for page in range(blocks.num_pages)]
            assert blocks.num_available == holders.count(0)

    @invariant()
    def slots_are_held_by_one_request_each(self) -> None:
        held = [(each.rank, each.slot) for each in self.requests if each.slot is not None]
        assert len(held) == len(set(held))
        assert all(slot in range(self.config.max_batch_size) for _, slot in held)
        for each in self.requests:
            assert bool(each.pages) == (each.slot is not None) == (each.rank is not None)
            assert each.pages or each.num_computed == 0

    @invariant()
    def steps_in_flight_keep_their_pages_and_slots(self) -> None:
        works: list[Work] = []
        for schedule in self.in_flight:
            for rank, rank_works in enumerate(schedule.ranks):
                works.extend(rank_works)
                for work in rank_works:
                    assert work.pages == tuple(work.request.pages[: len(work.pages)])
                    assert work.request.slot is not None
                    self.check_writes(rank, work)
        for request in self.requests:
            mine = [work for work in works if work.request is request]
            assert request.in_flight == len(mine)
            assert request.pending_samples == sum(work.samples for work in mine)

    @invariant()
    def tokens_are_those_of_the_request_alone(self) -> None:
        for request in self.requests:
            expected = generate_alone(request)
            assert request.output_ids == expected[: request.num_outputs]
            if request.finish_reason == "length":
                assert request.output_ids == expected
            if request.finish_reason == "stop" and request.stop_reason is None:
                assert request.output_ids == expected
                assert expected[-1] == STOP

    @invariant()
    def every_unfinished_request_waits_or_runs(self) -> None:
        statuses = [each.status for each in self.requests]
        assert statuses.count(RequestStatus.RUNNING) == self.scheduler.num_running
        assert statuses.count(RequestStatus.WAITING) == self.scheduler.num_waiting

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        unfinished = [each for each in self.requests if not each.is_finished]
        # A step for each token would do if no request were ever computed again.
        num_steps = 10 + 4 * MAX_SEQ_LEN * len(unfinished) * self.config.num_stages
        while self.scheduler.has_work and num_steps:
            num_steps -= 1
            self.advance(1)
            self.pages_are_held_by_those_who_list_them()
            self.tokens_are_those_of_the_request_alone()
        assert all(request.is_finished for request in self.requests)
        assert not self.scheduler.has_work
        for blocks in self.scheduler.blocks:
            assert blocks.num_available == self.config.num_pages


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=60, stateful_step_count=40, derandomize=True, deadline=None
)
