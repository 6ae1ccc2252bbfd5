import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_gemm import sort
from pallas_kernels.grouped_gemm.sort import sort_rows


@pytest.mark.parametrize("rows", [1, 7, 300, sort.MAX_PAIRWISE + 1, 4096])
@pytest.mark.parametrize("groups", [1, 5, 128])
def test_rows_are_sorted_by_group_and_those_of_no_group_come_last(rows, groups):
    # -1 and `groups` are no groups.
    group = np.random.default_rng(rows).integers(-1, groups + 1, rows)
    key = np.where((group >= 0) & (group < groups), group, groups)
    order = np.argsort(key, stable=True)
    out = sort_rows(jnp.asarray(group, jnp.int32), groups)
    np.testing.assert_array_equal(out.row, order)
    np.testing.assert_array_equal(np.asarray(out.place)[order], np.arange(rows))
    np.testing.assert_array_equal(out.sizes, np.bincount(key, minlength=groups + 1)[:groups])


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
