"""Tile configurations of the Hopper grouped GEMM, chosen by shape.

Measured on an H200 by `python -m benchmarks.kernels --op grouped_gemm --tune`.
"""

import math

from pallas_kernels.grouped_gemm.tiles import TileConfig

NARROW = TileConfig(row_tiles=(8, 16, 32), warpgroups=1, stages=12)
"""64 columns, the fewest that any matrix must have."""
PAIR = TileConfig(row_tiles=(8, 16, 32), warpgroups=1, width=128, stages=8, store_rows=16)
"""128 columns, the fewest that a gate and what it gates must have together."""
WIDE = TileConfig(row_tiles=(8, 16, 32), width=128, stages=6, store_rows=8)
"""256 columns by up to 32 rows: reads 512 neighbouring bytes of each weight row."""
THIN = TileConfig(row_tiles=(16, 32, 48, 64), warpgroups=1, stages=12, store_rows=32)
"""64 columns by up to 64 rows, where wider tiles would leave multiprocessors without work."""
MEDIUM = TileConfig(row_tiles=(16, 64, 96, 128, 136, 144), stages=6, store_rows=32)
"""128 columns by up to 144 rows, six steps in flight: memory still sets the pace."""
SQUARE = TileConfig(row_tiles=(16, 64, 96, 128, 136, 144), width=128, stages=4, store_rows=24)
"""256 columns by up to 144 rows: the fewest bytes through shared memory for a product."""
LARGE = TileConfig(row_tiles=(64, 128, 192, 256), stages=4)
"""128 columns by up to 256 rows."""
TALL_NARROW = TileConfig(row_tiles=(64, 128, 192), warpgroups=1, stages=6)
"""64 columns by up to 192 rows, for many rows of matrices that no larger tile divides."""
TALL_PAIR = TileConfig(row_tiles=(64, 128, 144), warpgroups=1, width=128, stages=5, store_rows=48)
"""128 columns by up to 144 rows, likewise for a gate and what it gates."""

NAMED = {
    "narrow": NARROW, "pair": PAIR, "wide": WIDE, "thin": THIN, "medium": MEDIUM, "square": SQUARE,
    "large": LARGE, "tall narrow": TALL_NARROW, "tall pair": TALL_PAIR,
}  # fmt: skip
"""What the tuner tries."""


def config_for(
    *, rows: int, groups: int, k: int, n: int, num_sms: int, gated: bool = False
) -> TileConfig:
    """The configuration for so many rows, the groups that share them, and a k by n matrix.

    `gated` when half of the columns are the gate of the other half.
    """
    mean = rows / groups
    if mean <= 24:
        candidates = [WIDE, PAIR] if gated else [WIDE, PAIR, NARROW]
    elif gated:
        candidates = [SQUARE, TALL_PAIR]
    elif mean <= 48:
        candidates = [MEDIUM, THIN]
    elif mean <= 160 and k < 4096:
        # Storing a tile is a large part of a short product, and a small tile stores sooner.
        candidates = [MEDIUM, TALL_NARROW]
    else:
        candidates = [SQUARE, TALL_NARROW]
    dividing = [config for config in candidates if n % config.columns == 0]
    if mean > 48 or not dividing:
        return (dividing or candidates)[0]
    # Where memory sets the pace, wide tiles are worth less than work for every multiprocessor.
    used_groups = groups * (1 - (1 - 1 / groups) ** rows)
    shares = [_busy_share(used_groups * n / config.columns, num_sms) for config in dividing]
    return next(c for c, share in zip(dividing, shares, strict=True) if share > 0.9 * max(shares))


def _busy_share(tiles: float, num_sms: int) -> float:
    """Multiprocessors at work, on average over the rounds that so many tiles take."""
    return tiles / (num_sms * math.ceil(tiles / num_sms))
