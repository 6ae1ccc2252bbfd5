"""Sizes of the latent-attention kernel on Hopper, and the references that its parts share."""

import dataclasses
from typing import Any

HEADS = 64
"""Query heads that a block computes together: the height of wgmma."""
KV_BLOCK = 64
"""Positions of a tile."""
ROPE = 64
"""Features of a key that are no values. As many as a tile has positions: see `MlaRefs.rope`."""
SIDES = 2
"""Warpgroups that compute. Each has one of two places for tiles, whose weights it computes, and
half of the value features, which it sums up over all tiles."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlaConfig:
    """How the latent-attention kernel is laid out on the chip."""

    blocks: int
    """Thread blocks: one for each multiprocessor, all of which must run at the same time."""
    min_tiles: int = 2
    """Tiles of a share at least: fewer shares leave less to merge."""
    row_cost: int = 2
    """Tiles that take as long as the change from one row to another."""
    in_registers: bool = True
    """Whether sums stay in registers between products, registers are stored as they lie, and lanes
    plan the shares: the interpreter knows none of these."""
    synchronize: bool = True
    """Whether blocks wait for each other: the interpreter cannot, but runs them in turn."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlaShape:
    """Static sizes that the kernel bodies share."""

    rows: int
    head_blocks: int
    """Blocks that share the query heads of a row."""
    heads: int
    """Query heads of one of them, up to `HEADS`: what is computed beyond them is dropped."""
    dv: int
    pages: int
    page: int
    scale: float
    config: MlaConfig

    @property
    def half(self) -> int:
        """Value features that a warpgroup sums up."""
        return self.dv // SIDES

    @property
    def shares(self) -> int:
        return max(1, self.config.blocks // self.head_blocks)

    @property
    def copy_rows(self) -> int:
        """Positions of one copy, which must lie in one page."""
        return min(self.page, KV_BLOCK)

    @property
    def copies(self) -> int:
        """Copies that fill a part of a tile."""
        return KV_BLOCK // self.copy_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlaRefs:
    """The references of the kernel: operands, results, then scratch."""

    q: Any
    pages: Any
    layer: Any
    page_table: Any
    lengths: Any
    out: Any
    lse: Any
    sums: Any
    """What each block saves of rows that it shares with others: of one that began in an earlier
    block, and of one that ends in a later one."""
    saved_lse: Any
    q_latent: Any
    """Queries of a row, by halves of the latent features."""
    q_rope: Any
    latent: Any
    """Latent features of the tiles in both places, by halves; they are the values, too."""
    rope: Any
    """The other features of a tile, [positions, ROPE]. Once scores are computed, the weights take
    their place, [heads, positions], which is as large."""
    highest: Any
    """The highest score of a row up to and with the tile in each place."""
    totals: Any
    """Sums of the weights of a side, for two rows in turn."""
    q_full: Any
    q_free: Any
    latent_full: Any
    latent_free: Any
    rope_full: Any
    rope_free: Any
    weights_full: Any
    totals_full: Any
    block_saved: Any
    """Where the warpgroups of a block meet before they merge, if no signals tell."""
