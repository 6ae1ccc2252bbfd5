"""Pipeline stages: each holds a part of the layer stack and of the cache.

The stage is a `shard_map` over the pipeline axis alone, present for one stage too; the other axes
stay explicit inside, so layers are written the same with and without a pipeline.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

STAGE = PartitionSpec("pp")
"""Leading axis of whatever is stacked by layer."""


def run_stage(
    body: Callable[[Any, Any, Any], tuple[Any, Any]], stack: Any, cache: Any, inputs: Any
) -> tuple[Any, Any]:
    """Calls body(stack, cache, inputs) -> (hidden, cache) on each stage's own layers.

    `stack` and `cache` are trees of arrays with a leading axis of layers; `inputs` and hidden
    states are the same on all stages.
    """
    whole = PartitionSpec()
    return jax.shard_map(
        body,
        in_specs=(STAGE, STAGE, whole),
        out_specs=(whole, STAGE),
        axis_names={"pp"},
        check_vma=False,
    )(stack, cache, inputs)
