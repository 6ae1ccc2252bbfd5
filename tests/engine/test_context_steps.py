"""A compiled step on context ranks: what it sends in each layer, and what it holds."""

import re
from collections import Counter
from functools import cache
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from small_engine import SMALL
from strategies import GOLDEN

from llmjax.config import EngineConfig
from llmjax.engine.runner import Runner
from llmjax.explore.layout import read_config
from llmjax.explore.steps import read_steps
from llmjax.models.decoder import cache_shapes
from llmjax.weights.model import declared_params, nest
from meshes import ParallelPlan, Rules, make_mesh

CONTEXT = ("cp",)
MERGE = {("all-gather", "always"): 1, ("all-to-all", "always"): 1}
"""Decode tokens are collected, and what the ranks find for them is merged."""
CACHED = {("all-gather", "branch"): 1, ("all-to-all", "branch"): 1}
"""The same for prefill tokens, in a branch that runs where a prompt has something cached."""


@cache
def sent_in_attention(family: str, plan: ParallelPlan) -> dict[str, Counter[tuple[str, str]]]:
    engine = EngineConfig(**SMALL, dtype="float32")
    found = {}
    for step in read_steps(read_config(GOLDEN / family), plan, engine).steps:
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
    layers = -(-read_config(GOLDEN / family).num_layers // plan.pp)
    ring = {("collective-permute", "always"): plan.cp - 1}
    expected = {"decode": MERGE, "prefill": MERGE | CACHED | ring}
    assert sent == {
        name: Counter({key: layers * count for key, count in of_layer.items()})
        for name, of_layer in expected.items()
    }


class Prefill(NamedTuple):
    """The compiled prefill of one long prompt; bytes are those of a rank."""

    temporaries: int
    cache: int
    program: str


PROMPT, DECODES = 4096, 8


@cache
def compile_prefill(family: str, ranks: int) -> Prefill:
    config, plan = read_config(GOLDEN / family), ParallelPlan(cp=ranks)
    rules, mesh = Rules(plan), make_mesh(plan)
    weights = {
        path: jax.ShapeDtypeStruct(
            param.shape, param.dtype, sharding=NamedSharding(mesh, param.out_sharding)
        )
        for path, param in declared_params(config, rules, jnp.dtype("float32")).items()
    }
    engine = EngineConfig(
        max_batch_size=DECODES,
        batch_buckets=(DECODES,),
        max_num_tokens=PROMPT,
        token_buckets=(PROMPT,),
        max_seq_len=64,
        kv_cache_max_tokens=PROMPT,
        dtype="float32",
        max_logprobs=1,
    )
    runner = Runner(config, rules, mesh, nest(weights), engine)
    # Memory does not depend on how good the machine code is.
    lowered = runner.lower(max(runner.buckets))
    compiled = lowered.compile({"xla_backend_optimization_level": 0})
    pages = -(-PROMPT // runner.block_size) * rules.size("pages")
    shapes = cache_shapes(config, rules, pages=pages, page_size=runner.page_size)
    return Prefill(
        temporaries=compiled.memory_analysis().temp_size_in_bytes,
        cache=sum(4 * prod(shape) for shape in shapes) // ranks,
        program=compiled.as_text(),
    )


LONG_PREFILL = ["qwen3", "deepseek_v3"]


@pytest.mark.covering
@pytest.mark.parametrize("family", LONG_PREFILL)
def test_memory_of_a_prefill_falls_as_the_ranks_grow(family):
    two, four, eight = (compile_prefill(family, ranks) for ranks in (2, 4, 8))
    assert two.cache == 2 * four.cache == 4 * eight.cache
    # Bytes are a + b / ranks, and a is small.
    for fewer, more in ((two, four), (four, eight)):
        assert 2 * more.temporaries - fewer.temporaries < 0.2 * two.temporaries


@pytest.mark.covering
@pytest.mark.parametrize("family", LONG_PREFILL)
def test_no_rank_holds_keys_or_values_of_a_whole_prompt(family):
    shapes = re.findall(r"\bf32\[([\d,]+)\]", compile_prefill(family, 8).program)
    sizes = [[int(size) for size in shape.split(",")] for shape in set(shapes)]
    own = [(PROMPT + DECODES) // 8, read_config(GOLDEN / family).hidden_size]
    assert own in sizes, "the hidden states of a rank's own tokens are found"
    # What is as long as the prompt has one number for each token.
    assert all(prod(size) == max(size) for size in sizes if max(size) >= PROMPT)
