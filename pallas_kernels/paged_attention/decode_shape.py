"""Sizes of the decode kernel on Hopper, and the references that its parts share."""

import dataclasses
from typing import Any

from jax import lax
from jaxtyping import Array

from pallas_kernels.paged_attention.swizzle import swizzled_features

VALUE_ROWS = 64
"""Value features of a product at least, and what it takes multiples of: the height of wgmma."""
REDUCED = 256
"""Numbers that the warps of a warpgroup exchange to reduce rows: two a thread."""
COPY_ROWS = 64
"""Positions of one copy at most. What reaches past a row's end is copied by halves."""
WHOLE = 128
"""Positions that are computed sooner than they are saved and merged, so that they stay in a row."""


def padded_values(dv: int) -> int:
    """Returns value features as the kernel computes them."""
    return -(-dv // VALUE_ROWS) * VALUE_ROWS


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How the decode kernel is laid out on the chip."""

    blocks: int
    """Thread blocks: one or two for each multiprocessor."""
    kv_block: int = 64
    """Positions of a tile."""
    stages: int = 3
    """Tiles that a block holds in shared memory."""
    computers: int = 1
    """Warpgroups that compute, on every other tile each where there are two."""
    min_tiles: int = 1
    """Tiles of a share at least: fewer shares leave less to merge. What a share has beyond is a
    multiple of the positions of a copy, not of a tile."""
    merge_registers: int = 128
    """Registers of a thread for the parts of a row that are read at once when it is merged."""
    inlined: bool = True
    """Whether float8 is multiplied from registers, two warpgroups reduce apart and lanes find a
    block's share, in code that the interpreter does not know."""
    synchronize: bool = True
    """Whether blocks wait for each other: the interpreter cannot, but runs them in turn."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeShape:
    """Static sizes that the kernel bodies share."""

    rows: int
    kv_heads: int
    group: int
    """Query heads of a KV head."""
    d: int
    dv: int
    pages: int
    page: int
    scale: float
    soft_cap: float | None
    limited: bool
    """Whether queries may see only a part of their rows."""
    has_sinks: bool
    stored: int
    """Bytes of an element in the pages."""
    config: DecodeConfig

    @property
    def narrow(self) -> bool:
        """Whether pages hold float8, which is turned into float16 to be multiplied."""
        return self.stored == 1

    @property
    def from_registers(self) -> bool:
        """Whether keys and values are multiplied from registers."""
        return self.narrow and self.config.inlined

    @property
    def columns(self) -> int:
        """Query heads of a tile: wgmma takes multiples of 8."""
        return -(-self.group // 8) * 8

    @property
    def value_rows(self) -> int:
        """Value features of a tile in shared memory: those past the last are never read out."""
        return padded_values(self.dv)

    @property
    def key_swizzle(self) -> int:
        return swizzled_features(self.d)

    @property
    def value_swizzle(self) -> int:
        return swizzled_features(self.dv)

    @property
    def stored_swizzle(self) -> int:
        """Features that the swizzle of a tile of values spans, as they lie in the pages."""
        return swizzled_features(self.dv, self.stored)

    @property
    def shares(self) -> int:
        return max(1, self.config.blocks // self.kv_heads)

    @property
    def copy_rows(self) -> int:
        """Positions of one copy, which must lie in one page."""
        return min(self.page, COPY_ROWS)

    @property
    def whole(self) -> int:
        """Copies that no border of shares cuts off a row, so that a short window stays whole."""
        return WHOLE // self.copy_rows if self.limited else 1

    @property
    def copies(self) -> int:
        """Copies that fill a tile."""
        return self.config.kv_block // self.copy_rows

    def tiles(self, copies: Array) -> Array:
        """Returns the tiles that so many copies make."""
        return lax.div(copies + (self.copies - 1), lax.full_like(copies, self.copies))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeRefs:
    """The references of the kernel: operands, results, then scratch."""

    q: Any
    k_pages: Any
    v_pages: Any
    layer: Any
    page_table: Any
    lengths: Any
    limits: Any = None
    lows: Any = None
    sinks: Any = None
    scales: Any = None
    """What keys and values are multiplied with, where pages hold float8."""
    out: Any
    lse: Any
    sums: Any
    """What each block saves of a row that ends in a later one, see `Softmax`."""
    highest: Any
    totals: Any
    q_shared: Any
    """Queries of two segments: one is computed, the next is on its way."""
    k_shared: Any
    v_shared: Any
    k_wide: Any = None
    """Keys of the tile that is computed, in float16, where pages hold float8 and it matters."""
    v_wide: Any = None
    weights_shared: Any
    """Weights of a tile, [columns, positions]: wgmma takes its right side from shared memory."""
    out_shared: Any
    reduced: Any = None
    """Where the warps of a warpgroup meet, if two of them compute."""
    handed_sums: Any = None
    """What one warpgroup hands to the one that has the last tile of a segment."""
    handed_highest: Any = None
    handed_totals: Any = None
    handed_full: Any = None
    handed_free: Any = None
    q_full: Any
    q_free: Any
    k_full: Any
    k_free: Any
    v_full: Any
    v_free: Any

    def of_warpgroup(self, index: Array) -> "DecodeRefs":
        """Returns the references as a warpgroup that computes uses them."""
        names = ("k_wide", "v_wide", "weights_shared", "out_shared", "reduced")
        every = {name: getattr(self, name) for name in names}
        own = {name: ref.at[index] for name, ref in every.items() if ref is not None}
        return dataclasses.replace(self, **own)
