"""Pictures of a mesh, and of a tensor's shards on it."""

from itertools import product
from math import prod

from llmjax.explore.layout import Layout, TensorLayout
from llmjax.explore.table import Table
from llmjax.explore.tables import format_shape
from meshes import ParallelPlan


def draw_mesh(plan: ParallelPlan) -> Table:
    """The devices as a grid: outer axes down, the innermost across; axes of size one left out."""
    wide = [axis for axis, size in plan.sizes.items() if size > 1]
    outer, inner = wide[:-1], wide[-1:]
    rows = [_name_ranks(outer, ranks) for ranks in _all_ranks(plan, outer)]
    columns = [_name_ranks(inner, ranks) for ranks in _all_ranks(plan, inner)]
    devices = [
        [row * len(columns) + column for column in range(len(columns))] for row in range(len(rows))
    ]
    return Table(
        title=f"Mesh of {plan}",
        columns=("", *columns),
        rows=tuple(
            (name, *(f"device {device}" for device in line))
            for name, line in zip(rows, devices, strict=True)
        ),
        shades=tuple((None, *line) for line in devices),
    )


def draw_shards(layout: Layout, name: str) -> Table:
    """Which devices hold which part of a tensor; a part with several devices is whole on each.

    The last tensor axis that is split runs across, all others run down.
    """
    plan, tensor = layout.plan, layout[name]
    sizes = [prod(plan.sizes[axis] for axis in axes) for axes in tensor.mesh_axes]
    split = [dimension for dimension, size in enumerate(sizes) if size > 1]
    down, across = split[:-1], split[-1:]
    holders: dict[tuple[int, ...], list[int]] = {}
    for device, ranks in enumerate(_all_ranks(plan, list(plan.sizes))):
        at = dict(zip(plan.sizes, ranks, strict=True))
        block = tuple(_block_index(tensor.mesh_axes[dimension], plan, at) for dimension in split)
        holders.setdefault(block, []).append(device)
    rows = list(product(*(range(sizes[dimension]) for dimension in down)))
    columns = list(product(*(range(sizes[dimension]) for dimension in across)))
    return Table(
        title=f"{name}, {format_shape(tensor.shape)}, on {plan}",
        columns=("", *(_name_slices(tensor, across, block) for block in columns)),
        rows=tuple(
            (
                _name_slices(tensor, down, row),
                *(_name_devices(holders[(*row, *column)]) for column in columns),
            )
            for row in rows
        ),
        shades=tuple((None, *(holders[(*row, *column)][0] for column in columns)) for row in rows),
    )


def _all_ranks(plan: ParallelPlan, axes: list[str]) -> list[tuple[int, ...]]:
    """Coordinates on these axes, the last counting fastest: the order of the mesh's devices."""
    return list(product(*(range(plan.sizes[axis]) for axis in axes)))


def _block_index(axes: tuple[str, ...], plan: ParallelPlan, at: dict[str, int]) -> int:
    """Which block of a tensor axis split over `axes` the device at these coordinates holds."""
    index = 0
    for axis in axes:
        index = index * plan.sizes[axis] + at[axis]
    return index


def _name_ranks(axes: list[str], ranks: tuple[int, ...]) -> str:
    return ", ".join(f"{axis}={rank}" for axis, rank in zip(axes, ranks, strict=True))


def _name_slices(tensor: TensorLayout, dimensions: list[int], blocks: tuple[int, ...]) -> str:
    parts = []
    for dimension, block in zip(dimensions, blocks, strict=True):
        width = tensor.shard_shape[dimension]
        first, last = block * width, (block + 1) * width - 1
        parts.append(f"axis {dimension}: {first}" + (f" to {last}" if width > 1 else ""))
    return ", ".join(parts) or "whole"


def _name_devices(devices: list[int]) -> str:
    return ("devices " if len(devices) > 1 else "device ") + ", ".join(map(str, devices))
