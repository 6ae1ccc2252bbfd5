import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.layers.vocabulary import Vocabulary, compute_logits

EMBED, WIDTH, SIZE = 16, 40, 37


def compute(hidden: jax.Array, head: jax.Array) -> jax.Array:
    return compute_logits(hidden, head, Vocabulary(size=SIZE, axes=()))


@pytest.mark.parametrize("rows", [1, 7, 8, 9])
def test_padded_rows_leave_the_logits_as_they_are(rows):
    draw = np.random.default_rng(rows)
    hidden, head = draw.normal(size=(rows, EMBED)), draw.normal(size=(EMBED, WIDTH))
    logits = compute(jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32))
    assert logits.shape == (rows, WIDTH)
    np.testing.assert_allclose(logits[:, :SIZE], (hidden @ head)[:, :SIZE], rtol=1e-4, atol=1e-5)
    assert np.all(np.isneginf(logits[:, SIZE:]))


def test_the_product_with_the_head_never_has_fewer_than_eight_rows():
    hidden = jax.ShapeDtypeStruct((1, EMBED), jnp.bfloat16)
    head = jax.ShapeDtypeStruct((EMBED, WIDTH), jnp.bfloat16)
    program = jax.jit(compute).trace(hidden, head).lower(lowering_platforms=("cuda",)).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) == 1
    assert f"tensor<8x{EMBED}xbf16>, tensor<{EMBED}x{WIDTH}xbf16>" in products[0]
