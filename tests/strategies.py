"""The plans that tests run: what each of them combines, and which models they are dealt out to."""

import json
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any, Final, Literal

from llmjax.layers.moe import DispatchOptions
from llmjax.models.decoder import RunOptions
from llmjax.parallel.expert_dispatch import Dispatch
from meshes import ParallelPlan, PlanError

GOLDEN = Path(__file__).parent / "golden"

EXPERTS = ("ep allreduce", "ep allgather", "ep all_to_all", "ETP")
"""Features that only a model with experts has."""
FEATURES = (
    "tp",
    "dp",
    "attention DP full",
    "attention DP partial",
    *EXPERTS,
    "cp ring",
    "cp Helix",
    "pp even",
    "pp uneven",
)
"""What a strategy may combine; a pair of them is proved by a cell that has both."""
ALTERNATIVES = (
    {"attention DP full", "attention DP partial"},
    {"ep allreduce", "ep allgather", "ep all_to_all"},
    {"cp ring", "cp Helix"},
    {"pp even", "pp uneven"},
)
"""Values of one setting, which no plan can have at once."""
ENGINE_FEATURES = (
    "chunked prefill",
    "prefix caching",
    "preemption",
    "overlap",
    "logprobs",
    "prompt logprobs",
    "penalties",
    "seeds",
)
"""What the engine does for requests on every plan."""


@dataclass(frozen=True)
class Strategy:
    """A plan, and how it brings tokens to their experts."""

    plan: ParallelPlan = ParallelPlan()
    dispatch: Dispatch | Literal["auto"] = "auto"
    max_num_tokens: int | None = None
    uneven: bool = False
    """Whether the first pipeline stage has one layer; else stages differ by a layer at most."""

    @property
    def options(self) -> RunOptions:
        dispatch = DispatchOptions(method=self.dispatch, max_num_tokens=self.max_num_tokens)
        return RunOptions(dispatch=dispatch)

    def plan_for(self, model: str) -> ParallelPlan:
        """The plan with a model's layers dealt out to the stages.

        Raises:
            PlanError: the model has fewer layers than the plan has stages.
        """
        layers = read_config(model)["num_hidden_layers"]
        self.plan.check_layers(layers)
        return replace(self.plan, pp_partition=(1, layers - 1)) if self.uneven else self.plan

    @property
    def features(self) -> frozenset[str]:
        """What it combines, for a model with experts."""
        plan = self.plan
        present = {
            "tp": plan.tp > 1,
            "dp": plan.dp > 1,
            "attention DP full": plan.attention_dp is True,
            "attention DP partial": plan.attention_dp == "partial" and plan.tp > 1,
            f"ep {self.dispatch}": plan.ep > 1 and self.dispatch != "auto",
            "ETP": plan.ep > 1 and plan.tp > 1 and self.dispatch != "auto",
            "cp ring": plan.cp > 1 and plan.cp_type == "RING",
            "cp Helix": plan.cp > 1 and plan.cp_type == "HELIX",
            "pp even": plan.pp > 1 and not self.uneven,
            "pp uneven": self.uneven,
        }
        return frozenset(name for name, is_present in present.items() if is_present)

    def __str__(self) -> str:
        dispatch = "" if self.dispatch == "auto" else f" {self.dispatch}"
        limit = f" in rounds of {self.max_num_tokens}" if self.max_num_tokens else ""
        return f"{self.plan}{' uneven' if self.uneven else ''}{dispatch}{limit}"


@cache
def read_config(model: str) -> dict[str, Any]:
    """The config of a golden model, as Hugging Face wrote it."""
    return json.loads((GOLDEN / model / "config.json").read_text())


def pairs_of(features: frozenset[str]) -> frozenset[frozenset[str]]:
    """All pairs of features."""
    return frozenset(map(frozenset, combinations(sorted(features), 2)))


def possible_pairs() -> frozenset[frozenset[str]]:
    """The pairs that are no alternatives of one setting."""
    pairs = pairs_of(frozenset(FEATURES))
    return frozenset(pair for pair in pairs if not any(pair <= each for each in ALTERNATIVES))


def reason_of_refusal(model: str, strategy: Strategy) -> str | None:
    """Why a model cannot run on a plan; None where it can."""
    try:
        strategy.plan_for(model)
    except PlanError as error:
        return str(error)
    return None


DENSE = ("llama", "llama_odd_llama3rope", "qwen2", "qwen3", "gemma3_text")
"""The second has 6 query heads, 1 key/value head, 100 features between: nothing divides by 8."""
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
MODELS = (*DENSE, *SPARSE, *DENSE_VARIANTS, *SPARSE_VARIANTS)

ONE_DEVICE = Strategy()
MIXED = ParallelPlan(dp=2, ep=2, tp=2, attention_dp="partial")
"""Replicas, tensor ranks inside experts, and a batch over the expert ranks."""
HELIX: Final = "HELIX"
PAIRS = (
    Strategy(ParallelPlan(cp=2, ep=2, tp=2, attention_dp="partial", cp_type=HELIX), "all_to_all"),
    Strategy(ParallelPlan(cp=2, ep=2, tp=2, attention_dp=True), "allreduce"),
    Strategy(
        ParallelPlan(cp=2, ep=2, tp=2, attention_dp="partial"), "all_to_all", max_num_tokens=5
    ),
    Strategy(MIXED, "allreduce"),
    Strategy(ParallelPlan(dp=2, cp=2, ep=2), "allgather"),
    Strategy(ParallelPlan(pp=2, ep=2, tp=2, attention_dp="partial"), "allreduce"),
    Strategy(ParallelPlan(pp=2, cp=2, ep=2, attention_dp=True, cp_type=HELIX), "allgather"),
    Strategy(ParallelPlan(pp=2, cp=2, ep=2), "all_to_all"),
    Strategy(ParallelPlan(pp=2, dp=2, cp=2, cp_type=HELIX)),
    Strategy(ParallelPlan(pp=2, ep=2, tp=2, attention_dp="partial"), "allgather", uneven=True),
    Strategy(
        ParallelPlan(pp=2, cp=2, ep=2, attention_dp=True, cp_type=HELIX), "allreduce", uneven=True
    ),
    Strategy(ParallelPlan(pp=2, dp=2, ep=2, attention_dp=True), "all_to_all", uneven=True),
    Strategy(ParallelPlan(pp=2, dp=2, cp=2), uneven=True),
)
"""Every pair of features is in one of these."""
FIRST = (PAIRS[1], PAIRS[2], PAIRS[6], PAIRS[12])
SECOND = (PAIRS[7], PAIRS[8], PAIRS[9], PAIRS[10])
THIRD = (PAIRS[0], PAIRS[4], PAIRS[5], PAIRS[11])
"""Each of the three has all features, and together with `SPARE` they are `PAIRS`."""
SPARE = PAIRS[3]
ROUND = (
    Strategy(ParallelPlan(pp=2, cp=2, tp=2, attention_dp=True)),
    Strategy(ParallelPlan(pp=2, dp=2, cp=2, cp_type=HELIX), uneven=True),
    Strategy(MIXED),
)
"""Between them they have all features of a model without experts."""
ALONE = (
    Strategy(ParallelPlan(tp=2)),
    Strategy(ParallelPlan(tp=4)),
    Strategy(ParallelPlan(tp=8)),
    Strategy(ParallelPlan(dp=2)),
    Strategy(ParallelPlan(dp=8)),
    Strategy(ParallelPlan(ep=2), "allreduce"),
    Strategy(ParallelPlan(ep=4), "allgather"),
    Strategy(ParallelPlan(ep=8), "all_to_all"),
    Strategy(ParallelPlan(tp=8, attention_dp=True)),
    Strategy(ParallelPlan(ep=2, attention_dp=True), "all_to_all"),
    Strategy(ParallelPlan(ep=8, attention_dp=True), "all_to_all"),
    Strategy(ParallelPlan(ep=8, attention_dp=True), "allgather"),
    Strategy(ParallelPlan(pp=2)),
    Strategy(ParallelPlan(pp=2), uneven=True),
    Strategy(ParallelPlan(pp=4)),
    Strategy(ParallelPlan(cp=2)),
    Strategy(ParallelPlan(cp=4)),
    Strategy(ParallelPlan(cp=8)),
    Strategy(ParallelPlan(cp=2, cp_type=HELIX)),
    Strategy(ParallelPlan(cp=4, cp_type=HELIX)),
    Strategy(ParallelPlan(cp=8, cp_type=HELIX)),
)
"""One axis at a time."""
TOGETHER = (
    Strategy(ParallelPlan(ep=2, tp=2), "all_to_all"),
    Strategy(ParallelPlan(ep=2, tp=2, attention_dp="partial"), "allgather"),
    Strategy(ParallelPlan(dp=2, ep=2), "all_to_all"),
    Strategy(ParallelPlan(ep=4, tp=2), "all_to_all"),
    Strategy(ParallelPlan(ep=4, tp=2, attention_dp=True), "all_to_all"),
    Strategy(ParallelPlan(ep=4, tp=2, attention_dp=True), "allgather"),
    Strategy(ParallelPlan(ep=2, tp=4), "allreduce"),
    Strategy(ParallelPlan(ep=2, tp=4, attention_dp="partial"), "all_to_all"),
    Strategy(ParallelPlan(ep=2, tp=4, attention_dp=True), "allreduce"),
    Strategy(ParallelPlan(dp=4, tp=2)),
    Strategy(ParallelPlan(dp=2, ep=4), "allgather"),
    Strategy(ParallelPlan(pp=2, tp=4)),
    Strategy(ParallelPlan(pp=4, tp=2)),
    Strategy(ParallelPlan(pp=2, ep=4, attention_dp=True), "all_to_all"),
    Strategy(ParallelPlan(pp=2, dp=2, tp=2)),
    Strategy(MIXED, "all_to_all", max_num_tokens=5),
    Strategy(ParallelPlan(cp=2, tp=2)),
    Strategy(ParallelPlan(cp=4, tp=2)),
    Strategy(ParallelPlan(cp=2, tp=4, cp_type=HELIX)),
    Strategy(ParallelPlan(cp=4, tp=2, cp_type=HELIX)),
    Strategy(ParallelPlan(pp=2, cp=2, tp=2)),
    Strategy(ParallelPlan(pp=2, cp=2, tp=2, cp_type=HELIX)),
    Strategy(ParallelPlan(dp=2, cp=2, tp=2)),
    Strategy(ParallelPlan(cp=4, ep=2), "all_to_all"),
)
"""Products in other sizes."""
STRATEGIES = tuple(dict.fromkeys((*ALONE, *PAIRS, *ROUND[:2], *TOGETHER)))
PLANS = tuple(dict.fromkeys(Strategy(each.plan, uneven=each.uneven) for each in STRATEGIES))
"""Without the dispatches, of which a model without experts knows nothing."""

Cell = tuple[str, Strategy]
KINDS: dict[str, tuple[Cell, ...]] = {
    "grouped-query": (
        *(("qwen3_moe", strategy) for strategy in FIRST),
        *(("mixtral", strategy) for strategy in SECOND),
        *(("glm4_moe", strategy) for strategy in THIRD),
        ("glm4_moe_groups", SPARE),
    ),
    "latent (MLA)": (
        *(("deepseek_v2", strategy) for strategy in FIRST),
        *(("deepseek_v3", strategy) for strategy in SECOND),
        *(("deepseek_v2_groups_yarn", strategy) for strategy in (*THIRD[:2], SPARE)),
        *(("deepseek_v3_bias_yarn", strategy) for strategy in THIRD[2:]),
    ),
    "sliding window": tuple(
        ("mixtral_window" if strategy.plan.ep > 1 else "gemma3_text", strategy)
        for strategy in PAIRS
    ),
    "sinks": (
        *(("gpt_oss", strategy) for strategy in (*FIRST, *SECOND)),
        *(("gpt_oss_odd", strategy) for strategy in (*THIRD, SPARE)),
    ),
    "chunked": (
        *(("llama4_text", strategy) for strategy in (*FIRST, *SECOND)),
        *(("llama4_text_tied", strategy) for strategy in (*THIRD, SPARE)),
    ),
}
"""For each kind of attention, every pair of features."""


def covering_cells() -> tuple[Cell, ...]:
    """Each kind of attention on all pairs, each family under all features, and each variant."""
    return (
        ("llama", ONE_DEVICE),
        *(cell for cells in KINDS.values() for cell in cells),
        *((model, strategy) for model in DENSE[:-1] for strategy in ROUND),
        *(("gemma3_text", strategy) for strategy in (ROUND[0], ROUND[2])),
        (
            "qwen3_moe_odd",
            Strategy(ParallelPlan(pp=2, cp=2, ep=2, attention_dp=True), "allgather"),
        ),
        ("qwen3_moe_odd", Strategy(ParallelPlan(pp=2, dp=2, ep=2), "allreduce", uneven=True)),
        ("qwen3_moe_odd", THIRD[0]),
        ("llama_bias_linear_rope", Strategy(ParallelPlan(tp=8))),
        ("llama_yarn_rope", Strategy(ParallelPlan(cp=8))),
        ("mistral_window", Strategy(ParallelPlan(cp=4, tp=2, cp_type=HELIX))),
        ("qwen2_window", Strategy(ParallelPlan(tp=8, attention_dp=True))),
        ("qwen3_bias_odd", Strategy(ParallelPlan(ep=2, tp=4, attention_dp="partial"))),
        ("gemma3_text_linear_rope", Strategy(ParallelPlan(pp=4, tp=2))),
        (
            "qwen3_moe_sparse_step",
            Strategy(ParallelPlan(ep=8, attention_dp=True), "all_to_all"),
        ),
    )


def all_cells() -> tuple[Cell, ...]:
    """The product of models and strategies, and what covers other checkpoints of the families."""
    cells = (
        *((model, strategy) for model in DENSE for strategy in (ONE_DEVICE, *PLANS)),
        *((model, strategy) for model in SPARSE for strategy in (ONE_DEVICE, *STRATEGIES)),
        *((model, ONE_DEVICE) for model in (*DENSE_VARIANTS, *SPARSE_VARIANTS)),
        *covering_cells(),
    )
    return tuple(sorted(dict.fromkeys(cells), key=lambda cell: MODELS.index(cell[0])))


CROWDED = {
    "tensor ranks": Strategy(ParallelPlan(tp=2)),
    "replicas": Strategy(ParallelPlan(dp=2)),
    "expert ranks": Strategy(ParallelPlan(ep=2), "allreduce"),
    "tensor ranks inside experts": Strategy(ParallelPlan(ep=2, tp=2), "all_to_all"),
    "attention DP": Strategy(ParallelPlan(ep=2, attention_dp=True), "all_to_all"),
    "partial attention DP": Strategy(ParallelPlan(ep=2, tp=2, attention_dp="partial"), "allgather"),
    "stages": Strategy(ParallelPlan(pp=2)),
    "uneven stages of experts": Strategy(
        ParallelPlan(pp=2, ep=2, attention_dp=True), "all_to_all", uneven=True
    ),
    "ring": Strategy(ParallelPlan(cp=2)),
    "Helix": Strategy(ParallelPlan(cp=2, cp_type=HELIX)),
    "ring in stages": Strategy(ParallelPlan(pp=2, cp=2, tp=2)),
    "Helix of experts": Strategy(
        ParallelPlan(cp=2, ep=2, tp=2, attention_dp="partial", cp_type=HELIX), "allgather"
    ),
}
"""Plans on which 64 requests of all sorts crowd an engine."""
CROWDED_MODEL = "qwen3_moe_odd"
