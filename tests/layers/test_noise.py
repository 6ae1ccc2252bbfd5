import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry2x32_p

from llmjax.layers.noise import gumbel, threefry2x32


def noise_of(seeds: list[int], positions: list[int], ids: np.ndarray) -> np.ndarray:
    seeds_array, positions_array = jnp.array(seeds, jnp.uint32), jnp.array(positions, jnp.int32)
    return np.asarray(gumbel(seeds_array, positions_array, jnp.asarray(ids, jnp.int32)))


def test_the_cipher_gives_the_bits_of_jax():
    words = np.random.default_rng(0).integers(0, 2**32, (4, 100), dtype=np.uint32)
    key_high, key_low, high, low = (jnp.asarray(row) for row in words)
    ours = threefry2x32((key_high, key_low), (high, low))
    theirs = threefry2x32_p.bind(key_high, key_low, high, low)
    np.testing.assert_array_equal(np.stack(ours), np.stack(theirs))


def test_noise_of_a_part_of_the_vocabulary_and_of_a_single_row_is_a_part_of_the_whole():
    whole = noise_of([3, 4, 5], [10, 20, 30], np.arange(4096))
    part = noise_of([4], [20], np.arange(1024, 1100))
    np.testing.assert_array_equal(part[0], whole[1, 1024:1100])


def test_noise_has_the_quantiles_of_a_gumbel_distribution():
    noise = np.sort(noise_of([1], [0], np.arange(200_000))[0])
    cumulative = np.exp(-np.exp(-noise.astype(np.float64)))
    distance = np.abs(cumulative - (np.arange(len(noise)) + 0.5) / len(noise)).max()
    # Kolmogorov-Smirnov: a true Gumbel sample exceeds this once in a thousand tests.
    assert distance < 1.95 / np.sqrt(len(noise))


@pytest.mark.parametrize(("seeds", "positions"), [([7, 8], [5, 5]), ([7, 7], [5, 6])])
def test_noise_of_other_seeds_and_positions_is_unrelated(seeds, positions):
    first, second = noise_of(seeds, positions, np.arange(100_000))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.01


def test_noise_is_finite_at_the_ends_of_the_random_bits(monkeypatch):
    def extreme(key, counter):
        words = jnp.array([[0, 2**32 - 1]], jnp.uint32)
        return words, words

    monkeypatch.setattr("llmjax.layers.noise.threefry2x32", extreme)
    with jax.disable_jit():
        low, high = noise_of([0], [0], np.arange(2))[0][::-1]
    assert np.isfinite([low, high]).all()
    assert low == pytest.approx(-2.81, abs=0.01)
    # -log(2**-65): the all-zero draw is an event of probability 2**-64, not infinity.
    assert high == pytest.approx(65 * np.log(2), abs=0.01)
