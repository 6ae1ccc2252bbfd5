"""Tiles in shared memory, as TMA writes and wgmma reads them."""

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

COPY_ALIGNMENT = 128
"""Bytes that what TMA copies lies at a multiple of."""


def tiled(shape: tuple[int, ...], dtype: Any, *, swizzle: int) -> Any:
    """Returns scratch memory for tiles whose swizzle spans so many features."""
    transforms = (
        plgpu.TilingTransform((8, swizzle)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(swizzle * jnp.dtype(dtype).itemsize),  # pyright: ignore[reportAbstractUsage]
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)
