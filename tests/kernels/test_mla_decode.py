import functools
from typing import Any

import jax
import jax.numpy as jnp
import kernel_checks
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernel_checks import (
    LAYER,
    PAGE,
    assert_lowers_for_cuda,
    deal_pages,
    fill_pages,
    float32_attention,
)

import pallas_kernels
from pallas_kernels.paged_attention.configs import mla_config
from pallas_kernels.paged_attention.mla_decode_sm90 import mla_decode
from pallas_kernels.paged_attention.mla_shape import MlaConfig
from pallas_kernels.paged_attention.single_rows import split_rows

assert_equal_attention = functools.partial(kernel_checks.assert_equal_attention, lse_atol=1e-4)

# Queries past the last head are computed on whatever is there, and dropped.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def mla_case(lengths: list[int], *, heads=8, value_dim=256, page=PAGE, seed=0) -> Any:
    """Random queries over shuffled pages; whatever a row does not own is NaN, or no page at all."""
    rng = np.random.default_rng(seed)
    table, owned = deal_pages(rng, lengths, page)
    pages = fill_pages(rng, owned, 1, value_dim + 64)
    q = jnp.asarray(rng.normal(size=(len(lengths), heads, value_dim + 64)), jnp.bfloat16)
    return q, pages, LAYER, jnp.asarray(table), jnp.asarray(lengths, jnp.int32)


def decode(case: Any, *, blocks=1, races=True, value_dim=256) -> Any:
    """The kernel under the interpreter, which runs blocks in turn and knows no signals."""
    config = MlaConfig(blocks=blocks, min_tiles=1, in_registers=False, synchronize=False)
    params = plgpu.InterpretGPUParams(detect_races=races, out_of_bounds_reads="uninitialized")
    return mla_decode(*case, scale=0.125, value_dim=value_dim, config=config, interpret=params)


def expected(case: Any, *, value_dim=256) -> Any:
    q, pages, layer, table, lengths = case
    return float32_attention(
        q, pages, None, layer, table, jnp.arange(len(lengths) + 1), lengths,
        max_query_length=1, value_dim=value_dim,
    )  # fmt: skip


def test_latent_kernel_agrees_with_float32_and_has_no_race():
    case = mla_case([150, 0, 1, 15, 16, 17, 64])
    assert_equal_attention(decode(case), expected(case))
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize("page", [64, 128])
def test_latent_kernel_reads_pages_of_every_size(page):
    case = mla_case([page - 1, page, page + 1], page=page)
    assert_equal_attention(decode(case), expected(case))


@pytest.mark.parametrize("heads", [4, 64, 68])
def test_latent_kernel_takes_every_number_of_heads(heads):
    case = mla_case([40, 70], heads=heads)
    blocks = -(-heads // 64)
    assert_equal_attention(decode(case, blocks=blocks), expected(case))


@pytest.mark.parametrize("blocks", [3, 7])
def test_rows_that_several_blocks_share_are_merged(blocks):
    # Without signals between blocks, the detector would rightly report their sums as a race.
    case = mla_case([450, 0, 10, 230])
    assert_equal_attention(decode(case, blocks=blocks, races=False), expected(case))


PREFILL = ([50, 17, 0, 3, 40, 0], [20, 17, 0, 1, 2, 3])
"""Lengths of rows and, of these, queries: a cached prefix, a new prompt, nothing, a decode, two,
and queries without positions."""


def prefill_case(lengths: list[int], queries: list[int], **sizes: Any) -> Any:
    """Random queries of many rows, and two outside every row."""
    _, pages, layer, table, counts = mla_case(lengths, **sizes)
    start = jnp.asarray(np.cumsum([0, *queries]), jnp.int32)
    (q, *_) = mla_case([1] * (sum(queries) + 2), **sizes)
    return q, pages, None, layer, table, start, counts


def test_rows_of_many_queries_run_as_rows_of_one():
    q, pages, _, layer, table, start, counts = prefill_case(*PREFILL)
    alone, visible = split_rows(table, start, counts, tokens=len(q))
    got = decode((q, pages, layer, alone, visible), blocks=2, races=False)
    want = float32_attention(
        q, pages, None, layer, table, start, counts, max_query_length=20, value_dim=256
    )
    assert_equal_attention(got, want)


@pytest.mark.parametrize("heads, page", [(128, 64), (16, 16), (96, 128)])
def test_every_shipped_configuration_lowers_for_cuda(heads, page):
    config = mla_config(num_sms=132)
    run = functools.partial(mla_decode, scale=0.1, value_dim=512, config=config)
    arguments = (
        jax.ShapeDtypeStruct((4, heads, 576), jnp.bfloat16),
        jax.ShapeDtypeStruct((2, 100, page, 1, 576), jnp.bfloat16),
        jax.ShapeDtypeStruct((), jnp.int32),
        jax.ShapeDtypeStruct((4, 10), jnp.int32),
        jax.ShapeDtypeStruct((4,), jnp.int32),
    )
    assert_lowers_for_cuda(run, *arguments)


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(value_dim=192), "keys of 256 features and values of 192 of them"),
        (dict(heads=65), "65 query heads; it takes up to 64 a block of 1"),
        (dict(page=24), "pages of 24; it takes powers of 2 from 16 on"),
    ],
)
def test_latent_kernel_says_what_it_does_not_cover(sizes, message):
    with pytest.raises(NotImplementedError, match=message):
        decode(mla_case([3], **sizes), value_dim=sizes.get("value_dim", 256))


@pytest.mark.gpu
@pytest.mark.parametrize("heads, page", [(128, 64), (16, 16), (96, 128)])
def test_latent_kernel_agrees_with_float32_on_the_gpu(heads, page):
    lengths = [page * 31, 0, 1, page - 1, page, page + 1, 3000]
    case = mla_case(lengths, heads=heads, value_dim=512, page=page)
    q, pages, layer, table, counts = case
    run = functools.partial(pallas_kernels.paged_attention, implementation="mla_decode_sm90")
    run = functools.partial(run, scale=0.125, max_query_length=1, value_dim=512)
    starts = jnp.arange(len(lengths) + 1)
    got = jax.jit(run)(q, pages, None, layer, table, starts, counts)
    assert_equal_attention(got, expected(case, value_dim=512))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 128])
def test_rows_of_two_several_and_many_parts_agree_with_float32_on_the_gpu(heads):
    lengths = [3200, *[1280 - 7 * i for i in range(20)], *[400 - i for i in range(20)]]
    case = mla_case(lengths, heads=heads, value_dim=512, page=64)
    run = functools.partial(mla_decode, scale=0.125, value_dim=512, config=mla_config(num_sms=132))
    assert_equal_attention(jax.jit(run)(*case), expected(case, value_dim=512))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 128])
def test_latent_prefill_agrees_with_float32_on_the_gpu(heads):
    case = prefill_case([700, 300, 0, 65, 129], [400, 300, 0, 1, 64], heads=heads, value_dim=512)
    run = functools.partial(pallas_kernels.paged_attention, implementation="mla_prefill_sm90")
    run = functools.partial(run, scale=0.125, max_query_length=400, value_dim=512)
    want = float32_attention(*case, max_query_length=400, value_dim=512)
    assert_equal_attention(jax.jit(run)(*case), want)
