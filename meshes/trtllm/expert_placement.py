"""TensorRT-LLM's expert placement (`moe_config.load_balancer`), parsed and checked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meshes.documents import read_document
from meshes.errors import PlanError, shorten
from meshes.plan import is_size

KEY = "moe_config.load_balancer"
KNOWN = ("num_slots", "initial_global_assignments", "layer_updates_per_iter")


def check_load_balancer(value: Any, *, num_ranks: int) -> None:
    """Checks the number of slots, their ranks, and which expert each slot of each layer holds.

    Args:
        value: a mapping, the path of a YAML file with one, or None.
        num_ranks: expert ranks, over which the slots are dealt out evenly.

    Raises:
        PlanError: a value that no placement could have.
    """
    if value is None:
        return
    if isinstance(value, str):
        if not Path(value).is_file():
            raise PlanError(f"{KEY}={shorten(value)} is no file: give the path of a YAML file.")
        value = read_document(value, what=f"The {KEY}")
    if not isinstance(value, Mapping):
        raise PlanError(f"{KEY}={shorten(value)} is neither a path nor a mapping.")
    for key in value:
        if key not in KNOWN:
            raise PlanError(f"{KEY} has the unknown key {key!r}: use {', '.join(KNOWN)}.")
    slots, updates = value.get("num_slots"), value.get("layer_updates_per_iter", 0)
    if not is_size(slots) or slots % num_ranks:
        raise PlanError(
            f"{KEY}.num_slots={shorten(slots)} must be a multiple of "
            f"moe_expert_parallel_size={num_ranks}: each rank holds the same number of slots."
        )
    if not is_size(updates) and (updates != 0 or isinstance(updates, bool)):
        raise PlanError(
            f"{KEY}.layer_updates_per_iter={shorten(updates)} is out of range: use a whole "
            "number from 0 up; 0 leaves the placement as it is."
        )
    _check_assignments(value.get("initial_global_assignments") or {}, slots)


def _check_assignments(assignments: Any, num_slots: int) -> None:
    key = f"{KEY}.initial_global_assignments"
    if not isinstance(assignments, Mapping):
        raise PlanError(f"{key} must map layers to lists of expert ids, one for each slot.")
    for layer, experts in assignments.items():
        if not (layer == 0 or is_size(layer)):
            raise PlanError(f"{key} has the key {shorten(layer)}, which is no layer's number.")
        if not isinstance(experts, list) or len(experts) != num_slots:
            count = len(experts) if isinstance(experts, list) else "no list of"
            raise PlanError(
                f"{key} gives layer {layer} {count} experts, and num_slots={num_slots}: "
                "name one expert for each slot."
            )
        if not all(expert == 0 or is_size(expert) for expert in experts):
            raise PlanError(f"{key} of layer {layer} must hold expert ids: whole numbers from 0.")
