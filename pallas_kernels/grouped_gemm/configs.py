"""Tile configurations of the Hopper grouped GEMM, chosen by shape.

Measured on an H200 by `python -m benchmarks.kernels --op grouped_gemm --tune`, and by the benchmark
`grouped_gemm_layer` where few rows leave most groups empty.
"""

import math

from pallas_kernels.grouped_gemm.tiles import TileConfig

NARROW = TileConfig(row_tiles=(8, 16, 32), warpgroups=1, stages=12)
"""64 columns, the fewest that any matrix must have."""
PAIR = TileConfig(row_tiles=(8, 16, 32), warpgroups=1, width=128, stages=8, store_rows=16)
"""128 columns, the fewest that a gate and what it gates must have together."""
WIDE = TileConfig(row_tiles=(8, 16, 32), width=128, stages=6, store_rows=8)
"""256 columns by up to 32 rows: reads 512 neighbouring bytes of each weight row."""
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
    "narrow": NARROW, "pair": PAIR, "wide": WIDE, "medium": MEDIUM, "square": SQUARE,
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
        return _memory_bound(rows=rows, groups=groups, n=n, num_sms=num_sms, gated=gated)
    if gated:
        return SQUARE if n % SQUARE.columns == 0 else TALL_PAIR
    # Storing a tile is a large part of a short product, and a small tile stores sooner.
    config = MEDIUM if mean <= 48 or (mean <= 160 and k < 4096) else SQUARE
    return config if n % config.columns == 0 else TALL_NARROW


def _memory_bound(*, rows: int, groups: int, n: int, num_sms: int, gated: bool) -> TileConfig:
    """The widest tile that divides n and leaves about as few multiprocessors idle as any."""
    candidates = [c for c in (WIDE, PAIR) if n % c.columns == 0]
    if not gated:
        candidates.append(NARROW)
    used_groups = groups * (1 - (1 - 1 / groups) ** rows)
    shares = [_busy_share(used_groups * n / c.columns, num_sms) for c in candidates]
    enough = 0.9 * max(shares, default=0)
    busy = (c for c, share in zip(candidates, shares, strict=True) if share > enough)
    return next(busy, PAIR)


def _busy_share(tiles: float, num_sms: int) -> float:
    """Multiprocessors at work, on average over the rounds that so many tiles take."""
    return tiles / (num_sms * math.ceil(tiles / num_sms))
