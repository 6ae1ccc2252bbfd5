"""What kernels for Hopper that write instructions of their own do alike."""

from collections.abc import Callable
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith


def inline(
    *arg_types: Any, returns: Any = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Turns a function that writes instructions into one that kernels call with references and
    arrays; without `returns` it is called for what it does."""

    def decorate(write: Callable[..., Any]) -> Callable[..., Any]:
        @plgpu.inline_mgpu(arg_types=arg_types, return_type=returns)
        def run(context: Any, *operands: Any) -> Any:
            del context
            results = write(*operands)
            return () if results is None else results

        inlined: Any = run
        return inlined

    return decorate


def i32() -> Any:
    """The type of a number of 32 bits."""
    return ir.IntegerType.get_signless(32)


def number(value: int) -> Any:
    """A constant of 32 bits."""
    return arith.constant(i32(), value)
