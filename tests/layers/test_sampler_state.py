from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.layers.logit_adjustments import penalise
from llmjax.layers.sampler_state import GENERATED, PROMPT, UNUSED, SamplerState, init_state
from llmjax.layers.vocabulary import Vocabulary, compute_logits
from meshes import ParallelPlan, Rules

PLANS = [ParallelPlan(), ParallelPlan(dp=2, tp=4), ParallelPlan(ep=2, tp=4, attention_dp=True)]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_request_that_comes_in_chunks_fills_its_slot_and_no_other(plan, sampler_on):
    sampler = sampler_on(plan)
    request = {"bias": {7: 1.5, 60: -2.0}, "stop_ids": [2]}
    state = sampler.fill(sampler.empty_state(), 5, ids=[9, 9, 60], kinds=[PROMPT] * 3, **request)
    ids, kinds = [4, 9, 33, 33, 11], [PROMPT, GENERATED, GENERATED, GENERATED, UNUSED]
    state = sampler.fill(state, 5, ids=ids, kinds=kinds, reset=False, **request)
    occurrences = np.zeros((sampler.slots, sampler.padded_vocab), np.int32)
    # Twice the times generated, plus one for the prompt.
    occurrences[5, [9, 60, 4, 33]] = 3, 1, 1, 4
    np.testing.assert_array_equal(state.occurrences, occurrences)
    np.testing.assert_array_equal(
        np.asarray(state.generated)[5, [9, 60, 4, 33, 11]], [1, 0, 0, 2, 0]
    )
    bias_ids, bias_values, stop_ids = (np.asarray(array) for array in state[1:])
    np.testing.assert_array_equal(bias_ids[[0, 4, 6]], -1)
    np.testing.assert_array_equal(stop_ids[[0, 4, 6]], -1)
    np.testing.assert_array_equal(bias_ids[5], [7, 60, -1, -1])
    np.testing.assert_array_equal(bias_values[5], [1.5, -2, 0, 0])
    np.testing.assert_array_equal(stop_ids[5], [2, -1])


def test_a_new_request_finds_nothing_of_the_one_before_it(sampler_on):
    sampler = sampler_on(ParallelPlan(dp=2, tp=4))
    state = sampler.fill(
        sampler.empty_state(), 3, ids=[1], kinds=[GENERATED], bias={1: 1.0}, stop_ids=[1]
    )
    for got, want in zip(sampler.fill(state, 3), sampler.empty_state(), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_each_device_holds_its_share_of_the_counts(plan, sampler_on):
    state = sampler_on(plan).empty_state()
    assert {shard.data.size for shard in state.occurrences.addressable_shards} == {
        state.occurrences.size // plan.num_devices
    }


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"slots": 7}, "slots=7 does not divide over 2 ranks: use 8"),
        ({"slots": 0}, "slots=0 does not divide over 2 ranks: use 2"),
        ({"padded_vocab_size": 61}, "padded_vocab_size=61 does not divide over 4 ranks: use 64"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_ones_that_do(sizes, message):
    fitting = {"slots": 8, "padded_vocab_size": 64, "max_bias": 1, "max_stop_ids": 1}
    build = partial(init_state, **{**fitting, **sizes}, rules=Rules(ParallelPlan(dp=2, tp=4)))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(build)


def test_penalties_follow_their_definitions():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(4, 50)).astype(np.float32) * 3
    counts = generator.integers(0, 3, (4, 50))
    in_prompt = generator.integers(0, 2, (4, 50))
    repetition, frequency, presence = generator.uniform(0.5, 2, (3, 4)).astype(np.float32)

    want = logits.copy()
    for row, token in np.ndindex(*logits.shape):
        seen = in_prompt[row, token] or counts[row, token]
        if seen and want[row, token] > 0:
            want[row, token] /= repetition[row]
        elif seen:
            want[row, token] *= repetition[row]
        want[row, token] -= frequency[row] * counts[row, token]
        want[row, token] -= presence[row] * (counts[row, token] > 0)

    none = jnp.zeros((4, 0), jnp.int32)
    occurrences = jnp.asarray(2 * counts + in_prompt, jnp.int32)
    got = penalise(
        jnp.asarray(logits),
        SamplerState(occurrences, none, none.astype(jnp.float32), none),
        repetition=jnp.asarray(repetition),
        frequency=jnp.asarray(frequency),
        presence=jnp.asarray(presence),
    )
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_logits_of_bfloat16_weights_are_summed_in_float32():
    generator = np.random.default_rng(0)
    hidden = jnp.asarray(generator.normal(size=(3, 512)), jnp.bfloat16)
    head = jnp.asarray(generator.normal(size=(512, 16)), jnp.bfloat16)
    got = compute_logits(hidden, head, Vocabulary(size=15, axes=()))
    want = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got[:, :15], want[:, :15], atol=1e-4)
    assert (np.asarray(got[:, 15]) == -np.inf).all()
