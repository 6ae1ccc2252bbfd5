from dataclasses import dataclass

import jax
import pytest
from jax.sharding import AxisType

from meshes import MESH_AXES, ParallelPlan, PlanError, make_mesh


@dataclass(frozen=True)
class FakeDevice:
    """What `make_mesh` asks a device for."""

    id: int
    process_index: int
    platform: str = "gpu"


def hosts(count: int, devices_each: int) -> list[FakeDevice]:
    """Devices of several hosts; ids say nothing about hosts, as on real machines."""
    return [
        FakeDevice(id=device * count + host, process_index=host)
        for host in range(count)
        for device in range(devices_each)
    ]


def test_a_mesh_has_all_five_axes_and_each_is_explicit():
    mesh = make_mesh(ParallelPlan(dp=2, tp=4))
    assert mesh.axis_names == MESH_AXES
    assert mesh.axis_types == (AxisType.Explicit,) * 5
    assert dict(mesh.shape) == {"pp": 1, "dp": 2, "cp": 1, "ep": 1, "tp": 4}


def test_tensor_ranks_are_neighbours_and_replicas_are_far_apart():
    mesh = make_mesh(ParallelPlan(dp=2, tp=4))
    assert [device.id for device in mesh.devices.flat] == list(range(8))
    assert [device.id for device in mesh.devices[0, 0, 0, 0]] == [0, 1, 2, 3]


def test_a_small_plan_takes_the_first_devices():
    assert [device.id for device in make_mesh(ParallelPlan(tp=2)).devices.flat] == [0, 1]


def test_inner_axes_stay_inside_a_host():
    devices = hosts(2, 4)
    mesh = make_mesh(ParallelPlan(dp=2, tp=4), devices[::-1])
    for replica in mesh.devices[0, :, 0, 0]:
        assert len({device.process_index for device in replica}) == 1
        assert [device.id for device in replica] == sorted(device.id for device in replica)


def test_a_plan_larger_than_the_devices_is_refused_with_both_numbers():
    with pytest.raises(PlanError) as error:
        make_mesh(ParallelPlan(dp=2, tp=8))
    assert str(error.value) == (
        "The plan (dp=2,tp=8) needs 16 devices, and 8 cpu devices are here. Use smaller sizes "
        "whose product is at most 8. On CPU, virtual devices can be made: --virtual-devices N, or "
        "jax.config.update('jax_num_cpu_devices', N) before the first use of JAX."
    )


def test_virtual_devices_are_offered_on_cpu_only():
    with pytest.raises(PlanError) as error:
        make_mesh(ParallelPlan(tp=2), hosts(1, 1))
    assert str(error.value) == (
        "The plan (tp=2) needs 2 devices, and 1 gpu device is here. Use smaller sizes whose "
        "product is at most 1."
    )


def test_a_plan_that_leaves_a_process_without_devices_is_refused():
    with pytest.raises(PlanError) as error:
        make_mesh(ParallelPlan(tp=4), hosts(2, 4))
    assert str(error.value) == (
        "The plan (tp=4) uses 4 of the 8 devices of 2 processes: with several processes the sizes "
        "must multiply to 8."
    )


def test_given_devices_are_used_instead_of_all():
    devices = jax.devices()[4:6]
    mesh = make_mesh(ParallelPlan(tp=2), devices)
    assert list(mesh.devices.flat) == devices
