"""Choosing experts on Hopper in one kernel, which XLA does in a string of small ones.

A warp holds the experts of one token, or of several where 32 does not divide them, and finds the
best, the first that is as good, and masks it, once for each choice. Values are compared as integers
of the same order, and experts counted from the last: a warp has one instruction for the largest of
32 integers, and none for the largest float or the smallest integer that Mosaic knows.

Where an integer is taken or masked out, `where` has the array first: Mosaic takes the result for as
unsigned as a constant in its place.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float32, Int32

from pallas_kernels.grouped_gemm.lanes_sm90 import (
    BY_LANE,
    check_columns,
    lanes_of,
    row_layout,
    rows_of,
)
from pallas_kernels.grouped_gemm.route import Router
from pallas_kernels.registers import store_registers

MAX_HELD = 64
"""Experts of one token that a lane may hold."""
REMOVED = -0x80000000
"""Below whatever a float is as an integer."""
MINUS_INFINITY = -0x7F800001
"""What minus infinity is as an integer."""


def route_tokens(
    logits: Float32[Array, "tokens experts"],
    correction: Float32[Array, " experts"] | None,
    is_real: Bool[Array, " tokens"] | None,
    router: Router,
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Int32[Array, "tokens top_k"], Float32[Array, "tokens top_k"]]:
    """Experts of each token, in falling order of choice, and their gates.

    Raises NotImplementedError for what the kernel does not cover.
    """
    check_covered(logits, router)
    tokens, experts = logits.shape
    block = block_rows(experts, router)
    kernel = plgpu.kernel(
        functools.partial(
            _kernel,
            block=block,
            router=router,
            corrected=correction is not None,
            padded=is_real is not None,
        ),
        out_type=(
            jax.ShapeDtypeStruct((tokens, router.top_k), jnp.int32),
            jax.ShapeDtypeStruct((tokens, router.top_k), jnp.float32),
        ),
        # Whole blocks, then the tokens that are left, each on its own.
        grid=(tokens // block + tokens % block,),
        grid_names=("block",),
        scratch_types=(),
        compiler_params=BY_LANE,
        kernel_name="route_tokens",
        interpret=interpret,
    )
    optional = [] if correction is None else [correction]
    if is_real is not None:
        optional.append(is_real.astype(jnp.int32))
    return kernel(logits, *optional)


def check_covered(logits: Array, router: Router) -> None:
    """Raises NotImplementedError, with the reason, for what the kernel does not cover."""
    tokens, experts = logits.shape
    if not tokens:
        raise NotImplementedError("needs at least one token")
    width = _group_width(experts, router)
    check_columns(width, "experts in a group" if router.is_grouped else "experts")
    if experts // lanes_of(width) > MAX_HELD:
        raise NotImplementedError(
            f"needs at most {MAX_HELD} experts a lane, got {experts} on {lanes_of(width)} lanes"
        )


def block_rows(experts: int, router: Router) -> int:
    """Tokens of a block."""
    return rows_of(_group_width(experts, router))


def _group_width(experts: int, router: Router) -> int:
    return experts // router.num_groups if router.is_grouped else experts


def _kernel(logits_ref, *refs, block: int, router: Router, corrected: bool, padded: bool):
    *optional, experts_ref, gates_ref = refs
    correction_ref = optional.pop(0) if corrected else None
    real_ref = optional.pop(0) if padded else None
    tokens, experts = logits_ref.shape
    index, whole = lax.axis_index("block"), tokens // block
    layout = row_layout(_group_width(experts, router))
    load = functools.partial(plgpu.load, optimized=False)

    def route(rows, layout, of_token, of_expert):
        """Routes a block of tokens or one, with layouts for all values and for one of each."""
        logits = load(logits_ref.at[rows], layout=layout)
        correction = None
        if correction_ref is not None:
            correction = load(correction_ref.at[:], layout=of_expert)
            axis = logits.ndim - 1
            correction = lax.broadcast_in_dim(correction, logits.shape, (axis,))
            correction = plgpu.layout_cast(correction, layout)
        chosen, gates = _choose(logits, correction, layout, router)
        is_real = None if real_ref is None else load(real_ref.at[rows], layout=of_token) != 0
        for choice, (expert, gate) in enumerate(zip(chosen, gates, strict=True)):
            if is_real is not None:
                expert = jnp.where(is_real, expert, -1)
            store_registers(experts_ref.at[rows, choice], expert)
            store_registers(gates_ref.at[rows, choice], gate)

    @pl.when(index < whole)
    def _():
        route(pl.ds(index * block, block), layout, layout.reduce(1), layout.reduce(0))

    if tokens % block:

        @pl.when(index >= whole)
        def _():
            # All warps do the same.
            route(whole * block + index - whole, layout.reduce(0), None, layout.reduce(0))


def _choose(logits, correction, layout, router: Router) -> tuple[list, list]:
    """Experts and gates, choice by choice; `layout` is that of the logits."""
    scores = _scores(logits, layout, router.scoring)
    keys = _to_keys(scores if correction is None else scores + correction)
    last = keys.shape[-1] - 1
    rank = last - plgpu.broadcasted_iota(jnp.int32, keys.shape, keys.ndim - 1, layout=layout)
    if router.is_grouped:
        keys = _keep_groups(keys, rank, layout, router)
    chosen, gates = [], []
    for _ in range(router.top_k):
        best, highest, keys = _take_best(keys, rank, layout)
        if correction is not None:
            here = rank == _spread(highest, layout, rank)
            best = jnp.max(jnp.where(here, _to_keys(scores), REMOVED), axis=-1)
        chosen.append(last - highest)
        gates.append(_to_floats(best))
    if router.normalize:
        # Sigmoids may all be zero.
        total = sum(gates[1:], start=gates[0]) + 1e-20
        gates = [gate / total for gate in gates]
    return chosen, [gate * router.scaling_factor for gate in gates]


def _scores(logits, layout, scoring: str):
    if scoring == "sigmoid":
        return 1 / (1 + jnp.exp(-logits))
    largest = _to_floats(jnp.max(_to_keys(logits), axis=-1))
    powers = jnp.exp(logits - _spread(largest, layout, logits))
    return powers / _spread(jnp.sum(powers, axis=-1), layout, logits)


def _keep_groups(keys, rank, layout, router: Router):
    """Puts the experts of all but the best groups where no choice is."""
    size = keys.shape[-1] // router.num_groups
    groups = [slice(first, first + size) for first in range(0, keys.shape[-1], size)]
    worth = []
    for group in groups:
        left, best = keys[..., group], []
        for _ in range(router.group_best):
            largest, _, left = _take_best(left, rank[..., group], layout)
            best.append(_to_floats(largest))
        worth.append(sum(best[1:], start=best[0]))
    kept = []
    for number, (group, mine) in enumerate(zip(groups, worth, strict=True)):
        # Of equal groups the first are kept.
        better = [
            (other >= mine if before < number else other > mine).astype(jnp.int32)
            for before, other in enumerate(worth)
            if before != number
        ]
        is_kept = sum(better[1:], start=better[0]) < router.top_groups
        is_kept = _spread(is_kept.astype(jnp.int32), layout, keys[..., group]) != 0
        kept.append(jnp.where(is_kept, keys[..., group], MINUS_INFINITY))
    return jnp.concatenate(kept, axis=-1)


def _take_best(keys, rank, layout):
    """The largest key of each token, the highest rank that has it, and the keys without it."""
    best = jnp.max(keys, axis=-1)
    highest = jnp.max(jnp.where(keys == _spread(best, layout, keys), rank, -1), axis=-1)
    return best, highest, jnp.where(rank != _spread(highest, layout, keys), keys, REMOVED)


def _spread(x, layout, like):
    """One value a token for each of its experts."""
    if x.ndim == 0:
        return jnp.broadcast_to(x, like.shape)
    return plgpu.layout_cast(lax.broadcast_in_dim(x, like.shape, (0,)), layout)


def _to_keys(x):
    """Floats as integers of the same order."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _to_floats(keys):
    """The floats of which these are the keys."""
    return lax.bitcast_convert_type(jnp.where(keys < 0, keys ^ 0x7FFFFFFF, keys), jnp.float32)
