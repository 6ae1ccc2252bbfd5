"""Pipeline stages: each holds a part of the layer stack and of the cache.

One call of the step is a tick: every stage runs its own micro-batch, and hands its activations on.
A micro-batch enters at the first stage and leaves the last one as many ticks later as there are
stages; with as many micro-batches in flight no stage ever waits.

The stage is a `shard_map` over the pipeline axis alone, present for one stage too; the other axes
stay explicit inside, so layers are written the same with and without a pipeline.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from llmjax.parallel.collectives import island, psum
from meshes import Rules

STAGES = "pp"
"""The mesh axis of stages."""
Held = Float[Array, "stages held embed"]
"""What each stage was handed in the tick before; room for the tokens of the largest step."""


def run_stages(
    body: Callable[[Any, Any, Any, Any], tuple[Any, Any]],
    stack: Any,
    cache: Any,
    placement: Any,
    entering: Float[Array, "tokens embed"],
    held: Held | None,
    *,
    rules: Rules,
) -> tuple[Float[Array, "tokens embed"], Any, Held | None]:
    """One tick: body(stack, cache, placement, x) -> (x, cache) on each stage's own layers.

    Args:
        stack, cache: trees of arrays with a leading axis of layers.
        placement: a tree of arrays with a leading axis of stages.
        entering: the micro-batch that enters the first stage.
        held: None where there is one stage.

    Returns:
        what the last stage gave, on all stages; the cache; and what each stage was handed.
    """
    own, whole = PartitionSpec(STAGES), PartitionSpec()
    stages = rules.plan.sizes[STAGES]

    def stage(
        stack: Any, cache: Any, placement: Any, entering: Array, held: Array | None
    ) -> tuple[Any, Any, Any]:
        placement = jax.tree.map(_only, placement)
        if held is None:
            return *body(stack, cache, placement, entering), None
        index = lax.axis_index(STAGES)
        x = jnp.where(index == 0, entering, _cut(_only(held), entering, rules))
        x, cache = body(stack, cache, placement, x)
        leaving = _share(x, index == stages - 1, rules)
        ring = [(source, (source + 1) % stages) for source in range(stages)]
        handed = lax.ppermute(x, STAGES, ring)
        return leaving, cache, _fill(_only(held), handed, rules)[None]

    return jax.shard_map(
        stage,
        in_specs=(own, own, own, whole, own),
        out_specs=(whole, own, own),
        axis_names={STAGES},
        check_vma=False,
    )(stack, cache, placement, entering, held)


def count_stage_tokens(
    is_real: Bool[Array, "stages tokens"], *, rules: Rules
) -> Int[Array, "stages"] | None:
    """Tokens that each stage computes in this tick, on every device; None for one stage.

    Each device counts its own, and one sum over stages and tokens' ranks puts them side by side.
    """
    stages = rules.plan.sizes[STAGES]
    if stages == 1:
        return None

    def body(is_real: Array) -> Array:
        is_own = jnp.arange(stages) == lax.axis_index(STAGES)
        counts = jnp.where(is_own, jnp.sum(is_real, dtype=jnp.int32), 0)
        return psum(counts, (STAGES, *rules.axes("tokens")))

    with jax.named_scope("stage_tokens"):
        return island(body, in_specs=rules.spec("layers", "tokens"), out_specs=PartitionSpec())(
            is_real
        )


def _share(x: Array, is_source: Array, rules: Rules) -> Array:
    """Gives one stage's tokens to all stages."""
    tokens = rules.spec("tokens", None)

    def body(x: Array, is_source: Array) -> Array:
        # Outside an island XLA:CPU refuses this sum in bfloat16: it aborts the process.
        return lax.psum(jnp.where(is_source, x, 0), STAGES)

    return island(body, in_specs=(tokens, PartitionSpec()), out_specs=tokens)(x, is_source)


def _only(x: Array) -> Array:
    return x[0]


def _cut(held: Array, like: Array, rules: Rules) -> Array:
    """The first tokens of each batch rank, as many as a tick's step has."""
    tokens = rules.spec("tokens", None)

    def body(held: Array, like: Array) -> Array:
        return held[: like.shape[0]]

    return island(body, in_specs=(tokens, tokens), out_specs=tokens)(held, like)


def _fill(held: Array, x: Array, rules: Rules) -> Array:
    """Puts each batch rank's tokens first."""
    tokens = rules.spec("tokens", None)

    def body(held: Array, x: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(held, x, 0, axis=0)

    return island(body, in_specs=(tokens, tokens), out_specs=tokens)(held, x)
