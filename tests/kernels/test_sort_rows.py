import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernel_checks import assert_lowers_for_cuda, group_rows

from pallas_kernels.grouped_gemm import sort, sort_many_sm90, sort_rows, sort_sm90
from pallas_kernels.groups import ROOM_STEP, group_begin, room_for, rows_held

aligned = pytest.mark.parametrize("alignment", [1, 8])


def assert_as_numpy(out, group, groups: int, alignment: int = 1):
    """Rows of a group stand side by side, in their order, from where the group begins."""
    key = np.where((group >= 0) & (group < groups), group, groups)
    sizes = np.bincount(key, minlength=groups + 1)
    order, place = np.argsort(key, stable=True), np.concatenate(group_rows(sizes, alignment))
    np.testing.assert_array_equal(np.asarray(out.place)[order], place)
    np.testing.assert_array_equal(np.asarray(out.row)[place], order)
    np.testing.assert_array_equal(out.sizes, sizes[:groups])
    assert out.row.size == room_for(len(group), groups, alignment)
    assert (np.asarray(out.row) >= 0).all() and (np.asarray(out.row) < len(group)).all()


@aligned
@pytest.mark.parametrize("rows", [1, 7, 300, sort.MAX_PAIRWISE + 1, 4096])
@pytest.mark.parametrize("groups", [1, 5, 128])
def test_rows_are_sorted_by_group_and_those_of_no_group_come_last(rows, groups, alignment):
    # -1 and `groups` are no groups.
    group = np.random.default_rng(rows).integers(-1, groups + 1, rows)
    out = sort_rows(jnp.asarray(group, jnp.int32), groups, row_alignment=alignment)
    assert_as_numpy(out, group, groups, alignment)


@aligned
@pytest.mark.parametrize(("rows", "groups"), [(2, 8), (24, 5), (64, 16), (544, 9)])
def test_hopper_kernel_sorts_few_rows_and_has_no_race(rows, groups, alignment):
    group = np.random.default_rng(rows).integers(-1, groups + 1, rows)
    params = plgpu.InterpretGPUParams(detect_races=True)
    out = sort_sm90.sort_rows(
        jnp.asarray(group, jnp.int32), groups, row_alignment=alignment, interpret=params
    )
    assert_as_numpy(out, group, groups, alignment)
    assert not gpu_callbacks.get_races().races_found


@aligned
@pytest.mark.parametrize(("rows", "groups"), [(150, 40), (320, 5)])
def test_hopper_kernels_sort_many_rows_and_have_no_race(rows, groups, alignment):
    group = np.random.default_rng(rows).integers(-1, groups + 1, rows)
    params = plgpu.InterpretGPUParams(detect_races=True)
    out = sort_many_sm90.sort_rows(
        jnp.asarray(group, jnp.int32), groups,
        row_alignment=alignment, part=32, parts=2, interpret=params,
    )  # fmt: skip
    assert_as_numpy(out, group, groups, alignment)
    assert not gpu_callbacks.get_races().races_found


@aligned
@pytest.mark.parametrize(("rows", "groups"), [(8, 128), (2048, 8), (40_000, 129)])
def test_hopper_kernels_lower_for_cuda(rows, groups, alignment):
    group = jax.ShapeDtypeStruct((rows,), jnp.int32)
    sort = functools.partial(sort_sm90.sort_rows, groups=groups, row_alignment=alignment)
    assert_lowers_for_cuda(sort, group)


@pytest.mark.parametrize("sizes", [[1] * 5, [7] * 5, [8] * 5, [9] * 5, [0, 0, 30], [30, 0, 0, 1]])
def test_aligned_groups_do_not_overlap_and_end_within_the_room_that_they_get(sizes):
    sizes, ends = np.array(sizes), np.concatenate([[0], np.cumsum(sizes)])
    begins = np.asarray(group_begin(jnp.asarray(ends), jnp.arange(ends.size), 8))
    assert (begins % 8 == 0).all()
    assert (begins[:-1] + sizes <= begins[1:]).all()
    for groups in range(1, sizes.size + 1):
        # Rows of no group follow, here those of the groups that are left.
        assert begins[groups] + ends[-1] - ends[groups] <= room_for(int(ends[-1]), groups, 8)


@pytest.mark.parametrize("rows", [2, 64, 2048, 16384])
@pytest.mark.parametrize("groups", [8, 128])
@aligned
def test_the_rows_that_an_array_holds_follow_from_its_room(rows, groups, alignment):
    held = rows_held(room_for(rows, groups, alignment), groups, alignment)
    assert rows <= held <= rows + ROOM_STEP


def test_hopper_kernel_says_what_it_does_not_cover():
    with pytest.raises(NotImplementedError, match="needs an even number of rows, got 7"):
        sort_sm90.sort_rows(jnp.zeros(7, jnp.int32), 4)


@pytest.mark.gpu
@aligned
@pytest.mark.parametrize(
    ("rows", "groups"), [(2, 8), (1000, 129), (4096, 128), (4099, 9), (65536, 128)]
)
def test_on_a_gpu_the_kernels_sort(rows, groups, alignment):
    group = np.random.default_rng(rows).integers(-1, groups + 1, rows)
    out = sort_sm90.sort_rows(jnp.asarray(group, jnp.int32), groups, row_alignment=alignment)
    assert_as_numpy(out, group, groups, alignment)


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
