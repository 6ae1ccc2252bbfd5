from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernel_checks import LAYER, PAGE, assert_lowers_for_cuda

from pallas_kernels import reference
from pallas_kernels.paged_attention import store_sm90

FLOAT8 = jnp.float8_e4m3fn


def store_case(tokens: int, *, kv_heads=2, d=64, dtype: Any = jnp.bfloat16, seed=0) -> Any:
    """Two pools, rows for them, and slots of which some are nowhere."""
    rng = np.random.default_rng(seed)
    pages = tokens // PAGE + 2
    pools = [jnp.asarray(rng.normal(size=(2, pages, PAGE, kv_heads, d)), dtype) for _ in range(2)]
    rows = [jnp.asarray(rng.normal(size=(tokens, kv_heads, d)), jnp.bfloat16) for _ in range(2)]
    slots = rng.permutation(pages * PAGE)[:tokens]
    slots[::3] = -1
    return pools, LAYER, rows, jnp.asarray(slots, jnp.int32)


def assert_stored(got, case) -> None:
    pools, layer, rows, slots = case
    for pool, row, stored in zip(pools, rows, got, strict=True):
        want = reference.store_rows(pool, layer, row, slots)
        np.testing.assert_array_equal(stored.astype(jnp.float32), want.astype(jnp.float32))


@pytest.mark.parametrize("tokens, num_sms", [(1, 4), (5, 2), (37, 2)])
def test_rows_are_stored_where_their_slots_are(tokens, num_sms):
    case = store_case(tokens)
    params = plgpu.InterpretGPUParams(detect_races=True, out_of_bounds_reads="uninitialized")
    assert_stored(store_sm90.store_rows(*case, num_sms=num_sms, interpret=params), case)
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize("tokens, dtype", [(1, jnp.bfloat16), (300, FLOAT8)])
def test_storing_lowers_for_cuda(tokens, dtype):
    pools, layer, rows, slots = store_case(tokens, kv_heads=8, d=128, dtype=dtype)

    def run(pools, rows, slots):
        return store_sm90.store_rows(pools, layer, rows, slots, num_sms=132)

    assert_lowers_for_cuda(run, pools, rows, slots)


def test_rows_that_do_not_fit_a_copy_are_refused():
    message = "rows of 2 x 4 in bfloat16; it takes multiples of 128 bytes"
    with pytest.raises(NotImplementedError, match=message):
        store_sm90.store_rows(*store_case(3, d=4), num_sms=1)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "tokens, dtype", [(1, jnp.bfloat16), (64, jnp.bfloat16), (5000, jnp.bfloat16), (1000, FLOAT8)]
)
def test_rows_are_stored_in_place_on_the_gpu(tokens, dtype):
    case = store_case(tokens, kv_heads=8, d=128, dtype=dtype)
    pools, layer, rows, slots = case

    def run(pools, rows, slots):
        return store_sm90.store_rows(pools, layer, rows, slots, num_sms=132)

    copies = [pool.copy() for pool in pools]
    places = {pool.unsafe_buffer_pointer() for pool in copies}
    got = jax.jit(run, donate_argnums=0)(copies, rows, slots)
    assert {pool.unsafe_buffer_pointer() for pool in got} == places
    assert_stored(got, case)
