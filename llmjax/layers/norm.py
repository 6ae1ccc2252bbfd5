"""Root-mean-square normalisation (Zhang & Sennrich, 2019)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from llmjax.layers.params import Declare


class RMSNorm(nnx.Module):
    """Scales the last axis to a root mean square of one, then by a learned weight."""

    def __init__(self, features: int, *, eps: float, declare: Declare):
        self.eps = eps
        self.scale = declare.param((features,), (None,), init="ones")

    def __call__(self, x: Float[Array, "... features"]) -> Float[Array, "... features"]:
        # The mean square is taken in float32: bfloat16 loses it at 8k features.
        wide = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        return (wide * inverse_rms).astype(x.dtype) * self.scale[...]
