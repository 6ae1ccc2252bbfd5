"""Logits on a sharded vocabulary, and the reductions over it.

Everything here runs inside an island: arrays are one device's shards.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from llmjax.parallel.collectives import Axes, all_gather, axis_index, pmax, psum

_FEWEST_ROWS = 8
"""Rows of hidden states that the product with the head is given at least."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """How the vocabulary lies on the mesh."""

    size: int
    """Token ids of the model; higher ids are padding, which makes the shards equal."""
    axes: Axes
    """Mesh axes that it is split over."""
    soft_cap: float | None = None
    """Logits l become cap * tanh(l / cap)."""

    def ids(self, width: int) -> Int32[Array, " width"]:
        """Token ids of this device's shard, which holds `width` of them."""
        first = axis_index(self.axes) * width
        return (first + jnp.arange(width)).astype(jnp.int32)

    def columns(self, ids: Int32[Array, "*shape"], width: int) -> Int32[Array, "*shape"]:
        """Where these tokens lie in this device's shard; `width`, out of range, if elsewhere."""
        columns = ids - axis_index(self.axes) * width
        here = (ids >= 0) & (columns >= 0) & (columns < width)
        return jnp.where(here, columns, width).astype(jnp.int32)


def compute_logits(
    hidden: Float[Array, "rows embed"], head: Float[Array, "embed vocab"], vocabulary: Vocabulary
) -> Float32[Array, "rows vocab"]:
    """Logits of this device's shard; minus infinity at padding ids."""
    with jax.named_scope("logits"):
        # A GPU's default for float32 is TF32, whose error changes greedy tokens.
        precision = lax.Precision.HIGHEST if head.dtype == jnp.float32 else None
        # For one row XLA:GPU multiplies element by element, and first converts the whole head to
        # float32; eight rows are a product for tensor cores, which reads the head as it is.
        rows = len(hidden)
        hidden = jnp.pad(hidden, ((0, max(_FEWEST_ROWS - rows, 0)), (0, 0)))
        logits = jnp.matmul(hidden, head, precision=precision, preferred_element_type=jnp.float32)
        logits = logits[:rows]
        if vocabulary.soft_cap is not None:
            logits = cap_softly(logits, vocabulary.soft_cap)
        return jnp.where(vocabulary.ids(head.shape[1]) < vocabulary.size, logits, -jnp.inf)


def cap_softly(x: Float[Array, "..."], cap: float) -> Float[Array, "..."]:
    """Numbers close to zero stay, others come no further than the cap."""
    return cap * jnp.tanh(x / cap)


def find_argmax(
    scores: Float32[Array, "rows vocab"], vocabulary: Vocabulary
) -> Int32[Array, " rows"]:
    """Token id of the highest score; the lowest id of equal ones."""
    best = scores.max(axis=-1)
    ids = vocabulary.ids(scores.shape[-1])[scores.argmax(axis=-1)]
    # One collective for both: shards come in the order of their ids, and argmax takes the first.
    pairs = jnp.stack([lax.bitcast_convert_type(best, jnp.int32), ids], axis=-1)
    shards = all_gather(pairs[None], vocabulary.axes)
    bests = lax.bitcast_convert_type(shards[..., 0], jnp.float32)
    return jnp.take_along_axis(shards[..., 1], bests.argmax(axis=0)[None], axis=0)[0]


def find_max(
    scores: Float32[Array, "rows vocab"], vocabulary: Vocabulary
) -> Float32[Array, " rows"]:
    """Highest score of each row."""
    return pmax(scores.max(axis=-1), vocabulary.axes)


def find_top(
    scores: Float32[Array, "rows vocab"], count: int, vocabulary: Vocabulary
) -> tuple[Float32[Array, "rows count"], Int32[Array, "rows count"]]:
    """The highest scores of each row in falling order, and their token ids."""
    if count == 0:  # XLA refuses to gather empty arrays.
        return scores[:, :0], jnp.zeros((len(scores), 0), jnp.int32)
    width = scores.shape[-1]
    # No shard can hold more than `count` of the winners, so merging the local ones is exact.
    values, columns = lax.top_k(scores, min(count, width))
    ids = all_gather(vocabulary.ids(width)[columns], vocabulary.axes, axis=1)
    values, order = lax.top_k(all_gather(values, vocabulary.axes, axis=1), count)
    return values, jnp.take_along_axis(ids, order, axis=1)


def pick(
    scores: Float32[Array, "rows vocab"], tokens: Int32[Array, " rows"], vocabulary: Vocabulary
) -> Float32[Array, " rows"]:
    """Score of one token of each row."""
    columns = vocabulary.columns(tokens, scores.shape[-1])
    picked = scores.at[jnp.arange(len(tokens)), columns].get(mode="fill", fill_value=0)
    return psum(picked, vocabulary.axes)
