"""The router chooses what a plain loop over tokens chooses."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.config import ExpertConfig
from llmjax.layers.moe import choose_experts, num_slots, padded_ffn
from meshes import ParallelPlan, Rules

MIXTRAL = ExpertConfig(num_experts=8, top_k=2, ffn=1, normalize=True)
V2 = ExpertConfig(
    num_experts=16, top_k=3, ffn=1, scaling_factor=2.0, num_groups=4, top_groups=2, group_best=1
)
V3 = ExpertConfig(
    num_experts=16,
    top_k=4,
    ffn=1,
    scoring="sigmoid",
    normalize=True,
    scaling_factor=2.5,
    num_groups=4,
    top_groups=2,
    correction_bias=True,
)
LLAMA4 = ExpertConfig(num_experts=5, top_k=1, ffn=1, scoring="sigmoid")
ROUTERS = {
    "softmax": replace(MIXTRAL, normalize=False),
    "softmax of the chosen": MIXTRAL,
    "all experts": replace(MIXTRAL, top_k=8),
    "groups by their best": V2,
    "one group": replace(V2, top_groups=1),
    "all groups": replace(V2, top_groups=4),
    "sigmoids, corrected, groups by their best two": V3,
    "not normalized": replace(V3, normalize=False),
    "corrected without groups": replace(V3, num_groups=1, top_groups=1),
    "one sigmoid": LLAMA4,
}


def choose_in_a_loop(
    logits: np.ndarray, correction: np.ndarray, config: ExpertConfig
) -> tuple[list[int], list[float]]:
    """Experts and gates of one token; of equals, the one with the lower index."""
    if config.scoring == "softmax":
        powers = np.exp(logits - logits.max())
        scores = powers / powers.sum()
    else:
        scores = 1 / (1 + np.exp(-logits))
    choice = scores + correction
    size = config.num_experts // config.num_groups
    groups = [choice[first : first + size] for first in range(0, config.num_experts, size)]
    worth = [sum(sorted(group)[-config.group_best :]) for group in groups]
    best_groups = sorted(range(len(groups)), key=lambda group: -worth[group])
    allowed = [
        e for e in range(config.num_experts) if e // size in best_groups[: config.top_groups]
    ]
    chosen = sorted(allowed, key=lambda expert: -choice[expert])[: config.top_k]
    gates = scores[chosen]
    if config.normalize:
        gates = gates / gates.sum()
    return chosen, list(gates * config.scaling_factor)


@pytest.mark.parametrize("config", ROUTERS.values(), ids=ROUTERS)
def test_experts_and_gates_are_those_of_a_plain_loop(config):
    draw = np.random.default_rng(0)
    logits = draw.normal(0, 2, (200, config.num_experts)).astype(np.float32)
    correction = np.zeros(config.num_experts, np.float32)
    if config.correction_bias:
        correction = draw.normal(0, 0.3, config.num_experts).astype(np.float32)
    given = jnp.array(correction) if config.correction_bias else None
    experts, gates = choose_experts(jnp.array(logits), given, config)
    expected = [choose_in_a_loop(row, correction, config) for row in logits]
    assert experts.tolist() == [chosen for chosen, _ in expected]
    np.testing.assert_allclose(gates, [own for _, own in expected], rtol=1e-5)


@pytest.mark.parametrize("config", ROUTERS.values(), ids=ROUTERS)
def test_of_equal_experts_and_groups_the_first_are_chosen(config):
    correction = jnp.zeros(config.num_experts) if config.correction_bias else None
    experts, gates = choose_experts(jnp.ones((3, config.num_experts)), correction, config)
    assert experts.tolist() == [list(range(config.top_k))] * 3
    assert np.ptp(gates) == 0


def test_a_correction_changes_the_choice_and_not_the_gates():
    config = replace(V3, num_groups=1, top_groups=1, top_k=1, normalize=False, scaling_factor=1.0)
    logits = jnp.zeros((1, 16)).at[0, 3].set(2.0)
    favoured = jnp.zeros(16).at[9].set(5.0)
    assert choose_experts(logits, jnp.zeros(16), config)[0].item() == 3
    expert, gate = choose_experts(logits, favoured, config)
    assert (expert.item(), gate.item()) == (9, 0.5)


def test_corrections_below_zero_open_no_group_that_was_left_out():
    # Experts outside the best groups may not win by a score of zero where all others are negative.
    correction = jnp.full(16, -10.0).at[4:8].set(-9.0).at[8:12].set(-8.0)
    experts, _ = choose_experts(jnp.zeros((1, 16)), correction, V3)
    assert sorted(experts[0].tolist()) == [8, 9, 10, 11]


def test_scores_that_are_all_zero_give_gates_of_zero():
    _, gates = choose_experts(jnp.full((2, 16), -1e4), jnp.zeros(16), V3)
    assert gates.tolist() == [[0.0] * 4] * 2


@pytest.mark.parametrize(("ep", "slots"), [(1, 6), (2, 6), (3, 6), (4, 8), (8, 8)])
def test_experts_that_do_not_divide_get_empty_slots(ep, slots):
    config = ExpertConfig(num_experts=6, top_k=1, ffn=1)
    assert num_slots(config, Rules(ParallelPlan(ep=ep))) == slots


@pytest.mark.parametrize(
    ("ffn", "tp", "padded"),
    [
        (2880, 1, 2880), (2880, 2, 2944), (2880, 8, 3072), (768, 4, 768), (768, 8, 1024),
        (1408, 8, 1536), (96, 2, 96), (97, 2, 98),
    ],
)  # fmt: skip
def test_a_rank_has_whole_units_of_features_unless_it_has_less_than_one(ffn, tp, padded):
    config = ExpertConfig(num_experts=6, top_k=1, ffn=ffn)
    assert padded_ffn(config, Rules(ParallelPlan(tp=tp))) == padded
