"""What the stages of a pipeline ran, tick by tick, from the counters of a real run."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from llmjax.engine.engine import Engine
from llmjax.engine.stats import EngineStats, Tick
from llmjax.explore.table import Table

IDLE = "."


@contextmanager
def record_ticks(engine: Engine) -> Iterator[list[Tick]]:
    """Collects every step that the engine reads inside the block."""
    ticks: list[Tick] = []
    engine.watchers.append(ticks.append)
    try:
        yield ticks
    finally:
        engine.watchers.remove(ticks.append)


def draw_timeline(ticks: Sequence[Tick], *, title: str, first: int = 0) -> Table:
    """Stages down, ticks across: each cell has its micro-batch and how many tokens it carries.

    A micro-batch keeps its shade on its way. The last row is the tokens that the tick's bucket has
    room for, at each stage. `first` is the number of the first tick.
    """
    stages = range(len(ticks[0].stages)) if ticks else range(0)
    return Table(
        title=title,
        columns=("", *(f"tick {tick}" for tick in range(first, first + len(ticks)))),
        rows=(
            *((f"stage {stage}", *(_name(tick, stage) for tick in ticks)) for stage in stages),
            ("room", *(str(tick.room) for tick in ticks)),
        ),
        shades=(
            *((None, *(_number(tick, stage) for tick in ticks)) for stage in stages),
            (None,) * (1 + len(ticks)),
        ),
    )


def compare_occupancy(runs: Mapping[str, Sequence[Tick]]) -> Table:
    """How much of each stage's work was for a request, in several runs."""
    stages = max((len(tick.stages) for ticks in runs.values() for tick in ticks), default=0)
    return Table(
        title="Occupancy of each stage: its tokens over those that it had room for",
        columns=("run", "ticks", "tokens", *(f"stage {stage}" for stage in range(stages))),
        rows=tuple((name, *_measure(ticks, stages)) for name, ticks in runs.items()),
    )


def _measure(ticks: Sequence[Tick], stages: int) -> tuple[str, ...]:
    stats = EngineStats()
    for tick in ticks:
        stats.count_tick(tick)
    shares = [f"{share:.0%}" for share in stats.stage_occupancy]
    missing = [""] * (stages - len(shares))
    return str(stats.ticks), str(max(stats.stage_tokens, default=0)), *shares, *missing


def _name(tick: Tick, stage: int) -> str:
    number = _number(tick, stage)
    return IDLE if number is None else f"#{number}: {tick.tokens[stage]}"


def _number(tick: Tick, stage: int) -> int | None:
    schedule = tick.stages[stage]
    return None if schedule is None else schedule.index
