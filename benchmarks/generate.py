"""Times generation end to end and by part: python -m benchmarks.generate --model qwen3-8b

The method is that of the peers' table in docs/performance.md: prompts of random ids, `new` tokens
each; the time per output token is a whole run less a run of one token, over the tokens between.
"""

import argparse
import datetime
import importlib
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.parts import measure_parts
from llmjax import LLM, SamplingParams

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-8b": {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
}
"""Published configurations that run with random weights."""

READ_GBPS = {"NVIDIA H200": 4603.0}
"""Measured read bandwidth, for the byte floor."""


def build(model: str, batches: Sequence[int], longest: int, options: dict[str, Any]) -> LLM:
    """An engine with one bucket a batch size, so that few programs are compiled."""
    common: dict[str, Any] = dict(
        max_seq_len=longest,
        max_batch_size=max(batches),
        batch_buckets=tuple(batches),
        enable_block_reuse=False,
        progress=False,
        **options,
    )
    if model not in SHAPES:
        return LLM(model, **common)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[model]))
        return LLM(folder, load_format="dummy", **common)


def time_run(llm: LLM, batch: int, prompt: int, new: int, seed: int) -> float:
    """Seconds for one batch of fresh random prompts."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(10, llm.config.vocab_size - 10, (batch, prompt)).tolist()
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    assert all(len(output.outputs[0].token_ids) == new for output in outputs)
    return seconds


def byte_floor_ms(llm: LLM, batch: int, context: int) -> float | None:
    """Time to read every weight but the embedding, and the batch's keys and values, once.

    Of routed experts only those count that the batch is expected to use.
    """
    bandwidth = READ_GBPS.get(jax.devices()[0].device_kind)
    if bandwidth is None:
        return None
    weights = llm.engine.runner.weights
    read = {key: value for key, value in weights.items() if key != "embedding"}
    if "output" not in weights:
        read = weights
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(read))
    if experts := llm.config.experts:
        unused = (1 - experts.top_k / experts.num_experts) ** batch
        total -= unused * sum(leaf.nbytes for leaf in jax.tree.leaves(weights["experts"]))
    config, size = llm.config, jax.tree.leaves(weights)[0].dtype.itemsize
    cached = 2 * config.num_layers * config.num_kv_heads * config.head_dim * size
    return (total + batch * context * cached) / bandwidth / 1e6


def without_attention_kernels() -> None:
    """Makes attention over pages and writing to them take the reference, for the whole process."""

    def refuse(device: Any) -> None:
        raise NotImplementedError(f"the reference was asked for, on {device.device_kind}")

    package = importlib.import_module("pallas_kernels.paged_attention")
    vars(package)["check_hopper"] = refuse


def measure(llm: LLM, batch: int, prompt: int, new: int) -> dict[str, Any]:
    """One row of the table."""
    time_run(llm, batch, prompt, 4, seed=0)
    one = min(time_run(llm, batch, prompt, 1, seed=seed) for seed in (1, 2))
    whole = time_run(llm, batch, prompt, new, seed=3)
    tpot = (whole - one) / (new - 1)
    return {
        "batch": batch,
        "prompt": prompt,
        "new": new,
        "tpot_ms": 1e3 * tpot,
        "decode_tokens_per_s": batch / tpot,
        "output_tokens_per_s": batch * new / whole,
        "prefill_tokens_per_s": batch * prompt / one,
        "floor_ms": byte_floor_ms(llm, batch, prompt + new // 2),
        "parts_ms": measure_parts(llm, batch, prompt, new),
    }


def main() -> None:
    """Runs the benchmark and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen3-8b")
    parser.add_argument("--batches", default="1,32,256")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--layer-loop", default=None, choices=["scan", "unroll"])
    parser.add_argument("--token-buckets", default="512,8192")
    parser.add_argument("--compiler-option", action="append", default=[], metavar="NAME=JSON")
    parser.add_argument(
        "--reference-attention",
        action="store_true",
        help="attend to pages, and write them, by XLA, to compare",
    )
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    batches = [int(batch) for batch in arguments.batches.split(",")]
    buckets = tuple(int(size) for size in arguments.token_buckets.split(","))
    pairs = (option.split("=", 1) for option in arguments.compiler_option)
    options: dict[str, Any] = {name: json.loads(value) for name, value in pairs}
    if arguments.reference_attention:
        without_attention_kernels()
    started = time.perf_counter()
    llm = build(
        arguments.model,
        batches,
        arguments.prompt + arguments.new,
        dict(
            dtype=arguments.dtype,
            layer_loop=arguments.layer_loop,
            token_buckets=buckets,
            max_num_tokens=buckets[-1],
            **({"compiler_options": options} if options else {}),
        ),
    )
    result: dict[str, Any] = {
        "model": arguments.model,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "dtype": str(jax.tree.leaves(llm.engine.runner.weights)[0].dtype),
        "layer_loop": llm.engine.runner.maker.options.layer_loop,
        "compiler_options": options,
        "reference_attention": arguments.reference_attention,
        "start_up_s": time.perf_counter() - started,
        "rows": [],
    }
    print(f"started in {result['start_up_s']:.1f} s", flush=True)
    for batch in batches:
        row = measure(llm, batch, arguments.prompt, arguments.new)
        result["rows"].append(row)
        print(json.dumps(row), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
