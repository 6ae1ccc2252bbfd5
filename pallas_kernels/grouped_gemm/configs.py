"""Tile configurations of the Hopper grouped GEMM, chosen by shape.

Measured on an H200 by `python -m benchmarks.kernels --op grouped_gemm --tune`.
"""

from pallas_kernels.grouped_gemm.mosaic_sm90 import TileConfig

NARROW = TileConfig(row_tiles=(8, 16, 32), warpgroups=1, stages=12)
"""A few rows a group: 64 columns a tile, so that the last wave of tiles is short."""
WIDE = TileConfig(row_tiles=(8, 16, 32), width=128, stages=6, store_rows=8)
"""A few rows a group: 512 neighbouring bytes of each weight row."""
MEDIUM = TileConfig(row_tiles=(16, 64, 96, 128, 136, 144), stages=6, store_rows=32)
"""Around a hundred rows a group: weights still come from memory, many steps in flight."""
SQUARE = TileConfig(row_tiles=(16, 64, 96, 128, 136, 144), width=128, stages=4, store_rows=24)
"""Hundreds of rows a group: 256 columns by up to 144 rows."""
TALL = TileConfig(row_tiles=(16, 64, 128, 160, 176, 192), stages=5, store_rows=32)
"""Hundreds of rows a group: 128 columns by up to 192 rows."""
LARGE = TileConfig(row_tiles=(16, 64, 128, 192, 224, 232, 256), stages=4)
"""Thousands of rows a group: the largest tile that the registers hold."""

NAMED = {
    "narrow": NARROW,
    "wide": WIDE,
    "medium": MEDIUM,
    "square": SQUARE,
    "tall": TALL,
    "large": LARGE,
}
"""What the tuner tries."""
BY_ROWS = ((24, NARROW), (96, MEDIUM), (1024, SQUARE), (None, LARGE))
"""The first entry whose bound on the mean number of rows a group holds, None being no bound."""


def config_for(*, rows: int, groups: int, n: int) -> TileConfig:
    """The configuration for so many rows, groups that share them, and columns."""
    mean = rows / groups
    config = next(c for bound, c in BY_ROWS if bound is None or mean <= bound)
    return config if n % config.columns == 0 else NARROW
