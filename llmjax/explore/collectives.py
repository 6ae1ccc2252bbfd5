"""The collectives of a compiled program, read from the text in which XLA prints it."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import numpy as np

from llmjax.explore.hlo import Computation, Instruction, parse_program, type_bytes

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
"""XLA's names of the operations in which devices send to each other."""

When = Literal["always", "branch", "round"]


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One kind of message between devices, and how often a program sends it."""

    part: str
    """Named scope of the model that it comes from; empty outside all scopes."""
    kind: str
    """One of `KINDS`."""
    axes: tuple[str, ...]
    """Mesh axes along which the devices of a group differ, in mesh order."""
    ranks: int
    """Devices of a group."""
    num_bytes: int
    """Bytes on a device of one call: its operand, or of an all-gather its result."""
    count: int
    """Calls in one run of the program; loops over layers are counted through."""
    when: When
    """"branch": only if a branch is taken. "round": in each round of a loop without a fixed end."""

    @property
    def total_bytes(self) -> int:
        """Bytes on a device of all calls."""
        return self.count * self.num_bytes


def read_collectives(program: str, sizes: Mapping[str, int]) -> tuple[Collective, ...]:
    """Lists the collectives of a compiled program, like ones as one, in the order of the program.

    Args:
        program: what `compiled.as_text()` gives.
        sizes: mesh axes and their sizes, outer to inner, such as `ParallelPlan.sizes`.

    Raises:
        ValueError: the program says in an unknown way which devices take part.
    """
    entry, computations = parse_program(program)
    counts: Counter[Collective] = Counter()
    for call, computation, times, when in _walk(entry, computations, 1, "always"):
        found = _read_call(call, computation, sizes)
        counts[replace(found, when=when)] += times
    return tuple(replace(found, count=count) for found, count in counts.items())


def _walk(
    name: str, computations: Mapping[str, Computation], times: int, when: When
) -> Iterator[tuple[Instruction, Computation, int, When]]:
    """Every collective that a computation reaches, and how often it is reached."""
    computation = computations[name]
    for call in computation.instructions:
        if call.opcode.removesuffix("-start") in KINDS:
            yield call, computation, times, when
        elif call.opcode == "while":
            rounds, inner = call.trip_count, when
            if rounds is None:
                rounds, inner = 1, "round"
            for callee in call.callees:
                yield from _walk(callee, computations, times * rounds, inner)
        elif call.opcode == "conditional":
            inner = "branch" if when == "always" else when
            for callee in call.callees:
                yield from _walk(callee, computations, times, inner)
        elif not call.opcode.endswith(("-update", "-done")):
            for callee in call.callees:
                yield from _walk(callee, computations, times, when)


def _read_call(call: Instruction, computation: Computation, sizes: Mapping[str, int]) -> Collective:
    kind = call.opcode.removesuffix("-start")
    groups = _read_groups(call.attributes, prod(sizes.values()))
    axes = _varying_axes(groups, sizes)
    pairs = kind == "collective-permute"
    ranks = prod(sizes[axis] for axis in axes) if pairs else len(groups[0])
    # Of a ragged one the first operand is what is sent; the rest says where it goes.
    sent = call.operands[:1] if kind.startswith("ragged") else call.operands
    num_bytes = sum(type_bytes(computation.types[operand]) for operand in sent)
    if _is_promoted(call):
        num_bytes //= 2
    return Collective(
        part=_read_part(call.attributes),
        kind=kind,
        axes=axes,
        ranks=ranks,
        num_bytes=num_bytes * ranks if kind == "all-gather" else num_bytes,
        count=1,
        when="always",
    )


def _is_promoted(call: Instruction) -> bool:
    """Whether XLA:CPU sums bfloat16 as float32; on a GPU it does not."""
    return any(callee.endswith("_promoted") for callee in call.callees)


def _read_groups(attributes: str, num_devices: int) -> list[list[int]]:
    """Devices of each group, in the four ways in which XLA writes them."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        return _read_lists(pairs[1])
    if "replica_groups={}" in attributes:
        return [list(range(num_devices))]
    if lists := re.search(r"replica_groups=\{(.*?)\}\}", attributes):
        return _read_lists(lists[1])
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        grid = np.arange(num_devices).reshape([int(size) for size in iota[3].split(",")])
        if iota[4]:
            grid = grid.transpose([int(axis) for axis in iota[4].split(",")])
        return grid.reshape(int(iota[1]), int(iota[2])).tolist()
    if mesh := re.search(r"replica_groups=mesh\[([^]]*)\] \{([^}]*)\}", attributes):
        return _read_mesh_groups(mesh[1], mesh[2])
    raise ValueError(f"An unknown way to write replica groups: {attributes[:200]}")


def _read_lists(text: str) -> list[list[int]]:
    """ "{0,1},{2,3" -> [[0, 1], [2, 3]]."""
    return [[int(device) for device in part.strip("{}").split(",")] for part in text.split("},")]


def _read_mesh_groups(mesh: str, axes: str) -> list[list[int]]:
    """Groups over named axes of a mesh; "'tp':(2)4" is the part of an axis between 2 and 8."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    spans = {name: (1, sizes[name]) for name in re.findall(r"'(\w+)'", axes)}
    for name, before, size in re.findall(r"'(\w+)':\((\d+)\)(\d+)", axes):
        spans[name] = (int(before), int(size))
    groups: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for device, at in enumerate(np.ndindex(*sizes.values())):
        key = []
        for (name, whole), place in zip(sizes.items(), at, strict=True):
            before, size = spans.get(name, (1, 1))
            after = whole // (before * size)
            key.append((place // (after * size), place % after))
        groups.setdefault(tuple(key), []).append(device)
    return list(groups.values())


def _varying_axes(groups: list[list[int]], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes along which members of a group differ."""
    shape = tuple(sizes.values())
    varying = np.zeros(len(shape), bool)
    for group in groups:
        places = np.array(np.unravel_index(group, shape))
        varying |= (places != places[:, :1]).any(axis=1)
    return tuple(axis for axis, varies in zip(sizes, varying, strict=True) if varies)


# What JAX itself puts into the names of operations, between the scopes of the model.
_WRAPPERS = re.compile(r".*[(>:].*|while|body|cond|branch_\d+_fun|closed_call|eval_jaxpr|shard_map")


def _read_part(attributes: str) -> str:
    """The outermost named scope that an instruction comes from."""
    name = re.search(r'op_name="([^"]*)"', attributes)
    scopes = name[1].split("/")[:-1] if name else []
    return next((scope for scope in scopes if not _WRAPPERS.fullmatch(scope)), "")
