"""Shares of the cached positions of ragged rows, worked out by each block of a kernel.

The tiles of all rows, laid end to end, are cut into shares of equal size (Stream-K, Osama et al.,
2023), so that ragged lengths and small batches fill the chip alike. What a share holds of one row
is a *segment*.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.paged_attention.limits import first_visible, unlimited
from pallas_kernels.paged_attention.schedule_lanes import MOST_ROWS, place_share


class Segment(NamedTuple):
    """The tiles of one row that a share holds."""

    row: Array
    base: Array
    """Where the row begins among all rows, in tiles: its own are counted from there."""
    first: Array
    """The segment's first tile, counted from the row's first visible tile."""
    count: Array
    tiles: Array
    """Tiles of the whole row."""
    low: Array
    """First position that the query sees."""
    length: Array
    after: "Segment | None" = None
    """The next segment, if the row before this one has any positions."""

    def begin(self, tile: int) -> Array:
        """Returns the segment's first position, a multiple of the positions of a tile."""
        return (lax.div(self.low, jnp.int32(tile)) + self.first) * tile

    def end(self, tile: int) -> Array:
        """Returns one past the segment's last position."""
        return jnp.minimum(self.begin(tile) + self.count * tile, self.length)

    @property
    def starts(self) -> Array:
        return self.first == 0

    @property
    def ends(self) -> Array:
        return self.first + self.count == self.tiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which tiles a share holds."""

    rows: int
    tile: int
    """Positions of a tile: of what shares are made of. In decode that is a copy of a page or a part
    of one, several of which fill what is computed at a time."""
    at_once: int
    """Lengths that are read at once, so that their latencies overlap."""
    lengths: Any
    """Reference to the cached positions of each row."""
    limits: Any
    """Reference to how far back every query sees, or None."""
    lows: Any
    """Reference to the first position that the query of each row sees, or None: see `limits`."""
    row_cost: int
    """Tiles that take as long as the change from one row to another in a share."""
    size: Array
    """Tiles of a share, the cost of changes included."""
    begin: Array
    end: Array
    last: tuple[Array, ...] | None = None
    """The row of the share's last tile, where that row begins, its length and that of the row
    before, where known."""
    whole: int = 1
    """Tiles that no border of shares cuts off a row: a border that would cut off fewer moves to
    where the row begins or ends."""

    def sharers(self, segment: Segment) -> tuple[Array, Array]:
        """Returns the first and the last share that has tiles of a segment's row."""
        kept = jnp.minimum(segment.tiles, self.whole)
        # A border before the first of these tiles has moved to the row's begin, one behind the
        # last to its end.
        first, last = kept - 1, jnp.maximum(kept - 1, segment.tiles - self.whole)
        return lax.div(segment.base + first, self.size), lax.div(segment.base + last, self.size)

    def low(self, row: Array, length: Array) -> Array:
        """Returns the first position that the query of a row of `length` positions sees."""
        if self.lows is not None:
            return self.lows[jnp.clip(row, 0, self.rows - 1)]
        if self.limits is None:
            return jnp.int32(0)
        return first_visible(length - 1, self.limits)

    def tiles(self, row: Array, length: Array) -> Array:
        """Returns the tiles that the query of a row of `length` positions sees."""
        tile = jnp.int32(self.tile)
        return pl.cdiv(length, tile) - lax.div(self.low(row, length), tile)

    def cost(self, tiles: Array) -> Array:
        """Returns what a row of so many tiles adds to a share that holds all of it."""
        return jnp.where(tiles > 0, tiles + self.row_cost, 0) if self.row_cost else tiles

    def for_each_segment(self, body: Callable[[Any, Segment], Any], carry: Any) -> Any:
        """Runs `carry = body(carry, segment)` over the share's segments, the last row first.

        So the part that later shares wait for is ready early, and the part that waits comes last.
        """

        def exhausted(state: tuple[Array, ...]) -> Array:
            position, _, base, _, _ = state
            return position <= base

        def next_row(state: tuple[Array, ...]) -> tuple[Array, ...]:
            position, row, base, _, next_length = state
            # The length after the next is on its way while the next row is computed.
            row -= 1
            base -= self.cost(self.tiles(row, next_length))
            return position, row, base, next_length, self._length(row - 1)

        def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
            *place, carry = state
            place = lax.while_loop(exhausted, next_row, tuple(place))
            position, row, base, length, next_length = place
            segment = self._segment(position, row, base, length)
            before = jnp.maximum(row - 1, 0)
            next_base = base - self.cost(self.tiles(before, next_length))
            after = self._segment(base - self.row_cost, before, next_base, next_length)
            carry = body(carry, segment._replace(after=after))
            return base + segment.first - self.row_cost, *place[1:], carry

        def unfinished(state: tuple[Any, ...]) -> Array:
            return state[0] > self.begin

        row, base, length, next_length = self._last_row()
        position = self.end
        if self.row_cost:
            # A share may end among the tiles that a change of rows costs.
            position = jnp.minimum(position, base + self.tiles(row, length))
        place = (position, row, base, length, next_length)
        return lax.while_loop(unfinished, step, (*place, carry))[-1]

    def _segment(self, position: Array, row: Array, base: Array, length: Array) -> Segment:
        """Returns what the share holds of a row before a position."""
        begin = jnp.maximum(base, self.begin)
        tiles, low = self.tiles(row, length), self.low(row, length)
        return Segment(row, base, begin - base, position - begin, tiles, low, length)

    def _length(self, row: Array) -> Array:
        return self.lengths[jnp.clip(row, 0, self.rows - 1)]

    def _last_row(self) -> tuple[Array, ...]:
        """Returns what `last` says."""
        if self.last is not None:
            return self.last

        def unfinished(state: tuple[Array, ...]) -> Array:
            index, _, _, seen = state
            return (seen < self.end) & (index < self._chunks())

        def skip(state: tuple[Array, ...]) -> tuple[Array, ...]:
            index, row, base, seen = state
            for tiles in self._chunk(index):
                seen += tiles
                before = seen < self.end
                row += before.astype(jnp.int32)
                base = jnp.where(before, seen, base)
            return index + 1, row, base, seen

        zero = jnp.int32(0)
        _, row, base, _ = lax.while_loop(unfinished, skip, (zero, zero, zero, zero))
        return row, base, self._length(row), self._length(row - 1)

    def total(self) -> Array:
        """Returns the tiles of all rows, the cost of changes between them included."""

        def add(index: Array, total: Array) -> Array:
            return sum(self._chunk(index), total)

        total = lax.fori_loop(0, self._chunks(), add, jnp.int32(0))
        return jnp.maximum(total - self.row_cost, 0)

    def move_borders(self, borders: list[Array]) -> list[Array]:
        """Moves borders of shares to where rows begin or end, where `whole` says so."""
        furthest = jnp.int32(2**30)

        def find(index: Array, found: tuple[Array, list[Array], list[Array]]) -> Any:
            seen, begins, ends = found
            for tiles in self._chunk(index):
                seen += tiles
                pairs = list(zip(borders, begins, ends, strict=True))
                begins = [jnp.where(seen <= at, seen, begin) for at, begin, _ in pairs]
                ends = [jnp.where(seen <= at, end, jnp.minimum(end, seen)) for at, _, end in pairs]
            return seen, begins, ends

        zero = jnp.int32(0)
        start = zero, [zero] * len(borders), [furthest] * len(borders)
        _, begins, ends = lax.fori_loop(0, self._chunks(), find, start)
        return [
            jnp.where(at - begin < self.whole, begin, jnp.where(end - at < self.whole, end, at))
            for at, begin, end in zip(borders, begins, ends, strict=True)
        ]

    def _chunks(self) -> int:
        return -(-self.rows // self.at_once)

    def _chunk(self, index: Array) -> list[Array]:
        """Returns the costs of the next rows, 0 past the last."""
        rows = [index * self.at_once + i for i in range(self.at_once)]
        lengths = [self._length(row) for row in rows]
        return [
            jnp.where(row < self.rows, self.cost(self.tiles(row, length)), 0)
            for row, length in zip(rows, lengths, strict=True)
        ]


def plan_share(
    share: Array,
    shares: int,
    *,
    rows: int,
    tile: int,
    at_once: int,
    min_tiles: int,
    lengths: Any,
    limits: Any,
    lows: Any = None,
    row_cost: int = 0,
    whole: int = 1,
    by_lanes: bool = False,
) -> Schedule:
    """Returns the schedule of one of `shares` shares of at least `min_tiles` tiles.

    Lanes may work it out for not too many rows, of which the interpreter knows nothing. Raises
    ValueError for a `row_cost` and borders that move: they count where a row ends differently.
    """
    if row_cost and whole > 1:
        raise ValueError(f"shares with row_cost={row_cost} have whole=1, got {whole}")
    zero = jnp.int32(0)
    schedule = Schedule(
        rows=rows,
        tile=tile,
        at_once=min(rows, at_once),
        lengths=lengths,
        limits=limits,
        lows=lows,
        row_cost=row_cost,
        size=zero,
        begin=zero,
        end=zero,
        whole=whole,
    )
    if by_lanes and lows is None and rows <= MOST_ROWS:
        size, begin, end, *last = place_share(
            share,
            lengths,
            *unlimited(limits),
            rows=rows,
            tile=tile,
            shares=shares,
            min_tiles=min_tiles,
            row_cost=row_cost,
            whole=whole,
        )
        return dataclasses.replace(schedule, size=size, begin=begin, end=end, last=tuple(last))
    total = schedule.total()
    size = jnp.maximum(pl.cdiv(total, jnp.int32(shares)), min_tiles)
    begin = share * size
    end = jnp.minimum(begin + size, total)
    if whole > 1:
        begin, end = schedule.move_borders([begin, end])
    return dataclasses.replace(schedule, size=size, begin=begin, end=end)
