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
            sharers = schedule.sharers(segment)
            what = jnp.stack([segment.row, segment.first, segment.count, *sharers])
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


@pytest.mark.parametrize("length, begin", [(150, 128), (148, 128), (147, 64), (20, 0)])
def test_a_segment_begins_at_the_tile_that_the_window_begins_in(length, begin):
    schedule = plan_share(
        jnp.int32(0), 1, rows=1, tile=TILE, at_once=1, min_tiles=1,
        lengths=jnp.asarray([length]), limits=jnp.asarray([20]),
    )  # fmt: skip

    def note(noted: jax.Array, segment: Segment) -> jax.Array:
        return noted.at[:].set(jnp.stack([segment.begin(TILE), segment.end(TILE)]))

    noted = schedule.for_each_segment(note, jnp.zeros(2, jnp.int32))
    assert noted.tolist() == [begin, length]


def test_moving_borders_do_not_go_with_a_cost_of_rows():
    with pytest.raises(ValueError, match="row_cost=2 have whole=1, got 4"):
        plan_share(
            jnp.int32(0), 1, rows=1, tile=TILE, at_once=1, min_tiles=1,
            lengths=jnp.asarray([9]), limits=None, row_cost=2, whole=4,
        )  # fmt: skip


def test_shares_of_short_rows_hold_fewer_tiles():
    lengths = [20 * TILE] * 8 + [TILE] * 40
    costs = [
        sum(count + 2 for _, _, count, *_ in segments)
        for segments in deal(lengths, shares=8, row_cost=2)
    ]
    # Where a share begins and ends within rows, one change more or less is left.
    assert max(costs) - min(costs) <= 2 * 2
