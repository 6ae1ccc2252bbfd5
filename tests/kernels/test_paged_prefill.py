import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernel_checks import (
    LAYER,
    NO_PAGE,
    PAGE,
    assert_equal_attention,
    assert_lowers_for_cuda,
    deal_pages,
    fill_pages,
    float32_attention,
)

import pallas_kernels
from pallas_kernels import reference
from pallas_kernels.paged_attention import prefill_sm90
from pallas_kernels.paged_attention.configs import prefill_config
from pallas_kernels.paged_attention.prefill_plan import Tile, plan_tiles
from pallas_kernels.paged_attention.prefill_shape import PrefillConfig

FLOAT8 = jnp.float8_e4m3fn
SMALL = PrefillConfig(blocks=1, kv_block=64, stages=2, in_registers=False)

# Scores of keys past a row's end are NaN before they are hidden.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")


def prefill_case(
    rows: list[tuple[int, int]], *, spare=0, heads=2, kv_heads=1, d=64, dv=64, page=PAGE, seed=0,
    dtype: Any = jnp.bfloat16,
) -> Any:  # fmt: skip
    """Rows of (cached positions, queries after them) over shuffled pages, and spare tokens.

    Whatever a row does not own is NaN, or no page at all.
    """
    rng = np.random.default_rng(seed)
    queries = np.array([count for _, count in rows])
    lengths = np.array([cached + count for cached, count in rows])
    table, owned = deal_pages(rng, lengths, page)
    pages = functools.partial(fill_pages, rng, owned, kv_heads, dtype=dtype)
    start = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    q = jnp.asarray(rng.normal(size=(start[-1] + spare, heads, d)), jnp.bfloat16)
    ragged = (jnp.asarray(table), jnp.asarray(start), jnp.asarray(lengths, jnp.int32))
    return q, pages(d), pages(dv), LAYER, *ragged


def prefill(case, *, config=SMALL, **options):
    params = plgpu.InterpretGPUParams(detect_races=True, out_of_bounds_reads="uninitialized")
    return prefill_sm90.paged_prefill(
        *case, scale=0.125, config=config, interpret=params, **options
    )


def expected(case, **options):
    start = case[5]
    longest = max(2, int(jnp.max(start[1:] - start[:-1])))
    return float32_attention(*case, max_query_length=longest, **options)


def test_prefill_kernel_agrees_with_float32_and_has_no_race():
    case = prefill_case([(70, 13), (0, 1), (0, 70), (15, 1)], spare=7)
    assert_equal_attention(prefill(case), expected(case))
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize(
    "options",
    [
        {"window": jnp.int32(40)},
        {"window": 5, "soft_cap": 2.0, "sinks": jnp.asarray([-2.0, 9.0])},
        {"window": jnp.int32(0)},
        {"chunk": jnp.int32(30)},
        {"chunk": jnp.int32(96), "window": 40},
    ],
    ids=["window", "all", "no window", "chunk", "both"],
)
def test_prefill_kernel_knows_every_option_of_the_reference(options):
    case = prefill_case([(90, 9), (0, 3)], spare=4)
    assert_equal_attention(prefill(case, **options), expected(case, **options))


@pytest.mark.parametrize("page", [32, 128])
def test_prefill_kernel_reads_pages_of_every_size(page):
    case = prefill_case([(page - 2, 1), (page - 1, 1), (page - 1, 2)], page=page)
    assert_equal_attention(prefill(case), expected(case))


@pytest.mark.parametrize(
    "sizes",
    [dict(heads=3), dict(heads=4, kv_heads=2, d=128, dv=192)],
    ids=str,
)
def test_prefill_kernel_takes_any_group_and_head_dimension(sizes):
    case = prefill_case([(3, 66)], **sizes)
    assert_equal_attention(prefill(case), expected(case))


@pytest.mark.parametrize("d, dv", [(80, 80), (96, 96), (112, 112), (192, 48)])
def test_prefill_kernel_takes_heads_that_do_not_fill_the_widest_swizzle(d, dv):
    rows = [(0, 1), (PAGE - 2, 1), (PAGE - 1, 1), (PAGE, 1), (3, 66)]
    case = prefill_case(rows, spare=3, heads=4, kv_heads=2, d=d, dv=dv)
    assert_equal_attention(prefill(case), expected(case))
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize(
    "d, dv, options",
    [(64, 64, {}), (128, 96, {"window": 21, "soft_cap": 2.0, "sinks": jnp.asarray([-2.0, 9.0])})],
    ids=["plain", "all options"],
)
def test_prefill_kernel_reads_pages_of_float8(d, dv, options):
    case = prefill_case([(70, 13), (0, 1), (15, 1), (130, 3)], spare=7, d=d, dv=dv, dtype=FLOAT8)
    options = options | {"k_scale": jnp.float32(0.5), "v_scale": 0.75}
    assert_equal_attention(prefill(case, **options), expected(case, **options))
    assert not gpu_callbacks.get_races().races_found


def test_blocks_share_the_items_of_a_batch():
    case = prefill_case([(0, 66), (30, 3)], heads=4)
    config = PrefillConfig(blocks=2, kv_block=64, stages=2, in_registers=False)
    assert_equal_attention(prefill(case, config=config), expected(case))


def test_a_tile_begins_at_the_page_that_the_window_of_its_first_query_begins_in():
    # Queries from 140 on see from 121 on, in the eighth page; those from 204 on from 185.
    plan = plan_tiles(
        jnp.asarray([0, 70]), jnp.asarray([210]), jnp.asarray([20]),
        tokens=70, tile_tokens=64, kv_block=128, kv_alignment=16,
    )  # fmt: skip
    tiles = [Tile(*fields) for fields in np.asarray(plan.tiles)[: int(plan.count[0])]]
    assert {int(tile.token): int(tile.kv_begin) for tile in tiles} == {0: 112, 64: 176}


def test_a_row_without_positions_gives_zeros():
    q, k_pages, v_pages, layer, table, start, lengths = prefill_case([(0, 5), (4, 6)])
    case = q, k_pages, v_pages, layer, table, start, lengths.at[0].set(0)
    out, lse = prefill(case)
    assert_equal_attention((out, lse), expected(case))
    assert not np.any(np.asarray(out[:5], np.float32)) and np.all(np.isneginf(lse[:5]))


def test_tiles_cover_every_token_once_and_the_most_expensive_comes_first():
    rng = np.random.default_rng(0)
    for _ in range(5):
        queries, cached = rng.integers(0, 90, 6), rng.integers(0, 300, 6)
        start = np.concatenate([[0], np.cumsum(queries)]) + 3
        tokens = int(start[-1]) + 20
        plan = plan_tiles(
            jnp.asarray(start), jnp.asarray(cached + queries), None,
            tokens=tokens, tile_tokens=64, kv_block=128, kv_alignment=16,
        )  # fmt: skip
        tiles = [Tile(*fields) for fields in np.asarray(plan.tiles)[: int(plan.count[0])]]
        owned = [token for tile in tiles for token in range(int(tile.begin), int(tile.end))]
        assert sorted(owned) == list(range(tokens))
        costs = [tile.kv_tiles for tile in tiles]
        assert costs == sorted(costs, reverse=True) and costs[0] > 0


@pytest.mark.parametrize(
    "heads, kv_heads, d, page, limited, dtype",
    [
        (32, 8, 128, 64, False, jnp.bfloat16),
        (64, 8, 64, 16, True, jnp.bfloat16),
        (16, 16, 128, 128, False, jnp.bfloat16),
        (16, 8, 256, 64, True, jnp.bfloat16),
        (32, 32, 80, 64, False, jnp.bfloat16),
        (32, 8, 96, 16, True, jnp.bfloat16),
        (32, 8, 112, 128, True, jnp.bfloat16),
        (32, 8, 128, 64, False, FLOAT8),
        (16, 8, 256, 16, True, FLOAT8),
        (32, 8, 96, 128, True, FLOAT8),
    ],
)
def test_every_shipped_configuration_lowers_for_cuda(heads, kv_heads, d, page, limited, dtype):
    options: Any = {}
    if limited:
        sinks = jnp.zeros(heads)
        options = dict(window=jnp.int32(9), chunk=jnp.int32(0), soft_cap=3.0, sinks=sinks)
    stored = jnp.dtype(dtype).itemsize
    config = prefill_config(d=d, dv=d, num_sms=132, stored=stored)
    run = functools.partial(prefill_sm90.paged_prefill, scale=d**-0.5, config=config, **options)
    pages = jax.ShapeDtypeStruct((2, 100, page, kv_heads, d), dtype)
    arguments = (
        jax.ShapeDtypeStruct((100, heads, d), jnp.bfloat16),
        pages,
        pages,
        jax.ShapeDtypeStruct((), jnp.int32),
        jax.ShapeDtypeStruct((4, 10), jnp.int32),
        jax.ShapeDtypeStruct((5,), jnp.int32),
        jax.ShapeDtypeStruct((4,), jnp.int32),
    )
    assert_lowers_for_cuda(run, *arguments)


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(d=72), "head dimensions 72 and 64; it takes multiples of 16 up to 256"),
        (dict(page=24), "pages of 24; it takes powers of 2 from 16 on"),
        (dict(d=80, dtype=FLOAT8), "head dimensions 80 and 64; it takes multiples of 32 up to 256"),
    ],
)
def test_prefill_kernel_says_what_it_does_not_cover(sizes, message):
    with pytest.raises(NotImplementedError, match=message):
        prefill(prefill_case([(0, 3)], **sizes))


def test_a_machine_without_a_hopper_gpu_runs_the_reference():
    case = prefill_case([(20, 3), (0, 5)])
    q, k_pages, v_pages, layer, table, start, lengths = case
    table = jnp.where(table == NO_PAGE, 0, table)
    arguments = q, k_pages, v_pages, layer, table, start, lengths
    run = functools.partial(pallas_kernels.paged_attention, scale=0.125, max_query_length=5)
    want = reference.paged_attention(*arguments, scale=0.125, max_query_length=5)
    np.testing.assert_array_equal(run(*arguments)[0], want[0])
    with pytest.raises(NotImplementedError, match="needs a Hopper GPU"):
        run(*arguments, implementation="prefill_sm90")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "heads, kv_heads, d, dv, page",
    [
        (8, 2, 128, 128, 64),
        (8, 2, 64, 64, 16),
        (3, 3, 128, 128, 128),
        (4, 2, 256, 256, 64),
        (8, 2, 80, 80, 64),
        (3, 3, 80, 80, 16),
        (8, 2, 96, 96, 16),
        (3, 3, 96, 96, 64),
        (8, 2, 112, 112, 128),
        (3, 3, 112, 112, 64),
        (8, 8, 192, 128, 64),
    ],
)
def test_prefill_kernel_agrees_with_float32_on_the_gpu(heads, kv_heads, d, dv, page):
    rng = np.random.default_rng(heads * d + page)
    rows = [(int(cached), int(count)) for cached, count in rng.integers(1, 500, (4, 2))]
    rows += [(0, 1), (page - 2, 1), (page - 1, 1), (page, 1)]
    rows += [(page, page), (0, page + 1), (3 * page - 1, 1), (1000, 300)]
    case = prefill_case(rows, spare=37, heads=heads, kv_heads=kv_heads, d=d, dv=dv, page=page)
    options = {}
    if heads == 3:
        options = dict(window=jnp.int32(77), soft_cap=3.0, sinks=jnp.asarray([-2.0, 0.0, 4.0]))
    run = functools.partial(pallas_kernels.paged_attention, implementation="prefill_sm90")
    run = functools.partial(run, scale=0.125, max_query_length=500, **options)
    assert_equal_attention(jax.jit(run)(*case), expected(case, **options))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "heads, kv_heads, d, dv, page",
    [
        (8, 2, 128, 128, 64),
        (8, 2, 64, 64, 16),
        (3, 3, 96, 96, 64),
        (4, 2, 256, 256, 64),
        (8, 8, 192, 128, 128),
    ],
)
def test_prefill_kernel_reads_pages_of_float8_on_the_gpu(heads, kv_heads, d, dv, page):
    rows = [(0, 1), (page - 2, 1), (page - 1, 1), (page, 1), (0, page + 1), (1000, 300)]
    case = prefill_case(
        rows, spare=37, heads=heads, kv_heads=kv_heads, d=d, dv=dv, page=page, dtype=FLOAT8
    )
    options: Any = dict(k_scale=jnp.float32(0.5), v_scale=jnp.float32(0.75))
    if heads == 3:
        options |= dict(window=jnp.int32(77), soft_cap=3.0, sinks=jnp.asarray([-2.0, 0.0, 4.0]))
    run = functools.partial(pallas_kernels.paged_attention, implementation="prefill_sm90")
    run = functools.partial(run, scale=0.125, max_query_length=500, **options)
    assert_equal_attention(jax.jit(run)(*case), expected(case, **options))
