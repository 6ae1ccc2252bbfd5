"""A parallel plan: how many ranks each mesh axis has, and how attention uses them."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from math import prod
from pathlib import Path
from typing import Any, Literal, Self

import yaml

from meshes.axes import MESH_AXES


class PlanError(ValueError):
    """A plan that cannot be laid on the devices or the model at hand."""


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

    def __post_init__(self) -> None:
        for axis, size in self.sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise PlanError(f"{axis}={size!r} is not a size: use a whole number from 1 up.")
        if self.attention_dp not in (False, True, "partial"):
            raise PlanError(
                f"attention_dp={self.attention_dp!r} does not exist: use False (heads over ep and "
                'tp), True (requests over both) or "partial" (requests over ep, heads over tp).'
            )

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
        file = Path(path)
        preset = resources.files("meshes") / "presets" / f"{path}.yaml"
        try:
            text = file.read_text() if file.is_file() else preset.read_text()
        except FileNotFoundError:
            raise PlanError(
                f"The plan {str(path)!r} is neither a YAML file nor a preset "
                f"({', '.join(presets())})."
            ) from None
        except UnicodeDecodeError:
            raise PlanError(
                f"The plan {str(path)!r} is not UTF-8 text: give a YAML file."
            ) from None
        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise PlanError(f"The plan {str(path)!r} is not valid YAML: {error}") from None
        if not isinstance(content, Mapping):
            raise PlanError(f"The plan {str(path)!r} must map axes to sizes, such as `tp: 4`.")
        return cls.from_mapping(content, origin=f"The plan {str(path)!r}")


def presets() -> list[str]:
    """Names of the plans that ship with the package."""
    folder = resources.files("meshes") / "presets"
    return sorted(
        Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )
