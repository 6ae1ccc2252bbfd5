"""TensorRT-LLM's sizes -> a plan; its rules hold, and an error names what breaks them.

Source: the "Parallelism" page of TensorRT-LLM.
"""

from typing import Any

from meshes.errors import PlanError
from meshes.plan import ParallelPlan
from meshes.trtllm.words import Words

CP_TYPES = {
    "RING": None,
    "HELIX": None,
    "ULYSSES": "it splits heads, which tensor_parallel_size does too: raise that, or use RING",
    "STAR": "it approximates attention: use RING, which is exact",
}
"""Kind of context parallelism -> what to use instead."""


def make_plan(words: Words) -> ParallelPlan:
    """A plan with `ep * tp = tensor_parallel_size`.

    Raises:
        PlanError: a value out of its range, or sizes that do not multiply.
    """
    cp = words.size("context_parallel_size") or 1
    cp_type = _read_cp_type(words, cp)
    ep, tp = _split_experts(words, cp if cp_type == "HELIX" else 1)
    attention_dp = words.value("enable_attention_dp", False)
    if attention_dp not in (True, False, "partial"):
        raise PlanError(
            f'{words["enable_attention_dp"]} does not exist: use true, false or "partial".'
        )
    plan = ParallelPlan(
        pp=words.size("pipeline_parallel_size") or 1,
        dp=words.size("data_parallel_size") or 1,
        cp=cp,
        ep=ep,
        tp=tp,
        attention_dp=attention_dp,
        pp_partition=words.value("pp_partition"),
        cp_type=cp_type,
        gpus_per_node=words.size("gpus_per_node"),
    )
    if words.value("attention_dp_balance") is True and not attention_dp and plan.dp == 1:
        raise PlanError(
            f"{words['attention_dp_balance']} needs several batch ranks: "
            "add enable_attention_dp: true, or leave it out."
        )
    return plan


def _read_cp_type(words: Words, cp: int) -> Any:
    if "cp_type" not in words:
        return "RING"
    given = words["cp_type"]
    name = given.value.upper() if isinstance(given.value, str) else ""
    if reason := CP_TYPES.get(name, "use RING or HELIX"):
        raise PlanError(f"{given} does not exist here: {reason}.")
    if cp == 1:
        raise PlanError(
            f"{given} needs context_parallel_size above 1: raise it, or leave cp_config out."
        )
    return name


def _split_experts(words: Words, helix: int) -> tuple[int, int]:
    """Mesh axes ep and tp; with Helix, experts lie over its cp ranks too."""
    size = words.size("tensor_parallel_size") or 1
    ep, tp = words.size("moe_expert_parallel_size"), words.size("moe_tensor_parallel_size")
    if ep is None and tp is None:
        return 1, size
    key = "tensor_parallel_size * context_parallel_size" if helix > 1 else "tensor_parallel_size"
    ranks = size * helix
    name = "moe_tensor_parallel_size" if ep is None else "moe_expert_parallel_size"
    part = ep or tp or 1
    if ranks % part:
        raise PlanError(
            f"{name}={part} does not divide {key}={ranks}: use {_nearest_divisors(ranks, part)}."
        )
    if ep and tp and ep * tp != ranks:
        raise PlanError(
            f"{key}={ranks} needs moe_tensor_parallel_size * moe_expert_parallel_size = {ranks}, "
            f"got {tp} * {ep} = {tp * ep}. With moe_expert_parallel_size={ep}, use "
            f"moe_tensor_parallel_size={ranks // ep}."
        )
    tp = tp or ranks // part
    if size % tp:
        raise PlanError(
            f"moe_tensor_parallel_size={tp} does not divide tensor_parallel_size={size}, over "
            f"which HELIX splits each expert: use {_nearest_divisors(size, tp)}."
        )
    return size // tp, tp


def _nearest_divisors(number: int, wanted: int) -> str:
    """The divisors of a number next to a wanted one; those of huge numbers are not searched."""
    divisors = [size for size in range(1, min(number, 4096) + 1) if number % size == 0]
    below = [size for size in divisors if size < wanted][-1:]
    above = [size for size in divisors if size > wanted][:1]
    return " or ".join(map(str, below + above))
