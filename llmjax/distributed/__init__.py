"""Several processes that run the same program: start, agreement, shared arrays, a clear end.

Every process schedules on its own; they stay alike because process 0 hands out the requests and
nothing else enters a schedule. All of them must make the same calls in the same order.
"""

import json
import socket
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.sharding import Sharding

from llmjax.distributed.lifeline import DistributedError, Lifeline, gather, join

HEARTBEAT_SECONDS = 30
"""A process that hangs for this long is given up; one that dies is noticed at once."""
DAY_SECONDS = 24 * 60 * 60
"""How long processes wait for each other: while the others live, there is no reason to end."""

__all__ = ["DistributedError", "broadcast", "check_agreement", "initialize", "place"]


def initialize(coordinator: str, num_hosts: int, host_id: int, *, start_seconds: int = 60) -> None:
    """Joins the processes of a run; call before the first use of JAX's devices.

    From then on, a process whose peer dies says so and ends with exit code 1.

    Args:
        coordinator: address and port of process 0, such as 10.0.0.1:1234.
        start_seconds: how long to wait for the other processes.

    Raises:
        DistributedError: the numbers do not fit, or the others did not come in time.
    """
    if not 0 <= host_id < num_hosts:
        raise DistributedError(
            f"--host-id {host_id} does not fit --num-hosts {num_hosts}: use 0 to {num_hosts - 1}."
        )
    host, port = _split_address(coordinator)
    if num_hosts == 1:
        return
    deadline = time.monotonic() + start_seconds
    if host_id == 0:
        service_port = _find_free_port()
        peers = gather(port, num_hosts, {"port": service_port}, deadline)
    else:
        peer, answer = join(host, port, host_id, num_hosts, deadline)
        peers, service_port = {0: peer}, answer["port"]
    lifeline = Lifeline(peers, host_id, num_hosts)
    lifeline.watch()
    jax.distributed.initialize(
        f"{host}:{service_port}",
        num_hosts,
        host_id,
        initialization_timeout=start_seconds,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=DAY_SECONDS,
    )
    # After JAX's own: it would wait for processes that still compute, also if this one failed.
    lifeline.leave_at_exit()


def broadcast(value: Any) -> Any:
    """Process 0's value, which must be JSON, on every process."""
    if jax.process_count() == 1:
        return value
    return json.loads(_exchange(json.dumps(value) if jax.process_index() == 0 else "")[0])


def check_agreement(facts: Mapping[str, str]) -> None:
    """Compares named facts across processes; waits until all of them are here.

    Raises:
        DistributedError: a fact differs; the processes would wait for each other for ever.
    """
    if jax.process_count() == 1:
        return
    everyone = [json.loads(text) for text in _exchange(json.dumps(facts))]
    for process, others in enumerate(everyone):
        for name, value in everyone[0].items():
            if others.get(name) != value:
                raise DistributedError(
                    f"The processes do not agree on {name}: process 0 has {value}, process "
                    f"{process} has {others.get(name)}. Start all of them with the same version, "
                    "model and options, and make the same calls in each."
                )


def place(array: np.ndarray, sharding: Sharding) -> jax.Array:
    """Lays an array that every process holds whole on the devices."""
    if jax.process_count() == 1:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def _exchange(text: str) -> list[str]:
    """Every process's text, on every process."""
    # JAX's key-value store rather than a collective: those give up on a process that is late.
    client: Any = distributed.global_state.client
    count, mine = jax.process_count(), jax.process_index()
    # None can come a second time before all have come once, so arrivals count the rounds.
    turn = (client.key_value_increment("llmjax/arrivals", 1) - 1) // count
    client.key_value_set(f"llmjax/{turn}/{mine}", text)
    texts = [
        client.blocking_key_value_get(f"llmjax/{turn}/{process}", DAY_SECONDS * 1000)
        for process in range(count)
    ]
    # Whoever came to this turn has read the one before.
    if turn:
        client.key_value_delete(f"llmjax/{turn - 1}/{mine}")
    return texts


def _split_address(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise DistributedError(
            f"--coordinator {coordinator!r} is no address: give process 0's host and a free port, "
            "such as 10.0.0.1:1234."
        )
    return host, int(port)


def _find_free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]
