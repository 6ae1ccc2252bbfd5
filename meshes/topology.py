"""Devices -> Mesh: the innermost axes stay inside a host, the outermost cross hosts."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from meshes.axes import MESH_AXES
from meshes.errors import PlanError
from meshes.plan import ParallelPlan

# jax.Device is a variable to type checkers.
type Device = Any


def make_mesh(plan: ParallelPlan, devices: Sequence[Device] | None = None) -> Mesh:
    """Lays a plan on devices as a mesh with all five axes, each of type Explicit.

    A plan smaller than a single process's devices takes the first ones; with several
    processes the plan must use every device, or some process would have no part in it.

    Raises:
        PlanError: the plan needs more devices than there are, or leaves a process without any.
    """
    devices = list(jax.devices() if devices is None else devices)
    devices.sort(key=_host_then_id)
    needed, found = plan.num_devices, len(devices)
    processes = len({device.process_index for device in devices})
    if needed > found:
        hint = (
            " On CPU, virtual devices can be made: --virtual-devices N, or "
            "jax.config.update('jax_num_cpu_devices', N) before the first use of JAX."
        )
        raise PlanError(
            f"The plan ({plan}) needs {needed} devices, and {found} {devices[0].platform} "
            f"device{'s are' if found > 1 else ' is'} here. Use smaller sizes whose product is at "
            f"most {found}." + (hint if devices[0].platform == "cpu" else "")
        )
    if processes > 1 and needed != found:
        raise PlanError(
            f"The plan ({plan}) uses {needed} of the {found} devices of {processes} processes: "
            f"with several processes the sizes must multiply to {found}."
        )
    _check_hosts(plan, devices)
    grid = np.array(devices[:needed]).reshape([plan.sizes[axis] for axis in MESH_AXES])
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def _check_hosts(plan: ParallelPlan, devices: Sequence[Device]) -> None:
    """Compares `gpus_per_node` with the devices of each process; a host may run several."""
    if plan.gpus_per_node is None:
        return
    for process, count in sorted(Counter(device.process_index for device in devices).items()):
        if plan.gpus_per_node % count:
            raise PlanError(
                f"gpus_per_node={plan.gpus_per_node}, and process {process} has {count} devices: "
                f"use a multiple of {count}, or leave the key out, for JAX knows its devices."
            )


def _host_then_id(device: Device) -> tuple[int, int]:
    return device.process_index, device.id
