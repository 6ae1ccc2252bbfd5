"""What `llmjax info` shows: versions, devices, presets and kernels."""

import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct as Shape

from meshes import MESH_AXES, presets
from pallas_kernels import grouped_gemm, paged_attention
from pallas_kernels.grouped_gemm import IMPLEMENTATIONS as GEMMS
from pallas_kernels.paged_attention import IMPLEMENTATIONS as ATTENTIONS


def describe_environment() -> Iterator[tuple[str, str]]:
    """Names and values, in the order in which they are shown."""
    device = jax.devices()[0]
    yield "llmjax", importlib.metadata.version("llmjax")
    yield "JAX", jax.__version__
    yield "devices", f"{jax.device_count()} x {device.device_kind} ({device.platform})"
    yield "mesh axes", " ".join(MESH_AXES)
    yield "presets", " ".join(presets())
    yield "decode attention", _pick(partial(_attend, 1), ATTENTIONS)
    yield "prefill attention", _pick(partial(_attend, 64), ATTENTIONS)
    yield "expert products", _pick(_multiply_groups, GEMMS)


def _pick(trace: Callable[[str], Any], implementations: Sequence[str]) -> str:
    """The first implementation that covers a usual shape on this device; they are in that order."""
    for name in implementations:
        try:
            trace(name)
        except NotImplementedError:
            continue
        return name
    raise NotImplementedError(f"none of {', '.join(implementations)} covers a usual shape here")


def _attend(queries: int, implementation: str) -> None:
    """Traces attention of 8 rows in the shape of an 8B model."""
    pages = Shape((1, 64, 64, 8, 128), jnp.bfloat16)
    jax.eval_shape(
        partial(
            paged_attention,
            scale=1.0,
            max_query_length=queries,
            window=0,
            implementation=implementation,
        ),
        Shape((8 * queries, 32, 128), jnp.bfloat16),
        pages,
        pages,
        Shape((), jnp.int32),
        Shape((8, 8), jnp.int32),
        Shape((9,), jnp.int32),
        Shape((8,), jnp.int32),
    )


def _multiply_groups(implementation: str) -> None:
    """Traces the up projection of 128 experts for 64 rows."""
    jax.eval_shape(
        partial(grouped_gemm, implementation=implementation),
        Shape((64, 2048), jnp.bfloat16),
        Shape((1, 128, 2048, 1536), jnp.bfloat16),
        Shape((128,), jnp.int32),
        Shape((), jnp.int32),
    )
