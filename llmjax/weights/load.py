"""Streams a checkpoint onto a mesh: each device receives only its slice of each tensor."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Shaped
from tqdm.auto import tqdm

from llmjax.models.source import Source, read_region
from llmjax.weights.interface import Checkpoint, CheckpointError

# jax.Device is a variable to type checkers.
type Device = Any

_LISTED_PROBLEMS = 8


@dataclass(frozen=True, kw_only=True)
class AbstractParam:
    """A parameter before it has values."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    spec: PartitionSpec
    layers: tuple[int, ...] | None
    """The model's layer in each row of a stack, whose sources describe one layer; -1 is a row of
    zeros. None: not a stack."""


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

    The host holds one tensor and its shards at a time. In a program of several processes each reads
    only what its own devices hold; all must call this together.

    Args:
        ignored: regular expressions (whole names) of tensors that the model knowingly drops.

    Raises:
        CheckpointError: tensors are missing, extra or mis-shaped; raised before anything is read.
    """
    plan = _plan_reads(params, sources)
    _check_tensors(plan, checkpoint, ignored)
    total = sum(
        checkpoint.tensors[source.name].num_bytes
        for rows in plan.values()
        for row in rows
        for source in row
        if source.name in checkpoint.tensors
    )
    bar = tqdm(total=total, desc="loading weights", unit="B", unit_scale=True, disable=not progress)
    loaded = {}
    with bar:
        for name, param in params.items():
            loader = _ParamLoader(param, plan[name], checkpoint, mesh, bar)
            loaded[name] = loader.load_single() if param.layers is None else loader.load_stack()
    return loaded


def _plan_reads(
    params: Mapping[str, AbstractParam], sources: Mapping[str, tuple[Source, ...]]
) -> dict[str, list[tuple[Source, ...]]]:
    """List, for each parameter and row of its stack, the sources with their layer filled in."""
    plan = {}
    for name, param in params.items():
        for source in sources[name]:
            _check_fit(name, param, source)
        if param.layers is None:
            plan[name] = [sources[name]]
            continue
        plan[name] = [
            tuple(
                replace(source, name=source.name.replace("{layer}", str(layer)))
                for source in sources[name]
                if layer >= 0
            )
            for layer in param.layers
        ]
    return plan


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


def _check_tensors(
    plan: Mapping[str, list[tuple[Source, ...]]], checkpoint: Checkpoint, ignored: Sequence[str]
) -> None:
    problems = {}
    expected = set()
    for source in (source for rows in plan.values() for row in rows for source in row):
        expected.add(source.name)
        info = checkpoint.tensors.get(source.name)
        if info is None and not source.optional:
            problems[source.name] = f"{source.name} is missing; shape {source.shape} is needed"
        elif info is not None and info.shape != source.shape:
            problems[source.name] = (
                f"{source.name} has shape {info.shape}, the model needs {source.shape}"
            )
    drops = re.compile("|".join(f"(?:{pattern})" for pattern in ignored) or r"(?!)")
    for name, info in checkpoint.tensors.items():
        if name not in expected and not drops.fullmatch(name):
            problems[name] = f"{name} of shape {info.shape} has no place in the model"
    if problems:
        lines = list(problems.values())
        listed = "".join(f"\n  {line}" for line in lines[:_LISTED_PROBLEMS])
        hidden = len(lines) - _LISTED_PROBLEMS
        more = f"\n  and {hidden} more" if hidden > 0 else ""
        raise CheckpointError(
            f"{checkpoint.path} does not hold the model that its configuration describes:"
            f"{listed}{more}"
        )


class _ParamLoader:
    """Reads one parameter, a row of its stack at a time."""

    def __init__(
        self,
        param: AbstractParam,
        rows: list[tuple[Source, ...]],
        checkpoint: Checkpoint,
        mesh: Mesh,
        bar: tqdm,
    ):
        self._param = param
        self._rows = rows
        self._checkpoint = checkpoint
        self._sharding = NamedSharding(mesh, param.spec)
        self._bar = bar
        dtypes = [
            checkpoint.tensors[source.name].dtype
            for row in rows
            for source in row
            if source.name in checkpoint.tensors
        ]
        # The cast to the parameter's dtype is left to the devices: a host core casts 1 GB/s.
        self._dtype = reduce(jnp.promote_types, dtypes, dtypes[0]) if dtypes else param.dtype

    def load_single(self) -> jax.Array:
        """Load a parameter that has no layers axis."""
        shape = self._param.shape
        holders = _group_devices(_held_slices(self._sharding, shape))
        blocks = self._read_blocks(self._rows[0], list(holders))
        arrays = [jax.device_put(blocks[i], d) for i in holders for d in holders[i]]
        whole = jax.make_array_from_single_device_arrays(shape, self._sharding, arrays)
        if whole.dtype == self._param.dtype:
            return whole
        cast = jax.jit(_cast, static_argnums=1, donate_argnums=0, out_shardings=self._sharding)
        return cast(whole, self._param.dtype).block_until_ready()

    def load_stack(self) -> jax.Array:
        """Load a stack: zeros on the devices, filled in place by one row per stage at a time.

        A stage is a slice of the layers axis, where that axis is sharded. The devices of all stages
        fill the same local row together, so one program serves them all.
        """
        shape, sharding = self._param.shape, self._sharding
        local_rows = sharding.shard_shape(shape)[0]
        num_stages = shape[0] // local_rows
        stack = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)(
            shape, self._param.dtype
        )
        for row in range(local_rows):
            blocks = self._put_row(row, local_rows, (num_stages, *shape[1:]))
            stack = _fill_row(stack, blocks, np.int32(row), sharding)
            # Without the wait the host's blocks would pile up behind the transfers.
            stack.block_until_ready()
            del blocks
        return stack

    def _put_row(self, row: int, local_rows: int, shape: tuple[int, ...]) -> jax.Array:
        """Place local row `row` of every stage, as an array with a stage axis in front."""
        held = _held_slices(self._sharding, shape)
        arrays = []
        for stage in sorted({index[0].start for index in held.values()}):
            holders = _group_devices({d: i[1:] for d, i in held.items() if i[0].start == stage})
            blocks = self._read_blocks(self._rows[stage * local_rows + row], list(holders))
            arrays += [
                jax.device_put(blocks[index][None], device)
                for index, devices in holders.items()
                for device in devices
            ]
        return jax.make_array_from_single_device_arrays(shape, self._sharding, arrays)

    def _read_blocks(
        self, row: tuple[Source, ...], indices: list[tuple[slice, ...]]
    ) -> dict[tuple[slice, ...], Shaped[np.ndarray, "..."]]:
        """Read one row's values at each index, holding one tensor of the checkpoint at a time."""
        blocks = {
            index: np.zeros([part.stop - part.start for part in index], self._dtype)
            for index in indices
        }
        shape = self._param.shape if self._param.layers is None else self._param.shape[1:]
        for source in row:
            if source.name not in self._checkpoint.tensors:
                continue
            region = _bounded(source.region or (slice(None),) * len(shape), shape)
            tensor = self._checkpoint.read(source.name)
            for index, block in blocks.items():
                _fill_overlap(block, index, source, tensor, region)
            self._bar.update(tensor.nbytes)
            del tensor  # before the next one is read
        return blocks


def _fill_overlap(
    block: Shaped[np.ndarray, "..."],
    index: tuple[slice, ...],
    source: Source,
    tensor: Shaped[np.ndarray, "..."],
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
    block[tuple(in_block)] = read_region(source, tensor, tuple(in_region))


def _cast(array: Shaped[Array, "..."], dtype: jnp.dtype) -> Shaped[Array, "..."]:
    return array.astype(dtype)


@partial(jax.jit, static_argnames="sharding", donate_argnames="stack")
def _fill_row(
    stack: Shaped[Array, "layers ..."],
    blocks: Shaped[Array, "stages ..."],
    row: Int[Array, ""],
    sharding: NamedSharding,
) -> Shaped[Array, "layers ..."]:
    """Write each stage's block at its local row, without a copy of the stack."""

    def fill(stack, block, row):
        return jax.lax.dynamic_update_slice_in_dim(stack, block.astype(stack.dtype), row, axis=0)

    spec = sharding.spec
    return jax.shard_map(
        fill,
        mesh=sharding.mesh,
        in_specs=(spec, spec, PartitionSpec()),
        out_specs=spec,
        check_vma=False,
    )(stack, blocks, row)


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
