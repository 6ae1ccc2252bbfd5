"""Every plan computes what one device computes, and that is what Hugging Face computes."""

import json
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from strategies import (
    ALONE,
    DENSE,
    EXPERTS,
    FEATURES,
    GOLDEN,
    KINDS,
    MIXED,
    PLANS,
    SPARSE,
    all_cells,
    covering_cells,
    pairs_of,
    possible_pairs,
    read_config,
    reason_of_refusal,
)

from llmjax import LLM
from llmjax.models.decoder import RunOptions
from meshes import ParallelPlan, PlanError, Rules, presets

TOLERANCE = 2e-4
ODD = "llama_odd_llama3rope"


@pytest.fixture(autouse=True)
def forget_programs() -> Iterator[None]:
    """JAX keeps every program that it compiled, and no two of these tests share one."""
    yield
    jax.clear_caches()


def worst_error(golden: Any, logits_of: Any, plan: ParallelPlan) -> float:
    """The largest difference from Hugging Face's logits."""
    # Odd ranks hold the rows the other way round, so that a rank cannot pass with another's.
    orders = [(0, 1) if rank % 2 == 0 else (1, 0) for rank in range(Rules(plan).size("requests"))]
    prompts = [[golden.input_ids[row].tolist() for row in order] for order in orders]
    logits, expected = logits_of(prompts), golden.logits[np.array(orders)]
    assert logits.shape == expected.shape
    return float(np.abs(logits - expected).max())


def assert_greedy_ids_are_golden(golden: Any, logits_of: Any, plan: ParallelPlan) -> None:
    """After each beginning of the text, its next token is the likeliest."""
    ranks = Rules(plan).size("requests")
    chosen = logits_of([[golden.greedy, golden.greedy]] * ranks).argmax(-1)
    generated = slice(golden.prompt_length, None)
    assert (chosen[..., golden.prompt_length - 1 : -1] == golden.greedy[generated]).all()


@pytest.mark.covering
@pytest.mark.parametrize(("model", "strategy"), covering_cells(), ids=str)
def test_logits_and_greedy_ids_are_hugging_faces(model, strategy, golden, logits_on):
    plan = strategy.plan_for(model)
    logits_of = logits_on(golden(model).folder, plan, strategy.options)
    assert worst_error(golden(model), logits_of, plan) < TOLERANCE
    assert_greedy_ids_are_golden(golden(model), logits_of, plan)


PAGE = GOLDEN.parent.parent / "docs" / "plan-matrix.md"
INTRODUCTION = f"""# Every model on every plan

Tiny checkpoints of each family, on virtual CPU devices in float32: the largest difference of any
logit from that of Hugging Face transformers. Each must be under {TOLERANCE}, and the greedy ids
must be the same. Checkpoints that only switch something on in their family run on the plans that
cover it. `uv run pytest -m matrix` measures and writes this page; `-k` limits it to some rows and
leaves the others as they are.

"""


@pytest.fixture(scope="session")
def page() -> Iterator[dict[tuple[str, str], str]]:
    """(model, strategy) -> worst error; what a session measures goes into the page at its end."""
    # A file's tests run in one process (--dist loadfile), so nobody else writes the page.
    measured: dict[tuple[str, str], str] = {}
    yield measured
    lines = PAGE.read_text().splitlines() if PAGE.exists() else []
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    known = {(row[0], row[1]): row[2] for row in rows if len(row) == 3} | measured
    cells = [(model, str(strategy)) for model, strategy in all_cells()]
    table = [f"| {' | '.join((*cell, known[cell]))} |" for cell in cells if cell in known]
    heading = ["| model | plan and dispatch | worst error |", "| --- | --- | --- |"]
    PAGE.write_text(INTRODUCTION + "\n".join([*heading, *table]) + "\n")


@pytest.mark.matrix
@pytest.mark.parametrize(("model", "strategy"), all_cells(), ids=str)
def test_logits_and_greedy_ids_are_hugging_faces_in_the_product(
    model, strategy, golden, logits_on, page
):
    refusal = reason_of_refusal(model, strategy)
    if refusal is not None:
        with pytest.raises(PlanError, match=re.escape(refusal)):
            LLM(golden(model).folder, plan=strategy.plan, progress=False)
        page[model, str(strategy)] = f"refused: {refusal}"
        return
    plan = strategy.plan_for(model)
    logits_of = logits_on(golden(model).folder, plan, strategy.options)
    error = worst_error(golden(model), logits_of, plan)
    page[model, str(strategy)] = f"{error:.1e}"
    assert error < TOLERANCE
    assert_greedy_ids_are_golden(golden(model), logits_of, plan)


def test_each_kind_of_attention_runs_every_pair_of_features():
    for kind, cells in KINDS.items():
        proved = frozenset(pair for _, each in cells for pair in pairs_of(each.features))
        assert possible_pairs() - proved == set(), f"{kind} attention lacks these pairs"
        assert all(reason_of_refusal(model, strategy) is None for model, strategy in cells)


@pytest.mark.parametrize("family", [*DENSE, *SPARSE])
def test_each_family_runs_under_every_feature(family):
    known = set(FEATURES) - set(() if family in SPARSE else EXPERTS)
    # Variants are checkpoints of the same family: together they stand for it.
    of_family = [
        strategy.features
        for model, strategy in covering_cells()
        if read_config(model)["architectures"] == read_config(family)["architectures"]
    ]
    assert set().union(*of_family) >= known


def test_the_covering_cells_are_few_and_leave_out_no_model():
    cells = covering_cells()
    assert len(cells) == len(set(cells)) <= 90
    folders = {path.name for path in GOLDEN.iterdir() if path.is_dir()}
    assert {model for model, _ in cells} == {model for model, _ in all_cells()} == folders


def test_the_product_has_thirty_plans_of_two_four_and_eight_devices():
    assert len(PLANS) >= 30
    assert {strategy.plan.num_devices for strategy in PLANS} == {2, 4, 8}
    alone = set().union(*[each.features for each in ALONE])
    assert alone == set(FEATURES) - {"attention DP partial", "ETP"}, "these two need two axes"
    assert sum(len(combined(strategy.plan)) >= 3 for strategy in PLANS) >= 6


def combined(plan: ParallelPlan) -> list[str]:
    """The axes that have several ranks, and attention data parallelism."""
    axes = [axis for axis, size in plan.sizes.items() if size > 1]
    return [*axes, "attention_dp"] if plan.attention_dp else axes


def test_every_preset_is_one_of_the_plans_of_these_tests():
    tested = {strategy.plan for strategy in PLANS}
    assert {ParallelPlan.from_yaml(name) for name in presets()} <= tested


@pytest.mark.parametrize(
    ("model", "plan"),
    [("llama4_text", ParallelPlan()), ("deepseek_v3", MIXED), (ODD, ParallelPlan(tp=2))],
    ids=str,
)
def test_unrolled_layers_give_the_same_logits(model, plan, golden, logits_on):
    logits_of = logits_on(golden(model).folder, plan, RunOptions(layer_loop="unroll"))
    assert worst_error(golden(model), logits_of, plan) < TOLERANCE


@pytest.mark.parametrize("family", ["llama", ODD])
def test_rope_in_its_old_spelling_gives_the_same_logits(family, golden, logits_on, tmp_path):
    folder = golden(family).folder
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    plan = ParallelPlan()
    assert worst_error(golden(family), logits_on(tmp_path, plan), plan) < TOLERANCE
