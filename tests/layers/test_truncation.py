from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from llmjax.layers.truncation import find_kept, order_keys
from llmjax.layers.vocabulary import Vocabulary
from llmjax.parallel.collectives import island
from meshes import ParallelPlan, Rules, make_mesh

ROWS, VOCAB = 6, 64
ROW_OPTIONS = {
    "nothing": (0, 1.0, 0.0),
    "top_k of one": (1, 1.0, 0.0),
    "top_k of many": (40, 1.0, 0.0),
    "top_k of the whole vocabulary": (VOCAB, 1.0, 0.0),
    "top_k beyond the vocabulary": (1000, 1.0, 0.0),
    "tiny top_p": (0, 1e-6, 0.0),
    "top_p": (0, 0.7, 0.0),
    "top_p next to one": (0, 0.9999, 0.0),
    "min_p": (0, 1.0, 0.05),
    "min_p of one": (0, 1.0, 1.0),
    "top_k and top_p": (10, 0.8, 0.0),
    "top_k and min_p": (10, 1.0, 0.1),
    "top_p and min_p": (0, 0.9, 0.02),
    "all three": (20, 0.9, 0.01),
}


def expected(logits, top_k, top_p, min_p):
    """Sorts one row in float64; ties at a threshold are kept."""
    weights = np.exp(logits.astype(np.float64) - logits.max())
    kept = weights >= min_p
    if top_k:
        kept &= logits >= np.sort(logits)[::-1][min(top_k, VOCAB) - 1]
    if top_p < 1:
        mass = np.where(kept, weights, 0)
        likelier = np.array([mass[logits > logit].sum() for logit in logits])
        kept &= likelier < top_p * mass.sum()
    return kept


@cache
def kept_on(ranks: int):
    plan = ParallelPlan(tp=ranks)
    rules, mesh = Rules(plan), make_mesh(plan)
    vocabulary = Vocabulary(size=VOCAB, axes=rules.axes("vocab"))

    def body(logits, top_k, top_p, min_p):
        return find_kept(
            logits,
            logits - jax.lax.pmax(logits.max(axis=-1), vocabulary.axes)[:, None],
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            any_top_k=jnp.any(top_k > 0),
            any_top_p=jnp.any(top_p < 1),
            vocabulary=vocabulary,
        )

    table, whole = rules.spec(None, "vocab"), PartitionSpec()
    find = jax.jit(island(body, in_specs=(table, whole, whole, whole), out_specs=table))

    def run(logits, top_k, top_p, min_p):
        full = partial(np.full, len(logits))
        with jax.set_mesh(mesh):
            sharded = jax.device_put(logits, rules.sharding(mesh, None, "vocab"))
            options = (full(top_k, np.int32), full(top_p, np.float32), full(min_p, np.float32))
            return np.asarray(find(sharded, *options))

    return run


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("options", ROW_OPTIONS.values(), ids=ROW_OPTIONS)
def test_the_kept_tokens_are_those_of_a_sort(options, ranks):
    logits = np.random.default_rng(0).normal(size=(ROWS, VOCAB)).astype(np.float32) * 2
    want = np.stack([expected(row, *options) for row in logits])
    np.testing.assert_array_equal(kept_on(ranks)(logits, *options), want)


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("options", ROW_OPTIONS.values(), ids=ROW_OPTIONS)
def test_ties_at_a_threshold_are_all_kept(options, ranks):
    logits = np.random.default_rng(1).integers(-3, 4, (ROWS, VOCAB)).astype(np.float32)
    want = np.stack([expected(row, *options) for row in logits])
    np.testing.assert_array_equal(kept_on(ranks)(logits, *options), want)


def test_impossible_tokens_are_not_counted_as_kept_mass():
    logits = np.full((1, VOCAB), -np.inf, np.float32)
    logits[0, [5, 60]] = 1.0, 2.0
    kept = kept_on(4)(logits, 2, 0.9, 0.0)
    np.testing.assert_array_equal(np.flatnonzero(kept), [5, 60])


def test_keys_order_floats_and_make_both_zeros_equal():
    floats = np.array([-np.inf, -3e38, -1.5, -2e-38, 0.0, 2e-38, 1.5, 3e38, np.inf], np.float32)
    keys = np.asarray(order_keys(jnp.asarray(floats)))
    assert (np.diff(keys.astype(np.int64)) > 0).all()
    zeros = np.asarray(order_keys(jnp.array([-0.0, 0.0], jnp.float32)))
    assert zeros[0] == zeros[1]
