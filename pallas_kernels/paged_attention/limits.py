"""How far back a query sees: a sliding window, or the chunk that it is in."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int


def pack_limits(
    window: Array | int | None, chunk: Array | int | None
) -> Int[Array, " sizes"] | None:
    """Returns the window and the chunk, 0 for none, or None where neither is given.

    Without a chunk it is the window alone: kernels then need not divide by a chunk.
    """
    if window is None and chunk is None:
        return None
    sizes = [0 if window is None else window]
    if chunk is not None:
        sizes.append(chunk)
    return jnp.stack([jnp.asarray(size, jnp.int32).reshape(()) for size in sizes])


def first_visible(position: Array, limits: Any) -> Array:
    """Returns the first position that queries see; `limits` may be a reference in a kernel."""
    window, chunk = unlimited(limits)
    position = jnp.maximum(position, 0)
    in_chunk = lax.div(position, jnp.broadcast_to(chunk, position.shape)) * chunk
    return jnp.maximum(position - window + 1, in_chunk)


def unlimited(limits: Any) -> tuple[Array, Array]:
    """Returns a window and a chunk that reach further back than any position where none is."""
    furthest = jnp.int32(2**30)
    if limits is None:
        return furthest, furthest
    sizes = [jnp.where(limits[i] > 0, limits[i], furthest) for i in range(limits.shape[0])]
    return sizes[0], sizes[1] if len(sizes) > 1 else furthest


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
