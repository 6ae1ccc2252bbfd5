"""TensorRT-LLM's keys -> options of the engine; their ranges are the engine's own business."""

from typing import Any

from meshes.errors import PlanError
from meshes.plan import is_size
from meshes.trtllm.keys import KEYS, PLAN_WORDS, Honoured
from meshes.trtllm.words import Given, Words

GRAPH_RATIO = 4
"""Neighbouring batch sizes differ by this factor where only the largest is given."""
CACHE_TYPES = ("bfloat16", "float16", "float32")


def make_options(words: Words) -> tuple[dict[str, Any], dict[str, str]]:
    """Options of the engine, and for each of them the key that set it.

    Raises:
        PlanError: the batch sizes of `cuda_graph_config` are none, or contradict each other.
    """
    chosen = {
        target: given
        for target, given in words.items()
        if isinstance(KEYS[given.key], Honoured) and target not in PLAN_WORDS
    }
    chosen.pop("kv_cache_dtype", None)
    sizes, largest = chosen.pop("graph_batch_sizes", None), chosen.pop("graph_max_batch_size", None)
    if graphs := sizes or largest:
        batches = _list_batches(sizes, largest)
        limit = chosen.setdefault("max_batch_size", Given(graphs.key, batches[-1])).value
        # TensorRT-LLM runs larger batches without a graph; here every batch needs a program.
        if is_size(limit):
            buckets = tuple(sorted({size for size in batches if size < limit} | {limit}))
            chosen["batch_buckets"] = Given(graphs.key, buckets)
    options = {target: given.value for target, given in chosen.items()}
    return options, {target: given.key for target, given in chosen.items()}


def find_cache_problem(words: Words) -> list[str]:
    """Why the cache cannot have the type that was asked for: it has that of the weights."""
    given, dtype = words.get("kv_cache_dtype"), words.value("dtype", "auto")
    if given is None or given.value == "auto" or given.value == dtype:
        return []
    if given.value in CACHE_TYPES:
        return [f"{given} (the cache has the type of the weights: give dtype: {given.value} too)"]
    return [f"{given} (quantised caches do not run yet)"]


def _list_batches(sizes: Given | None, largest: Given | None) -> list[int]:
    """Rising batch sizes: those given, or powers up to the largest."""
    if largest is not None and not is_size(largest.value):
        raise PlanError(f"{largest} is not a size: use a whole number from 1 up.")
    if sizes is None:
        assert largest is not None
        powers = [1]
        while powers[-1] * GRAPH_RATIO < largest.value:
            powers.append(powers[-1] * GRAPH_RATIO)
        return sorted({*powers, largest.value})
    given = sizes.value
    if not isinstance(given, list | tuple) or not given or not all(map(is_size, given)):
        raise PlanError(
            f"{sizes} is no list of sizes: use whole numbers from 1 up, or leave the key out."
        )
    if largest is not None and largest.value != max(given):
        raise PlanError(
            f"{largest} and {sizes} disagree: the largest size is {max(given)}. Keep one key."
        )
    return sorted(set(given))
