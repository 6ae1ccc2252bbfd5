"""New requests wait for each other under attention data parallelism, but not for long."""

from typing import Any

from llmjax.config import SamplingParams
from llmjax.engine.alignment import PrefillAlignment
from llmjax.engine.request import Request
from llmjax.engine.schedule import Schedule, SchedulerConfig
from llmjax.engine.scheduler import Scheduler

BUSY = [True, True]


def answers(gate: PrefillAlignment, count: int, *, prefilling, decoding=BUSY) -> list[bool]:
    return [gate.lets_in(decoding=decoding, prefilling=prefilling) for _ in range(count)]


def test_a_lone_request_waits_for_the_timeout_and_then_goes():
    gate = PrefillAlignment(timeout_iters=3, batching_wait_iters=0)
    alone = answers(gate, 7, prefilling=[True, False])
    assert alone == [False, False, True, False, False, True, False]


def test_requests_of_all_ranks_go_at_once_and_end_the_wait():
    gate = PrefillAlignment(timeout_iters=3, batching_wait_iters=0)
    assert answers(gate, 2, prefilling=[True, False]) == [False, False]
    assert answers(gate, 1, prefilling=[True, True]) == [True]
    assert answers(gate, 3, prefilling=[True, False]) == [False, False, True]


def test_requests_of_all_ranks_gather_for_as_many_steps_as_asked():
    gate = PrefillAlignment(timeout_iters=3, batching_wait_iters=2)
    assert answers(gate, 6, prefilling=[True, True]) == [False, False, True] * 2


def test_a_rank_without_decodes_is_not_kept_waiting():
    gate = PrefillAlignment(timeout_iters=9, batching_wait_iters=9)
    for prefilling in ([True, False], [True, True]):
        assert answers(gate, 2, prefilling=prefilling, decoding=[True, False]) == [True, True]


def test_steps_without_new_requests_are_not_counted():
    gate = PrefillAlignment(timeout_iters=2, batching_wait_iters=0)
    assert answers(gate, 5, prefilling=[False, False]) == [True] * 5
    assert answers(gate, 2, prefilling=[False, True]) == [False, True]


# In the scheduler.


def make_scheduler(**changes: Any) -> Scheduler:
    limits: dict[str, Any] = dict(
        num_ranks=4, max_batch_size=8, max_num_tokens=64, max_prefill_requests=4
    )
    limits |= dict(page_size=8, num_pages=64, max_seq_len=128)
    return Scheduler(SchedulerConfig(**(limits | changes)))


def make_request(number: int, length: int, max_tokens: int) -> Request:
    return Request(
        id=number,
        prompt_ids=tuple(range(number * 100, number * 100 + length)),
        params=SamplingParams(),
        max_tokens=max_tokens,
        stop_ids=frozenset(),
    )


def advance(scheduler: Scheduler) -> Schedule | None:
    schedule = scheduler.schedule()
    if schedule is not None:
        works = [work for rank in schedule.ranks for work in rank]
        scheduler.retire(schedule, {work.request.id: 1 for work in works if work.samples})
    return schedule


def serve_skewed_arrivals(**balance: Any) -> tuple[float, list[list[int]]]:
    """Max/mean of the tokens of ranks over all steps, and the tokens of each step and rank.

    After one request for each rank, a request arrives every second step: every fourth prompt is
    four times as long as the others.
    """
    scheduler = make_scheduler(**balance)
    requests = [make_request(number, 48 if number % 4 == 0 else 12, 24) for number in range(40)]
    for request in requests[:4]:
        scheduler.add(request)
    arriving, steps = requests[4:], []
    while scheduler.has_work or arriving:
        if arriving and len(steps) % 2 == 0:
            scheduler.add(arriving.pop(0))
        schedule = advance(scheduler)
        if schedule is not None:
            steps.append([sum(work.count for work in works) for works in schedule.ranks])
    assert all(request.is_finished for request in requests)
    fullest = sum(max(tokens) for tokens in steps)
    mean = sum(sum(tokens) / len(tokens) for tokens in steps)
    return fullest / mean, steps


def test_balance_evens_out_what_ranks_compute_under_skewed_arrivals():
    plain, plain_steps = serve_skewed_arrivals()
    even, even_steps = serve_skewed_arrivals(attention_dp_balance=True)
    # All tokens are computed either way, in about as many steps.
    assert sum(map(sum, plain_steps)) == sum(map(sum, even_steps))
    assert len(even_steps) < 1.05 * len(plain_steps)
    assert plain > 2.3 and even < 1.5


def test_with_balance_new_requests_start_in_the_same_step_on_all_ranks():
    scheduler = make_scheduler(attention_dp_balance=True, attention_dp_batching_wait_iters=0)
    for number in range(4):
        scheduler.add(make_request(number, 12, 60))
    advance(scheduler)
    for number in range(4, 8):
        scheduler.add(make_request(number, 12, 4))
        schedule = advance(scheduler)
        assert schedule is not None
        started = [sum(not work.is_decode for work in works) for works in schedule.ranks]
        assert started == ([1] * 4 if number == 7 else [0] * 4)


def test_with_balance_a_lone_request_starts_after_the_timeout():
    timeout: dict[str, Any] = dict(attention_dp_timeout_iters=5, attention_dp_batching_wait_iters=0)
    scheduler = make_scheduler(attention_dp_balance=True, **timeout)
    for number in range(4):
        scheduler.add(make_request(number, 12, 60))
    advance(scheduler)
    scheduler.add(make_request(4, 12, 4))
    admitted = []
    for _ in range(6):
        schedule = advance(scheduler)
        assert schedule is not None
        admitted.append(len(schedule.admitted))
    assert admitted == [0, 0, 0, 0, 1, 0]
