"""Where a plan lays a model: shapes, specs and bytes of every tensor, from the abstract model.

Nothing is allocated and no device is needed, so a plan for 512 GPUs can be studied on a laptop.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llmjax.config import ModelConfig
from llmjax.models.decoder import cache_shapes
from llmjax.models.registry import find_family
from llmjax.weights import open_checkpoint
from llmjax.weights.model import declared_params
from meshes import ParallelPlan, PlanError, Rules


@dataclass(frozen=True, kw_only=True)
class TensorLayout:
    """One tensor on a plan."""

    name: str
    """Dotted path of a weight, or what else it is."""
    shape: tuple[int, ...]
    """Shape of all shards together, padding and head slots included."""
    axes: tuple[str | None, ...]
    """Logical name of each axis; None where it has none and is whole everywhere."""
    spec: PartitionSpec
    """Mesh axes of each tensor axis."""
    shard_shape: tuple[int, ...]
    """Shape of what one device holds."""
    num_bytes: int
    """Bytes of all shards together, counting shards that several devices hold once."""
    device_bytes: int
    """Bytes on each device."""
    added_bytes: int
    """Bytes of `num_bytes` that one device would not need: padding, and heads stored repeatedly."""

    @property
    def mesh_axes(self) -> tuple[tuple[str, ...], ...]:
        """The spec with one tuple of mesh axes for each tensor axis."""
        padded = (*self.spec, *(None,) * (len(self.shape) - len(self.spec)))
        return tuple(_as_axes(entry) for entry in padded)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A model on a plan; sizes are those of the weights, the cache is listed beside them."""

    plan: ParallelPlan
    weights: tuple[TensorLayout, ...]
    kv_cache: TensorLayout
    """Keys and values together."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights, each counted once."""
        return sum(tensor.num_bytes for tensor in self.weights)

    @property
    def device_bytes(self) -> int:
        """Bytes of the weights on each device."""
        return sum(tensor.device_bytes for tensor in self.weights)

    @property
    def added_bytes(self) -> int:
        """Bytes of the weights that one device would not need."""
        return sum(tensor.added_bytes for tensor in self.weights)

    def __getitem__(self, name: str) -> TensorLayout:
        """The weight of that name, or "kv_cache"."""
        by_name = {tensor.name: tensor for tensor in (*self.weights, self.kv_cache)}
        if name not in by_name:
            raise KeyError(f"There is no tensor {name!r}: use {', '.join(by_name)}.")
        return by_name[name]


def lay_out(
    model: str | Path | ModelConfig,
    plan: ParallelPlan,
    *,
    dtype: str = "bfloat16",
    cache_tokens: int = 8192,
    page_size: int = 16,
) -> Layout:
    """Lays a model on a plan.

    Args:
        model: what `LLM` takes, or its configuration.
        dtype: type of weights and cache.
        cache_tokens: tokens that the KV caches of all batch ranks hold together, rounded up to
            whole pages on each.

    Raises:
        PlanError: a tensor axis does not divide over its ranks.
    """
    config = model if isinstance(model, ModelConfig) else read_config(model)
    rules, alone = Rules(plan), Rules(ParallelPlan())
    kind = jnp.dtype(dtype)
    needed = declared_params(config, alone, kind)
    weights = tuple(
        _lay_tensor(
            name,
            param.shape,
            param.get_metadata("logical_axes"),
            rules,
            item_bytes=param.dtype.itemsize,
            needed=prod(needed[name].shape),
        )
        for name, param in declared_params(config, rules, kind).items()
    )
    pages = -(-cache_tokens // (page_size * rules.size("pages"))) * rules.size("pages")
    cache = cache_shapes(config, rules, pages=pages, page_size=page_size)
    least = cache_shapes(config, alone, pages=pages, page_size=page_size)
    kv_cache = _lay_tensor(
        "kv_cache",
        cache[0],
        cache.axes,
        rules,
        # Keys and values have the same shape.
        item_bytes=len(cache) * kind.itemsize,
        needed=prod(least[0]),
    )
    return Layout(plan=plan, weights=weights, kv_cache=kv_cache)


def read_config(model: str | Path) -> ModelConfig:
    """The configuration of what `LLM` takes; no weights are read."""
    checkpoint = open_checkpoint(model, needs_weights=False)
    return find_family(checkpoint.config).read_config(checkpoint.config)


def _lay_tensor(
    name: str,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    rules: Rules,
    *,
    item_bytes: int,
    needed: int,
) -> TensorLayout:
    """Divides a tensor; `needed` counts the elements that it has on one device."""
    shard_shape = list(shape)
    for dimension, logical in enumerate(axes):
        ranks = rules.size(logical)
        if shape[dimension] % ranks:
            raise PlanError(
                f"{name} {shape} cannot be laid on the plan ({rules.plan}): its axis {dimension} "
                f"of {shape[dimension]} does not divide over {' * '.join(rules.axes(logical))} = "
                f"{ranks} ranks. Use a divisor of {shape[dimension]}."
            )
        shard_shape[dimension] //= ranks
    return TensorLayout(
        name=name,
        shape=shape,
        axes=axes,
        spec=rules.spec(*axes),
        shard_shape=tuple(shard_shape),
        num_bytes=prod(shape) * item_bytes,
        device_bytes=prod(shard_shape) * item_bytes,
        added_bytes=(prod(shape) - needed) * item_bytes,
    )


def _as_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Mesh axes of one entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else entry
