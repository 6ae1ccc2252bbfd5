from collections.abc import Iterable
from typing import Any

import pytest

from llmjax.config import ConfigError, SamplingParams
from llmjax.engine.request import Request
from llmjax.engine.schedule import Schedule, SchedulerConfig, Work
from llmjax.engine.scheduler import Scheduler

EOS = 99


def scheduler(**changes: Any) -> Scheduler:
    limits: dict[str, Any] = {
        "num_ranks": 1,
        "max_batch_size": 4,
        "max_num_tokens": 8,
        "max_prefill_requests": 4,
        "page_size": 2,
        "num_pages": 16,
        "max_seq_len": 20,
    }
    return Scheduler(SchedulerConfig(**(limits | changes)))


def request(id: int, prompt: Iterable[int], *, max_tokens: int = 4, **params) -> Request:
    stop_ids = frozenset({EOS, *params.get("stop_token_ids", ())})
    return Request(
        id=id,
        prompt_ids=tuple(prompt),
        params=SamplingParams(**params),
        max_tokens=max_tokens,
        stop_ids=stop_ids,
    )


def step(engine: Scheduler) -> Schedule:
    schedule = engine.schedule()
    assert schedule is not None
    return schedule


def retire(engine: Scheduler, schedule: Schedule, token: int = 1) -> list[Request]:
    works = [work for rank in schedule.ranks for work in rank]
    return engine.retire(schedule, {work.request.id: token for work in works if work.samples})


def run(engine: Scheduler) -> list[Schedule]:
    """Run to the end, each step retired before the next."""
    schedules = []
    while engine.has_work:
        schedules.append(step(engine))
        retire(engine, schedules[-1])
    return schedules


def spans(works: Iterable[Work]) -> list[tuple[int, int, int]]:
    return [(work.request.id, work.start, work.count) for work in works]


def test_a_prompt_longer_than_the_budget_is_fed_in_chunks_and_sampled_at_its_end():
    engine = scheduler(max_num_tokens=4)
    engine.add(request(0, range(10), max_tokens=2))
    works = [schedule.ranks[0][0] for schedule in run(engine)]
    assert spans(works) == [(0, 0, 4), (0, 4, 4), (0, 8, 2), (0, 10, 1)]
    assert [work.samples for work in works] == [False, False, True, True]
    assert [work.is_decode for work in works] == [False, False, False, True]
    assert [len(work.pages) for work in works] == [2, 4, 5, 6]


def test_decodes_come_first_then_chunks_under_way_then_new_requests():
    engine = scheduler(max_num_tokens=6)
    first, second, third = request(0, [1, 2]), request(1, range(8)), request(2, range(50, 55))
    engine.add(first)
    engine.add(second)
    assert spans(step(engine).ranks[0]) == [(0, 0, 2), (1, 0, 4)]
    engine.add(third)
    schedule = step(engine)
    assert spans(schedule.ranks[0]) == [(0, 2, 1), (1, 4, 4), (2, 0, 1)]
    assert schedule.admitted == (third,)


def test_a_decode_is_scheduled_before_its_input_token_is_read():
    engine = scheduler()
    engine.add(request(0, [1, 2, 3]))
    first, second = step(engine), step(engine)
    (work,) = second.ranks[0]
    assert (work.start, work.token_on_device) == (3, True)
    retire(engine, first)
    retire(engine, second)
    (work,) = step(engine).ranks[0]
    assert (work.start, work.token_on_device) == (4, False)


def test_samples_in_flight_count_towards_max_tokens():
    engine = scheduler()
    only = request(0, [1, 2, 3], max_tokens=2)
    engine.add(only)
    first, second = step(engine), step(engine)
    assert engine.schedule() is None
    assert engine.has_work
    retire(engine, first, token=5)
    assert engine.schedule() is None
    assert retire(engine, second, token=6) == [only]
    assert (only.output_ids, only.finish_reason) == ([5, 6], "length")
    assert not engine.has_work


def test_generation_ends_at_max_seq_len():
    engine = scheduler(max_seq_len=6)
    only = request(0, [1, 2, 3], max_tokens=10)
    engine.add(only)
    run(engine)
    assert (only.num_tokens, only.finish_reason) == (6, "length")


@pytest.mark.parametrize(
    ("token", "params", "finish_reason", "stop_reason"),
    [
        (EOS, {}, "stop", None),
        (7, {"stop_token_ids": [7]}, "stop", 7),
        (EOS, {"min_tokens": 1}, None, None),
        (7, {}, None, None),
    ],
)
def test_a_stop_id_ends_the_request_and_says_which(token, params, finish_reason, stop_reason):
    engine = scheduler()
    only = request(0, [1, 2], **params)
    engine.add(only)
    assert retire(engine, step(engine), token=token) == [only]
    assert (only.finish_reason, only.stop_reason) == (finish_reason, stop_reason)
    assert only.output_ids == [token]


def test_a_stop_found_late_drops_the_next_sample_and_frees_the_pages_after_its_step():
    engine = scheduler()
    only = request(0, [1, 2, 3])
    engine.add(only)
    first, second = step(engine), step(engine)
    retire(engine, first, token=EOS)
    assert only.finish_reason == "stop"
    assert engine.blocks[0].num_available == 14
    assert engine.has_work
    assert retire(engine, second, token=5) == []
    assert only.output_ids == [EOS]
    assert engine.blocks[0].num_available == 16
    assert not engine.has_work


def test_pages_past_the_end_are_not_offered_for_reuse():
    engine = scheduler(page_size=1)
    engine.add(request(0, [1, 2, 3]))
    in_flight = [step(engine), step(engine), step(engine)]
    for schedule, token in zip(in_flight, [EOS, 5, 5], strict=True):
        retire(engine, schedule, token)
    # The second step fed the stop token at position 3, the third a dropped one at position 4.
    assert engine.blocks[0].num_cached == 4


def test_a_known_prefix_is_not_computed_again():
    engine = scheduler()
    engine.add(request(0, range(5), max_tokens=1))
    run(engine)
    second = request(1, range(5), max_tokens=1)
    engine.add(second)
    assert spans(step(engine).ranks[0]) == [(1, 4, 1)]
    assert second.num_cached == 4


def test_prompt_logprobs_compute_every_position_and_share_it_afterwards():
    engine = scheduler()
    engine.add(request(0, range(5), max_tokens=1))
    run(engine)
    engine.add(request(1, range(5), max_tokens=1, prompt_logprobs=1))
    assert spans(run(engine)[0].ranks[0]) == [(1, 0, 5)]
    engine.add(request(2, range(5), max_tokens=1))
    assert spans(run(engine)[0].ranks[0]) == [(2, 4, 1)]


def test_the_latest_arrival_gives_its_pages_to_an_earlier_one_and_comes_back_first():
    engine = scheduler(num_pages=6, max_batch_size=2, enable_block_reuse=False)
    first, second, third = (request(id, [id, 7, 8], max_tokens=7) for id in range(3))
    for each in (first, second, third):
        engine.add(each)
    schedules = run(engine)
    (index,) = [schedule.index for schedule in schedules if schedule.preempted]
    assert schedules[index].preempted == (second,)
    assert schedules[index].admitted == ()
    admissions = [each for schedule in schedules for each in schedule.admitted]
    assert admissions == [first, second, second, third]
    assert [each.num_outputs for each in (first, second, third)] == [7, 7, 7]
    (recomputed,) = [
        work
        for schedule in schedules[index:]
        if second in schedule.admitted
        for work in schedule.ranks[0]
        if work.request is second
    ]
    assert recomputed.start == 0
    assert recomputed.count > 3
    assert (second.num_preemptions, engine.num_preemptions) == (1, 1)


def preempt_in_flight(engine: Scheduler) -> tuple[Request, Request, list[Schedule]]:
    """Two requests and the steps in flight when the first one takes the second one's pages."""
    first, second = request(0, [1, 2, 3, 4], max_tokens=6), request(1, [5, 6, 7, 8], max_tokens=6)
    engine.add(first)
    engine.add(second)
    in_flight = [step(engine), step(engine), step(engine)]
    assert second.num_preemptions == 0
    assert engine.schedule() is None
    assert second.num_preemptions == 1
    return first, second, in_flight


def test_pages_of_a_preempted_request_wait_for_its_steps_in_flight():
    engine = scheduler(num_pages=5, max_batch_size=2)
    first, second, in_flight = preempt_in_flight(engine)
    assert engine.schedule() is None
    assert (len(second.pages), second.in_flight) == (2, 1)
    retire(engine, in_flight[0])
    assert (second.pages, second.output_ids) == ([], [1])
    schedule = step(engine)
    assert spans(schedule.ranks[0]) == [(0, 6, 1)]
    assert schedule.preempted == (second,)
    for each in [*in_flight[1:], schedule]:
        retire(engine, each)
    run(engine)
    assert [len(each.output_ids) for each in (first, second)] == [6, 6]


def test_pages_about_to_be_free_are_waited_for_rather_than_preempting():
    engine = scheduler(num_pages=7, max_num_tokens=12)
    for id, prompt in enumerate([range(4), range(5, 9), [9, 9]]):
        engine.add(request(id, prompt))
    in_flight = [step(engine), step(engine), step(engine)]
    engine.cancel(2)
    assert engine.schedule() is None
    retire(engine, in_flight[0])
    assert spans(step(engine).ranks[0]) == [(0, 6, 1)]
    assert engine.num_preemptions == 0


def test_a_preempted_request_may_come_back_on_another_rank_in_a_later_step():
    engine = scheduler(num_ranks=2, num_pages=5)
    second = request(2, range(5, 9), max_tokens=6)
    engine.add(request(0, range(4), max_tokens=6))
    engine.add(request(1, range(8), max_tokens=1))
    engine.add(second)
    schedules = run(engine)
    (index,) = [schedule.index for schedule in schedules if schedule.preempted]
    assert schedules[index].admitted == ()
    assert schedules[index + 1].admitted == (second,)
    assert [work.request for work in schedules[index + 1].ranks[1]] == [second]


def test_a_preempted_request_may_finish_by_a_token_that_was_in_flight():
    engine = scheduler(num_pages=5, max_batch_size=2)
    first, second, in_flight = preempt_in_flight(engine)
    assert engine.retire(in_flight[0], {0: 1, 1: EOS}) == [first, second]
    assert second.finish_reason == "stop"
    for each in in_flight[1:]:
        retire(engine, each)
    run(engine)
    assert (first.num_outputs, second.output_ids) == (6, [EOS])


def test_requests_go_to_the_rank_that_holds_the_fewest_tokens():
    engine = scheduler(num_ranks=2)
    for id, length in enumerate([5, 2, 2, 2, 1]):
        engine.add(request(id, [id] * length))
    schedule = step(engine)
    assert [spans(works) for works in schedule.ranks] == [
        [(4, 0, 1), (0, 0, 5)],
        [(1, 0, 2), (2, 0, 2), (3, 0, 2)],
    ]


def test_a_request_goes_to_another_rank_when_the_least_loaded_has_no_slot():
    engine = scheduler(num_ranks=2, max_batch_size=2)
    requests = [request(id, [id] * length) for id, length in enumerate([5, 1, 1, 1])]
    for each in requests:
        engine.add(each)
    step(engine)
    assert [each.rank for each in requests] == [0, 1, 1, 0]


def test_the_number_of_prefill_rows_is_limited():
    engine = scheduler(max_prefill_requests=1)
    for id in range(2):
        engine.add(request(id, [id, 1, 2]))
    assert spans(step(engine).ranks[0]) == [(0, 0, 3)]
    assert spans(step(engine).ranks[0]) == [(0, 3, 1), (1, 0, 3)]


def test_without_chunked_prefill_a_prompt_waits_until_it_fits_whole():
    engine = scheduler(max_num_tokens=20, enable_chunked_prefill=False)
    engine.add(request(0, range(12), max_tokens=2))
    engine.add(request(1, range(50, 61), max_tokens=2))
    schedules = [spans(schedule.ranks[0]) for schedule in run(engine)]
    assert schedules == [[(0, 0, 12)], [(0, 12, 1), (1, 0, 11)], [(1, 11, 1)]]


def test_a_large_request_at_the_front_is_not_overtaken():
    engine = scheduler(num_pages=6, max_num_tokens=20)
    engine.add(request(0, range(7), max_tokens=2))
    engine.add(request(1, range(50, 59), max_tokens=2))
    engine.add(request(2, [3], max_tokens=2))
    admitted = [each.id for schedule in run(engine) for each in schedule.admitted]
    # Beside the first one there was room for the third, but not for the second.
    assert admitted == [0, 1, 2]


@pytest.mark.parametrize("state", ["waiting", "running", "in flight"])
def test_a_cancelled_request_keeps_its_tokens_and_gives_back_its_pages(state):
    engine = scheduler()
    only = request(0, [1, 2, 3])
    engine.add(only)
    in_flight = []
    if state != "waiting":
        retire(engine, step(engine), token=5)
    if state == "in flight":
        in_flight = [step(engine)]
    assert engine.cancel(0) is only
    assert only.finish_reason == "abort"
    assert engine.schedule() is None
    for schedule in in_flight:
        assert only.pages
        assert retire(engine, schedule) == []
    assert engine.blocks[0].num_available == 16
    assert only.output_ids == ([] if state == "waiting" else [5])
    assert not engine.has_work


def test_finishing_names_the_stop_text_and_only_the_first_end_counts():
    engine = scheduler()
    only = request(0, [1, 2, 3])
    engine.add(only)
    retire(engine, step(engine))
    assert engine.finish(0, "stop", "\n\n") is only
    assert engine.cancel(0) is None
    assert (only.finish_reason, only.stop_reason) == ("stop", "\n\n")


def test_slots_are_reused_only_after_their_last_step():
    engine = scheduler(max_batch_size=1)
    first, second = request(0, [1]), request(1, [2])
    engine.add(first)
    engine.add(second)
    schedule = step(engine)
    engine.cancel(0)
    assert engine.schedule() is None
    retire(engine, schedule)
    assert step(engine).admitted == (second,)
    assert second.slot == 0


def test_equal_requests_give_equal_digests_and_other_requests_do_not():
    def digest(lengths: list[int]) -> str:
        engine = scheduler(num_ranks=2, num_pages=8)
        for id, length in enumerate(lengths):
            engine.add(request(id, [id] * length))
        run(engine)
        return engine.digest()

    assert digest([5, 2, 7, 3]) == digest([5, 2, 7, 3])
    assert digest([5, 2, 7, 3]) != digest([5, 2, 3, 7])


def test_steps_must_retire_in_order():
    engine = scheduler()
    engine.add(request(0, [1]))
    first, second = step(engine), step(engine)
    with pytest.raises(RuntimeError, match="step 1 is retired but step 0 is next"):
        retire(engine, second)
    retire(engine, first)
    with pytest.raises(RuntimeError, match="step 0 is retired but step 1 is next"):
        retire(engine, first)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        (range(20), 1, "use at most 19 prompt tokens"),
        (range(9), 9, r"needs? the keys and values of 17 tokens .* room for 16 .*max_tokens <= 8"),
        ([], 1, "0 prompt tokens"),
        ([1], 0, "max_tokens=0"),
    ],
)
def test_a_request_that_can_never_run_is_refused(prompt, max_tokens, message):
    engine = scheduler(num_pages=8)
    with pytest.raises(ValueError, match=message):
        engine.add(request(0, prompt, max_tokens=max_tokens))
    assert not engine.has_work


def test_the_largest_request_that_fits_the_pages_runs():
    engine = scheduler(num_pages=8)
    only = request(0, range(9), max_tokens=8)
    engine.add(only)
    run(engine)
    assert only.num_outputs == 8


def test_an_id_in_use_is_refused():
    engine = scheduler()
    engine.add(request(0, [1]))
    with pytest.raises(ValueError, match="request id 0 is in use"):
        engine.add(request(0, [2]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_num_tokens": 3}, "max_num_tokens=3 must be at least max_batch_size=4"),
        ({"enable_chunked_prefill": False}, "use at least max_seq_len=20"),
    ],
)
def test_limits_that_would_starve_requests_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        scheduler(**changes)
