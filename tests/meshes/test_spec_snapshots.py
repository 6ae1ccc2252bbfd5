"""The spec of every weight of every family under eight plans, against reviewed files.

After a change that is meant: `pytest tests/meshes/test_spec_snapshots.py --update-snapshots`, then
review the difference of tests/meshes/snapshots.
"""

import json
from pathlib import Path

import pytest

from llmjax.explore import Table, lay_out
from llmjax.explore.layout import read_config
from llmjax.explore.tables import format_spec
from llmjax.models.registry import FAMILIES
from meshes import ParallelPlan

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
SNAPSHOTS = Path(__file__).resolve().parent / "snapshots"
MODELS = sorted(config.parent.name for config in GOLDEN.glob("*/config.json"))
PLANS = {
    "tp8": ParallelPlan(tp=8),
    "ep8": ParallelPlan(ep=8),
    "ep4-tp2": ParallelPlan(ep=4, tp=2),
    "dp2-ep2-tp2": ParallelPlan(dp=2, ep=2, tp=2),
    "attention-dp8": ParallelPlan(tp=8, attention_dp=True),
    "attention-dp8-ep8": ParallelPlan(ep=8, attention_dp=True),
    "attention-dp8-ep4-tp2": ParallelPlan(ep=4, tp=2, attention_dp=True),
    "attention-dp2-tp4": ParallelPlan(ep=2, tp=4, attention_dp="partial"),
}
"""Every way to place attention and experts, each under its name."""


def render_specs(model: str) -> str:
    """Logical axes of every weight and of the cache, and the mesh axes that each lies on."""
    config = read_config(GOLDEN / model)
    layouts = [lay_out(config, plan, dtype="float32") for plan in PLANS.values()]
    tensors = (*layouts[0].weights, layouts[0].kv_cache)
    return str(
        Table(
            title=f"{config.architecture}: tests/golden/{model}",
            columns=("tensor", "axes", *PLANS),
            rows=tuple(
                (
                    tensor.name,
                    ", ".join(axis or "-" for axis in tensor.axes),
                    *(format_spec(layout[tensor.name], layout.plan) for layout in layouts),
                )
                for tensor in tensors
            ),
        )
    )


@pytest.mark.parametrize("model", MODELS)
def test_the_spec_of_every_weight_is_the_reviewed_one(model, request):
    file = SNAPSHOTS / f"{model}.txt"
    if request.config.getoption("--update-snapshots"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"{render_specs(model)}\n")
    assert file.read_text() == f"{render_specs(model)}\n", f"review it: {__doc__}"


def test_every_family_has_a_reviewed_snapshot_and_no_snapshot_is_left_over():
    assert sorted(file.stem for file in SNAPSHOTS.glob("*.txt")) == MODELS
    configs = [json.loads((GOLDEN / model / "config.json").read_text()) for model in MODELS]
    shown = {name for config in configs for name in config["architectures"]}
    for family in FAMILIES:
        assert shown.intersection(family.architectures), f"no golden model: {family.architectures}"


def test_the_plans_are_eight_and_differ():
    assert len(PLANS) == len(set(PLANS.values())) == 8
    assert {plan.num_devices for plan in PLANS.values()} == {8}
