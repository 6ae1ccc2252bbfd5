import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention.schedule import Segment, plan_share

TILE = 64
RAGGED = [0, 1, 64, 65, 0, 0, 700, 3, 2000, 130, 0]


def deal(lengths: list[int], *, shares: int, row_cost: int) -> list[np.ndarray]:
    """What each share holds: rows, their first tile there, how many, the first and last share."""

    def walk(share: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        schedule = plan_share(
            share, shares, rows=len(lengths), tile=TILE, at_once=4, min_tiles=2,
            lengths=lengths, limits=None, row_cost=row_cost,
        )  # fmt: skip

        def note(carry: tuple, segment: Segment) -> tuple:
            count, notes = carry
            first = segment.base // schedule.size
            last = (segment.base + segment.tiles - 1) // schedule.size
            what = jnp.stack([segment.row, segment.first, segment.count, first, last])
            return count + 1, notes.at[count].set(what)

        start = (jnp.int32(0), jnp.zeros((len(lengths), 5), jnp.int32))
        return schedule.for_each_segment(note, start)

    walk_all = jax.jit(jax.vmap(walk, in_axes=(0, None)))
    counts, notes = walk_all(jnp.arange(shares), jnp.asarray(lengths, jnp.int32))
    return [np.asarray(notes)[share, :count] for share, count in enumerate(counts.tolist())]


@pytest.mark.parametrize("row_cost", [0, 1, 3])
@pytest.mark.parametrize("shares", [1, 5, 40])
def test_shares_hold_every_tile_once_whatever_a_change_of_rows_costs(shares, row_cost):
    held = [np.zeros(-(-length // TILE), int) for length in RAGGED]
    holders: list[set[int]] = [set() for _ in RAGGED]
    said: list[set[int]] = [set() for _ in RAGGED]
    for share, segments in enumerate(deal(RAGGED, shares=shares, row_cost=row_cost)):
        for row, begin, count, first, last in segments:
            assert count > 0
            held[row][begin : begin + count] += 1
            holders[row].add(share)
            said[row] |= set(range(first, last + 1))
    assert all((tiles == 1).all() for tiles in held)
    assert holders == said


def test_shares_of_short_rows_hold_fewer_tiles():
    lengths = [20 * TILE] * 8 + [TILE] * 40
    costs = [
        sum(count + 2 for _, _, count, *_ in segments)
        for segments in deal(lengths, shares=8, row_cost=2)
    ]
    # Where a share begins and ends within rows, one change more or less is left.
    assert max(costs) - min(costs) <= 2 * 2
