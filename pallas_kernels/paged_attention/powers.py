"""The softmax of attention in powers of 2, for which the chip has an instruction."""

import math

import jax.numpy as jnp
from jaxtyping import Array

LOG2_E = math.log2(math.e)


def capped(product: Array, scale: Array | float, soft_cap: float) -> Array:
    """tanh(product * scale / (LOG2_E * soft_cap)), to be multiplied with `soft_cap * LOG2_E`.

    By tanh(x) = 1 - 2 / (1 + exp(2 x)): the approximate tanh of the chip is too coarse.
    """
    return 1.0 - 2.0 / (1.0 + jnp.exp2(product * (scale * (2 / soft_cap))))
