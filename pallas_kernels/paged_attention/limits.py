"""How far back a query sees: a sliding window, or the chunk that it is in."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int


def pack_limits(window: Array | int | None, chunk: Array | int | None) -> Int[Array, "2"] | None:
    """Returns the window and the chunk, 0 for none, or None where neither is given."""
    if window is None and chunk is None:
        return None
    sizes = [0 if size is None else size for size in (window, chunk)]
    return jnp.stack([jnp.asarray(size, jnp.int32).reshape(()) for size in sizes])


def first_visible(position: Array, limits: Any) -> Array:
    """Returns the first position that queries see; `limits` may be a reference in a kernel."""
    window, chunk = limits[0], limits[1]
    # Without a limit, one that reaches further back than any position.
    furthest = jnp.int32(2**30)
    window = jnp.where(window > 0, window, furthest)
    chunk = jnp.where(chunk > 0, chunk, furthest)
    position = jnp.maximum(position, 0)
    in_chunk = lax.div(position, jnp.broadcast_to(chunk, position.shape)) * chunk
    return jnp.maximum(position - window + 1, in_chunk)


def keys_before(
    position: Int[Array, "rows"], *, page: int, page_stride: int, first_page: Array | int
) -> Int[Array, "rows"]:
    """Returns how many of a row's keys here are before a position of its sequence.

    Every `page_stride`-th page of the sequence is here, from page `first_page` on.
    """
    behind = position // page - first_page
    whole = jnp.maximum(-(-behind // page_stride), 0)
    is_inside = (behind >= 0) & (behind % page_stride == 0)
    return whole * page + jnp.where(is_inside, position % page, 0)
