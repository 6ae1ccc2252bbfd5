"""Collectives for use inside an island (a `shard_map` body over all axes that are left).

Each takes a tuple of mesh axis names as `meshes.Rules.axes` gives them and leaves out axes of
size one: XLA keeps such collectives, which costs a launch each and spoils counts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

Axes = tuple[str, ...]


def island(body: Callable[..., Any], *, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """A function on global arrays whose body runs on each device's own shards.

    Every array that the body uses must be an argument: closing over a sharded array fails.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # Inside a pipeline stage its axis is manual already.
    axes = set(mesh.axis_names) - set(mesh.manual_axes)
    # check_vma=False: with it, an all_gather to a replicated output is refused.
    return jax.shard_map(
        body, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False
    )


def axis_size(axes: Axes) -> int:
    """Ranks of the group that the axes span."""
    size = 1
    for axis in axes:
        size *= lax.axis_size(axis)
    return size


def axis_index(axes: Axes) -> Any:
    """This device's rank in the group, the last axis counting fastest."""
    return lax.axis_index(axes) if axes else 0


def psum(x: Any, axes: Axes) -> Any:
    """Sum over the group."""
    axes = _wide(axes)
    return lax.psum(x, axes) if axes else x


def pmax(x: Any, axes: Axes) -> Any:
    """Maximum over the group."""
    axes = _wide(axes)
    return lax.pmax(x, axes) if axes else x


def pmin(x: Any, axes: Axes) -> Any:
    """Minimum over the group."""
    axes = _wide(axes)
    return lax.pmin(x, axes) if axes else x


def all_gather(x: Any, axes: Axes, axis: int = 0) -> Any:
    """Concatenates the group's shards along `axis`, in rank order."""
    axes = _wide(axes)
    return lax.all_gather(x, axes, axis=axis, tiled=True) if axes else x


def psum_scatter(x: Any, axes: Axes, axis: int = 0) -> Any:
    """Sums over the group and keeps this rank's part along `axis`."""
    axes = _wide(axes)
    return lax.psum_scatter(x, axes, scatter_dimension=axis, tiled=True) if axes else x


def all_to_all(x: Any, axes: Axes) -> Any:
    """Sends the i-th of equal parts along the first axis to rank i, and joins what arrives."""
    axes = _wide(axes)
    return lax.all_to_all(x, axes, split_axis=0, concat_axis=0, tiled=True) if axes else x


def ppermute(x: Any, axes: Axes, pairs: Sequence[tuple[int, int]]) -> Any:
    """Sends this rank's array along the pairs (source, target) of ranks."""
    axes = _wide(axes)
    return lax.ppermute(x, axes, pairs) if axes else x


def own_part(x: Any, axes: Axes, axis: int = 0) -> Any:
    """This rank's part along `axis` of an array that the group holds whole."""
    size = axis_size(axes)
    if size == 1:
        return x
    length = x.shape[axis] // size
    return lax.dynamic_slice_in_dim(x, axis_index(axes) * length, length, axis)


def _wide(axes: Axes) -> Axes:
    return tuple(axis for axis in axes if lax.axis_size(axis) > 1)
