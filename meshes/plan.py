"""A parallel plan: how many ranks each mesh axis has, and how attention uses them."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path
from typing import Any, Literal, Self, TypeGuard

from meshes.axes import MESH_AXES
from meshes.documents import presets, read_document
from meshes.errors import PlanError, shorten

__all__ = ["ParallelPlan", "PlanError", "presets"]


def is_size(value: Any) -> TypeGuard[int]:
    """Whether a value counts ranks or layers: a whole number from 1 up."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """Sizes of the five mesh axes and the placement of attention.

    TensorRT-LLM's sizes are products of these: `tensor_parallel_size = ep * tp`,
    `moe_expert_parallel_size = ep` and `moe_tensor_parallel_size = tp`.

    Raises:
        PlanError: a size below one, or an attention placement that does not exist.
    """

    pp: int = 1
    """Pipeline stages."""
    dp: int = 1
    """Replicas, each with its own requests."""
    cp: int = 1
    """Context ranks: each holds a part of every sequence."""
    ep: int = 1
    """Expert ranks."""
    tp: int = 1
    """Tensor ranks."""
    attention_dp: bool | Literal["partial"] = False
    """False: heads over ep and tp. True: requests over both. "partial": requests over ep only."""
    pp_partition: tuple[int, ...] | None = None
    """Layers of each pipeline stage; None: as equal as they can be."""
    cp_type: Literal["RING", "HELIX"] = "RING"
    """RING: prefill passes keys round a ring of cp. HELIX: decode merges parts over cp, and dense
    layers are split over it too."""
    gpus_per_node: int | None = None
    """Devices of a host, checked against the devices that are there; None: as many as there are."""

    def __post_init__(self) -> None:
        sizes = dict(self.sizes)
        if self.gpus_per_node is not None:
            sizes["gpus_per_node"] = self.gpus_per_node
        for key, size in sizes.items():
            if not is_size(size):
                raise PlanError(
                    f"{key}={shorten(size)} is not a size: use a whole number from 1 up."
                )
        self._check_stages()
        if self.cp_type not in ("RING", "HELIX"):
            kind = shorten(self.cp_type)
            raise PlanError(f'cp_type={kind} does not exist: use "RING" or "HELIX".')
        if self.attention_dp not in (False, True, "partial"):
            raise PlanError(
                f"attention_dp={shorten(self.attention_dp)} does not exist: use False (heads "
                "over ep and tp), True (requests over both) or "
                '"partial" (requests over ep, heads over tp).'
            )

    def check_layers(self, num_layers: int) -> None:
        """Makes sure that every stage has layers, and `pp_partition` deals out all of a model's.

        Raises:
            PlanError: there are more stages than layers, or the sum is another number.
        """
        if self.pp > num_layers:
            raise PlanError(
                f"pp={self.pp} is more pipeline stages than the model has layers: use at most "
                f"{num_layers}."
            )
        if self.pp_partition is not None and sum(self.pp_partition) != num_layers:
            raise PlanError(
                f"pp_partition={list(self.pp_partition)} deals out {sum(self.pp_partition)} "
                f"layers, and the model has {num_layers}: change a stage by "
                f"{num_layers - sum(self.pp_partition):+d}."
            )

    def _check_stages(self) -> None:
        if self.pp_partition is None:
            return
        stages = self.pp_partition
        if not isinstance(stages, list | tuple) or not all(map(is_size, stages)):
            raise PlanError(
                f"pp_partition={shorten(stages)} is no list of layers a stage: give each stage "
                "a whole number from 1 up, such as [16, 16]."
            )
        if len(stages) != self.pp:
            raise PlanError(
                f"pp_partition={list(stages)} has {len(stages)} stages, and "
                f"pipeline_parallel_size (pp) is {self.pp}: give one number for each stage."
            )
        object.__setattr__(self, "pp_partition", tuple(stages))

    @property
    def sizes(self) -> dict[str, int]:
        """Mesh axis -> number of ranks, in mesh order."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}

    @property
    def num_devices(self) -> int:
        """Devices that the plan occupies."""
        return prod(self.sizes.values())

    @property
    def tensor_parallel_size(self) -> int:
        """TensorRT-LLM's tensor_parallel_size: ep * tp."""
        return self.ep * self.tp

    def __str__(self) -> str:
        parts = [f"{axis}={size}" for axis, size in self.sizes.items() if size > 1]
        if self.attention_dp:
            parts.append("attention_dp" + ("=partial" if self.attention_dp == "partial" else ""))
        if self.pp_partition:
            parts.append("pp_partition=" + "+".join(map(str, self.pp_partition)))
        if self.cp_type != "RING":
            parts.append(f"cp_type={self.cp_type}")
        return ",".join(parts) or "one device"

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], *, origin: str = "the plan") -> Self:
        """Builds a plan from mesh axis names and sizes; an unknown key is refused by name."""
        known = [field.name for field in fields(cls)]
        for key in mapping:
            if key not in known:
                raise PlanError(f"{origin} has the unknown key {key!r}: use {', '.join(known)}.")
        return cls(**mapping)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Reads a plan from a YAML file, or from the preset of that name."""
        return cls.from_mapping(read_document(path), origin=f"The plan {str(path)!r}")
