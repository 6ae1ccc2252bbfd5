"""Counts what pipeline stages compute for nothing, on virtual CPU devices:
python -m benchmarks.pipeline

Prompts of random length come while others decode. Occupancy is read from the counters of the
stages; the work of a stage is the tokens of all buckets that it ran. Nothing is timed.
"""

import argparse
import json
import tempfile
from pathlib import Path

import jax
import numpy as np

from benchmarks.host import TINY
from llmjax import LLM, ParallelPlan, SamplingParams
from llmjax.engine.engine import Engine
from llmjax.engine.request import Request
from llmjax.engine.stats import EngineStats

LAYERS = 4
REQUESTS, NEW_TOKENS, LONGEST = 48, 32, 500


def build(stages: int) -> LLM:
    """A tiny model with random weights, in the buckets that an engine has by default."""
    config = {**TINY, "num_hidden_layers": LAYERS}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return LLM(
            folder,
            plan=ParallelPlan(pp=stages),
            load_format="dummy",
            progress=False,
            enable_block_reuse=False,
        )


def serve(llm: LLM, gap: int) -> EngineStats:
    """What the stages counted while a request came every `gap` ticks."""
    engine, draw = Engine(llm.engine.runner), np.random.default_rng(0)
    lengths = draw.integers(10, LONGEST, REQUESTS).tolist()
    submitted = 0
    while submitted < REQUESTS or engine.has_work:
        while submitted < REQUESTS and submitted * gap <= engine.stats.steps:
            ids = draw.integers(3, 900, lengths[submitted]).tolist()
            engine.submit(
                Request(
                    id=submitted,
                    prompt_ids=tuple(ids),
                    params=SamplingParams(temperature=0),
                    max_tokens=NEW_TOKENS,
                    stop_ids=frozenset(),
                )
            )
            submitted += 1
        engine.step()
    return engine.stats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--gaps", type=int, nargs="+", default=[0, 8, 24])
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(arguments.stages))
    print("| stages | ticks between requests | occupancy | work of a stage | ticks |")
    print("|---|---|---|---|---|")
    for stages in arguments.stages:
        llm = build(stages)
        for gap in arguments.gaps:
            stats = serve(llm, gap)
            occupancy = f"{min(stats.stage_occupancy):.2f}"
            print(f"| {stages} | {gap} | {occupancy} | {stats.stage_room} | {stats.ticks} |")


if __name__ == "__main__":
    main()
