import numpy as np
import pytest

from llmjax.layers import logprobs
from meshes import ParallelPlan

VOCAB = 61
PLANS = [
    ParallelPlan(),
    ParallelPlan(tp=8),
    ParallelPlan(dp=2, ep=2, tp=2, attention_dp=True),
]


def log_softmax(logits):
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def check(result, logits, tokens, count):
    want, rows = log_softmax(logits), np.arange(len(logits))
    np.testing.assert_allclose(result.logprob, want[rows, tokens], atol=1e-5)
    likelier = (logits > logits[rows, tokens][:, None]).sum(axis=1)
    np.testing.assert_array_equal(result.rank, 1 + likelier)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :count]
    np.testing.assert_array_equal(result.top_ids, order)
    np.testing.assert_allclose(
        result.top_logprobs, np.take_along_axis(want, order, axis=1), atol=1e-5
    )


def random_logits(rows):
    return np.random.default_rng(rows).normal(size=(rows, VOCAB)).astype(np.float32) * 5


@pytest.mark.parametrize(
    ("plan", "count"), [*((plan, 5) for plan in PLANS), (PLANS[1], VOCAB)], ids=str
)
def test_logprobs_are_those_of_the_unmodified_logits(count, plan, sampler_on):
    sampler, logits = sampler_on(plan, count), random_logits(8)
    state = sampler.fill(sampler.empty_state(), 0, bias={3: 100.0})
    options = [{"temperature": 2.0, "seed": i, "top_k": 30} for i in range(8)]
    options[0] = {"slot": 0, "uses_state": True}
    options[1]["num_logprobs"] = 0
    sampled, _ = sampler(logits, options, state)
    assert sampled.tokens[0] == 3
    check(sampled, logits, sampled.tokens, count)


def test_equal_logits_share_a_rank_and_come_in_the_order_of_their_ids(sampler_on):
    sampled, _ = sampler_on(ParallelPlan(tp=8), 5)(
        np.zeros((8, VOCAB), np.float32), {"num_logprobs": 5}
    )
    np.testing.assert_array_equal(sampled.rank, 1)
    np.testing.assert_array_equal(sampled.top_ids, [range(5)] * 8)


def test_logprobs_stay_finite_for_very_unlikely_tokens(sampler_on):
    sampler, logits = sampler_on(ParallelPlan(tp=8), 5), random_logits(8) * 1e4
    scores = sampler.score(logits, logits.argmin(axis=1).astype(np.int32))
    assert np.isfinite(scores.logprob).all()
    np.testing.assert_allclose(scores.logprob, np.ptp(logits, axis=1) * -1, rtol=1e-5)


def test_a_step_that_wants_no_logprobs_gets_zeros(sampler_on):
    sampled, _ = sampler_on(ParallelPlan(tp=8), 5)(random_logits(8), {})
    for field in sampled[1:]:
        assert not field.any()


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("rows", [8, 40])
def test_scores_of_given_tokens_are_exact_however_many_rows_go_at_once(
    rows, plan, sampler_on, monkeypatch
):
    monkeypatch.setattr(logprobs, "_ROWS_AT_ONCE", 12)
    logits = random_logits(rows)
    targets = np.random.default_rng(0).integers(0, VOCAB, rows).astype(np.int32)
    check(sampler_on(plan, 5).score(logits, targets), logits, targets, 5)


def test_tokens_are_scored_without_alternatives_too(sampler_on):
    logits = random_logits(8)
    targets = logits.argmin(axis=1).astype(np.int32)
    check(sampler_on(PLANS[1], 0).score(logits, targets), logits, targets, 0)


def test_a_step_without_targets_is_not_scored(sampler_on):
    scores = sampler_on(ParallelPlan(tp=8), 5).score(random_logits(8), np.full(8, -1, np.int32))
    for field in scores:
        assert not field.any()


def test_more_alternatives_than_tokens_are_refused(sampler_on):
    with pytest.raises(ValueError, match="max_logprobs=62 does not fit a vocabulary of 61 tokens"):
        sampler_on(ParallelPlan(), 62)(random_logits(8), {})
