"""A plan and options of the engine -> TensorRT-LLM's keys."""

from collections.abc import Mapping
from typing import Any

from meshes.errors import PlanError
from meshes.plan import ParallelPlan
from meshes.trtllm.keys import KEYS, PLAN_WORDS, Honoured


def to_mapping(plan: ParallelPlan, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """TensorRT-LLM's keys for a plan and options of the engine; `read_deployment` reads them.

    Raises:
        PlanError: an option for which TensorRT-LLM has no key.
    """
    words = _describe_plan(plan)
    keys = {fate.target: key for key, fate in KEYS.items() if isinstance(fate, Honoured)}
    keys["batch_buckets"] = keys["graph_batch_sizes"]
    for option, value in (options or {}).items():
        if option not in keys or option in PLAN_WORDS:
            raise PlanError(f"TensorRT-LLM has no key for the option {option}: leave it out.")
        section, _, key = keys[option].rpartition(".")
        place = words.setdefault(section, {}) if section else words
        place[key] = list(value) if isinstance(value, tuple) else value
    return words


def _describe_plan(plan: ParallelPlan) -> dict[str, Any]:
    words: dict[str, Any] = {"tensor_parallel_size": plan.tensor_parallel_size}
    if plan.ep > 1:
        # With Helix, experts lie over its cp ranks too.
        helix = plan.cp if plan.cp_type == "HELIX" else 1
        words["moe_expert_parallel_size"] = plan.ep * helix
        words["moe_tensor_parallel_size"] = plan.tp
    if plan.pp > 1:
        words["pipeline_parallel_size"] = plan.pp
    if plan.pp_partition is not None:
        words["pp_partition"] = list(plan.pp_partition)
    if plan.cp > 1:
        words["context_parallel_size"] = plan.cp
        words["cp_config"] = {"cp_type": plan.cp_type}
    if plan.dp > 1:
        words["data_parallel_size"] = plan.dp
    if plan.gpus_per_node is not None:
        words["gpus_per_node"] = plan.gpus_per_node
    if plan.attention_dp:
        words["enable_attention_dp"] = plan.attention_dp
    return words
