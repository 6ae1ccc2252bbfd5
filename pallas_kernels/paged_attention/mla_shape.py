"""Sizes of the latent-attention kernel on Hopper, and the references that its parts share."""

import dataclasses
from typing import Any

HEADS = 64
"""Query heads that a block computes together: the height of wgmma."""
KV_BLOCK = 64
"""Positions of a tile."""
ROPE = 64
"""Features of a key that are no values. As many as a tile has positions: see `MlaRefs.rope`."""
SUMMERS = 2
"""Warpgroups that sum up values, each half of the features."""
CHUNKS = 4
"""Parts of the value features, which are loaded and multiplied one by one."""
OWN_CHUNKS = CHUNKS // SUMMERS
"""Those of one warpgroup. One product of all of them would need more registers than a thread of
four warpgroups may start with."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlaConfig:
    """How the latent-attention kernel is laid out on the chip."""

    blocks: int
    """Thread blocks: one for each multiprocessor, all of which must run at the same time."""
    stages: int = 2
    """Tiles that a block holds in shared memory."""
    min_tiles: int = 2
    """Tiles of a share at least: fewer shares leave less to merge."""
    in_registers: bool = True
    """Whether sums stay in registers between products: the interpreter knows no such products."""
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
    def chunk(self) -> int:
        """Value features of a chunk."""
        return self.dv // CHUNKS

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
    highest: Any
    totals: Any
    q_latent: Any
    """Queries of a row, by chunks of the latent features."""
    q_rope: Any
    latent: Any
    """Latent features of the positions of a tile, by chunks; they are the values, too."""
    rope: Any
    """The other features of a tile, [positions, ROPE]. Once scores are computed, the weights take
    their place, [heads, positions], which is as large."""
    keep: Any
    """What is left of the sums when a tile raises the highest score."""
    inverse: Any
    """What the sums of a whole row are multiplied with in the end."""
    q_full: Any
    q_free: Any
    latent_full: Any
    latent_free: Any
    rope_full: Any
    rope_free: Any
    keep_full: Any
    weights_full: Any
    inverse_full: Any
    inverse_free: Any
    block_saved: Any
    """Where the warpgroups of a block meet before they merge, if no signals tell."""
