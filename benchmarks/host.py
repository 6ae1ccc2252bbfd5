"""Times the host's part of a decode step, on CPU with a tiny model: python -m benchmarks.host

Counted is the processor time of the thread that generates, from one step's schedule to the next
one's: waiting for devices takes none, nor does what a thread of its own does beside it.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from llmjax import LLM, SamplingParams
from llmjax.tokenizer import load_tokenizer
from llmjax.weights import EMBEDDED_MODEL, open_checkpoint

TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
"""A model that costs the device as little as one can."""


def build(batches: tuple[int, ...], longest: int) -> LLM:
    """An engine for these batch sizes, with random weights and no tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(TINY))
        return LLM(
            folder,
            load_format="dummy",
            progress=False,
            max_batch_size=max(batches),
            max_seq_len=longest,
            max_num_tokens=2048,
            batch_buckets=batches,
            token_buckets=(2048,),
        )


def measure_host(llm: LLM, batch: int, prompt: int, new: int) -> float:
    """Milliseconds of the host's time for a step in which all of the batch decodes."""
    engine, marks = llm.engine, []
    step = engine.step

    def step_and_mark() -> Any:
        marks.append((time.thread_time(), engine.stats.tokens, engine.stats.steps))
        return step()

    prompts = [[10 + i % 900] * prompt for i in range(batch)]
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    engine.step = step_and_mark
    try:
        llm.generate(prompts, params, use_tqdm=False)
    finally:
        engine.step = step
    took = [
        end[0] - start[0]
        for start, end in zip(marks, marks[1:], strict=False)
        if (end[1] - start[1], end[2] - start[2]) == (batch, 1)
    ]
    return 1e3 * statistics.median(took)


def main() -> None:
    """Prints a row for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", default="1,32,256")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    arguments = parser.parse_args()
    batches = tuple(int(batch) for batch in arguments.batches.split(","))
    llm = build(batches, arguments.prompt + arguments.new)
    tokenizer = load_tokenizer(open_checkpoint(EMBEDDED_MODEL, needs_weights=False).path)
    print(f"Python {platform.python_version()}, JAX {jax.__version__}; ms of host time a step")
    print("batch  token ids  with text")
    for batch in batches:
        times = []
        for llm.tokenizer in (None, tokenizer):
            times.append(measure_host(llm, batch, arguments.prompt, arguments.new))
        print(f"{batch:5}  {times[0]:9.2f}  {times[1]:9.2f}")


if __name__ == "__main__":
    main()
