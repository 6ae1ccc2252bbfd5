"""A compiled step on context ranks: what it sends in each layer, and what it holds."""

import json
from collections import Counter
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from llmjax.config import EngineConfig, ModelConfig
from llmjax.engine.runner import Runner
from llmjax.explore.steps import read_steps
from llmjax.models.decoder import cache_shapes
from llmjax.models.registry import find_family
from llmjax.weights.model import declared_params, nest
from meshes import ParallelPlan, Rules, make_mesh

GOLDEN = Path(__file__).parent.parent / "golden"
CONTEXT = ("cp",)
MERGE = {("all-gather", "always"): 1, ("all-to-all", "always"): 1}
"""Decode tokens are collected, and what the ranks find for them is merged."""
CACHED = {("all-gather", "branch"): 1, ("all-to-all", "branch"): 1}
"""The same for prefill tokens, in a branch that runs where a prompt has something cached."""


def read_config(family: str) -> ModelConfig:
    document = json.loads((GOLDEN / family / "config.json").read_text())
    return find_family(document).read_config(document)


@cache
def sent_in_attention(family: str, plan: ParallelPlan) -> dict[str, Counter[tuple[str, str]]]:
    engine = EngineConfig(
        max_batch_size=4,
        batch_buckets=(4,),
        max_num_tokens=32,
        token_buckets=(32,),
        max_seq_len=64,
        kv_cache_max_tokens=256,
        tokens_per_block=4,
        dtype="float32",
    )
    found = {}
    for step in read_steps(read_config(family), plan, engine).steps:
        found[step.name] = Counter()
        for each in step.collectives:
            if each.axes == CONTEXT and each.part == "attention":
                found[step.name][each.kind, each.when] += each.count
    return found


PLANS = [
    ("qwen3", ParallelPlan(cp=2)),
    ("deepseek_v3", ParallelPlan(cp=4, cp_type="HELIX")),
    ("gpt_oss", ParallelPlan(cp=4, ep=2, attention_dp=True)),
    ("qwen3", ParallelPlan(pp=2, cp=2, tp=2)),
]


@pytest.mark.parametrize(("family", "plan"), PLANS, ids=str)
def test_a_layer_passes_keys_on_once_less_than_there_are_ranks_and_decode_merges_once(family, plan):
    sent = sent_in_attention(family, plan)
    # A stage has its share of the layers.
    layers = -(-read_config(family).num_layers // plan.pp)
    ring = {("collective-permute", "always"): plan.cp - 1}
    expected = {"decode": MERGE, "prefill": MERGE | CACHED | ring}
    assert sent == {
        name: Counter({key: layers * count for key, count in of_layer.items()})
        for name, of_layer in expected.items()
    }


@pytest.mark.covering
@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_memory_of_a_prefill_falls_as_the_ranks_grow(family):
    config, tokens = read_config(family), 4096
    temporary, cached = {}, {}
    for ranks in (2, 4, 8):
        plan = ParallelPlan(cp=ranks)
        rules, mesh = Rules(plan), make_mesh(plan)
        weights = {
            path: jax.ShapeDtypeStruct(
                param.shape, param.dtype, sharding=NamedSharding(mesh, param.out_sharding)
            )
            for path, param in declared_params(config, rules, jnp.dtype("float32")).items()
        }
        engine = EngineConfig(
            max_batch_size=8,
            batch_buckets=(8,),
            max_num_tokens=tokens,
            token_buckets=(tokens,),
            max_seq_len=64,
            kv_cache_max_tokens=tokens,
            dtype="float32",
            max_logprobs=1,
        )
        runner = Runner(config, rules, mesh, nest(weights), engine)
        memory = runner.lower(max(runner.buckets)).compile().memory_analysis()
        temporary[ranks] = memory.temp_size_in_bytes
        pages = -(-tokens // runner.block_size) * rules.size("pages")
        shapes = cache_shapes(config, rules, pages=pages, page_size=runner.page_size)
        cached[ranks] = sum(jnp.zeros(shape).nbytes for shape in shapes) / ranks
    assert cached[2] == 2 * cached[4] == 4 * cached[8]
    # Bytes are a + b / ranks, and a is small.
    for ranks in (2, 4):
        assert 2 * temporary[2 * ranks] - temporary[ranks] < 0.2 * temporary[2]
