"""Every plan computes what one device computes, and that is what Hugging Face computes."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from llmjax.layers.moe import DispatchOptions
from llmjax.models.decoder import RunOptions
from llmjax.parallel.expert_dispatch import Dispatch
from meshes import ParallelPlan, Rules, presets

TOLERANCE = 2e-4
ODD = "llama_odd_llama3rope"
"""6 query heads, 1 key/value head, 100 features between: nothing divides over 8 ranks."""
DENSE = ("llama", ODD, "qwen2", "qwen3", "gemma3_text")
SPARSE = (
    "mixtral",
    "qwen3_moe",
    "qwen3_moe_odd",  # 6 experts, 1 key/value head
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
    "llama4_text",
    "glm4_moe",
)
DENSE_VARIANTS = (
    "llama_bias_linear_rope",
    "llama_yarn_rope",
    "mistral_window",
    "qwen2_window",
    "qwen3_bias_odd",
    "gemma3_text_linear_rope",
)
"""What other checkpoints of the families switch on."""
SPARSE_VARIANTS = (
    "mixtral_window",
    "qwen3_moe_sparse_step",
    "deepseek_v2_groups_yarn",
    "deepseek_v3_bias_yarn",
    "gpt_oss_odd",
    "llama4_text_tied",
    "glm4_moe_groups",
)


@dataclass(frozen=True)
class Strategy:
    """A plan, and how it brings tokens to their experts."""

    plan: ParallelPlan = ParallelPlan()
    dispatch: Dispatch | Literal["auto"] = "auto"
    max_num_tokens: int | None = None

    @property
    def options(self) -> RunOptions:
        dispatch = DispatchOptions(method=self.dispatch, max_num_tokens=self.max_num_tokens)
        return RunOptions(dispatch=dispatch)

    def __str__(self) -> str:
        dispatch = "" if self.dispatch == "auto" else f" {self.dispatch}"
        limit = f" in rounds of {self.max_num_tokens}" if self.max_num_tokens else ""
        return f"{self.plan}{dispatch}{limit}"


ONE_DEVICE = Strategy()
MIXED = ParallelPlan(dp=2, ep=2, tp=2, attention_dp="partial")
"""All axes at once."""
RICH = (
    Strategy(ParallelPlan(ep=4, tp=2), "all_to_all"),
    Strategy(ParallelPlan(ep=4, tp=2, attention_dp=True), "all_to_all"),
    Strategy(MIXED, "all_to_all", max_num_tokens=5),
)
"""What holds the most at once: 8 devices, tensor ranks inside each expert, tokens that are sent."""
STRATEGIES = (
    Strategy(ParallelPlan(tp=2)),
    Strategy(ParallelPlan(ep=2), "allreduce"),
    Strategy(ParallelPlan(tp=4)),
    Strategy(ParallelPlan(ep=4), "allgather"),
    Strategy(ParallelPlan(ep=2, attention_dp=True), "all_to_all"),
    Strategy(ParallelPlan(ep=2, tp=2), "all_to_all"),
    Strategy(ParallelPlan(ep=2, tp=2, attention_dp="partial"), "allgather"),
    Strategy(ParallelPlan(dp=2, ep=2), "all_to_all"),
    Strategy(ParallelPlan(ep=8, attention_dp=True), "all_to_all"),
    Strategy(ParallelPlan(tp=8, attention_dp=True)),
    *RICH,
    Strategy(ParallelPlan(tp=8)),
    Strategy(ParallelPlan(ep=4, tp=2, attention_dp=True), "allgather"),
    Strategy(ParallelPlan(ep=2, tp=4), "allreduce"),
    Strategy(ParallelPlan(dp=4, tp=2)),
    Strategy(ParallelPlan(ep=2, tp=4, attention_dp="partial"), "all_to_all"),
    Strategy(ParallelPlan(ep=8, attention_dp=True), "allgather"),
    Strategy(ParallelPlan(ep=8), "all_to_all"),
    Strategy(ParallelPlan(ep=2, tp=4, attention_dp=True), "allreduce"),
    Strategy(ParallelPlan(dp=8)),
    Strategy(ParallelPlan(dp=2, ep=4), "allgather"),
    Strategy(MIXED, "allreduce"),
)
PLANS = tuple({strategy.plan: Strategy(strategy.plan) for strategy in STRATEGIES}.values())
"""Without the dispatches, of which a dense model knows nothing."""

Cell = tuple[str, Strategy]


def covering_cells() -> list[Cell]:
    """Each family on one device, each strategy with a family, each variant on a rich strategy.

    Strategies are dealt out to the families like cards: each sparse family gets three of them.
    """
    dense = (ParallelPlan(tp=8), MIXED, ParallelPlan(dp=4, tp=2), PLANS[2].plan, PLANS[9].plan)
    return [
        *((model, ONE_DEVICE) for model in (*DENSE, *SPARSE)),
        *zip(cycle(SPARSE), STRATEGIES, strict=False),
        *((model, Strategy(plan)) for model, plan in zip(DENSE, dense, strict=True)),
        *((model, Strategy(MIXED)) for model in DENSE_VARIANTS),
        *zip(SPARSE_VARIANTS, cycle(RICH), strict=False),
    ]


def all_cells() -> list[Cell]:
    """The product, but that variants are on one device and on rich strategies only."""
    return [
        *((model, strategy) for model in DENSE for strategy in (ONE_DEVICE, *PLANS)),
        *((model, strategy) for model in SPARSE for strategy in (ONE_DEVICE, *STRATEGIES)),
        *((model, Strategy(plan)) for model in DENSE_VARIANTS for plan in (ParallelPlan(), MIXED)),
        *((model, strategy) for model in SPARSE_VARIANTS for strategy in (ONE_DEVICE, *RICH)),
    ]


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


@pytest.mark.parametrize(("model", "strategy"), covering_cells(), ids=str)
def test_logits_and_greedy_ids_are_hugging_faces(model, strategy, golden, logits_on):
    logits_of = logits_on(golden(model).folder, strategy.plan, strategy.options)
    assert worst_error(golden(model), logits_of, strategy.plan) < TOLERANCE
    assert_greedy_ids_are_golden(golden(model), logits_of, strategy.plan)


PAGE = Path(__file__).parent.parent.parent / "docs" / "plan-matrix.md"
INTRODUCTION = f"""# Every model on every plan

Tiny checkpoints of each family, on virtual CPU devices in float32: the largest difference of any
logit from that of Hugging Face transformers. Each must be under {TOLERANCE}, and the greedy ids
must be the same. `uv run pytest -m matrix` measures and writes this page; `-k` limits it to some
rows and leaves the others as they are.

"""


@pytest.fixture(scope="session")
def page() -> Iterator[dict[tuple[str, str], float]]:
    """(model, strategy) -> worst error; what a session measures goes into the page at its end."""
    # A file's tests run in one process (--dist loadfile), so nobody else writes the page.
    measured: dict[tuple[str, str], float] = {}
    yield measured
    lines = PAGE.read_text().splitlines() if PAGE.exists() else []
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    known = {(row[0], row[1]): row[2] for row in rows if len(row) == 3}
    known |= {cell: f"{error:.1e}" for cell, error in measured.items()}
    cells = [(model, str(strategy)) for model, strategy in all_cells()]
    table = [f"| {' | '.join((*cell, known[cell]))} |" for cell in cells if cell in known]
    heading = ["| model | plan and dispatch | worst error |", "| --- | --- | --- |"]
    PAGE.write_text(INTRODUCTION + "\n".join([*heading, *table]) + "\n")


@pytest.mark.matrix
@pytest.mark.parametrize(("model", "strategy"), all_cells(), ids=str)
def test_logits_and_greedy_ids_are_hugging_faces_in_the_product(
    model, strategy, golden, logits_on, page
):
    logits_of = logits_on(golden(model).folder, strategy.plan, strategy.options)
    page[model, str(strategy)] = worst_error(golden(model), logits_of, strategy.plan)
    assert page[model, str(strategy)] < TOLERANCE
    assert_greedy_ids_are_golden(golden(model), logits_of, strategy.plan)


def test_the_covering_cells_are_few_and_leave_out_no_model_and_no_strategy():
    cells = covering_cells()
    assert len(cells) == len(set(cells)) <= 60
    assert {model for model, _ in cells} == {folder.name for folder in golden_folders()}
    assert {strategy for _, strategy in cells} >= set(STRATEGIES)
    assert len(PLANS) >= 16


def golden_folders() -> list[Path]:
    return [path for path in (Path(__file__).parent.parent / "golden").iterdir() if path.is_dir()]


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
