import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernel_checks import assert_lowers_for_cuda

import pallas_kernels
from pallas_kernels.grouped_gemm import gather_sm90


def operands(*, tokens: int, rows: int, embed: int):
    rng = np.random.default_rng(rows)
    x = jnp.asarray(rng.normal(size=(tokens, embed)), jnp.bfloat16)
    return x, jnp.asarray(rng.integers(0, tokens, rows), jnp.int32)


@pytest.mark.parametrize("rows", [4, 48])
def test_hopper_kernel_gathers_rows_and_has_no_race(rows):
    x, index = operands(tokens=5, rows=rows, embed=4096)
    params = plgpu.InterpretGPUParams(detect_races=True)
    out = gather_sm90.gather_rows(x, index, num_sms=2, interpret=params)
    np.testing.assert_array_equal(out, x[index])
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize("embed", [2048, 2880, 4096, 7168])
def test_hopper_kernel_lowers_for_cuda(embed):
    run = functools.partial(gather_sm90.gather_rows, num_sms=132)
    shapes = (
        jax.ShapeDtypeStruct((256, embed), jnp.bfloat16),
        jax.ShapeDtypeStruct((2048,), jnp.int32),
    )
    assert_lowers_for_cuda(run, *shapes)


@pytest.mark.parametrize(
    "dtype, rows, embed, message",
    [
        (jnp.float32, 8, 64, "needs elements of two bytes, got float32"),
        (jnp.bfloat16, 8, 96, "needs rows of a multiple of 64 elements, at most 16384, got 96"),
        (jnp.bfloat16, 9, 2048, "needs a multiple of 8 rows, got 9"),
    ],
)
def test_hopper_kernel_says_what_it_does_not_cover(dtype, rows, embed, message):
    x, index = operands(tokens=2, rows=rows, embed=embed)
    with pytest.raises(NotImplementedError, match=message):
        gather_sm90.check_covered(x.astype(dtype), index)


def test_without_a_gpu_xla_gathers():
    x, index = operands(tokens=5, rows=4096, embed=64)
    np.testing.assert_array_equal(pallas_kernels.gather_rows(x, index), x[index])


@pytest.mark.gpu
@pytest.mark.parametrize("embed", [2048, 2880, 4096, 7168])
def test_on_a_gpu_the_kernel_gathers_rows(embed):
    x, index = operands(tokens=1000, rows=8192, embed=embed)
    out = gather_sm90.gather_rows(x, index, num_sms=jax.devices()[0].core_count)
    np.testing.assert_array_equal(out, x[index])
