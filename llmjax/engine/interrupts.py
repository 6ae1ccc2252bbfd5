"""Ctrl-C and a notebook's stop button, held back while they would tear a step apart."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delivers an interrupt after the block instead of inside; a second one at once.

    Between its schedule and its retirement a step is known to scheduler and devices alike: an
    exception at any line in between would leave them with different stories.
    """
    handler = signal.getsignal(signal.SIGINT)
    # Python interrupts its main thread only, and only there may handlers be set.
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    held: list[FrameType | None] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if held:
            handler(number, frame)
        held.append(frame)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if held:
        handler(signal.SIGINT, held[0])
