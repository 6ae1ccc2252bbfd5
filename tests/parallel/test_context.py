"""The deal of tokens and pages over context ranks, the merge, and what a prefill holds and does."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llmjax.parallel.collectives import island
from llmjax.parallel.context import (
    Attended,
    PageDeal,
    TokenDeal,
    add_sinks,
    collect,
    deal,
    merge,
    merge_ranks,
)
from meshes import ParallelPlan, make_mesh
from pallas_kernels import NO_ROW, Places, block_attention, visible_blocks
from pallas_kernels.softmax import KV_BLOCK

RANKS = pytest.mark.parametrize("ranks", [2, 3, 4, 8])


def test_tokens_are_dealt_in_zigzag():
    assert deal(16, 4).tolist() == [[0, 7, 8, 15], [1, 6, 9, 14], [2, 5, 10, 13], [3, 4, 11, 12]]


@RANKS
def test_every_token_has_one_place_and_decode_tokens_come_first(ranks):
    tokens = TokenDeal(decodes=3 * ranks, prefills=5 * ranks, ranks=ranks)
    assert sorted(tokens.held.reshape(-1)) == list(range(8 * ranks))
    assert (tokens.held[:, :3] < 3 * ranks).all() and (tokens.held[:, 3:] >= 3 * ranks).all()
    assert (tokens.held.reshape(-1)[tokens.place] == np.arange(8 * ranks)).all()


@RANKS
@pytest.mark.parametrize("page", [1, 4])
def test_each_position_is_counted_and_stored_on_the_rank_of_its_page(ranks, page):
    pages, lengths = PageDeal(page, ranks), np.arange(5 * ranks * page)
    owner = lengths // page % ranks
    for rank in range(ranks):
        mine = np.concatenate([[0], np.cumsum(owner == rank)[:-1]])
        assert (np.asarray(pages.count(jnp.asarray(lengths), rank)) == mine).all()
        slots = np.asarray(pages.own(jnp.asarray(lengths), rank))
        assert ((slots >= 0) == (owner == rank)).all()
        assert (slots[owner == rank] == np.arange((owner == rank).sum())).all()
        assert pages.own(jnp.asarray([-1]), rank)[0] == -1


@pytest.mark.parametrize("options", [{}, {"window": 40}, {"chunk": 64}, {"soft_cap": 2.0}], ids=str)
def test_parts_of_the_keys_merge_to_attention_over_all_of_them(options):
    draw, ranks, lengths = np.random.default_rng(0), 3, (400, 1, 100, 2)
    total = sum(lengths)
    padded = total + -total % ranks
    row = np.concatenate([np.repeat(np.arange(len(lengths)), lengths), [NO_ROW] * (padded - total)])
    position = np.concatenate([*map(np.arange, lengths), [0] * (padded - total)])
    q, k, v = (draw.normal(size=(padded, 2, 8)).astype(np.float32) for _ in range(3))
    visible = (row[:, None] == row) & (position[:, None] >= position) & (row != NO_ROW)
    if "window" in options:
        visible &= position[:, None] - position < options["window"]
    if "chunk" in options:
        visible &= position[:, None] // options["chunk"] == position // options["chunk"]
    scores = np.einsum("qhd,khd->qhk", q, k) * 0.3
    if "soft_cap" in options:
        scores = options["soft_cap"] * np.tanh(scores / options["soft_cap"])
    scores = np.where(visible[:, None], scores, -np.inf)[:total]
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("qhk,khd->qhd", weights / weights.sum(-1, keepdims=True), v)

    held = deal(padded, ranks)
    places = [Places(jnp.asarray(row[own]), jnp.asarray(position[own])) for own in held]
    attend = jax.jit(partial(block_attention, scale=0.3, **options))
    for own, queries in zip(held, places, strict=True):
        parts = [
            attend(q[own], k[source], v[source], queries, keys)
            for source, keys in zip(held, places, strict=True)
        ]
        out, lse = merge(*(jnp.stack(each) for each in zip(*parts, strict=True)))
        real = own < total
        np.testing.assert_allclose(out[real], expected[own[real]], atol=1e-5)
        assert np.isneginf(np.asarray(lse)[~real]).all() and (np.asarray(out)[~real] == 0).all()


@RANKS
def test_no_rank_of_the_ring_has_more_to_do_than_another(ranks):
    for blocks in (16, 24):
        length = blocks * KV_BLOCK
        for lengths in ([length], [length // 3, 7, length // 2]):
            row = np.repeat(np.arange(len(lengths)), lengths)
            position = np.concatenate([*map(np.arange, lengths)])
            cut = len(row) // ranks * ranks
            places = [
                Places(jnp.asarray(row[own]), jnp.asarray(position[own]))
                for own in deal(cut, ranks)
            ]
            work = []
            for queries in places:
                spans = [visible_blocks(queries, keys) for keys in places]
                work.append(sum(int((stop - first).sum()) for first, stop in spans))
            assert max(work) <= 1.05 * min(work)


def test_what_ranks_find_is_merged_in_one_exchange_in_any_type():
    mesh, draw = make_mesh(ParallelPlan(cp=4)), np.random.default_rng(1)
    outs = draw.normal(size=(4, 8, 2, 16)).astype(np.float32)
    lses = draw.normal(size=(4, 8, 2)).astype(np.float32) * 5
    lses[1, 3], lses[:, 5] = -np.inf, -np.inf
    weights = np.exp(lses - np.where(np.isneginf(lses.max(0)), 0, lses.max(0)))
    total = np.where(weights.sum(0) == 0, 1, weights.sum(0))

    def body(out, lse):
        merged, _ = merge_ranks(Attended(out[0], lse[0]), ("cp",))
        return collect(merged, ("cp",))

    run = island(body, in_specs=(P("cp"), P("cp")), out_specs=P())
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 1e-6)):
        typed = jnp.asarray(outs, dtype)
        expected = (np.asarray(typed, np.float32) * weights[..., None]).sum(0) / total[..., None]
        with jax.set_mesh(mesh):
            placed = jax.device_put((typed, lses), jax.NamedSharding(mesh, P("cp")))
            program = jax.jit(run).lower(*placed).compile()
            found = program(*placed)
        np.testing.assert_allclose(found, expected, atol=tolerance)
        text = program.as_text() or ""
        assert text.count(" all-to-all(") == 1


def test_a_sink_takes_the_part_of_a_key_without_a_value():
    attended = Attended(jnp.ones((1, 2, 3)), jnp.log(jnp.array([[3.0, 1.0]])))
    out = add_sinks(attended, jnp.log(jnp.array([1.0, 3.0])))
    np.testing.assert_allclose(out[0, :, 0], [0.75, 0.25], rtol=1e-6)
