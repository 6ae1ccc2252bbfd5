"""Splits a decode step's device time by the named scopes of the source."""

import gzip
import json
import re
import tempfile
from collections import defaultdict
from pathlib import Path

import jax

from llmjax import LLM, SamplingParams

SCOPES = ("attend", "attention", "mlp", "sample", "embed", "unpack", "final_norm")
"""Scopes of the step, inner ones before the scopes that hold them."""
STEPS = 16
"""Decode steps that are profiled."""


def measure_parts(llm: LLM, batch: int, prompt: int, new: int) -> dict[str, float]:
    """Milliseconds of each part of a decode step, read from a profile; empty if it has none.

    `new` tokens must outlast the prefill of the whole batch and the profile.
    """
    runner = llm.engine.runner
    bucket = next(b for b in runner.buckets if b.decodes >= batch and not b.prefill_tokens)
    scope_of = read_scopes(runner.compiled_text(bucket))
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    streams = [llm.stream([i + 5] * prompt, params) for i in range(batch)]
    for stream in streams:
        next(stream)
    with tempfile.TemporaryDirectory() as folder:
        first = llm.engine.stats.steps
        with jax.profiler.trace(folder):
            while llm.engine.has_work and llm.engine.stats.steps < first + STEPS:
                llm.engine.step()
            jax.block_until_ready(runner.state)
        steps = llm.engine.stats.steps - first
        events = read_events(Path(folder))
    for stream in streams:
        stream.close()
    totals: defaultdict[str, float] = defaultdict(float)
    for operation, microseconds in events:
        totals[scope_of.get(operation, "other")] += microseconds
    return {part: total / steps / 1e3 for part, total in sorted(totals.items())}


def read_scopes(program: str) -> dict[str, str]:
    """Operation of a compiled program -> the scope that its source lies in.

    An operation that XLA made up carries no source and stays "other".
    """
    scopes = {}
    pattern = r"%?([\w.-]+) = [^\n]*op_name=\"([^\"]+)\""
    for operation, source in re.findall(pattern, program):
        path = source.split("/")
        scopes[operation] = next((scope for scope in SCOPES if scope in path), "other")
    return scopes


def read_events(folder: Path) -> list[tuple[str, float]]:
    """(operation, microseconds) of everything that ran on a GPU's streams."""
    events = []
    for file in folder.rglob("*.trace.json.gz"):
        content = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        devices = {
            event["pid"]
            for event in content
            if event.get("name") == "process_name" and "GPU" in event["args"]["name"]
        }
        for event in content:
            operation = event.get("args", {}).get("hlo_op")
            if event.get("pid") in devices and operation and "dur" in event:
                events.append((operation, event["dur"]))
    return events
