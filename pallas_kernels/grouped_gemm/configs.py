"""Tile configurations of the Hopper grouped GEMM, chosen by shape.

Measured on an H200 by `python -m benchmarks.kernels --op grouped_gemm --tune`.
"""

from pallas_kernels.grouped_gemm.mosaic_sm90 import TileConfig

NARROW = TileConfig(row_tiles=(8, 16, 32), warpgroups=1, stages=12)
"""64 columns, the fewest that any matrix must have."""
WIDE = TileConfig(row_tiles=(8, 16, 32), width=128, stages=6, store_rows=8)
"""256 columns by up to 32 rows: reads 512 neighbouring bytes of each weight row."""
MEDIUM = TileConfig(row_tiles=(16, 64, 96, 128, 136, 144), stages=6, store_rows=32)
"""128 columns by up to 144 rows, six steps in flight: memory still sets the pace."""
SQUARE = TileConfig(row_tiles=(16, 64, 96, 128, 136, 144), width=128, stages=4, store_rows=24)
"""256 columns by up to 144 rows: the fewest bytes through shared memory for a product."""
LARGE = TileConfig(row_tiles=(64, 128, 192, 256), stages=4)
"""128 columns by up to 256 rows."""

NAMED = {"narrow": NARROW, "wide": WIDE, "medium": MEDIUM, "square": SQUARE, "large": LARGE}
"""What the tuner tries."""


def config_for(*, rows: int, groups: int, k: int, n: int) -> TileConfig:
    """The configuration for so many rows, the groups that share them, and a k by n matrix."""
    mean = rows / groups
    if mean <= 24:
        config = WIDE
    elif mean <= 48 or (mean <= 160 and k < 4096):
        # Storing a tile is a large part of a short product, and a small tile stores sooner.
        config = MEDIUM
    else:
        config = SQUARE
    return config if n % config.columns == 0 else NARROW
