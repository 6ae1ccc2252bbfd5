import functools
import inspect
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend import backend
from kernel_checks import assert_lowers_for_cuda, group_rows, scatter

import pallas_kernels
from pallas_kernels import reference
from pallas_kernels.activation import ACTIVATIONS
from pallas_kernels.grouped_gemm import configs, mosaic_sm90
from pallas_kernels.grouped_gemm.tiles import TileConfig
from pallas_kernels.groups import room_for

TINY_TILES = {
    "narrow": TileConfig(row_tiles=(8, 16, 24), stages=2, store_rows=16),
    "wide": TileConfig(row_tiles=(16, 32), warpgroups=1, width=128, stages=3, store_rows=8),
}
SHIPPED = [
    pytest.param(name, activation, id=f"{name}, {activation}")
    for name, config in configs.NAMED.items()
    for activation in (None, "clamped_swiglu")
    if activation is None or config.width % 128 == 0
]
SIZES = {
    "empty groups and single rows": [3, 0, 13, 24, 1, 30],
    "nothing but empty groups": [0, 0, 0],
    "one group over several tiles": [0, 61, 0],
    "aligned groups": [8, 16, 8],
    "more groups than are counted at once": [0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 20],
}

aligned = pytest.mark.parametrize("alignment", [1, 8])
rows_lie = pytest.mark.parametrize(
    "alignment, scattered",
    [(1, False), (8, False), (8, True)],
    ids=["side by side", "aligned", "scattered"],
)


def operands(
    seed: int, sizes: list[int], *, groups: int, k: int = 128, n: int = 128, alignment: int = 1
):
    rng = np.random.default_rng(seed)
    # Five rows belong to no group.
    room = room_for(sum(sizes) + 5, len(sizes), alignment)
    lhs = rng.normal(size=(room, k))
    if alignment > 1:
        lhs[~np.isin(np.arange(room), np.concatenate(group_rows(sizes, alignment)))] = np.nan
    rhs = jnp.asarray(rng.normal(size=(2, groups, k, n)), jnp.bfloat16)
    return jnp.asarray(lhs, jnp.bfloat16), rhs, jnp.asarray(sizes, jnp.int32)


def exact(lhs, rhs, sizes, layer, first_group, bias=None, activation=None, alignment=1):
    """The products group by group in float64, NaN for rows of absent groups and of none."""
    lhs, rhs = np.asarray(lhs, np.float64), np.asarray(rhs, np.float64)[layer]
    out = np.full((lhs.shape[0], rhs.shape[2]), np.nan)
    all_rows = group_rows(sizes, alignment)
    for index, weights in enumerate(rhs):
        rows = all_rows[first_group + index]
        out[rows] = lhs[rows] @ weights
        if bias is not None:
            out[rows] += np.asarray(bias, np.float64)[layer, index]
    if activation is None:
        return out
    gate, up = np.split(out, 2, axis=1)
    if activation == "silu":
        return gate / (1 + np.exp(-gate)) * up
    gate = np.minimum(gate, 7)
    return gate / (1 + np.exp(-1.702 * gate)) * (np.clip(up, -7, 7) + 1)


def random_bias(seed: int, rhs):
    layers, groups, _, n = rhs.shape
    return jnp.asarray(np.random.default_rng(seed).normal(size=(layers, groups, n)), rhs.dtype)


def assert_close(out, want):
    mine = ~np.isnan(want[:, 0])
    if not mine.any():
        # Memory starts as NaN or, for the reference, as zeros.
        out = np.asarray(out, np.float64)
        assert (np.isnan(out) | (out == 0)).all()
    np.testing.assert_allclose(
        np.asarray(out, np.float64)[mine], want[mine], rtol=2**-7, atol=2**-7
    )


@aligned
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_reference_multiplies_each_group_with_its_own_matrix(sizes, alignment):
    lhs, rhs, group_sizes = operands(0, sizes, groups=len(sizes), alignment=alignment)
    out = reference.grouped_gemm(lhs, rhs, group_sizes, 1, row_alignment=alignment)
    assert_close(out, exact(lhs, rhs, sizes, 1, 0, alignment=alignment))


@pytest.mark.parametrize("bytes_at_once", [1, 3 * 128 * 128 * 2, 10**9])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_reference_multiplies_several_groups_at_once_off_the_cpu(sizes, bytes_at_once, monkeypatch):
    def run_default(*operands, cpu, default):
        return default(*operands)

    monkeypatch.setattr(reference.lax, "platform_dependent", run_default)
    monkeypatch.setattr(reference, "BYTES_AT_ONCE", bytes_at_once)
    lhs, rhs, group_sizes = operands(0, sizes, groups=len(sizes))
    bias = random_bias(1, rhs)
    out = reference.grouped_gemm(lhs, rhs, group_sizes, 1, bias=bias)
    assert_close(out, exact(lhs, rhs, sizes, 1, 0, bias))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_adds_the_bias_and_applies_the_activation_to_the_sums(activation):
    sizes = [3, 0, 70]
    lhs, rhs, group_sizes = operands(9, sizes, groups=3)
    bias = random_bias(10, rhs)
    out = reference.grouped_gemm(lhs, rhs, group_sizes, 1, bias=bias, activation=activation)
    assert_close(out, exact(lhs, rhs, sizes, 1, 0, bias, activation))


def test_reference_gives_zero_for_rows_of_absent_groups():
    sizes = [3, 5, 2, 4]
    lhs, rhs, group_sizes = operands(1, sizes, groups=2)
    out = reference.grouped_gemm(lhs, rhs, group_sizes, 0, first_group=1)
    assert_close(out, exact(lhs, rhs, sizes, 0, 1))
    assert not np.asarray(out)[:3].any() and not np.asarray(out)[10:].any()


@aligned
@pytest.mark.parametrize("tiles", TINY_TILES.values(), ids=TINY_TILES.keys())
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_hopper_kernel_agrees_with_float64_and_has_no_race(sizes, tiles, alignment):
    lhs, rhs, group_sizes = operands(2, sizes, groups=len(sizes), alignment=alignment)
    out = interpret(lhs, rhs, group_sizes, 1, config=tiles, row_alignment=alignment)
    assert_close(out, exact(lhs, rhs, sizes, 1, 0, alignment=alignment))
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize("tiles", TINY_TILES.values(), ids=TINY_TILES.keys())
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_hopper_kernel_fetches_scattered_rows_and_has_no_race(sizes, tiles):
    lhs, rhs, group_sizes = operands(14, sizes, groups=len(sizes), alignment=8)
    [source], index, [lhs] = scatter(lhs)
    options = {"row_index": index, "row_alignment": 8}
    out = interpret(source, rhs, group_sizes, 1, config=tiles, **options)
    assert_close(out, exact(lhs, rhs, sizes, 1, 0, alignment=8))
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize("alignment, gathers", [(8, False), (1, True)])
def test_on_a_hopper_the_product_fetches_rows_where_groups_have_blocks_of_their_own(
    alignment, gathers, monkeypatch
):
    hopper = SimpleNamespace(
        platform="gpu", compute_capability="9.0", core_count=132, device_kind="a Hopper"
    )
    monkeypatch.setattr(backend, "get_default_device", lambda: hopper)
    shape = jax.ShapeDtypeStruct
    arguments = (
        shape((64, 128), jnp.bfloat16), shape((1, 4, 128, 256), jnp.bfloat16),
        shape((4,), jnp.int32), shape((128,), jnp.int32),
    )  # fmt: skip

    def run(lhs, rhs, sizes, index):
        options = {"row_index": index, "row_alignment": alignment}
        return pallas_kernels.grouped_gemm(lhs, rhs, sizes, 0, **options)

    lowered = jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in lowered
    assert ("stablehlo.gather" in lowered) == gathers


def test_scattered_rows_need_groups_of_whole_blocks():
    lhs, rhs, group_sizes = operands(15, [3, 5], groups=2)
    [source], index, _ = scatter(lhs)
    with pytest.raises(NotImplementedError, match="multiple of 8 for scattered rows, got row_al"):
        interpret(source, rhs, group_sizes, 1, row_index=index, config=TINY_TILES["wide"])


@aligned
def test_hopper_kernel_takes_local_groups_of_a_larger_set(alignment):
    sizes = [1, 5, 0, 30, 2, 2]
    lhs, rhs, group_sizes = operands(3, sizes, groups=3, alignment=alignment)
    options = {"first_group": jnp.int32(2), "row_alignment": alignment}
    out = interpret(lhs, rhs, group_sizes, 0, config=TINY_TILES["narrow"], **options)
    assert_close(out, exact(lhs, rhs, sizes, 0, 2, alignment=alignment))
    # Interpreted memory starts as NaN: other groups' rows were not touched.
    _, before, *_, after = group_rows(sizes, alignment)
    out = np.asarray(out)
    assert np.isnan(out[: before[-1] + 1]).all() and np.isnan(out[after[0] :]).all()


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_hopper_kernel_adds_the_bias_and_fuses_the_activation(activation, with_bias):
    sizes = [3, 0, 13, 24, 1, 30]
    lhs, rhs, group_sizes = operands(11, sizes, groups=len(sizes), n=256)
    bias = random_bias(12, rhs) if with_bias else None
    options = {"bias": bias, "activation": activation}
    out = interpret(lhs, rhs, group_sizes, 1, config=TINY_TILES["wide"], **options)
    assert_close(out, exact(lhs, rhs, sizes, 1, 0, bias, activation))
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize(
    "alignment, message",
    [(3, "row_alignment=3 is no power of two"), (8, "takes 24 rows more than .* got 21 in all")],
)
def test_an_alignment_that_rows_cannot_have_is_refused(alignment, message):
    lhs, rhs, group_sizes = operands(0, [8, 0, 8], groups=3)
    with pytest.raises(ValueError, match=message):
        pallas_kernels.grouped_gemm(lhs, rhs, group_sizes, 1, row_alignment=alignment)


@aligned
def test_without_a_gpu_scattered_rows_are_gathered_first(alignment):
    sizes = [3, 0, 5]
    lhs, rhs, group_sizes = operands(15, sizes, groups=3, alignment=alignment)
    [source], index, [lhs] = scatter(lhs)
    out = pallas_kernels.grouped_gemm(
        source, rhs, group_sizes, 1, row_index=index, row_alignment=alignment
    )
    assert_close(out, exact(lhs, rhs, sizes, 1, 0, alignment=alignment))


def interpret(*args, **kwargs):
    params = plgpu.InterpretGPUParams(detect_races=True)
    return mosaic_sm90.grouped_gemm(*args, **kwargs, num_sms=2, interpret=params)


@rows_lie
@pytest.mark.parametrize("name, activation", SHIPPED)
def test_every_shipped_configuration_lowers_for_cuda(name, activation, alignment, scattered):
    run = functools.partial(
        mosaic_sm90.grouped_gemm,
        activation=activation, row_alignment=alignment, config=configs.NAMED[name], num_sms=132,
    )  # fmt: skip
    arguments = (
        jax.ShapeDtypeStruct((1024, 2048), jnp.bfloat16),
        jax.ShapeDtypeStruct((2, 128, 2048, 1536), jnp.bfloat16),
        jax.ShapeDtypeStruct((128,), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    options = {"bias": jax.ShapeDtypeStruct((2, 128, 1536), jnp.bfloat16)}
    if scattered:
        options["row_index"] = jax.ShapeDtypeStruct((4096,), jnp.int32)
    assert_lowers_for_cuda(run, *arguments, **options)


def test_program_does_not_grow_with_the_number_of_groups():
    def size(groups: int) -> int:
        arguments = (
            jax.ShapeDtypeStruct((64, 128), jnp.bfloat16),
            jax.ShapeDtypeStruct((1, groups, 128, 128), jnp.bfloat16),
            jax.ShapeDtypeStruct((groups,), jnp.int32),
            0,
        )
        run = functools.partial(mosaic_sm90.grouped_gemm, config=TINY_TILES["narrow"], num_sms=132)
        return str(jax.make_jaxpr(run)(*arguments)).count("\n")

    assert size(8) == size(256)


@pytest.mark.parametrize("rows", [1, 128, 300, 1000, 16384])
@pytest.mark.parametrize("n, gated", [(1536, False), (192, False), (1536, True), (5760, True)])
def test_a_configuration_is_found_whose_columns_divide_the_matrix(rows, n, gated):
    config = configs.config_for(rows=rows, groups=8, k=2048, n=n, num_sms=132, gated=gated)
    assert n % config.columns == 0
    assert config.width % 128 == 0 or not gated


@pytest.mark.parametrize("n, columns", [(2944, 128), (2880, 64), (100, 64)])
def test_matrices_that_the_widest_tile_does_not_divide_get_the_next(n, columns):
    config = configs.config_for(rows=8192, groups=8, k=2048, n=n, num_sms=132)
    assert config.columns == columns


def test_few_rows_get_tiles_narrow_enough_for_every_multiprocessor():
    # Two groups of 4096 columns: 32 tiles of 256 columns would leave 100 of 132 without work.
    config = configs.config_for(rows=2, groups=8, k=14336, n=4096, num_sms=132)
    assert 2 * 4096 / config.columns > 100


@pytest.mark.parametrize(
    "dtype, k, n, message",
    [
        (jnp.float32, 128, 128, "needs bfloat16 operands, got float32 and float32"),
        (jnp.bfloat16, 96, 128, "needs k to be a multiple of 64, got 96"),
        (jnp.bfloat16, 128, 96, "needs n to be a multiple of 64, got 96"),
    ],
)
def test_hopper_kernel_says_what_it_does_not_cover(dtype, k, n, message):
    lhs, rhs, _ = operands(4, [8], groups=1, k=k, n=n)
    with pytest.raises(NotImplementedError, match=message):
        mosaic_sm90.check_covered(lhs.astype(dtype), rhs.astype(dtype), configs.NARROW, None)


def test_without_a_gpu_the_reference_runs_and_the_kernel_refuses():
    sizes = [3, 5]
    lhs, rhs, group_sizes = operands(5, sizes, groups=2)
    out = pallas_kernels.grouped_gemm(lhs, rhs, group_sizes, 0)
    assert_close(out, exact(lhs, rhs, sizes, 0, 0))
    with pytest.raises(NotImplementedError, match="needs a Hopper GPU"):
        pallas_kernels.grouped_gemm(lhs, rhs, group_sizes, 0, implementation="mosaic_sm90")


def test_large_groups_begin_at_whole_blocks_where_the_kernel_runs(monkeypatch):
    assert pallas_kernels.preferred_row_alignment(1000.0) == 1
    hopper = SimpleNamespace(platform="gpu", compute_capability="9.0")
    monkeypatch.setattr(backend, "get_default_device", lambda: hopper)
    assert pallas_kernels.preferred_row_alignment(8.0) == 8
    assert pallas_kernels.preferred_row_alignment(1.0) == 1


def test_an_unknown_implementation_is_refused_with_the_known_ones():
    lhs, rhs, group_sizes = operands(6, [3], groups=1)
    with pytest.raises(ValueError, match="use None or one of mosaic_sm90, reference"):
        pallas_kernels.grouped_gemm(lhs, rhs, group_sizes, 0, implementation="cutlass")


def test_operands_of_different_depths_are_refused():
    # Where types are checked, as in these tests, that comes first.
    multiply = inspect.unwrap(pallas_kernels.grouped_gemm)
    _, rhs, group_sizes = operands(6, [3], groups=1)
    with pytest.raises(ValueError, match="rows of 64 features and rhs matrices of 128"):
        multiply(jnp.ones((8, 64), jnp.bfloat16), rhs, group_sizes, 0)


@pytest.mark.parametrize("index", [np.zeros(8, np.float32), np.zeros((4, 2), np.int32)])
def test_an_index_that_is_none_is_refused(index):
    multiply = inspect.unwrap(pallas_kernels.grouped_gemm)
    lhs, rhs, group_sizes = operands(6, [3], groups=1)
    with pytest.raises(ValueError, match="one integer for each row, got .* of shape"):
        multiply(lhs, rhs, group_sizes, 0, row_index=index)


def test_an_unknown_activation_is_refused_with_the_known_ones():
    lhs, rhs, group_sizes = operands(6, [3], groups=1)
    with pytest.raises(ValueError, match="use None or one of silu, clamped_swiglu"):
        pallas_kernels.grouped_gemm(lhs, rhs, group_sizes, 0, activation="relu")


def test_an_activation_needs_an_even_number_of_columns():
    lhs, rhs, group_sizes = operands(6, [3], groups=1, n=9)
    with pytest.raises(ValueError, match="an even number in all; rhs has 9"):
        pallas_kernels.grouped_gemm(lhs, rhs, group_sizes, 0, activation="silu")


@pytest.mark.gpu
@rows_lie
@pytest.mark.parametrize("name, activation", SHIPPED)
def test_on_a_gpu_every_shipped_configuration_agrees_with_float64(
    name, activation, alignment, scattered
):
    sizes = np.random.default_rng(7).multinomial(1000, np.ones(16) / 16).tolist()
    sizes[3] = 0
    lhs, rhs, group_sizes = operands(8, sizes, groups=16, k=256, n=512, alignment=alignment)
    bias = random_bias(13, rhs)
    source, index = lhs, None
    if scattered:
        [source], index, [lhs] = scatter(lhs)
    out = mosaic_sm90.grouped_gemm(
        source, rhs, group_sizes, 1, row_index=index, bias=bias, activation=activation,
        row_alignment=alignment,
        # So few blocks that each has more steps than stages.
        config=configs.NAMED[name], num_sms=3,
    )  # fmt: skip
    assert_close(out, exact(lhs, rhs, sizes, 1, 0, bias, activation, alignment))
