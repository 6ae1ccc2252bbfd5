import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernel_checks import assert_lowers_for_cuda, group_rows, scatter

import pallas_kernels
from pallas_kernels import QuantizedMatrices, QuantizedRows, quantize_matrices, quantize_rows
from pallas_kernels.activation import ACTIVATIONS
from pallas_kernels.grouped_gemm import configs, quantized_sm90
from pallas_kernels.grouped_gemm.tiles import TileConfig
from pallas_kernels.groups import room_for

TINY_TILES = {
    "narrow": TileConfig(row_tiles=(8, 16, 24), stages=2, store_rows=16),
    "wide": TileConfig(row_tiles=(16, 32), warpgroups=1, width=128, stages=3, store_rows=8),
    "upright": TileConfig(row_tiles=(128,), width=192, stages=2, upright=True),
}
SHIPPED = [
    pytest.param(name, activation, id=f"{name}, {activation}")
    for name, config in configs.QUANTIZED.items()
    for activation in (None, "clamped_swiglu")
    if activation is None or config.width == 128
]
SIZES = {
    "empty groups and single rows": [3, 0, 13, 24, 1, 30],
    "nothing but empty groups": [0, 0, 0],
    "one group over several tiles": [0, 61, 0],
    "a group that leaves a warpgroup without rows": [130, 5],
}


aligned = pytest.mark.parametrize("alignment", [1, 8])
rows_lie = pytest.mark.parametrize(
    "alignment, scattered",
    [(1, False), (8, False), (8, True)],
    ids=["side by side", "aligned", "scattered"],
)


def operands(seed: int, sizes: list[int], *, k: int = 256, n: int = 256, alignment: int = 1):
    """Scales differ by up to a factor of 1000 between blocks, so that a wrong one shows."""
    rng = np.random.default_rng(seed)
    groups = len(sizes)
    # Five rows belong to no group.
    rows = room_for(sum(sizes) + 5, groups, alignment)
    row_magnitude = np.repeat(10 ** rng.uniform(-2, 1, size=(rows, k // 128)), 128, axis=1)
    lhs = rng.normal(size=(rows, k)) * row_magnitude
    if alignment > 1:
        lhs[~np.isin(np.arange(rows), np.concatenate(group_rows(sizes, alignment)))] = np.nan
    magnitude = 10 ** rng.uniform(-2, 1, size=(2, groups, k // 128, n // 128))
    magnitude = np.repeat(np.repeat(magnitude, 128, axis=2), 128, axis=3)
    rhs = rng.normal(size=(2, groups, k, n)) * magnitude
    quantized = quantize_rows(jnp.asarray(lhs)), quantize_matrices(jnp.asarray(rhs))
    return *quantized, jnp.asarray(sizes, jnp.int32)


def dequantize(lhs: QuantizedRows, rhs: QuantizedMatrices) -> tuple[np.ndarray, np.ndarray]:
    """Both in float64, matrices as [layers, groups, k, n]."""
    rows = np.asarray(lhs.values, np.float64)
    rows *= np.repeat(np.asarray(lhs.scales).T, 128, axis=1)
    matrices = np.asarray(rhs.values, np.float64)
    matrices *= np.repeat(np.repeat(np.asarray(rhs.scales), 128, axis=2), 128, axis=3)
    return rows, matrices.swapaxes(2, 3)


def exact(lhs, rhs, sizes, layer, bias=None, activation=None, first_group=0, alignment=1):
    """The products group by group in float64, NaN for rows of absent groups and of none."""
    rows, matrices = dequantize(lhs, rhs)
    out = np.full((len(rows), matrices.shape[3]), np.nan)
    all_rows = group_rows(sizes, alignment)
    for index, matrix in enumerate(matrices[layer]):
        mine = all_rows[first_group + index]
        out[mine] = rows[mine] @ matrix
        if bias is not None:
            out[mine] += np.asarray(bias, np.float64)[layer, index]
    if activation is None:
        return out
    return np.asarray(ACTIVATIONS[activation](*jnp.split(jnp.asarray(out), 2, axis=1)), np.float64)


def scatter_quantized(lhs: QuantizedRows) -> tuple[QuantizedRows, jax.Array, QuantizedRows]:
    (values, scales), index, (found, found_scales) = scatter(lhs.values, lhs.scales.T)
    return QuantizedRows(values, scales.T), index, QuantizedRows(found, found_scales.T)


def random_bias(seed: int, rhs: QuantizedMatrices):
    shape = rhs.values.shape[:3]
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)


def assert_close(out, want, tolerance=2**-7):
    """Row by row: the rows differ in magnitude."""
    mine = ~np.isnan(want[:, 0])
    if not mine.any():
        # Memory starts as NaN or, for the reference, as zeros.
        out = np.asarray(out, np.float64)
        assert (np.isnan(out) | (out == 0)).all()
    difference = np.linalg.norm(np.asarray(out)[mine].astype(np.float64) - want[mine], axis=1)
    assert (difference <= tolerance * np.linalg.norm(want[mine], axis=1)).all()


def interpret(*args, **kwargs):
    params = plgpu.InterpretGPUParams(detect_races=True)
    return quantized_sm90.grouped_gemm(*args, **kwargs, num_sms=2, interpret=params)


def test_quantised_rows_are_within_half_a_step_of_the_rows():
    x = np.random.default_rng(0).normal(size=(7, 384)) * np.logspace(-3, 3, 7)[:, None]
    x[3, 128:256] = 0
    out = quantize_rows(jnp.asarray(x, jnp.float32))
    assert out.values.dtype == jnp.float8_e4m3fn and out.scales.shape == (3, 7)
    scales = np.repeat(np.asarray(out.scales).T, 128, axis=1)
    # e4m3 has three bits after the point, and steps of 2^-9 next to zero.
    allowed = np.maximum(2**-4 * np.abs(x), 2**-10 * scales) * 1.01
    assert (np.abs(np.asarray(out.values, np.float64) * scales - x) <= allowed).all()


def test_quantised_matrices_are_transposed_with_a_scale_for_each_square():
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(1, 2, 128, 256)) * np.repeat([1.0, 100.0], 128)
    out = quantize_matrices(jnp.asarray(weights, jnp.float32))
    assert out.values.shape == (1, 2, 256, 128) and out.scales.shape == (1, 2, 2, 1)
    _, back = dequantize(quantize_rows(jnp.ones((1, 128))), out)
    largest = np.abs(weights).reshape(1, 2, 128, 2, 128).max(axis=(2, 4))
    np.testing.assert_allclose(out.scales[..., 0], largest / 448, rtol=1e-6)
    np.testing.assert_allclose(back, weights, rtol=2**-4, atol=largest.max() * 2**-18)


def test_a_size_that_does_not_divide_into_blocks_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="k=200 does not divide .* nearest size that does is 256"):
        quantize_rows(jnp.ones((1, 200)))


@aligned
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_reference_multiplies_scaled_operands(activation, alignment):
    sizes = [3, 0, 70]
    lhs, rhs, group_sizes = operands(2, sizes, alignment=alignment)
    bias = random_bias(3, rhs)
    out = pallas_kernels.grouped_gemm(
        lhs, rhs, group_sizes, 1, bias=bias, activation=activation, row_alignment=alignment
    )
    assert out.dtype == jnp.bfloat16
    assert_close(out, exact(lhs, rhs, sizes, 1, bias, activation, alignment=alignment))


@aligned
@pytest.mark.parametrize("tiles", TINY_TILES.values(), ids=TINY_TILES.keys())
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_hopper_kernel_agrees_with_float64_and_has_no_race(sizes, tiles, alignment):
    lhs, rhs, group_sizes = operands(4, sizes, alignment=alignment)
    out = interpret(lhs, rhs, group_sizes, 1, config=tiles, row_alignment=alignment)
    assert_close(out, exact(lhs, rhs, sizes, 1, alignment=alignment))
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize("tiles", TINY_TILES)
@pytest.mark.parametrize(
    "sizes", ["empty groups and single rows", "a group that leaves a warpgroup without rows"]
)
def test_hopper_kernel_fetches_scattered_rows_and_has_no_race(sizes, tiles):
    sizes = SIZES[sizes]
    lhs, rhs, group_sizes = operands(12, sizes, alignment=8)
    source, index, lhs = scatter_quantized(lhs)
    options: dict[str, Any] = {"config": TINY_TILES[tiles], "row_alignment": 8}
    out = interpret(source, rhs, group_sizes, 1, row_index=index, **options)
    assert_close(out, exact(lhs, rhs, sizes, 1, alignment=8))
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize("upright", [False, True], ids=["across", "upright"])
def test_hopper_kernel_adds_the_bias_and_fuses_the_activation(upright):
    sizes = [3, 0, 13, 1]
    lhs, rhs, group_sizes = operands(5, sizes)
    bias = random_bias(6, rhs)
    options = {"bias": bias, "activation": "silu"}
    tiles = TINY_TILES["wide"]
    if upright:
        tiles = TileConfig(row_tiles=(128,), width=128, stages=2, upright=True)
    out = interpret(lhs, rhs, group_sizes, 1, config=tiles, **options)
    assert_close(out, exact(lhs, rhs, sizes, 1, **options))
    assert not gpu_callbacks.get_races().races_found


def test_hopper_kernel_takes_local_groups_of_a_larger_set():
    lhs, rhs, _ = operands(7, [30, 9])
    sizes = [2, 30, 9, 1]
    group_sizes = jnp.asarray(sizes, jnp.int32)
    out = interpret(lhs, rhs, group_sizes, 0, first_group=1, config=TINY_TILES["narrow"])
    assert_close(out, exact(lhs, rhs, sizes, 0, first_group=1))
    # Interpreted memory starts as NaN: other groups' rows were not touched.
    assert np.isnan(np.asarray(out)[:2]).all() and np.isnan(np.asarray(out)[41:]).all()


@rows_lie
@pytest.mark.parametrize("name, activation", SHIPPED)
def test_every_shipped_configuration_lowers_for_cuda(name, activation, alignment, scattered):
    run = functools.partial(
        quantized_sm90.grouped_gemm, activation=activation, row_alignment=alignment,
        config=configs.QUANTIZED[name], num_sms=132,
    )  # fmt: skip
    shape: Any = jax.ShapeDtypeStruct
    arguments = (
        QuantizedRows(shape((1024, 2048), jnp.float8_e4m3fn), shape((16, 1024), jnp.float32)),
        QuantizedMatrices(
            shape((2, 128, 1536, 2048), jnp.float8_e4m3fn), shape((2, 128, 12, 16), jnp.float32)
        ),
        shape((128,), jnp.int32),
        shape((), jnp.int32),
    )
    options = {"bias": shape((2, 128, 1536), jnp.bfloat16)}
    if scattered:
        options["row_index"] = shape((4096,), jnp.int32)
    assert_lowers_for_cuda(run, *arguments, **options)


def test_without_a_gpu_scattered_rows_are_gathered_first():
    sizes = [3, 0, 5]
    lhs, rhs, group_sizes = operands(13, sizes)
    source, index, lhs = scatter_quantized(lhs)
    out = pallas_kernels.grouped_gemm(source, rhs, group_sizes, 1, row_index=index)
    assert_close(out, exact(lhs, rhs, sizes, 1))


@pytest.mark.parametrize("rows", [1, 128, 300, 1000, 16384])
@pytest.mark.parametrize("n, gated", [(1536, False), (384, False), (1536, True)])
def test_a_configuration_is_found_that_the_kernel_covers(rows, n, gated):
    config = configs.quantized_config_for(
        rows=rows, groups=8, k=2048, n=n, num_sms=132, gated=gated
    )
    values: Any = jax.ShapeDtypeStruct((1, 8, n, 2048), jnp.float8_e4m3fn)
    activation = "silu" if gated else None
    quantized_sm90.check_covered(QuantizedMatrices(values, scales=values), config, activation)


@pytest.mark.parametrize(
    "k, n, activation, message",
    [
        (192, 256, None, "needs k to be a multiple of 128, got 192"),
        (256, 128, None, "needs n to be a multiple of 256, got 128"),
        (256, 384, "silu", "needs n to be a multiple of 256, got 384"),
    ],
)
def test_hopper_kernel_says_what_it_does_not_cover(k, n, activation, message):
    values: Any = jax.ShapeDtypeStruct((1, 1, n, k), jnp.float8_e4m3fn)
    with pytest.raises(NotImplementedError, match=message):
        quantized_sm90.check_covered(
            QuantizedMatrices(values, scales=values), configs.QUANTIZED_WIDE, activation
        )


def test_operands_of_two_kinds_are_refused_with_what_to_do():
    lhs, rhs, group_sizes = operands(8, [3])
    with pytest.raises(ValueError, match="multiplied with QuantizedRows, which quantize_rows"):
        pallas_kernels.grouped_gemm(jnp.ones((8, 256)), rhs, group_sizes, 0)
    with pytest.raises(ValueError, match="got QuantizedRows and"):
        pallas_kernels.grouped_gemm(lhs, jnp.ones((1, 1, 256, 256)), group_sizes, 0)


@pytest.mark.gpu
@rows_lie
@pytest.mark.parametrize("name, activation", SHIPPED)
def test_on_a_gpu_every_shipped_configuration_agrees_with_float64(
    name, activation, alignment, scattered
):
    sizes = np.random.default_rng(9).multinomial(700, np.ones(16) / 16).tolist()
    sizes[3:6] = 0, 1, 300
    lhs, rhs, group_sizes = operands(10, sizes, k=512, n=512, alignment=alignment)
    bias = random_bias(11, rhs)
    source, index = lhs, None
    if scattered:
        source, index, lhs = scatter_quantized(lhs)
    out = quantized_sm90.grouped_gemm(
        source, rhs, group_sizes, 1, row_index=index, bias=bias, activation=activation,
        row_alignment=alignment,
        # So few blocks that each has more steps than stages.
        config=configs.QUANTIZED[name], num_sms=3,
    )  # fmt: skip
    assert_close(out, exact(lhs, rhs, sizes, 1, bias, activation, alignment=alignment))
