"""Root-mean-square normalisation (Zhang & Sennrich, 2019)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from llmjax.layers.params import Declare


class RMSNorm(nnx.Module):
    """Scales the last axis to a root mean square of one, then by a learned weight plus `offset`."""

    def __init__(self, features: int, *, eps: float, declare: Declare, offset: float = 0.0):
        self.eps, self.offset = eps, offset
        self.scale = declare.param((features,), (None,), init="zeros" if offset else "ones")

    def __call__(self, x: Float[Array, "... features"]) -> Float[Array, "... features"]:
        if not self.offset:
            return unit_norm(x, eps=self.eps) * self.scale[...]
        # Weights close to zero plus one: in bfloat16 the sum would lose them.
        scale = self.scale[...].astype(jnp.float32) + self.offset
        return (unit_norm(x.astype(jnp.float32), eps=self.eps) * scale).astype(x.dtype)


def unit_norm(x: Float[Array, "... features"], *, eps: float) -> Float[Array, "... features"]:
    """Scales the last axis to a root mean square of one."""
    # The mean square is taken in float32: bfloat16 loses it at 8k features.
    wide = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)
    return (wide * inverse_rms).astype(x.dtype)
