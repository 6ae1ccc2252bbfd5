"""Sizes of the prefill kernel on Hopper, and the references that its parts share."""

import dataclasses
from typing import Any

from pallas_kernels.paged_attention.swizzle import swizzled_features

WARPGROUPS = 2
"""Warpgroups that compute; one more loads."""
WARPGROUP_ROWS = 64
"""Queries of one head that a warpgroup computes together: the height of wgmma."""
TOKEN_ALIGNMENT = 8
"""Tiles of queries begin at multiples of it: swizzled copies move eight rows at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillConfig:
    """How the prefill kernel is laid out on the chip."""

    blocks: int
    """Thread blocks: one for each multiprocessor."""
    kv_block: int = 128
    """Positions of a tile of keys and values."""
    stages: int = 2
    """Tiles of keys and values that a block holds in shared memory."""
    in_registers: bool = True
    """Whether weights and sums stay in registers: the interpreter knows no such products."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillShape:
    """Static sizes that the kernel bodies share."""

    tokens: int
    heads: int
    kv_heads: int
    d: int
    dv: int
    pages: int
    page: int
    scale: float
    soft_cap: float | None
    windowed: bool
    chunked: bool
    has_sinks: bool
    stored: int
    """Bytes of an element in the pages."""
    config: PrefillConfig

    @property
    def narrow(self) -> bool:
        """Whether pages hold float8, which is turned into float16 to be multiplied."""
        return self.stored == 1

    @property
    def limited(self) -> bool:
        """Whether queries may see only a part of the positions before them."""
        return self.windowed or self.chunked

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.heads // self.kv_heads

    @property
    def item_heads(self) -> int:
        """Query heads of a work item: two of one KV head where there are, a warpgroup each."""
        return 1 if self.group % WARPGROUPS else WARPGROUPS

    @property
    def item_tokens(self) -> int:
        """Tokens of a work item."""
        return WARPGROUPS * WARPGROUP_ROWS // self.item_heads

    @property
    def key_swizzle(self) -> int:
        return swizzled_features(self.d)

    @property
    def chunk(self) -> int:
        """Value features that a swizzle spans, and that leave shared memory in one copy."""
        return swizzled_features(self.dv)

    def stored_swizzle(self, features: int) -> int:
        """Features that the swizzle of a tile spans, as they lie in the pages."""
        return swizzled_features(features, self.stored)

    @property
    def shares_queries(self) -> bool:
        """Whether outputs leave from where the queries were, of which there is room for two.

        Heads between have narrower swizzles, and have run on a GPU without only.
        """
        return self.d == self.dv in (64, 128) and not self.narrow

    @property
    def query_stages(self) -> int:
        """Items whose queries are in shared memory."""
        return 2 if self.shares_queries else 1

    @property
    def out_stages(self) -> int:
        """Chunks of outputs of a warpgroup in shared memory: wide heads and float8 leave less."""
        return 2 if self.dv <= 128 and not self.narrow else 1

    @property
    def copy_rows(self) -> int:
        """Positions of one copy, which must lie in one page."""
        return min(self.page, self.config.kv_block)

    @property
    def copies(self) -> int:
        """Copies that fill a tile."""
        return self.config.kv_block // self.copy_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillRefs:
    """The references of the kernel: operands, results, then scratch."""

    q: Any
    k_pages: Any
    v_pages: Any
    layer: Any
    page_table: Any
    tiles: Any
    """Tiles of queries, see `prefill_plan`."""
    tile_count: Any
    limits: Any = None
    sinks: Any = None
    scales: Any = None
    """What keys and values are multiplied with, where pages hold float8."""
    out: Any
    lse: Any
    q_shared: Any
    k_shared: Any
    v_shared: Any
    out_shared: Any = None
    """Chunks of a warpgroup's outputs: one is filled while another leaves; None if outputs leave
    from where the queries were."""
    edge_shared: Any
    """Eight rows without swizzle, of which single ones leave, each aligned as copies need it."""
    weights_shared: Any = None
    k_narrow: Any = None
    """The next tile of keys, as it lies in the pages, where they hold float8."""
    v_narrow: Any = None
    k_landed: Any = None
    q_full: Any
    """One for each place of queries, as `q_free`."""
    q_free: Any
    k_full: Any
    k_free: Any
    v_full: Any
    v_free: Any
    v_landed: Any
    """A tile that reaches past its row's end has landed, and is yet to be cleared there; or any
    tile of float8, which is yet to be turned into float16."""
    turn: Any
    """Where the computing warpgroups meet: one multiplies while the other exponentiates."""
