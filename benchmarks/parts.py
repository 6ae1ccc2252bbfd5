"""Splits a decode step's time on the device by the named scopes of the source.

Kernels inside a command buffer carry no source: profile with
`--compiler-option 'xla_gpu_enable_command_buffer=""'`.
"""

import gzip
import json
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from llmjax import LLM, SamplingParams

SCOPES = ("attend", "attention", "mlp", "sample", "embed", "unpack", "final_norm")
"""Scopes of the step, inner ones before the scopes that hold them."""
STEPS = 16
"""Decode steps that are profiled."""


class Event(NamedTuple):
    """One kernel or copy on a GPU's streams; times in microseconds."""

    start: float
    duration: float
    source: str
    """Path of scopes in the source; empty for what XLA made up."""


def measure_parts(llm: LLM, batch: int, prompt: int, new: int) -> dict[str, float]:
    """Milliseconds of each part of a decode step, read from a profile; empty if it has none.

    `new` tokens must outlast the prefill of the whole batch and the profile.
    """
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    # A stream queues its request when it is first read: all at once, so that they run together.
    groups = llm._submit([[i + 5] * prompt for i in range(batch)], [params] * batch)
    for (one,) in groups:
        while not one.deltas:
            llm._advance(one)
    with tempfile.TemporaryDirectory() as folder:
        first = llm.engine.stats.steps
        options = jax.profiler.ProfileOptions()
        # Tracing every Python call would slow down the host, and show up as idle time.
        options.python_tracer_level = 0
        with jax.profiler.trace(folder, profiler_options=options):
            while llm.engine.has_work and llm.engine.stats.steps < first + STEPS:
                llm.engine.step()
        steps = llm.engine.stats.steps - first
        events = read_events(Path(folder))
    for group in groups:
        llm._close(group)
    return {part: total / steps / 1e3 for part, total in sum_parts(events).items()}


def sum_parts(events: Sequence[Event]) -> dict[str, float]:
    """Microseconds of each part; "idle" is the time between two events on any stream."""
    if not events:
        return {}
    totals: defaultdict[str, float] = defaultdict(float)
    busy_until = min(events).start
    for event in sorted(events):
        totals[find_scope(event.source)] += event.duration
        totals["idle"] += max(event.start - busy_until, 0)
        busy_until = max(busy_until, event.start + event.duration)
    return dict(sorted(totals.items()))


def find_scope(source: str) -> str:
    """The innermost scope of ours in a path such as jit(step)/while/body/mlp/dot_general."""
    path = source.split("/")
    return next((scope for scope in SCOPES if scope in path), "other")


def read_events(folder: Path) -> list[Event]:
    """Everything that ran on a GPU's streams."""
    events = []
    for file in folder.rglob("*.trace.json.gz"):
        content = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        devices = {
            event["pid"]
            for event in content
            if event.get("name") == "process_name" and "GPU" in event["args"]["name"]
        }
        events += [_read_event(event) for event in content if _is_run(event, devices)]
    return events


def _is_run(event: dict[str, Any], devices: set[int]) -> bool:
    return event.get("pid") in devices and event.get("ph") == "X"


def _read_event(event: dict[str, Any]) -> Event:
    source = event.get("args", {}).get("name", "")
    return Event(start=event["ts"], duration=event["dur"], source=source)
