import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernel_checks import assert_lowers_for_cuda

from pallas_kernels.grouped_gemm import sort, sort_many_sm90, sort_rows, sort_sm90


def assert_as_numpy(out, group, groups: int):
    key = np.where((group >= 0) & (group < groups), group, groups)
    order = np.argsort(key, stable=True)
    np.testing.assert_array_equal(out.row, order)
    np.testing.assert_array_equal(np.asarray(out.place)[order], np.arange(len(group)))
    np.testing.assert_array_equal(out.sizes, np.bincount(key, minlength=groups + 1)[:groups])


@pytest.mark.parametrize("rows", [1, 7, 300, sort.MAX_PAIRWISE + 1, 4096])
@pytest.mark.parametrize("groups", [1, 5, 128])
def test_rows_are_sorted_by_group_and_those_of_no_group_come_last(rows, groups):
    # -1 and `groups` are no groups.
    group = np.random.default_rng(rows).integers(-1, groups + 1, rows)
    assert_as_numpy(sort_rows(jnp.asarray(group, jnp.int32), groups), group, groups)


@pytest.mark.parametrize(("rows", "groups"), [(2, 8), (24, 5), (64, 16), (544, 9)])
def test_hopper_kernel_sorts_few_rows_and_has_no_race(rows, groups):
    group = np.random.default_rng(rows).integers(-1, groups + 1, rows)
    params = plgpu.InterpretGPUParams(detect_races=True)
    out = sort_sm90.sort_rows(jnp.asarray(group, jnp.int32), groups, interpret=params)
    assert_as_numpy(out, group, groups)
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize(("rows", "groups"), [(150, 40), (320, 5)])
def test_hopper_kernels_sort_many_rows_and_have_no_race(rows, groups):
    group = np.random.default_rng(rows).integers(-1, groups + 1, rows)
    params = plgpu.InterpretGPUParams(detect_races=True)
    out = sort_many_sm90.sort_rows(
        jnp.asarray(group, jnp.int32), groups, part=32, parts=2, interpret=params
    )
    assert_as_numpy(out, group, groups)
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize(("rows", "groups"), [(8, 128), (2048, 8), (40_000, 129)])
def test_hopper_kernels_lower_for_cuda(rows, groups):
    group = jax.ShapeDtypeStruct((rows,), jnp.int32)
    assert_lowers_for_cuda(lambda group: sort_sm90.sort_rows(group, groups), group)


def test_hopper_kernel_says_what_it_does_not_cover():
    with pytest.raises(NotImplementedError, match="needs an even number of rows, got 7"):
        sort_sm90.sort_rows(jnp.zeros(7, jnp.int32), 4)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "groups"), [(2, 8), (1000, 129), (4096, 128), (4099, 9), (65536, 128)]
)
def test_on_a_gpu_the_kernels_sort(rows, groups):
    group = np.random.default_rng(rows).integers(-1, groups + 1, rows)
    assert_as_numpy(sort_sm90.sort_rows(jnp.asarray(group, jnp.int32), groups), group, groups)


@pytest.mark.parametrize("rows", [1, 300, sort.MAX_PAIRWISE + 1])
def test_counting_places_rows_where_sorting_does(rows):
    group = jnp.asarray(np.random.default_rng(rows).integers(0, 6, rows), jnp.int32)
    for counted, ordered in zip(
        sort.place_by_counting(group, 5), sort.place_by_sorting(group, 5), strict=True
    ):
        np.testing.assert_array_equal(counted, ordered)


@pytest.mark.parametrize("rows", [100, 40_000])
def test_all_rows_in_one_group_keep_their_order(rows):
    out = sort_rows(jnp.full(rows, 2, jnp.int32), 4)
    np.testing.assert_array_equal(out.row, np.arange(rows))
    assert out.sizes.tolist() == [0, 0, rows, 0]
