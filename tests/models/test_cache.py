"""What a token takes in the cache, on each device, as attention and its placement have it."""

import json
from functools import partial
from math import prod
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from llmjax.layers.kv_cache import Cache, empty_cache
from llmjax.models.decoder import cache_shapes
from llmjax.models.registry import find_family
from meshes import ParallelPlan, Rules, make_mesh

GOLDEN = Path(__file__).parent.parent / "golden"
PAGES, PAGE_SIZE = 3, 4
"""Pages of each batch rank."""
LATENT_NUMBERS = 3 * (16 + 8)
"""3 layers of a latent of 16 numbers and 8 that carry the position."""
KEY_VALUE_NUMBERS = 3 * 2 * 2 * 16
"""3 layers of keys and values of 2 heads of 16 features."""


def build_cache(model: str, plan: ParallelPlan, dtype: str) -> Cache:
    document = json.loads((GOLDEN / model / "config.json").read_text())
    config, rules = find_family(document).read_config(document), Rules(plan)
    pages = PAGES * rules.size("pages")
    shapes = cache_shapes(config, rules, pages=pages, page_size=PAGE_SIZE)
    with jax.set_mesh(make_mesh(plan)):
        return jax.jit(partial(empty_cache, shapes, jnp.dtype(dtype), rules))()


def bytes_a_token(cache: Cache) -> float:
    """Bytes on a device, over the tokens that its batch rank can hold."""
    parts = [array.addressable_shards[0].data for array in cache]
    return sum(part.nbytes for part in parts) / (PAGES * PAGE_SIZE)


def batch_ranks(cache: Cache) -> int:
    """Devices that hold other pages than each other."""
    return len({str(shard.index[1]) for shard in cache[0].addressable_shards})


@pytest.mark.parametrize(
    ("plan", "ranks"),
    [
        (ParallelPlan(), 1),
        # The latent is the same for all heads, so ranks that share the heads hold copies.
        (ParallelPlan(tp=4), 1),
        (ParallelPlan(ep=4, tp=2), 1),
        (ParallelPlan(ep=4, tp=2, attention_dp="partial"), 4),
        (ParallelPlan(ep=4, tp=2, attention_dp=True), 8),
    ],
    ids=str,
)
@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_latent_attention_caches_its_latent_and_the_rotated_part(plan, ranks, dtype, size):
    cache = build_cache("deepseek_v3", plan, dtype)
    assert bytes_a_token(cache) == size * LATENT_NUMBERS
    assert batch_ranks(cache) == ranks


@pytest.mark.parametrize(
    ("plan", "ranks", "parts"),
    [
        (ParallelPlan(), 1, 1),
        (ParallelPlan(tp=2), 1, 2),
        # Two heads on four ranks: each rank has one, which another has too.
        (ParallelPlan(tp=4), 1, 2),
        (ParallelPlan(ep=2, tp=2), 1, 2),
        (ParallelPlan(ep=2, tp=2, attention_dp="partial"), 2, 2),
        (ParallelPlan(ep=2, tp=2, attention_dp=True), 4, 1),
    ],
    ids=str,
)
def test_keys_and_values_are_split_by_heads_or_by_requests(plan, ranks, parts):
    cache = build_cache("qwen3_moe", plan, "float32")
    assert bytes_a_token(cache) == 4 * KEY_VALUE_NUMBERS / parts
    assert batch_ranks(cache) == ranks


def test_attention_dp_holds_as_many_tokens_more_as_it_has_ranks():
    # On eight ranks that share the heads, the latent lies eight times; split, it lies once.
    shared = build_cache("deepseek_v3", ParallelPlan(ep=8), "float32")
    split = build_cache("deepseek_v3", ParallelPlan(ep=8, attention_dp=True), "float32")
    assert bytes_a_token(shared) == bytes_a_token(split)
    assert prod(split[0].shape) == 8 * prod(shared[0].shape)
