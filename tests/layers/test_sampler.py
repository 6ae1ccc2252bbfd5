from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from llmjax.layers.sampler_state import GENERATED, PROMPT
from meshes import ParallelPlan

ROWS, VOCAB = 8, 61
ONE = ParallelPlan()
EIGHT = ParallelPlan(tp=8)
PLANS = [
    ParallelPlan(tp=2),
    ParallelPlan(tp=4),
    EIGHT,
    ParallelPlan(pp=2, ep=2, tp=2),
    ParallelPlan(dp=4, tp=2),
    ParallelPlan(dp=2, cp=2, tp=2),
    ParallelPlan(dp=2, ep=2, tp=2, attention_dp=True),
    ParallelPlan(dp=2, ep=2, tp=2, attention_dp="partial"),
]
MIXED: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "seed": 11, "position": 3},
    {"temperature": 1.3, "seed": 12, "position": 9, "top_k": 9},
    {"temperature": 1.0, "seed": 13, "position": 2, "top_p": 0.8},
    {"temperature": 1.0, "seed": 14, "min_p": 0.1, "num_logprobs": 3},
    {"temperature": 2.0, "seed": 2**32 - 1, "position": 5, "top_k": 30, "top_p": 0.9},
    {"slot": 6, "uses_state": True, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"slot": 7, "uses_state": True, "min_position": 4, "temperature": 0.9, "seed": 15},
]


def random_logits(rows=ROWS, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, VOCAB)).astype(np.float32) * 3


def chi_square(tokens, probabilities):
    """How many standard deviations the statistic lies above its mean (Wilson, Hilferty, 1931)."""
    expected = probabilities * len(tokens)
    counts = np.bincount(tokens, minlength=len(expected))
    assert counts[probabilities == 0].sum() == 0
    common = expected >= 5
    rare = (expected[~common].sum(), counts[~common].sum())
    expected, counts = np.append(expected[common], rare[0]), np.append(counts[common], rare[1])
    expected, counts = expected[expected > 0], counts[expected > 0]
    statistic, freedom = ((counts - expected) ** 2 / expected).sum(), len(expected) - 1
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / np.sqrt(spread)


def softmax(logits):
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


@pytest.mark.parametrize("plan", [ONE, EIGHT], ids=str)
def test_greedy_takes_the_highest_logit_and_the_lowest_id_of_equal_ones(plan, sampler_on):
    logits = random_logits()
    logits[3, [50, 20, 7]] = 99
    logits[4] = 0
    tokens = sampler_on(plan)(logits, {})[0].tokens
    np.testing.assert_array_equal(tokens, logits.argmax(axis=1))
    assert (tokens[3], tokens[4]) == (7, 0)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_every_plan_gives_the_tokens_and_logprobs_of_one_device(plan, sampler_on):
    def generate(plan):
        sampler = sampler_on(plan, 3)
        state = sampler.fill(sampler.empty_state(), 6, ids=[1, 2, 3], kinds=[PROMPT] * 3)
        state = sampler.fill(state, 7, bias={40: 3.0}, stop_ids=[0, 60])
        for step in range(6):
            options = [{**row, "position": row.get("position", 0) + step} for row in MIXED]
            sampled, state = sampler(random_logits(seed=step // 3), options, state)
            yield sampled, np.asarray(state.occurrences)

    for (ours, our_counts), (theirs, their_counts) in zip(
        generate(plan), generate(ONE), strict=True
    ):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        np.testing.assert_array_equal(our_counts, their_counts)
        np.testing.assert_array_equal(ours.rank, theirs.rank)
        np.testing.assert_array_equal(ours.top_ids, theirs.top_ids)
        np.testing.assert_allclose(ours.top_logprobs, theirs.top_logprobs, atol=1e-5)


def test_a_row_gives_the_same_token_in_any_place_of_any_batch(sampler_on):
    logits, others = random_logits(), random_logits(24, seed=5)
    options = [row for row in MIXED if "slot" not in row] + [{"temperature": 1.0, "seed": 3}] * 2
    alone = sampler_on(EIGHT)(logits, options)[0].tokens
    places = np.random.default_rng(0).permutation(32)
    crowd = np.concatenate([logits, others])[places]
    noise = [{"temperature": 5.0, "seed": 99, "position": i} for i in range(24)]
    crowd_options = [[*options, *noise][place] for place in places]
    tokens = sampler_on(EIGHT)(crowd, crowd_options)[0].tokens
    np.testing.assert_array_equal(tokens[np.argsort(places)[:8]], alone)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 3.0, "top_k": 20},
        {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    ],
    ids=str,
)
@pytest.mark.parametrize("varied", ["position", "seed"])
def test_draws_follow_the_distribution(options, varied, sampler_on):
    draws, logits = 8192, random_logits(1) / 2
    rows = [{**options, varied: i} for i in range(draws)]
    tokens = sampler_on(EIGHT)(np.repeat(logits, draws, axis=0), rows)[0].tokens
    probabilities = softmax(logits[0] / options["temperature"])
    order = np.argsort(-probabilities)
    probabilities[order[options.get("top_k", VOCAB) :]] = 0
    probabilities[probabilities < options.get("min_p", 0) * probabilities.max()] = 0
    probabilities /= probabilities.sum()
    before = np.cumsum(probabilities[order]) - probabilities[order]
    probabilities[order[before >= options.get("top_p", 2)]] = 0
    assert abs(chi_square(tokens, probabilities / probabilities.sum())) < 4


@pytest.mark.parametrize("temperature", [1e-9, 1e-5, 1e-3])
def test_a_low_temperature_takes_the_most_likely_token(temperature, sampler_on):
    logits = random_logits() * 1e4
    options = [{"temperature": temperature, "seed": i} for i in range(ROWS)]
    tokens = sampler_on(EIGHT)(logits, options)[0].tokens
    np.testing.assert_array_equal(tokens, logits.argmax(axis=1))


@pytest.mark.parametrize("temperature", [1e6, 3e38])
def test_a_high_temperature_draws_evenly_and_never_from_the_padding(temperature, sampler_on):
    logits = np.repeat(random_logits(1), 4096, axis=0)
    options = [{"temperature": temperature, "position": i} for i in range(4096)]
    tokens = sampler_on(EIGHT)(logits, options)[0].tokens
    assert abs(chi_square(tokens, np.full(VOCAB, 1 / VOCAB))) < 4


def test_rows_that_sample_nothing_leave_the_state_alone(sampler_on):
    options = [{"slot": i, "uses_state": True, "valid": i % 2 == 0} for i in range(ROWS)]
    logits = random_logits()
    sampled, state = sampler_on(ONE)(logits, options)
    generated = np.asarray(state.occurrences) // 2
    np.testing.assert_array_equal(generated.sum(axis=1), [1, 0] * 4)
    np.testing.assert_array_equal(generated[::2].argmax(axis=1), sampled.tokens[::2])


@pytest.mark.parametrize("plan", [ONE, ParallelPlan(dp=2, tp=4)], ids=str)
def test_penalties_follow_the_tokens_that_a_request_generates(plan, sampler_on):
    sampler = sampler_on(plan)
    logits = np.repeat(np.arange(VOCAB, dtype=np.float32)[None] / 4, ROWS, axis=0)
    state = sampler.fill(sampler.empty_state(), 0, ids=[60, 60], kinds=[PROMPT, GENERATED])
    options: list[dict[str, Any]] = [{} for _ in range(ROWS)]
    options[0] = {"slot": 0, "uses_state": True, "presence_penalty": 0.6}
    options[-1] = {"slot": 7, "uses_state": True, "frequency_penalty": 0.3}
    tokens = []
    for _ in range(6):
        sampled, state = sampler(logits, options, state)
        tokens.append(sampled.tokens)
    # Logits are 0.25 apart: a presence penalty of 0.6 lets two lower tokens pass, once for all;
    # a frequency penalty of 0.3 grows with each use.
    assert [row[0] for row in tokens] == [59, 58, 60, 60, 60, 60]
    assert [row[-1] for row in tokens] == [60, 59, 60, 58, 59, 60]
    assert [row[1] for row in tokens] == [60] * 6


def test_stop_tokens_are_impossible_before_the_minimum_length(sampler_on):
    sampler = sampler_on(EIGHT)
    logits = np.zeros((ROWS, VOCAB), np.float32)
    logits[:, [3, 58, 20]] = 30, 20, 10
    state = sampler.fill(sampler.empty_state(), 2, stop_ids=[3, 58])
    row = {"slot": 2, "uses_state": True, "min_position": 5}
    options = [{**row, "position": i, "temperature": i % 2} for i in range(ROWS)]
    tokens = sampler(logits, options, state)[0].tokens
    np.testing.assert_array_equal(tokens, [20] * 5 + [3] * 3)


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_bias_forces_or_bans_tokens(temperature, sampler_on):
    sampler = sampler_on(EIGHT)
    logits = np.zeros((ROWS, VOCAB), np.float32)
    logits[:, 9] = 50
    state = sampler.fill(sampler.empty_state(), 0, bias={33: 100.0})
    state = sampler.fill(state, 1, bias={9: -np.inf, 60: 40.0})
    state = sampler.fill(state, 2, bias={44: np.inf})
    slots = [{"slot": slot, "uses_state": True} for slot in range(3)] + [{}] * 5
    options = [{"temperature": temperature, **row} for row in slots]
    tokens = sampler(logits, options, state)[0].tokens
    np.testing.assert_array_equal(tokens, [33, 60, 44, 9, 9, 9, 9, 9])


def ban_all_but_position(logits, generated, position):
    return jnp.where(jnp.arange(len(logits)) == position, logits, -jnp.inf)


def ban_generated(logits, generated, position):
    return jnp.where(generated > 0, -jnp.inf, logits)


def ban_everything(logits, generated, position):
    return jnp.full_like(logits, -jnp.inf)


def force_seven(logits, generated, position):
    return logits.at[7].set(jnp.inf)


PROCESSORS = (ban_all_but_position, ban_generated, ban_everything, force_seven)


@pytest.mark.parametrize("plan", [ONE, EIGHT, PLANS[-2]], ids=str)
def test_processors_see_the_whole_vocabulary_of_the_rows_that_chose_them(plan, sampler_on):
    sampler, logits = sampler_on(plan, 0, PROCESSORS), random_logits()
    options: list[dict[str, Any]] = [{"position": 5 + i} for i in range(ROWS)]
    options[1] |= {"processors": 1}
    options[2] |= {"processors": 1, "temperature": 1.0}
    options[6] |= {"processors": 2, "slot": 5, "uses_state": True}
    state, tokens = sampler.empty_state(), []
    for _ in range(3):
        sampled, state = sampler(logits, options, state)
        tokens.append(sampled.tokens)
    want = np.stack([logits.argmax(axis=1)] * 3)
    want[:, 1], want[:, 2], want[:, 6] = 6, 7, np.argsort(-logits[6])[:3]
    np.testing.assert_array_equal(np.stack(tokens), want)


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_row_without_possible_tokens_still_gives_a_token_id(temperature, sampler_on):
    options = {"temperature": temperature, "processors": 4, "top_p": 0.5, "top_k": 3}
    tokens = sampler_on(EIGHT, 0, PROCESSORS)(random_logits(), options)[0].tokens
    np.testing.assert_array_equal(tokens, 0)


@pytest.mark.parametrize("temperature", [0, 1])
def test_an_infinite_logit_wins(temperature, sampler_on):
    options = {"temperature": temperature, "processors": 8, "top_p": 0.5, "top_k": 3}
    tokens = sampler_on(EIGHT, 0, PROCESSORS)(random_logits(), options)[0].tokens
    np.testing.assert_array_equal(tokens, 7)


def loops_outside_branches(jaxpr, inside=False):
    """Primitives of noise and threshold searches that run whatever the batch needs."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in ("while", "scan", "exp", "shift_right_logical"):
            yield name
        if name != "cond":
            for inner in jaxprs_in_params(equation.params):
                yield from loops_outside_branches(inner)


def test_an_all_greedy_batch_runs_no_search_and_no_noise(sampler_on):
    sampler = sampler_on(EIGHT, 3)
    with jax.set_mesh(sampler.mesh):
        arguments = (*sampler.arguments(random_logits(), {}), sampler.empty_state())
        jaxpr = jax.make_jaxpr(sampler.sample_function)(*arguments).jaxpr
    assert list(loops_outside_branches(jaxpr)) == []
    assert "shift_right_logical" in str(jaxpr)


def test_more_processors_than_mask_bits_are_refused(sampler_on):
    with pytest.raises(ValueError, match="32 logits processors are too many: use at most 31"):
        sampler_on(ONE, 0, (ban_everything,) * 32)(random_logits(), {})
