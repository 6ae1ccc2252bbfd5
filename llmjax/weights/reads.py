"""What is to be read of a checkpoint for each parameter, and whether the checkpoint has it."""

import itertools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llmjax.models.source import Source
from llmjax.weights.interface import Checkpoint, CheckpointError

logger = logging.getLogger(__name__)

_LISTED = 8

type Places = dict[tuple[int, ...], list[Source]]
"""(row of layers,), (row of layers, expert) or, of what is no stack, () -> what fills it."""


@dataclass(frozen=True, kw_only=True)
class AbstractParam:
    """A parameter before it has values."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    spec: PartitionSpec
    layers: tuple[int, ...] | None
    """The model's layer in each row of a stack, whose sources describe one layer; -1 is a row of
    zeros. None: not a stack."""
    by_expert: bool = False
    """The axis after the layers' is that of experts, which are loaded one by one."""

    @property
    def leading(self) -> int:
        """Axes that are filled a step at a time, to keep what the host holds small."""
        return 0 if self.layers is None else 1 + self.by_expert


def plan_reads(
    params: Mapping[str, AbstractParam], sources: Mapping[str, tuple[Source, ...]]
) -> dict[str, Places]:
    """List the sources of each place of each parameter, with their layer filled in."""
    plan = {}
    for name, param in params.items():
        for source in sources[name]:
            _check_fit(name, param, source)
        if param.layers is None:
            plan[name] = {(): list(sources[name])}
            continue
        places: Places = {}
        for row, layer in enumerate(param.layers):
            for source in sources[name] if layer >= 0 else ():
                named = replace(source, name=source.name.replace("{layer}", str(layer)))
                for place in _places_of(named, row, param):
                    places.setdefault(place, []).append(named)
        plan[name] = places
    return plan


def _places_of(source: Source, row: int, param: AbstractParam) -> list[tuple[int, ...]]:
    if not param.by_expert:
        return [(row,)]
    experts = source.region[0] if source.region else slice(None)
    return [(row, slot) for slot in range(*experts.indices(param.shape[1]))]


def _check_fit(name: str, param: AbstractParam, source: Source) -> None:
    shape = param.shape if param.layers is None else param.shape[1:]
    region = source.region or (slice(None),) * len(shape)
    sizes = tuple(len(range(*part.indices(size))) for part, size in zip(region, shape, strict=True))
    filled = source.filled_shape
    if len(filled) != len(shape) or any(
        have > room for have, room in zip(filled, sizes, strict=True)
    ):
        raise ValueError(
            f"source {source.name} gives shape {filled}, which does not fit the region {sizes} of "
            f"parameter {name} {shape}; only shorter axes of the same number are padded."
        )


def check_tensors(
    plan: Mapping[str, Places], checkpoint: Checkpoint, ignored: Sequence[str]
) -> None:
    """Compare the checkpoint's tensors with what is to be read; log which ones are dropped.

    Raises:
        CheckpointError: tensors are missing, mis-shaped, or neither wanted nor ignored.
    """
    groups = (found for places in plan.values() for found in places.values())
    wanted = {source.name: source for source in itertools.chain.from_iterable(groups)}
    extra = [name for name in checkpoint.tensors if name not in wanted]
    drops = re.compile("|".join(f"(?:{pattern})" for pattern in ignored) or r"(?!)")
    problems = [
        *_find_faults(wanted, checkpoint),
        *(
            f"{name} of shape {checkpoint.tensors[name].shape} has no place in the model"
            for name in extra
            if not drops.fullmatch(name)
        ),
    ]
    if problems:
        listed = "".join(f"\n  {line}" for line in problems[:_LISTED])
        hidden = len(problems) - _LISTED
        more = f"\n  and {hidden} more" if hidden > 0 else ""
        raise CheckpointError(
            f"{checkpoint.path} does not hold the model that its configuration describes:"
            f"{listed}{more}"
        )
    if extra:
        names = ", ".join(extra[:_LISTED]) + (", ..." if len(extra) > _LISTED else "")
        logger.info("%d tensors of the checkpoint are not used: %s", len(extra), names)


def _find_faults(wanted: Mapping[str, Source], checkpoint: Checkpoint) -> Iterator[str]:
    for name, source in wanted.items():
        info = checkpoint.tensors.get(name)
        if info is None and not source.optional:
            yield f"{name} is missing; shape {source.shape} is needed"
        elif info is not None and info.shape != source.shape:
            yield f"{name} has shape {info.shape}, the model needs {source.shape}"
