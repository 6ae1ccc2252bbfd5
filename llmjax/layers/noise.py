"""Gumbel noise that depends on (seed, position, token id) and on nothing else.

`jax.random` draws a whole array from one key, so its bits depend on the array's shape: on how
the vocabulary is sharded and on who else is in the batch. Here each number is a block of a
counter-based cipher, so that a shard computes exactly its own part.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, UInt32

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_KEY_PARITY = 0x1BD11BDA


def gumbel(
    seeds: UInt32[Array, " rows"],
    positions: Int32[Array, " rows"],
    token_ids: Int32[Array, " vocab"],
) -> Float32[Array, "rows vocab"]:
    """Standard Gumbel noise for each row and token.

    Two rows with the same seed and position get the same noise.
    """
    with jax.named_scope("gumbel"):
        key = (seeds[:, None], positions[:, None].astype(jnp.uint32))
        counter = (token_ids[None].astype(jnp.uint32), jnp.zeros((1, 1), jnp.uint32))
        high, low = threefry2x32(key, counter)
        # A token wins by a *large* Gumbel number, that is by a uniform number near zero here.
        # There float32 resolves 64 random bits down to 2**-65, whereas -log(-log(u)) with 24 bits
        # could never draw a token that is 2**-24 times as likely as the others.
        uniform = high.astype(jnp.float32) * 2.0**-32 + (low.astype(jnp.float32) + 0.5) * 2.0**-64
        # Rounding may reach 1, whose logarithm is infinite.
        return -jnp.log(-jnp.log1p(-jnp.minimum(uniform, 1 - 2.0**-24)))


def threefry2x32(
    key: tuple[UInt32[Array, "..."], UInt32[Array, "..."]],
    counter: tuple[UInt32[Array, "..."], UInt32[Array, "..."]],
) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
    """The cipher behind `jax.random`, on arrays that broadcast: 64 random bits an element.

    Written out so that XLA fuses it with its consumer; JAX's own primitive is a call of its own
    on a GPU and would write its inputs and outputs to memory.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011 (20 rounds).
    """
    keys = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(_KEY_PARITY))
    x, y = counter[0] + keys[0], counter[1] + keys[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x = x + y
            y = ((y << rotation) | (y >> (32 - rotation))) ^ x
        x = x + keys[(group + 1) % 3]
        y = y + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x, y
