"""What all kernels for Hopper do alike with a warpgroup's registers."""

from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array


def store_registers(ref: Any, value: Array) -> None:
    """Stores registers as they lie: JAX 0.12 wants to be told that this may be slow."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value
