"""What kernels share in which one warpgroup loads ahead through a ring of stages."""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array


def drain(steps: Array, released) -> None:
    """Waits until the last stages that were filled are read."""
    stages = released.shape[0]
    pending = lax.min(steps, jnp.int32(stages))

    def wait(index, _):
        plgpu.barrier_wait(released.at[lax.rem(steps - pending + index, stages)])

    lax.fori_loop(0, pending, wait, None)


def load_registers(warpgroups: int) -> int:
    """Registers that a loading thread keeps beside so many multiplying warpgroups."""
    # One of these holds all it may without what the loading threads could give.
    return 104 if warpgroups == 1 else 40


def multiply_registers(warpgroups: int) -> int:
    """Registers a multiplying thread may hold once the loading threads gave theirs back."""
    # A block gets what its threads were launched with, 8 at a time, out of 65536.
    at_launch = (warpgroups + 1) * min(248, 512 // (warpgroups + 1) // 8 * 8)
    return min(240, (at_launch - load_registers(warpgroups)) // warpgroups // 8 * 8)
