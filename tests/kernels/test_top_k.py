import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels import top_k


@pytest.mark.parametrize("tokens, choices, k", [(1, 128, 8), (7, 8, 2), (3, 256, 256)])
def test_counting_chooses_what_sorting_does(tokens, choices, k):
    scores = np.random.default_rng(tokens).normal(size=(tokens, choices))
    # Some are equal, and some out of the question.
    scores[:, ::3] = np.round(scores[:, ::3]) + 0.0  # No -0, which sorts before 0.
    scores[:, 1::4] = -np.inf
    for mine, want in zip(
        top_k(jnp.asarray(scores, jnp.float32), k),
        lax.top_k(jnp.asarray(scores, jnp.float32), k),
        strict=True,
    ):
        np.testing.assert_array_equal(mine, want)
