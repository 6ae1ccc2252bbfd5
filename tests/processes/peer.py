"""One of two processes with two virtual CPU devices each, for test_multiprocess.py.

Called with the coordinator's address, the number of this process, what it shall do, and the file
for what it saw.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

# XLA sizes its threads from NPROC; each virtual device needs one in a collective.
os.environ["NPROC"] = "32"

import jax
import numpy as np
import platformdirs
from jax.sharding import Mesh

from llmjax import LLM, ParallelPlan, SamplingParams
from llmjax.distributed import broadcast, check_agreement, initialize

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
ACROSS = {
    "tp": ("llama", ParallelPlan(tp=4)),
    "dp": ("llama", ParallelPlan(dp=2, tp=2)),
    "pp": ("llama", ParallelPlan(pp=2, tp=2)),
    "ep": ("qwen3_moe", ParallelPlan(ep=4)),
    "cp": ("llama", ParallelPlan(cp=2, tp=2)),
}
"""A model and a plan for each mesh axis that shall have ranks in both processes."""


def build(family: str, plan: ParallelPlan) -> LLM:
    """A tiny model in few buckets."""
    return LLM(
        GOLDEN / family,
        plan=plan,
        max_seq_len=128,
        max_batch_size=4,
        batch_buckets=(4,),
        max_num_tokens=32,
        kv_cache_max_tokens=512,
    )


def read_prompts(family: str) -> list[list[int]]:
    """The stored prompts; the first one's greedy continuation is stored too."""
    stored = np.load(GOLDEN / family / "io.npz")
    return [*stored["prompt"].tolist(), *stored["input_ids"].tolist()]


def show_plan(family: str, plan: ParallelPlan) -> dict[str, Any]:
    """Greedy tokens under a plan, and which arrays this process holds as a whole."""
    llm, prompts = build(family, plan), read_prompts(family)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    outputs = llm.generate(prompts, params)
    streamed = [token for delta in llm.stream(prompts[0], params) for token in delta.token_ids]
    runner = llm.engine.runner
    arrays = jax.tree.leaves((runner.weights, runner.state.cache))
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "streamed": streamed,
        "across": axes_across_processes(runner.mesh),
        "sharded": sum(not array.is_fully_replicated for array in arrays),
        "whole here": sum(array.is_fully_addressable for array in arrays),
    }


def axes_across_processes(mesh: Mesh) -> list[str]:
    """The mesh axes whose neighbours lie in different processes."""
    hosts = np.array([device.process_index for device in mesh.devices.flat])
    hosts = hosts.reshape(mesh.devices.shape)
    return [name for index, name in enumerate(mesh.axis_names) if np.ptp(hosts, axis=index).any()]


def disagree(host_id: int) -> str:
    """What the processes are told that were started with different lengths."""
    try:
        check_agreement({"max_seq_len": str(128 * (1 + host_id))})
    except RuntimeError as error:
        return str(error)
    return "agreed"


def main() -> None:
    """Does what was asked for, and writes down what it saw."""
    coordinator, host_id, task, report = sys.argv[1:]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    cache = platformdirs.user_cache_path("llmjax") / "test-programs"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    initialize(coordinator, 2, int(host_id))
    if task == "agree":
        seen: dict[str, Any] = {
            "plans": {axis: show_plan(*of_axis) for axis, of_axis in ACROSS.items()},
            "broadcast": broadcast({"from": int(host_id), "text": "é" * 300_000}),
            "disagreement": disagree(int(host_id)),
        }
        Path(report).write_text(json.dumps(seen))
        return
    if task == "load":
        Path(report).touch()
        # The other one is killed while this one waits for it, so this never returns.
        if host_id == "0":
            check_agreement({})
        else:
            sys.stdin.read()
    family, plan = ACROSS["tp"]
    llm, prompts = build(family, plan), read_prompts(family)
    while True:
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=64, ignore_eos=True))
        Path(report).touch()


if __name__ == "__main__":
    main()
