"""Several processes that run the same program: start, agreement, and a clear end.

Every process schedules on its own; they stay alike because process 0 hands out the requests and
nothing else enters a schedule.
"""

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

HEARTBEAT_SECONDS = 10
"""A process that is silent for this long is given up by the others."""


class DistributedError(RuntimeError):
    """Processes that cannot reach each other, or that disagree."""


def initialize(coordinator: str, num_hosts: int, host_id: int) -> None:
    """Joins the processes of a run; call before the first use of JAX's devices.

    Args:
        coordinator: address and port of process 0, such as 10.0.0.1:1234.

    Raises:
        DistributedError: the numbers do not fit, or the others did not come in time.
    """
    if not 0 <= host_id < num_hosts:
        raise DistributedError(
            f"--host-id {host_id} does not fit --num-hosts {num_hosts}: use 0 to {num_hosts - 1}."
        )
    try:
        jax.distributed.initialize(
            coordinator,
            num_hosts,
            host_id,
            initialization_timeout=120,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"Process {host_id} of {num_hosts} could not join the run at {coordinator}: start all "
            f"processes within 120 s with the same --coordinator. ({error})"
        ) from None


def broadcast(value: Any) -> Any:
    """Process 0's value, which must be JSON, on every process."""
    if jax.process_count() == 1:
        return value
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    # A power of two, so that few programs are compiled for all the lengths there are.
    padded = np.zeros(1 << max(length - 1, 1).bit_length(), np.uint8)
    if jax.process_index() == 0:
        padded[:length] = data
    received = np.asarray(multihost_utils.broadcast_one_to_all(padded))
    return json.loads(received[:length].tobytes().decode())


def check_agreement(digest: str) -> None:
    """Compares a hash across processes.

    Raises:
        DistributedError: the processes computed different schedules, so their results are void.
    """
    if jax.process_count() == 1:
        return
    mine = np.frombuffer(bytes.fromhex(digest), np.uint8)
    everyone = np.asarray(multihost_utils.process_allgather(mine))
    if (everyone != everyone[0]).any():
        raise DistributedError(
            "The processes scheduled different steps: start all of them with the same version, "
            "model and options."
        )
