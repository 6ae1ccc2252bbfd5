"""The largest scores of each token, by counting: XLA's `top_k` is a sort or a string of kernels."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def top_k(
    scores: Float[Array, "tokens choices"], k: int
) -> tuple[Float[Array, "tokens k"], Int32[Array, "tokens k"]]:
    """`lax.top_k` for up to some hundred choices: values in falling order, and which they are.

    Equal scores keep their order. The comparisons of all pairs are never stored where XLA fuses
    them with their sum, as it does on GPUs.
    """
    index = jnp.arange(scores.shape[1])
    mine, other = scores[:, :, None], scores[:, None, :]
    ahead = (other > mine) | ((other == mine) & (index < index[:, None]))
    place = jnp.sum(ahead, axis=2, dtype=jnp.int32)
    chosen = place[:, None, :] == jnp.arange(k)[:, None]
    # Exactly one term of each sum is not zero; a product with 0 would turn an infinity into NaN.
    values = jnp.sum(jnp.where(chosen, scores[:, None, :], 0), axis=2)
    return values, jnp.sum(jnp.where(chosen, index, 0), axis=2, dtype=jnp.int32)
