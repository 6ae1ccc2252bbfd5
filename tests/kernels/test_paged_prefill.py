import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

import pallas_kernels
from pallas_kernels import reference
from pallas_kernels.paged_attention import prefill_sm90
from pallas_kernels.paged_attention.configs import prefill_config
from pallas_kernels.paged_attention.prefill_plan import Tile, plan_tiles
from pallas_kernels.paged_attention.prefill_shape import PrefillConfig

PAGE, LAYER = 16, 1
NO_PAGE = 2**30
SMALL = PrefillConfig(blocks=1, kv_block=64, stages=2, in_registers=False)

# Scores of keys past a row's end are NaN before they are hidden.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")


def prefill_case(
    rows: list[tuple[int, int]], *, spare=0, heads=2, kv_heads=1, d=64, dv=64, page=PAGE, seed=0
):
    """Rows of (cached positions, queries after them) over shuffled pages, and spare tokens.

    Whatever a row does not own is NaN, or no page at all.
    """
    rng = np.random.default_rng(seed)
    queries = np.array([count for _, count in rows])
    lengths = np.array([cached + count for cached, count in rows])
    width = max(1, -(-max(lengths) // page))
    pool = len(rows) * width + 2
    table = rng.permutation(pool)[: len(rows) * width].reshape(len(rows), width).astype(np.int32)
    owned = np.zeros((pool, page), bool)
    for row, length in enumerate(lengths):
        used = -(-length // page)
        for column in range(used):
            owned[table[row, column]] = np.arange(page) < length - column * page
        table[row, used:] = NO_PAGE

    def pages(features: int) -> jax.Array:
        values = rng.normal(size=(2, pool, page, kv_heads, features))
        return jnp.asarray(np.where(owned[None, :, :, None, None], values, np.nan), jnp.bfloat16)

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
    """The reference in float32; it takes a table of real pages, and masks what is not owned."""
    q, k_pages, v_pages, layer, table, start, lengths = case
    return reference.paged_attention(
        q.astype(jnp.float32),
        k_pages.astype(jnp.float32),
        v_pages.astype(jnp.float32),
        layer,
        jnp.where(table == NO_PAGE, 0, table),
        start,
        lengths,
        scale=0.125,
        max_query_length=max(2, int(jnp.max(start[1:] - start[:-1]))),
        **options,
    )


def assert_equal_attention(got, want):
    out, lse = (np.asarray(array, np.float32) for array in got)
    np.testing.assert_allclose(out, want[0], atol=2**-6)
    np.testing.assert_allclose(lse, want[1], atol=1e-5)


def test_prefill_kernel_agrees_with_float32_and_has_no_race():
    case = prefill_case([(70, 13), (0, 1), (0, 70), (15, 1)], spare=7)
    assert_equal_attention(prefill(case), expected(case))
    assert not gpu_callbacks.get_races().races_found
