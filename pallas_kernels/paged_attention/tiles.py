"""Tiles in shared memory, as TMA writes and wgmma reads them."""

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu

BYTES = 2
"""Of an element: wgmma reads tiles along both of their axes only where it is 2."""


def tiled(shape: tuple[int, ...], dtype: Any, *, swizzle: int) -> Any:
    """Returns scratch memory for tiles whose swizzle spans so many features."""
    transforms = (
        plgpu.TilingTransform((8, swizzle)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(BYTES * swizzle),  # pyright: ignore[reportAbstractUsage]
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)
