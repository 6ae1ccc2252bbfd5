"""Rotary embedding turns pairs of features as complex numbers turn."""

import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.config import RopeConfig
from llmjax.layers.rope import Rope, apply_rope

POSITIONS = np.array([0, 1, 5, 300])
DIM = 12


def turn(x: np.ndarray, *, interleaved: bool) -> np.ndarray:
    """Pairs turned by their angles; first members of all pairs, then the second ones."""
    half = DIM // 2
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    frequencies = 10000.0 ** (-np.arange(half) / half)
    turned = (first + 1j * second) * np.exp(1j * POSITIONS[:, None, None] * frequencies)
    return np.concatenate([turned.real, turned.imag], axis=-1)


@pytest.mark.parametrize("interleaved", [False, True])
def test_pairs_turn_as_complex_numbers(interleaved):
    x = np.random.default_rng(0).normal(size=(len(POSITIONS), 3, DIM)).astype(np.float32)
    tables = Rope(RopeConfig(), head_dim=DIM).tables(jnp.array(POSITIONS))
    turned = apply_rope(jnp.array(x), tables, interleaved=interleaved)
    np.testing.assert_allclose(turned, turn(x, interleaved=interleaved), atol=1e-4)


@pytest.mark.parametrize("interleaved", [False, True])
def test_features_beyond_the_rotated_part_stay(interleaved):
    x = np.random.default_rng(0).normal(size=(len(POSITIONS), 3, 2 * DIM)).astype(np.float32)
    rope = Rope(RopeConfig(partial_rotary_factor=0.5), head_dim=2 * DIM)
    turned = apply_rope(jnp.array(x), rope.tables(jnp.array(POSITIONS)), interleaved=interleaved)
    np.testing.assert_array_equal(turned[..., DIM:], x[..., DIM:])
    expected = turn(x[..., :DIM], interleaved=interleaved)
    np.testing.assert_allclose(turned[..., :DIM], expected, atol=1e-4)


def test_llama3_without_a_ramp_divides_the_long_wavelengths_and_keeps_the_others():
    config = RopeConfig(
        theta=500000.0,
        kind="llama3",
        factor=16.0,
        low_freq_factor=1.0,
        high_freq_factor=1.0,
        original_max_position_embeddings=8192,
    )
    plain = np.array(Rope(RopeConfig(theta=500000.0), head_dim=128).frequencies)
    scaled = np.array(Rope(config, head_dim=128).frequencies)
    is_long = 2 * np.pi / plain > 8192
    assert is_long.any() and not is_long.all()
    np.testing.assert_allclose(scaled, np.where(is_long, plain / 16, plain), rtol=1e-6)
