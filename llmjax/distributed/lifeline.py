"""Connections between processes that tell who is there, and who has died.

Process 0 holds one to every other process. When a process dies, its system closes them at once;
without them the others would wait in a collective, or be aborted by JAX with a stack trace.
"""

import atexit
import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

HELLO_SECONDS = 5
"""How long someone who connects may take to say who it is."""
RETRY_SECONDS = 0.2
"""Pause between attempts to reach process 0, which may start later."""
KEEPALIVE_SECONDS = 5
"""A host that is silent for four times this long is off or cut off."""

LONGEST_LINE = 1000
"""Bytes of a message; a stranger may send more."""


class DistributedError(RuntimeError):
    """Processes that cannot reach each other, or that disagree."""


class Lifeline:
    """One process's connections; ends the process when another one dies."""

    def __init__(self, peers: Mapping[int, socket.socket], host_id: int, num_hosts: int):
        self._peers = dict(peers)
        self._name = f"Process {host_id} of {num_hosts}"
        for peer in self._peers.values():
            peer.settimeout(None)
            _keep_alive(peer)

    def watch(self) -> None:
        """Starts to wait for the other processes' ends, beside the program."""
        threading.Thread(target=self._wait_for_ends, name="lifeline", daemon=True).start()

    def leave_at_exit(self) -> None:
        """Tells the others when this process has come to its regular end."""
        atexit.register(self._leave)

    def _wait_for_ends(self) -> None:
        with selectors.DefaultSelector() as selector:
            for process, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, process)
            while selector.get_map():
                for key, _ in selector.select():
                    news = _receive(self._peers[key.data])
                    if news is None or "lost" in news:
                        self._end(key.data if news is None else news["lost"])
                    selector.unregister(key.fileobj)

    def _end(self, lost: int) -> None:
        _tell(self._peers, {"lost": lost})
        print(
            f"\n{self._name} ends, because process {lost} ended early or cannot be reached: read "
            "what that one said, and start all of them again.",
            file=sys.stderr,
            flush=True,
        )
        # The main thread may be inside a collective that never returns.
        os._exit(1)

    def _leave(self) -> None:
        if hasattr(sys, "last_exc"):
            # An exception ended the program. The others learn of it when the connections close.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        _tell(self._peers, {"done": True})


def gather(
    port: int, num_hosts: int, answer: Mapping[str, Any], deadline: float
) -> dict[int, socket.socket]:
    """Waits on process 0 for all the others, then gives each of them the answer.

    Raises:
        DistributedError: the port is taken, a number came twice, or someone did not come.
    """
    peers: dict[int, socket.socket] = {}
    try:
        with _listen(port) as server:
            while missing := sorted(set(range(1, num_hosts)) - set(peers)):
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    _welcome(server.accept()[0], peers, num_hosts)
                except TimeoutError:
                    raise DistributedError(
                        f"Of {num_hosts} processes {missing} did not come to port {port} in time: "
                        "start all of them together, each with its --host-id and the same "
                        "--coordinator and --num-hosts."
                    ) from None
    except DistributedError as error:
        _tell(peers, {"refused": str(error)})
        for peer in peers.values():
            peer.close()
        raise
    _tell(peers, answer)
    return peers


def join(
    host: str, port: int, host_id: int, num_hosts: int, deadline: float
) -> tuple[socket.socket, dict[str, Any]]:
    """Connects to process 0 and waits for its answer, which comes when all are there.

    Raises:
        DistributedError: process 0 cannot be reached, ended, or refused this process.
    """
    peer = _connect(host, port, deadline)
    _keep_alive(peer)
    _send(peer, {"process": host_id, "of": num_hosts})
    # Process 0 stops waiting at its own deadline, and then it says so or the connection closes.
    peer.settimeout(None)
    answer = _receive(peer)
    if answer is None:
        answer = {
            "refused": f"Process 0 at {host}:{port} ended before all {num_hosts} processes had "
            "come: read what it said, and start all of them again."
        }
    if "refused" in answer:
        peer.close()
        raise DistributedError(answer["refused"])
    return peer, answer


def _welcome(peer: socket.socket, peers: dict[int, socket.socket], num_hosts: int) -> None:
    """Adds someone who connects to the peers, if it is one of ours and fits."""
    peer.settimeout(HELLO_SECONDS)
    hello = _receive(peer)
    if hello is None or "process" not in hello:
        # Ports are scanned.
        peer.close()
        return
    number, count = hello["process"], hello["of"]
    refusal = None
    if count != num_hosts:
        refusal = (
            f"Process 0 was started with --num-hosts {num_hosts}, process {number} with {count}: "
            "use the same number."
        )
    elif number in peers:
        refusal = f"--host-id {number} came twice: give each process its own."
    if refusal is not None:
        _tell({number: peer}, {"refused": refusal})
        peer.close()
        raise DistributedError(refusal)
    peers[number] = peer


def _tell(peers: Mapping[int, socket.socket], news: Mapping[str, Any]) -> None:
    for peer in peers.values():
        # Whoever has died by now is noticed elsewhere.
        with contextlib.suppress(OSError):
            _send(peer, news)


def _listen(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128
            )
        return socket.create_server(("", port), backlog=128)
    except OSError as error:
        raise DistributedError(
            f"Process 0 cannot listen on port {port} ({error.strerror}): give --coordinator "
            "another one."
        ) from None


def _connect(host: str, port: int, deadline: float) -> socket.socket:
    while True:
        try:
            return socket.create_connection((host.strip("[]"), port), timeout=HELLO_SECONDS)
        except OSError as error:
            if time.monotonic() > deadline:
                raise DistributedError(
                    f"Process 0 did not answer at {host}:{port} ({error}): start it together with "
                    "this one, with the same --coordinator."
                ) from None
            time.sleep(RETRY_SECONDS)


def _keep_alive(peer: socket.socket) -> None:
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Systems differ in what they offer beside the switch itself.
    for name, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_SECONDS),
        ("TCP_KEEPINTVL", KEEPALIVE_SECONDS),
        ("TCP_KEEPCNT", 3),
    ):
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _send(peer: socket.socket, news: Mapping[str, Any]) -> None:
    peer.sendall(json.dumps(news).encode() + b"\n")


def _receive(peer: socket.socket) -> dict[str, Any] | None:
    """The next line of JSON; None where the connection ended or says something else."""
    line = b""
    try:
        while not line.endswith(b"\n"):
            # One byte at a time: what follows the line belongs to the next call.
            byte = peer.recv(1)
            if not byte or len(line) == LONGEST_LINE:
                return None
            line += byte
        news = json.loads(line)
    except (OSError, ValueError):
        return None
    return news if isinstance(news, dict) else None
