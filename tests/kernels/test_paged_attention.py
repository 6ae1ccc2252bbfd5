import functools
import importlib
from types import SimpleNamespace
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
from pallas_kernels.paged_attention import decode_sm90
from pallas_kernels.paged_attention.configs import decode_config
from pallas_kernels.paged_attention.decode_shape import DecodeConfig
from pallas_kernels.paged_attention.limits import keys_before
from pallas_kernels.paged_attention.schedule import plan_share

# The package has a function of this name, too.
paged_attention = importlib.import_module("pallas_kernels.paged_attention")

FLOAT8 = jnp.float8_e4m3fn


def decode_case(
    lengths: list[int],
    *,
    heads=4,
    kv_heads=1,
    d=64,
    dv=64,
    page=PAGE,
    dtype: Any = jnp.bfloat16,
    seed=0,
):
    """Random queries over shuffled pages; whatever a row does not own is NaN, or no page at all."""
    rng = np.random.default_rng(seed)
    table, owned = deal_pages(rng, lengths, page)
    pages = functools.partial(fill_pages, rng, owned, kv_heads, dtype=dtype)
    q = jnp.asarray(rng.normal(size=(len(lengths), heads, d)), jnp.bfloat16)
    return q, pages(d), pages(dv), LAYER, jnp.asarray(table), jnp.asarray(lengths, jnp.int32)


def decode(case, *, blocks=1, races=True, **options):
    """The kernel under the interpreter, which runs blocks in turn and knows no signals."""
    config = DecodeConfig(blocks=blocks, kv_block=64, stages=2, inlined=False, synchronize=False)
    params = plgpu.InterpretGPUParams(detect_races=races, out_of_bounds_reads="uninitialized")
    return decode_sm90.paged_decode(
        *case, scale=0.125, config=options.pop("config", config), interpret=params, **options
    )


def expected(case, **options):
    q, k_pages, v_pages, layer, table, lengths = case
    start = jnp.arange(len(lengths) + 1)
    return float32_attention(
        q, k_pages, v_pages, layer, table, start, lengths, max_query_length=1, **options
    )


def test_decode_kernel_agrees_with_float32_and_has_no_race():
    case = decode_case([100, 0, 1, 15, 16, 17, 64])
    assert_equal_attention(decode(case), expected(case))
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize(
    "options",
    [
        {"window": jnp.int32(70)},
        {"window": 5, "soft_cap": 2.0, "sinks": jnp.asarray([-2.0, 0.0, 1.0, 9.0])},
        {"chunk": jnp.int32(100)},
        {"chunk": 65, "window": jnp.int32(0)},
    ],
    ids=["window", "all", "chunk", "no window"],
)
def test_decode_kernel_knows_every_option_of_the_reference(options):
    case = decode_case([130, 3])
    assert_equal_attention(decode(case, **options), expected(case, **options))


@pytest.mark.parametrize("page", [32, 128])
def test_decode_kernel_reads_pages_of_every_size(page):
    case = decode_case([page - 1, page, page + 1], page=page)
    assert_equal_attention(decode(case), expected(case))


@pytest.mark.parametrize(
    "sizes",
    [dict(heads=12), dict(heads=2, kv_heads=2, d=128, dv=192)],
    ids=str,
)
def test_decode_kernel_takes_any_group_and_head_dimension(sizes):
    case = decode_case([40, 70], **sizes)
    blocks = case[1].shape[3]
    assert_equal_attention(decode(case, blocks=blocks), expected(case))


@pytest.mark.parametrize("d, dv", [(80, 80), (96, 96), (112, 112), (192, 48)])
def test_decode_kernel_takes_heads_that_do_not_fill_the_widest_swizzle(d, dv):
    lengths = [5 * PAGE + 3, 0, 1, PAGE - 1, PAGE, PAGE + 1]
    case = decode_case(lengths, heads=6, kv_heads=2, d=d, dv=dv)
    assert_equal_attention(decode(case, blocks=2), expected(case))
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize(
    "d, dv, options",
    [
        (64, 64, {}),
        (128, 96, {"window": 21, "soft_cap": 2.0, "sinks": jnp.asarray([-2.0, 0.0, 1.0, 9.0])}),
    ],
    ids=["plain", "all options"],
)
def test_decode_kernel_reads_pages_of_float8(d, dv, options):
    lengths = [70, 0, 1, PAGE - 1, PAGE, PAGE + 1]
    case = decode_case(lengths, kv_heads=2, d=d, dv=dv, dtype=FLOAT8)
    options = options | {"k_scale": jnp.float32(0.5), "v_scale": 0.75}
    assert_equal_attention(decode(case, blocks=2, **options), expected(case, **options))
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize("dtype", [jnp.bfloat16, FLOAT8])
def test_two_warpgroups_compute_every_other_tile_without_a_race(dtype):
    config = DecodeConfig(
        blocks=1, kv_block=64, stages=2, computers=2, inlined=False, synchronize=False
    )
    case = decode_case([200, 0, 1, 64, 65, 128, 129], dtype=dtype)
    assert_equal_attention(decode(case, config=config), expected(case))
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize("latent", [False, True])
def test_the_reference_scales_what_is_in_the_pages(latent):
    q, k_pages, v_pages, layer, table, lengths = decode_case([20, 3], dtype=FLOAT8)
    table = jnp.where(table == NO_PAGE, 0, table)
    others = layer, table, jnp.arange(3), lengths
    k_scale, v_scale = jnp.float32(0.25), 3.0
    k_exact = k_pages.astype(jnp.float32) * k_scale
    v_exact = v_pages.astype(jnp.float32) * v_scale
    run = functools.partial(
        pallas_kernels.paged_attention,
        scale=0.125, max_query_length=1, value_dim=32 if latent else None,
    )  # fmt: skip
    q = q.astype(jnp.float32)
    got = run(
        q, k_pages, None if latent else v_pages, *others,
        k_scale=k_scale, v_scale=None if latent else v_scale,
    )  # fmt: skip
    want = run(q, k_exact, None if latent else v_exact, *others)
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)
    np.testing.assert_allclose(got[1], want[1], atol=1e-5)


@pytest.mark.parametrize("blocks", [3, 7])
@pytest.mark.parametrize("options", [{}, {"window": 200}, {"window": 100}], ids=str)
def test_rows_that_several_blocks_share_are_merged(blocks, options):
    # Without signals between blocks, the detector would rightly report their sums as a race.
    case = decode_case([250, 0, 10, 130])
    got = decode(case, blocks=blocks, races=False, **options)
    assert_equal_attention(got, expected(case, **options))


def segments_of_shares(lengths, shares, *, window, whole):
    """The segments of all shares of tiles of 16, each as its share, row, tiles and sharers."""
    segments: list[tuple[int, ...]] = []
    for share in range(shares):
        schedule = plan_share(
            jnp.int32(share), shares, rows=len(lengths), tile=16, at_once=4, min_tiles=1,
            lengths=jnp.asarray(lengths), limits=jnp.asarray([window]), whole=whole,
        )  # fmt: skip

        def note(found, segment, schedule=schedule):
            numbers = segment.row, segment.count, *schedule.sharers(segment)
            return [*found, tuple(int(number) for number in numbers)]

        with jax.disable_jit():
            segments += [(share, *found) for found in schedule.for_each_segment(note, [])]
    return segments


@pytest.mark.parametrize("whole", [1, 4])
@pytest.mark.parametrize("window", [33, 1000])
@pytest.mark.parametrize("shares", [3, 16])
def test_shares_have_every_tile_once_and_cut_off_no_fewer_than_whole(shares, window, whole):
    lengths = np.random.default_rng(window).integers(0, 200, 9)
    tiles = -(-lengths // 16) - np.maximum(lengths - window, 0) // 16
    segments = segments_of_shares(lengths, shares, window=window, whole=whole)
    assert len(segments) >= np.count_nonzero(tiles)
    for row, count in enumerate(tiles):
        own = [segment for segment in segments if segment[1] == row]
        assert sum(part for _, _, part, _, _ in own) == count
        assert all(part >= min(whole, count) for _, _, part, _, _ in own)
        holders = [share for share, *_ in own]
        for *_, first, last in own:
            assert holders == list(range(first, last + 1))


SMALL_HOPPER = SimpleNamespace(
    platform="gpu", compute_capability="9.0", core_count=1, device_kind="interpreter"
)


@pytest.mark.parametrize("limits", [{}, {"window": 40}, {"chunk": 48}], ids=str)
@pytest.mark.parametrize("rank", [0, 2])
def test_decode_kernel_reads_the_pages_that_a_rank_of_three_holds(limits, rank, monkeypatch):
    length = jnp.asarray([150, 30, 5])
    here = keys_before(length, page=PAGE, page_stride=3, first_page=rank)
    case = decode_case([int(count) for count in here])
    run = functools.partial(pallas_kernels.paged_attention, scale=0.125, max_query_length=1)
    dealt: dict[str, Any] = dict(
        last_position=length - 1, page_stride=3, first_page=jnp.int32(rank), **limits
    )
    want = expected(case, **dealt)
    config = DecodeConfig(blocks=1, kv_block=64, stages=2, inlined=False, synchronize=False)
    kernel = functools.partial(
        decode_sm90.paged_decode,
        interpret=plgpu.InterpretGPUParams(out_of_bounds_reads="uninitialized"),
    )
    monkeypatch.setattr(paged_attention.backend, "get_default_device", lambda: SMALL_HOPPER)
    monkeypatch.setattr(paged_attention, "decode_config", lambda **_: config)
    monkeypatch.setattr(paged_attention.decode_sm90, "paged_decode", kernel)
    q, k_pages, v_pages, layer, table, lengths = case
    got = run(q, k_pages, v_pages, layer, table, jnp.arange(4), lengths, **dealt)
    assert_equal_attention(got, want)


def test_what_the_kernel_does_not_cover_runs_the_reference_on_a_rank_too(monkeypatch, caplog):
    length = jnp.asarray([150, 30])
    here = keys_before(length, page=PAGE, page_stride=2, first_page=1)
    case = decode_case([int(count) for count in here], d=72, dv=72)
    monkeypatch.setattr(paged_attention.backend, "get_default_device", lambda: SMALL_HOPPER)
    q, k_pages, v_pages, layer, table, lengths = case
    table = jnp.where(table == NO_PAGE, 0, table)
    dealt: dict[str, Any] = dict(last_position=length - 1, page_stride=2, first_page=1, window=40)
    got = pallas_kernels.paged_attention(
        q, k_pages, v_pages, layer, table, jnp.arange(3), lengths,
        scale=0.125, max_query_length=1, **dealt,
    )  # fmt: skip
    assert_equal_attention(got, expected(case, **dealt))
    warning = caplog.messages[-1]
    assert "runs as reference: paged decode on Hopper does not cover head dimensions 72" in warning


@pytest.mark.parametrize("stride, first", [(1, 0), (3, 0), (3, 2)])
def test_keys_before_counts_the_keys_that_are_here(stride, first):
    positions = np.arange(12 * PAGE)
    is_here = positions // PAGE % stride == first
    want = np.concatenate([[0], np.cumsum(is_here)])
    got = keys_before(jnp.arange(12 * PAGE + 1), page=PAGE, page_stride=stride, first_page=first)
    np.testing.assert_array_equal(got, want)


SHIPPED = (
    (32, 8, 128, 64),
    (64, 8, 64, 16),
    (64, 1, 128, 128),
    (32, 32, 80, 64),
    (32, 8, 96, 16),
    (32, 8, 112, 128),
)
"""Query heads, KV heads, features and page; swizzles of float8 span 32 features at least."""


@pytest.mark.parametrize(
    "heads, kv_heads, d, page, dtype",
    [
        *((*shape, jnp.bfloat16) for shape in SHIPPED),
        *((*shape, FLOAT8) for shape in SHIPPED if shape[2] % 32 == 0),
    ],
)
def test_every_shipped_configuration_lowers_for_cuda(heads, kv_heads, d, page, dtype):
    stored = jnp.dtype(dtype).itemsize
    config = decode_config(heads=heads, kv_heads=kv_heads, d=d, dv=d, num_sms=132, stored=stored)
    options: dict[str, Any] = {}
    if page == 16:
        options = dict(lows=jnp.zeros(4, jnp.int32))
    elif page == 128:
        options = dict(window=77, chunk=300, soft_cap=3.0, sinks=jnp.zeros(heads))
    run = functools.partial(decode_sm90.paged_decode, scale=d**-0.5, config=config, **options)
    pages = jax.ShapeDtypeStruct((2, 100, page, kv_heads, d), dtype)
    arguments = (
        jax.ShapeDtypeStruct((4, heads, d), jnp.bfloat16),
        pages,
        pages,
        jax.ShapeDtypeStruct((), jnp.int32),
        jax.ShapeDtypeStruct((4, 10), jnp.int32),
        jax.ShapeDtypeStruct((4,), jnp.int32),
    )
    assert_lowers_for_cuda(run, *arguments)


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(d=72), "head dimensions 72 and 64; it takes multiples of 16 up to 256"),
        (dict(heads=130, kv_heads=1), "130 query heads a KV head; it takes up to 64"),
        (dict(page=24), "pages of 24; it takes powers of 2 from 16 on"),
        (dict(d=80, dtype=FLOAT8), "head dimensions 80 and 64; it takes multiples of 32 up to 256"),
        (dict(dtype=jnp.float8_e5m2), "queries of bfloat16 and pages of float8_e5m2"),
    ],
)
def test_decode_kernel_says_what_it_does_not_cover(sizes, message):
    with pytest.raises(NotImplementedError, match=message):
        decode(decode_case([3], **sizes))


def test_a_machine_without_a_hopper_gpu_runs_the_reference():
    q, k_pages, v_pages, layer, table, lengths = decode_case([20, 3])
    table = jnp.where(table == NO_PAGE, 0, table)
    arguments = q, k_pages, v_pages, layer, table, jnp.arange(3), lengths
    run = functools.partial(pallas_kernels.paged_attention, scale=0.125, max_query_length=1)
    want = reference.paged_attention(*arguments, scale=0.125, max_query_length=1)
    np.testing.assert_array_equal(run(*arguments)[0], want[0])
    with pytest.raises(NotImplementedError, match="needs a Hopper GPU"):
        run(*arguments, implementation="decode_sm90")
    with pytest.raises(ValueError, match="use None or one of decode_sm90, mla_decode_sm90"):
        run(*arguments, implementation="flash")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "d, dv, page",
    [
        (64, 64, 16),
        (80, 80, 64),
        (96, 96, 128),
        (112, 112, 16),
        (128, 128, 16),
        (128, 128, 32),
        (128, 128, 64),
        (128, 128, 128),
        (192, 128, 64),
        (256, 256, 64),
    ],
)
def test_decode_kernel_agrees_with_float32_on_the_gpu(d, dv, page):
    lengths = [page * 31, 0, 1, page - 1, page, page + 1]
    case = decode_case(lengths, heads=32, kv_heads=8, d=d, dv=dv, page=page)
    arguments = *case[:5], jnp.arange(len(lengths) + 1), case[5]
    run = functools.partial(pallas_kernels.paged_attention, implementation="decode_sm90")
    got = jax.jit(functools.partial(run, scale=0.125, max_query_length=1))(*arguments)
    assert_equal_attention(got, expected(case))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "heads, d, dv, page",
    [(32, 128, 128, 16), (32, 128, 128, 64), (64, 64, 64, 64), (8, 96, 96, 32), (8, 192, 128, 16)],
)
def test_decode_kernel_reads_pages_of_float8_on_the_gpu(heads, d, dv, page):
    lengths = [page * 31, 0, 1, page - 1, page, page + 1]
    case = decode_case(lengths, heads=heads, kv_heads=8, d=d, dv=dv, page=page, dtype=FLOAT8)
    arguments = *case[:5], jnp.arange(len(lengths) + 1), case[5]
    scales: Any = dict(k_scale=jnp.float32(0.5), v_scale=jnp.float32(0.75))
    run = functools.partial(pallas_kernels.paged_attention, implementation="decode_sm90")
    got = jax.jit(functools.partial(run, scale=0.125, max_query_length=1))(*arguments, **scales)
    assert_equal_attention(got, expected(case, **scales))


@pytest.mark.gpu
def test_decode_kernel_reads_the_end_of_a_pool_of_more_than_two_to_the_31_elements():
    lengths, page = [700, 0, 64, 65], 64
    case = decode_case(lengths, heads=32, kv_heads=8, d=128, dv=128, page=page)
    q, k_pages, v_pages, layer, table, _ = case
    few = k_pages.shape[1]
    many = 2**31 // k_pages[0, 0].size // 2 + few
    is_page = table < few
    last = jnp.where(is_page, table + many - few, table)

    @jax.jit
    def enlarge(pages):
        whole = jnp.full((2, many, *pages.shape[2:]), jnp.nan, pages.dtype)
        return whole.at[:, many - few :].set(pages)

    assert enlarge.eval_shape(k_pages).size > 2**31
    run = functools.partial(pallas_kernels.paged_attention, implementation="decode_sm90")
    got = jax.jit(functools.partial(run, scale=0.125, max_query_length=1))(
        q, enlarge(k_pages), enlarge(v_pages), layer, last, jnp.arange(len(lengths) + 1), case[5]
    )
    assert_equal_attention(got, expected(case))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "rows, dtype", [(33, jnp.bfloat16), (300, jnp.bfloat16), (300, FLOAT8), (600, jnp.bfloat16)]
)
def test_decode_kernel_finds_its_share_of_many_rows_on_the_gpu(rows, dtype):
    lengths = np.random.default_rng(rows).integers(0, 300, rows).tolist()
    case = decode_case(lengths, heads=16, kv_heads=2, page=32, dtype=dtype)
    arguments = *case[:5], jnp.arange(rows + 1), case[5]
    run = functools.partial(pallas_kernels.paged_attention, implementation="decode_sm90")
    limited = dict(window=jnp.int32(70), chunk=jnp.int32(128), soft_cap=3.0)
    for options in ({}, limited, dict(window=jnp.int32(40))):
        kernel = functools.partial(run, scale=0.125, max_query_length=1, **options)
        assert_equal_attention(jax.jit(kernel)(*arguments), expected(case, **options))
