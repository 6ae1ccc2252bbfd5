"""Context parallelism: several ranks share the tokens and the keys of every sequence.

The tokens of a step are dealt to the ranks like cards, in zigzag: 0 1 2 3 3 2 1 0 0 1 ... So all
ranks have equally many, early and late ones of every request, and equal work under the causal
mask, whatever the requests' lengths are (Striped Attention, Brandon et al., 2023; the zigzag takes
away what the stripes' last rank has more).

Keys and values stay on their ranks: page p of a sequence lies on rank p mod ranks. Prefill passes
the keys of new tokens round a ring (Ring Attention, Liu et al., 2023), each rank stores those of
its own pages as they come by, and no rank ever holds those of a whole sequence. What is cached
already is read where it lies, by all queries, and what the ranks find is merged by its log-sum-exp
(as in Helix parallelism, Bhatia et al., 2025): so decode is done, and what a prefill has cached.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int, Shaped

from llmjax.parallel.collectives import (
    Axes,
    all_gather,
    all_to_all,
    axis_index,
    axis_size,
    island,
    ppermute,
    psum,
)
from meshes import Rules


class Attended(NamedTuple):
    """What attention to a part of the keys gave."""

    out: Float[Array, "tokens heads dim"]
    lse: Float32[Array, "tokens heads"]
    """Log-sum-exp of the scores; -inf where no key is visible, and `out` is 0."""


def deal(count: int, ranks: int) -> np.ndarray:
    """The tokens of each rank, [ranks, count / ranks] in rising order; `ranks` divides `count`."""
    rounds = np.arange(count).reshape(-1, ranks)
    rounds[1::2] = rounds[1::2, ::-1]
    return rounds.T


@dataclass(frozen=True)
class TokenDeal:
    """How the tokens of a step lie on context ranks: decode and prefill tokens are dealt apart."""

    decodes: int
    """Decode tokens of a batch rank."""
    prefills: int
    """Prefill tokens of a batch rank."""
    ranks: int
    """Context ranks; they divide both."""

    @property
    def own_decodes(self) -> int:
        """Decode tokens of each rank, which come before its prefill tokens."""
        return self.decodes // self.ranks

    @cached_property
    def held(self) -> np.ndarray:
        """Tokens of each rank, [ranks, tokens of a rank]."""
        prefills = self.decodes + deal(self.prefills, self.ranks)
        return np.concatenate([deal(self.decodes, self.ranks), prefills], axis=1)

    @cached_property
    def place(self) -> np.ndarray:
        """Where each token lies in the tokens of all ranks beside each other."""
        return np.argsort(self.held.reshape(-1))

    def take(self, x: Shaped[Array, "tokens *rest"], rank: Array | int) -> Array:
        """A rank's part of an array over all tokens."""
        if self.ranks == 1:
            return x
        return x[jnp.asarray(self.held)[rank]]


def restore(
    x: Shaped[Array, "tokens *rest"], tokens: TokenDeal, *, rules: Rules
) -> Shaped[Array, "tokens *rest"]:
    """An array over "tokens" in the order before the deal, whole on the context ranks."""
    axes = rules.axes("context")

    def body(x: Array) -> Array:
        return x if tokens.ranks == 1 else all_gather(x, axes)[tokens.place]

    rest = (None,) * (x.ndim - 1)
    return island(
        body, in_specs=rules.spec("tokens", *rest), out_specs=rules.spec("requests", *rest)
    )(x)


def select_tokens(
    x: Float[Array, "tokens embed"],
    index: Int[Array, "rows"],
    tokens: TokenDeal,
    *,
    rules: Rules,
) -> Float[Array, "rows embed"]:
    """What rows sample from; `index` counts the own batch rank's tokens before the deal."""
    axes = rules.axes("context")

    def body(x: Array, index: Array) -> Array:
        if tokens.ranks == 1:
            return x[index]
        rank, local = jnp.divmod(jnp.asarray(tokens.place)[index], x.shape[0])
        return psum(jnp.where((rank == axis_index(axes))[:, None], x[local], 0), axes)

    return island(
        body,
        in_specs=(rules.spec("tokens", None), rules.spec("requests")),
        out_specs=rules.spec("requests", None),
    )(x, index)


# Inside an island.


@dataclass(frozen=True)
class PageDeal:
    """Page p of a sequence lies on rank p mod ranks."""

    page: int
    """Positions of a page."""
    ranks: int

    def count(self, lengths: Int[Array, "*rows"], rank: Array | int) -> Int[Array, "*rows"]:
        """How many of the first `lengths` positions a rank holds."""
        whole, rest = jnp.divmod(lengths, self.page * self.ranks)
        return whole * self.page + jnp.clip(rest - rank * self.page, 0, self.page)

    def own(self, slots: Int[Array, " tokens"], rank: Array | int) -> Int[Array, " tokens"]:
        """The rank's own page * page_size + offset of each token; -1 for those of other ranks.

        `slots` count blocks of one page from each rank: block * positions of a block + offset.
        """
        block, offset = jnp.divmod(slots, self.page * self.ranks)
        mine = (slots >= 0) & (offset // self.page == rank)
        return jnp.where(mine, block * self.page + offset % self.page, -1)


def pass_on(x: Array, axes: Axes) -> Array:
    """Gives this rank's array to the next one in the ring, and takes that of the one before."""
    ranks = axis_size(axes)
    return ppermute(x, axes, [(rank, (rank + 1) % ranks) for rank in range(ranks)])


def collect(x: Shaped[Array, "dealt *rest"], axes: Axes) -> Shaped[Array, "tokens *rest"]:
    """All tokens of which each rank was dealt a part, in the order before the deal."""
    ranks = axis_size(axes)
    return all_gather(x, axes)[np.argsort(deal(x.shape[0] * ranks, ranks).reshape(-1))]


def merge_ranks(parts: Attended, axes: Axes) -> Attended:
    """Each rank's dealt part of the tokens, from what every rank found for all of them."""
    out, lse = parts
    count, ranks, dim = out.shape[0], axis_size(axes), out.shape[-1]
    # One exchange of bits for both, so that outputs travel in their own type.
    bits = jnp.dtype(f"uint{8 * out.dtype.itemsize}")
    lse_bits = lax.bitcast_convert_type(lse, bits).reshape(*lse.shape, -1)
    sent = jnp.concatenate([lax.bitcast_convert_type(out, bits), lse_bits], axis=-1)
    sent = sent[deal(count, ranks).reshape(-1)]
    found = all_to_all(sent, axes).reshape(ranks, count // ranks, *sent.shape[1:])
    outs = lax.bitcast_convert_type(found[..., :dim], out.dtype).astype(jnp.float32)
    lse_bits = found[..., dim:] if out.dtype.itemsize < 4 else found[..., dim]
    return merge(outs, lax.bitcast_convert_type(lse_bits, jnp.float32))


def merge(
    outs: Float32[Array, "parts tokens heads dim"], lses: Float32[Array, "parts tokens heads"]
) -> Attended:
    """Attention to all keys, from attention to disjoint parts of them."""
    highest = lses.max(0)
    # Where no part has a visible key, exp(-inf - -inf) would be NaN.
    shift = jnp.where(jnp.isneginf(highest), 0.0, highest)
    weights = jnp.exp(lses - shift)
    total = weights.sum(0)
    out = (outs * weights[..., None]).sum(0) / jnp.where(total == 0, 1.0, total)[..., None]
    return Attended(out, shift + jnp.log(total))


def add_sinks(
    attended: Attended, sinks: Float[Array, " heads"]
) -> Float32[Array, "tokens heads dim"]:
    """Lets each head's sink take its part of the weights, as a key without a value would."""
    out, lse = attended
    return out * jax.nn.sigmoid(lse - sinks)[..., None]
