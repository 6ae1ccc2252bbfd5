import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernel_checks import assert_lowers_for_cuda

from pallas_kernels.grouped_gemm import quantize_sm90
from pallas_kernels.grouped_gemm.quantize import quantize_rows_by_xla


def random_rows(rows: int, k: int):
    x = np.random.default_rng(rows).normal(size=(rows, k)) * np.logspace(-3, 3, rows)[:, None]
    x[3, :128] = 0
    return jnp.asarray(x, jnp.bfloat16)


def assert_as_xla(out, x):
    """Scales to a rounding, values to a step: the kernel multiplies where XLA divides."""
    want = quantize_rows_by_xla(x)
    np.testing.assert_allclose(out.scales, want.scales, rtol=1e-6)
    mine, theirs = (np.asarray(each.values, np.float32) for each in (out, want))
    assert (mine != theirs).mean() < 1e-3
    np.testing.assert_allclose(mine, theirs, rtol=2**-3, atol=2**-9)


def test_hopper_kernel_quantises_as_xla_and_has_no_race():
    x = random_rows(64, 256)
    params = plgpu.InterpretGPUParams(detect_races=True)
    assert_as_xla(quantize_sm90.quantize_rows(x, interpret=params), x)
    assert not gpu_callbacks.get_races().races_found


def test_hopper_kernel_lowers_for_cuda():
    x = jax.ShapeDtypeStruct((2048, 7168), jnp.bfloat16)
    assert_lowers_for_cuda(quantize_sm90.quantize_rows, x)


@pytest.mark.parametrize(
    "dtype, rows, message",
    [
        (jnp.float32, 64, "needs bfloat16, got float32"),
        (jnp.bfloat16, 60, "needs a multiple of 32 rows of a multiple of 128"),
    ],
)
def test_hopper_kernel_says_what_it_does_not_cover(dtype, rows, message):
    with pytest.raises(NotImplementedError, match=message):
        quantize_sm90.check_covered(jnp.ones((rows, 128), dtype))


@pytest.mark.gpu
def test_on_a_gpu_the_kernel_quantises_as_xla():
    x = random_rows(1024, 7168)
    assert_as_xla(quantize_sm90.quantize_rows(x), x)
