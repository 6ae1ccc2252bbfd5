"""The engine on a Hopper GPU: it takes the kernels by itself, and they change only rounding."""

import importlib
import json
import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import backend

from llmjax import LLM, SamplingParams
from llmjax.engine import runner

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
KERNELS = (
    "store_sm90", "decode_sm90", "prefill_sm90", "mosaic_sm90", "few_rows_sm90", "route_sm90",
    "sort_sm90",
)  # fmt: skip


def build(folder):
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return LLM(
        folder,
        load_format="dummy",
        dtype="bfloat16",
        max_seq_len=256,
        max_batch_size=2,
        max_num_tokens=256,
        batch_buckets=(2,),
        token_buckets=(256,),
        kv_cache_max_tokens=1024,
    )


def logprobs_of(entries, ids):
    return np.array([entry[token].logprob for entry, token in zip(entries, ids, strict=True)])


@pytest.fixture
def picks(caplog):
    """What the kernels' packages say that they picked, from here on."""
    # The packages have functions of these names, too.
    for name in ("grouped_gemm", "paged_attention"):
        importlib.import_module(f"pallas_kernels.{name}")._log_pick.cache_clear()
    caplog.set_level(logging.INFO, logger="pallas_kernels")
    return caplog


def test_steps_with_the_kernels_lower_for_cuda(tmp_path, monkeypatch, picks):
    # Nothing runs, so nothing is compiled for the CPU.
    monkeypatch.setattr(runner, "compile_steps", lambda lowered, compiler_options: lowered)
    engine = build(tmp_path).engine.runner
    hopper = SimpleNamespace(
        platform="gpu", compute_capability="9.0", core_count=132, device_kind="a Hopper"
    )
    monkeypatch.setattr(backend, "get_default_device", lambda: hopper)
    picks.clear()
    # Inner functions were traced for the CPU.
    jax.clear_caches()
    for bucket in engine.buckets:
        shape = (engine.num_stages, engine.num_ranks, bucket.num_numbers)
        packed = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=engine._packed_sharding)
        with engine._tracing():
            traced = jax.jit(engine.maker.make(bucket)).trace(engine.weights, engine.state, packed)
            traced.lower(lowering_platforms=("cuda",))
    jax.clear_caches()
    assert all(f"runs as {kernel}: on a Hopper" in picks.text for kernel in KERNELS), picks.text
    assert "runs as reference" not in picks.text


@pytest.mark.gpu
def test_engine_takes_the_kernels_and_agrees_with_the_reference(tmp_path, monkeypatch, picks):
    prompts = np.random.default_rng(0).integers(5, 500, (2, 100)).tolist()
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=0)
    outputs = build(tmp_path).generate(prompts, greedy, use_tqdm=False)
    assert all(f"runs as {kernel}" in picks.text for kernel in KERNELS), picks.text

    def refuse():
        raise NotImplementedError("the reference is wanted")

    paged = importlib.import_module("pallas_kernels.paged_attention")
    grouped = importlib.import_module("pallas_kernels.grouped_gemm")
    monkeypatch.setattr(paged, "_hopper_device", refuse)
    monkeypatch.setattr(grouped, "_is_hopper", lambda device: False)
    jax.clear_caches()
    reference = build(tmp_path)
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = output.outputs[0].token_ids
        score = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        (scored,) = reference.generate([prompt + list(ids)], score, use_tqdm=False)
        assert scored.prompt_logprobs is not None
        want = logprobs_of(scored.prompt_logprobs[len(prompt) :], ids)
        mine = logprobs_of(output.outputs[0].logprobs, ids)
        np.testing.assert_allclose(mine, want, atol=0.05)
