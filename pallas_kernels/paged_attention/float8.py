"""Pages of float8: what the kernels on Hopper multiply instead."""

import jax.numpy as jnp
from jaxtyping import Array, Float

WIDE = jnp.float16
"""What float8 is turned into, because that is what the chip can: it holds all of e4m3."""


def as_wide(queries: Array) -> Array:
    """Returns queries in float16, which is finer than bfloat16, but ends at 65504."""
    most = float(jnp.finfo(WIDE).max)
    return jnp.clip(queries.astype(jnp.float32), -most, most).astype(WIDE)


def pack_scales(k_scale: Array | float | None, v_scale: Array | float | None) -> Float[Array, "2"]:
    """Returns what keys and values are multiplied with; None is 1."""
    scales = [1.0 if scale is None else scale for scale in (k_scale, v_scale)]
    return jnp.stack([jnp.asarray(scale, jnp.float32).reshape(()) for scale in scales])
