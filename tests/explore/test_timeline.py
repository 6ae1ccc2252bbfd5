"""Timelines of pipeline stages, against an engine that ran."""

from copy import copy
from pathlib import Path

import pytest

from llmjax import LLM, ParallelPlan, SamplingParams
from llmjax.engine.stats import EngineStats, Tick
from llmjax.explore import compare_occupancy, draw_timeline, record_ticks

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
STAGES = 3


@pytest.fixture(scope="module")
def ran() -> tuple[LLM, list[Tick], EngineStats]:
    """An engine with three stages, the ticks in which it served three requests, its counts then."""
    llm = LLM(
        GOLDEN / "llama",
        plan=ParallelPlan(pp=STAGES),
        max_batch_size=3,
        batch_buckets=(1,),
        max_num_tokens=16,
        token_buckets=(16,),
        max_seq_len=32,
        kv_cache_max_tokens=128,
        progress=False,
    )
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    with record_ticks(llm.engine) as ticks:
        llm.generate([[3, 4, 5, 6], [7, 8], [9]], params)
    return llm, ticks, copy(llm.engine.stats)


def test_in_a_timeline_each_micro_batch_moves_a_stage_a_tick_with_its_tokens(ran):
    table = draw_timeline(ran[1], title="three requests")
    stages = [row[1:] for row in table.rows[:STAGES]]
    entered = [cell for cell in stages[0] if cell != "."]
    assert entered[0] == "#0: 7", "all three prompts enter together"
    for above, below in zip(stages, stages[1:], strict=False):
        assert below[0] == "." and below[1:] == above[:-1]
    assert table.rows[STAGES] == ("room", *(str(tick.room) for tick in ran[1]))


def test_a_micro_batch_keeps_its_shade_and_an_idle_stage_has_none(ran):
    table = draw_timeline(ran[1], title="three requests")
    for texts, shades in zip(table.rows[:STAGES], table.shades, strict=False):
        for text, shade in zip(texts[1:], shades[1:], strict=True):
            assert text.startswith("." if shade is None else f"#{shade}: ")


def test_a_timeline_of_some_ticks_keeps_their_numbers(ran):
    table = draw_timeline(ran[1][4:6], title="two ticks", first=4)
    assert table.columns == ("", "tick 4", "tick 5")


def test_occupancy_is_that_of_the_engines_counters(ran):
    _, ticks, stats = ran
    shares = [f"{share:.0%}" for share in stats.stage_occupancy]
    row = compare_occupancy({"three requests": ticks}).rows[0]
    assert row == ("three requests", str(stats.ticks), str(stats.tokens), *shares)


def test_nothing_is_recorded_after_the_block(ran):
    llm, ticks, _ = ran
    before = len(ticks)
    llm.generate([[3, 4]], SamplingParams(max_tokens=2))
    assert len(ticks) == before and llm.engine.watchers == []
