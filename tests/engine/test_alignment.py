"""New requests wait for each other under attention data parallelism, but not for long."""

from llmjax.engine.alignment import PrefillAlignment

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
