"""Gated activations of an expert layer, written once for the reference and for the kernels."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

CLAMP = 7.0
"""Beyond it gpt-oss cuts gate (from above) and up (on both sides)."""
SLOPE = 1.702
"""With it x * sigmoid(SLOPE * x) approximates GELU (Hendrycks & Gimpel, 2016)."""


def silu(gate: Float[Array, "..."], up: Float[Array, "..."]) -> Float[Array, "..."]:
    """SwiGLU (Shazeer, 2020): silu(gate) * up."""
    return gate * lax.logistic(gate) * up


def clamped_swiglu(gate: Float[Array, "..."], up: Float[Array, "..."]) -> Float[Array, "..."]:
    """The gated activation of gpt-oss: both inputs clamped, and one added to up."""
    gate = jnp.minimum(gate, CLAMP)
    up = jnp.minimum(jnp.maximum(up, -CLAMP), CLAMP)
    return gate * lax.logistic(SLOPE * gate) * (up + 1.0)


ACTIVATIONS = {"silu": silu, "clamped_swiglu": clamped_swiglu}
