"""Tile configurations of the Hopper grouped GEMM, chosen by shape.

Measured on an H200 by `python -m benchmarks.kernels --op grouped_gemm --tune`, and by the benchmark
`grouped_gemm_layer` where few rows leave most groups empty.
"""

import math

from pallas_kernels.grouped_gemm.tiles import BLOCK, TileConfig

NARROW = TileConfig(row_tiles=(8, 16, 32), warpgroups=1, stages=12)
"""64 columns, the fewest that any matrix must have."""
PAIR = TileConfig(row_tiles=(8, 16, 32), warpgroups=1, width=128, stages=8, store_rows=16)
"""128 columns, the fewest that a gate and what it gates must have together."""
WIDE = TileConfig(row_tiles=(8, 16, 32), width=128, stages=6, store_rows=8)
"""256 columns by up to 32 rows: reads 512 neighbouring bytes of each weight row."""
MEDIUM = TileConfig(row_tiles=(16, 64, 96, 128, 136, 144), stages=6, store_rows=32)
"""128 columns by up to 144 rows, six steps in flight: memory still sets the pace; or many rows of
matrices that twice as many columns do not divide."""
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


QUANTIZED_WIDE = TileConfig(row_tiles=(8, 16, 32), width=128, stages=5, store_rows=32)
"""256 columns by up to 32 rows."""
QUANTIZED_PAIR = TileConfig(row_tiles=(8, 16, 32), warpgroups=1, width=128, stages=10, store_rows=8)
"""128 columns by up to 32 rows, where 256 would leave multiprocessors without work."""
QUANTIZED_BROAD = TileConfig(row_tiles=(8, 16, 32, 48, 64), width=128, stages=4, store_rows=32)
"""256 columns by up to 64 rows."""
QUANTIZED_UPRIGHT = TileConfig(row_tiles=(128,), width=192, stages=4, upright=True)
"""128 rows by 192 columns: less to read from shared memory for a product, more rows wasted."""
QUANTIZED_UPRIGHT_PAIR = TileConfig(row_tiles=(128,), width=128, stages=5, upright=True)
"""128 rows by 64 columns of a gate and the 64 that they gate."""

QUANTIZED = {
    "wide": QUANTIZED_WIDE, "pair": QUANTIZED_PAIR, "broad": QUANTIZED_BROAD,
    "upright": QUANTIZED_UPRIGHT, "upright pair": QUANTIZED_UPRIGHT_PAIR,
}  # fmt: skip
"""The same for float8; a step is 128 elements deep, one block of scales."""


MAX_UNSORTED_TOKENS = 4
"""Tokens up to which one launch for both products beats sorted rows and a launch for each."""
EXPERTS_A_ROW = 4
"""Experts that there must be for each row: rows that share one would read its weights again."""


MIN_ALIGNED_ROWS = 8
"""Rows of a group, on average, from which on groups should begin at multiples of `BLOCK`: fewer
are read and written sooner side by side than in blocks of their own. That is where the first
product fetches its rows by `row_index`, which it can with such groups only; the product alone gains
from some 30 rows on."""


def row_alignment_for(rows_a_group: float) -> int:
    """What groups of so many rows on average should begin at a multiple of."""
    return BLOCK if rows_a_group >= MIN_ALIGNED_ROWS else 1


def go_unsorted(tokens: int, choices: int, *, experts: int) -> bool:
    """Whether so few tokens go to their choices of experts in one launch, see `few_rows_sm90`."""
    return 0 < tokens <= MAX_UNSORTED_TOKENS and EXPERTS_A_ROW * tokens * choices <= experts


def config_for(
    *, rows: int, groups: int, k: int, n: int, num_sms: int, gated: bool = False
) -> TileConfig:
    """The configuration for so many rows, the groups that share them, and a k by n matrix.

    `gated` when half of the columns are the gate of the other half.
    """
    mean = rows / groups
    if mean <= 24:
        candidates = (WIDE, PAIR) if gated else (WIDE, PAIR, NARROW)
        return _memory_bound(candidates, rows=rows, groups=groups, n=n, num_sms=num_sms)
    if gated:
        return SQUARE if n % SQUARE.columns == 0 else TALL_PAIR
    # Storing a tile is a large part of a short product, and a small tile stores sooner.
    config = MEDIUM if mean <= 48 or (mean <= 160 and k < 4096) else SQUARE
    return next((c for c in (config, MEDIUM) if n % c.columns == 0), TALL_NARROW)


def quantized_config_for(
    *, rows: int, groups: int, k: int, n: int, num_sms: int, gated: bool = False
) -> TileConfig:
    """The same for float8 operands; the depth k does not matter."""
    del k
    mean = rows / groups
    if mean <= 24:
        candidates = (QUANTIZED_WIDE, QUANTIZED_PAIR)
        return _memory_bound(candidates, rows=rows, groups=groups, n=n, num_sms=num_sms)
    if mean <= (80 if gated else 64) and n % QUANTIZED_BROAD.columns == 0:
        return QUANTIZED_BROAD
    return QUANTIZED_UPRIGHT_PAIR if gated else QUANTIZED_UPRIGHT


def _memory_bound(
    candidates: tuple[TileConfig, ...], *, rows: int, groups: int, n: int, num_sms: int
) -> TileConfig:
    """The widest tile that divides n and leaves about as few multiprocessors idle as any."""
    *_, narrowest = candidates
    candidates = tuple(c for c in candidates if n % c.columns == 0)
    used_groups = groups * (1 - (1 - 1 / groups) ** rows)
    shares = [_busy_share(used_groups * n / c.columns, num_sms) for c in candidates]
    enough = 0.9 * max(shares, default=0)
    busy = (c for c, share in zip(candidates, shares, strict=True) if share > enough)
    return next(busy, narrowest)


def _busy_share(tiles: float, num_sms: int) -> float:
    """Multiprocessors at work, on average over the rounds that so many tiles take."""
    return tiles / (num_sms * math.ceil(tiles / num_sms))
