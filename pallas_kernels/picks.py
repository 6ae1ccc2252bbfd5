"""Which implementation of an operation runs on this machine's device, said once."""

import functools
import logging
from collections.abc import Sequence
from typing import Any

logger = logging.getLogger(__name__)


def is_hopper(device: Any) -> bool:
    return device.platform == "gpu" and device.compute_capability.startswith("9.")


def check_hopper(device: Any) -> None:
    """Raises NotImplementedError for devices that the kernels do not run on."""
    if not is_hopper(device):
        raise NotImplementedError(f"needs a Hopper GPU, got {device.device_kind}")


def check_implementation(implementation: str | None, known: Sequence[str]) -> None:
    """Raises ValueError if there is none of that name."""
    if implementation not in (None, *known):
        raise ValueError(
            f"implementation={implementation!r} does not exist; use None or one of "
            f"{', '.join(known)}"
        )


def log_pick(operation: str, kernel: str, device: Any) -> None:
    """Says that a kernel runs."""
    log_once(logging.INFO, f"{operation} runs as {kernel}: on {device.device_kind}")


def log_fallback(operation: str, device: Any, reason: str, *, is_slow: bool = True) -> None:
    """Says why the XLA reference runs; warns on a Hopper, whose kernels are many times faster."""
    level = logging.WARNING if is_slow and is_hopper(device) else logging.INFO
    log_once(level, f"{operation} runs as reference: {reason}")


@functools.cache
def log_once(level: int, message: str) -> None:
    logger.log(level, message)
