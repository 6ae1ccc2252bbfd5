"""Streams a checkpoint onto a mesh: each device receives only its slice of each tensor."""

import math
from collections.abc import Mapping, Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Shaped
from tqdm.auto import tqdm

from llmjax.models.source import Source, read_region
from llmjax.weights.interface import Checkpoint
from llmjax.weights.reads import AbstractParam, Places, check_tensors, plan_reads

# jax.Device is a variable to type checkers.
type Device = Any


def load_weights(
    params: Mapping[str, AbstractParam],
    sources: Mapping[str, tuple[Source, ...]],
    checkpoint: Checkpoint,
    mesh: Mesh,
    *,
    ignored: Sequence[str] = (),
    progress: bool = False,
) -> dict[str, jax.Array]:
    """Read every parameter's sources and return the parameters, laid out as their specs say.

    The host holds one tensor (in a stack of experts, one expert) and its shards at a time. In a
    program of several processes each reads only what its own devices hold; all must call this
    together.

    Args:
        ignored: regular expressions (whole names) of tensors that the model knowingly drops.

    Raises:
        CheckpointError: tensors are missing, extra or mis-shaped; raised before anything is read.
    """
    plan = plan_reads(params, sources)
    check_tensors(plan, checkpoint, ignored)
    total = sum(
        math.prod(source.read_shape) * checkpoint.tensors[source.name].dtype.itemsize
        for places in plan.values()
        for found in places.values()
        for source in found
        if source.name in checkpoint.tensors
    )
    bar = tqdm(total=total, desc="loading weights", unit="B", unit_scale=True, disable=not progress)
    loaded = {}
    with bar:
        for name, param in params.items():
            loader = _ParamLoader(param, plan[name], checkpoint, mesh, bar)
            loaded[name] = loader.load_stack() if param.leading else loader.load_single()
    return loaded


class _ParamLoader:
    """Reads one parameter, of a stack one place at a time."""

    def __init__(
        self,
        param: AbstractParam,
        places: Places,
        checkpoint: Checkpoint,
        mesh: Mesh,
        bar: tqdm,
    ):
        self._param = param
        self._places = places
        self._checkpoint = checkpoint
        self._sharding = NamedSharding(mesh, param.spec)
        self._bar = bar
        dtypes = [
            checkpoint.tensors[source.name].dtype
            for found in places.values()
            for source in found
            if source.name in checkpoint.tensors
        ]
        # The cast to the parameter's dtype is left to the devices: a host core casts 1 GB/s.
        self._dtype = reduce(jnp.promote_types, dtypes, dtypes[0]) if dtypes else param.dtype

    def load_single(self) -> jax.Array:
        """Load a parameter that has no layers axis."""
        shape = self._param.shape
        holders = _group_devices(_held_slices(self._sharding, shape))
        blocks = self._read_blocks((), list(holders))
        arrays = [jax.device_put(blocks[i], d) for i in holders for d in holders[i]]
        whole = jax.make_array_from_single_device_arrays(shape, self._sharding, arrays)
        if whole.dtype == self._param.dtype:
            return whole
        cast = jax.jit(_cast, static_argnums=1, donate_argnums=0, out_shardings=self._sharding)
        return cast(whole, self._param.dtype).block_until_ready()

    def load_stack(self) -> jax.Array:
        """Load a stack: zeros on the devices, filled in place.

        Every device goes through the places of its own part of the stack, and all take the same
        step at a time, so one program serves them all.
        """
        shape, sharding = self._param.shape, self._sharding
        own = sharding.shard_shape(shape)[: self._param.leading]
        stack = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)(
            shape, self._param.dtype
        )
        for step in np.ndindex(*own):
            blocks = self._put_blocks(step, own)
            stack = _fill_blocks(stack, blocks, np.array(step, np.int32), sharding)
            # Without the wait the host's blocks would pile up behind the transfers.
            stack.block_until_ready()
            del blocks
        return stack

    def _put_blocks(self, step: tuple[int, ...], own: tuple[int, ...]) -> jax.Array:
        """One place of each device, as an array with a device's share of 1 in the leading axes."""
        leading, whole = len(own), self._param.shape
        shape = (
            *(size // part for size, part in zip(whole[:leading], own, strict=True)),
            *whole[leading:],
        )
        held = {}
        for device, index in _held_slices(self._sharding, shape).items():
            ranks = [part.start for part in index[:leading]]
            place = tuple(r * size + at for r, size, at in zip(ranks, own, step, strict=True))
            held.setdefault(place, {})[device] = index[leading:]
        arrays = []
        for place in sorted(held):
            holders = _group_devices(held[place])
            blocks = self._read_blocks(place, list(holders))
            arrays += [
                jax.device_put(blocks[index][None], device)
                for index, devices in holders.items()
                for device in devices
            ]
        return jax.make_array_from_single_device_arrays(shape, self._sharding, arrays)

    def _read_blocks(
        self, place: tuple[int, ...], indices: list[tuple[slice, ...]]
    ) -> dict[tuple[slice, ...], Shaped[np.ndarray, "..."]]:
        """Read the values at each index of one place, holding one tensor at a time."""
        # A source's region has all axes but that of the layers.
        fixed = tuple(slice(at, at + 1) for at in place[1:])
        shape = self._param.shape[min(1, len(place)) :]
        blocks = {
            index: np.zeros([part.stop - part.start for part in (*fixed, *index)], self._dtype)
            for index in indices
        }
        for source in self._places.get(place, ()):
            if source.name not in self._checkpoint.tensors:
                continue
            region = _bounded(source.region or (slice(None),) * len(shape), shape)
            rows = self._checkpoint.read(source.name, source.rows)
            for index, block in blocks.items():
                _fill_overlap(block, (*fixed, *index), source, rows, region)
            self._bar.update(rows.nbytes)
            del rows  # before the next ones are read
        return blocks


def _fill_overlap(
    block: Shaped[np.ndarray, "..."],
    index: tuple[slice, ...],
    source: Source,
    rows: Shaped[np.ndarray, "..."],
    region: tuple[slice, ...],
) -> None:
    """Copy what a source's region and a block at `index` have in common."""
    in_region, in_block = [], []
    for wanted, filled in zip(index, region, strict=True):
        start, stop = max(wanted.start, filled.start), min(wanted.stop, filled.stop)
        if start >= stop:
            return
        in_region.append(slice(start - filled.start, stop - filled.start))
        in_block.append(slice(start - wanted.start, stop - wanted.start))
    block[tuple(in_block)] = read_region(source, rows, tuple(in_region))


def _cast(array: Shaped[Array, "..."], dtype: jnp.dtype) -> Shaped[Array, "..."]:
    return array.astype(dtype)


@partial(jax.jit, static_argnames="sharding", donate_argnames="stack")
def _fill_blocks(
    stack: Shaped[Array, "layers ..."],
    blocks: Shaped[Array, "stages ..."],
    step: Int[Array, " leading"],
    sharding: NamedSharding,
) -> Shaped[Array, "layers ..."]:
    """Write each device's block at `step` of its own part of the stack, without a copy of it."""

    def fill(stack, block, step):
        start = (*step, *[0] * (stack.ndim - len(step)))
        return jax.lax.dynamic_update_slice(stack, block.astype(stack.dtype), start)

    spec = sharding.spec
    return jax.shard_map(
        fill,
        mesh=sharding.mesh,
        in_specs=(spec, spec, PartitionSpec()),
        out_specs=spec,
        check_vma=False,
    )(stack, blocks, step)


def _held_slices(
    sharding: NamedSharding, shape: tuple[int, ...]
) -> dict[Device, tuple[slice, ...]]:
    """Say which slice of an array each device of this process holds."""
    indices = sharding.addressable_devices_indices_map(shape)
    return {device: _bounded(index or (), shape) for device, index in indices.items()}


def _group_devices(
    indices: Mapping[Device, tuple[slice, ...]],
) -> dict[tuple[slice, ...], list[Device]]:
    """Group devices by the slice they hold, so that each slice is read once."""
    groups: dict[tuple[slice, ...], list[Device]] = {}
    for device, index in indices.items():
        groups.setdefault(index, []).append(device)
    return groups


def _bounded(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Give every slice its start and stop."""
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))
