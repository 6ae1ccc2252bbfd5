"""What kernels for Hopper that write instructions of their own do alike."""

from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith


def i32() -> Any:
    """The type of a number of 32 bits."""
    return ir.IntegerType.get_signless(32)


def number(value: int) -> Any:
    """A constant of 32 bits."""
    return arith.constant(i32(), value)
