"""What differs from layer to layer as numbers, so that one program runs them all."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from llmjax.config import LayerConfig, ModelConfig
from llmjax.layers.rope import ROPES
from meshes import Rules


class LayerTraits(NamedTuple):
    """One entry a layer, or those of one layer; None where no layer of the model has the trait."""

    window: Int[Array, "*layers"] | None
    """Tokens that a sliding window sees; 0 is full attention."""
    chunk: Int[Array, "*layers"] | None
    """Tokens of the chunks inside which attention stays; 0 is full attention."""
    rope: Int[Array, "*layers"] | None
    """Index into `ROPES`; None: all layers turn by the global one."""
    active: Bool[Array, "*layers"] | None
    """False where a pipeline stage has fewer layers than the longest: the layer changes nothing."""


def stack_traits(config: ModelConfig, layers: Sequence[int], rules: Rules) -> LayerTraits:
    """Traits of the given layers in a row, laid out as the layers are; -1 is a layer to skip."""
    rows = [config.layers[max(layer, 0)] for layer in layers]
    spec = rules.spec("layers")

    def stack(values: Sequence[int], kind: Any = jnp.int32) -> Array | None:
        return jax.sharding.reshard(jnp.array(values, kind), spec) if any(values) else None

    skipped = stack([layer < 0 for layer in layers], jnp.bool_)
    return LayerTraits(
        window=stack([row.window for row in rows]),
        chunk=stack([row.chunk for row in rows]),
        rope=stack([_rope_index(row) for row in rows]),
        active=None if skipped is None else ~skipped,
    )


def _rope_index(row: LayerConfig) -> int:
    return ROPES.index(row.rope)
