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

from llmjax import LLM, SamplingParams
from llmjax.distributed import broadcast, check_agreement, initialize

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "llama"


def build(**plan: Any) -> LLM:
    """A tiny model in few buckets."""
    return LLM(
        GOLDEN,
        max_seq_len=128,
        max_batch_size=4,
        batch_buckets=(4,),
        max_num_tokens=32,
        kv_cache_max_tokens=512,
        **plan,
    )


def show_plan(prompts: list[list[int]], **plan: Any) -> dict[str, Any]:
    """Greedy tokens under a plan, and which arrays this process holds as a whole."""
    llm = build(**plan)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    outputs = llm.generate(prompts, params)
    streamed = [token for delta in llm.stream(prompts[0], params) for token in delta.token_ids]
    runner = llm.engine.runner
    arrays = jax.tree.leaves((runner.weights, runner.state.cache))
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "streamed": streamed,
        "sharded": sum(not array.is_fully_replicated for array in arrays),
        "sharded and whole here": sum(
            array.is_fully_addressable for array in arrays if not array.is_fully_replicated
        ),
        "whole here": sum(array.is_fully_addressable for array in arrays),
    }


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
    stored = np.load(GOLDEN / "io.npz")
    prompts = [*stored["prompt"].tolist(), *stored["input_ids"].tolist()]
    if task == "agree":
        seen: dict[str, Any] = {
            "tp=4": show_plan(prompts, tensor_parallel_size=4),
            "dp=2,tp=2": show_plan(prompts, tensor_parallel_size=2, data_parallel_size=2),
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
    llm = build(tensor_parallel_size=4)
    while True:
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=64, ignore_eos=True))
        Path(report).touch()


if __name__ == "__main__":
    main()
