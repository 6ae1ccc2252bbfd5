"""Expert dispatch: brings tokens to the ranks that hold their experts, and the results back.

Three ways give the same result. `allreduce` and `allgather` compute on every rank all tokens of
the expert group and add up; they differ where tokens are replicated, in one reduction or a
reduce-scatter and an all-gather. `all_to_all` sends a token once to each rank that holds one of its
experts. None drops a token: buffers are as large as the worst routing needs, and `max_num_tokens`
bounds them. Sums are float32 within a rank; between ranks they travel in the type of the tokens.

Source: "Expert Parallelism" of TensorRT-LLM; tensor ranks inside an expert work with all three.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from llmjax.parallel.collectives import (
    Axes,
    all_gather,
    all_to_all,
    axis_index,
    axis_size,
    island,
    own_part,
    psum,
    psum_scatter,
)
from meshes import Rules
from pallas_kernels import room_for, sort_rows

Dispatch = Literal["allreduce", "allgather", "all_to_all"]
Exchange = Literal["padded", "ragged"]
"""How `all_to_all` sends: whole buffers, or only their rows (`lax.ragged_all_to_all`, CUDA)."""

Compute = Callable[[Array, Array | None, Array, Array, Any, Array], Array]
"""(x [m, embed], x_of_row [n] or None, group_sizes [local_slots], local_slot_of_row [n], params,
layer) -> [n, embed].

Row r is x[x_of_row[r]], or x[r] without an index. Rows are sorted by slot, as `sort_rows` of the
`row_alignment` leaves them; those of no group are padding, may be anything, and may come back as
anything. Results are partial sums over the axes of expert_ffn.
"""

ComputeUnsorted = Callable[[Array, Array, Any, Array], Array | None]
"""(x [tokens, embed], local_slots [tokens, top_k], params, layer) -> [tokens, top_k, embed].

The same for tokens as they come, -1 for no slot; None where sorted rows are the better way.
"""


class Tokens(NamedTuple):
    """Tokens and where they go."""

    x: Float[Array, "tokens embed"]
    slots: Int[Array, "tokens top_k"]
    gates: Float[Array, "tokens top_k"]


Experts = Callable[[Tokens], Array]
"""The results of this rank's experts for some tokens, summed by token."""


class ExpertGroup(NamedTuple):
    """The mesh axes over which the experts of a layer lie, and how tokens lie on them."""

    experts: Axes
    """Axes of the expert slots."""
    split: Axes
    """Axes of slots and features over which tokens are split."""
    whole: Axes
    """Axes of slots and features over which tokens are replicated."""

    @classmethod
    def of(cls, rules: Rules) -> "ExpertGroup":
        """The group that the rules of a plan give."""
        experts, tokens = rules.axes("experts"), rules.axes("tokens")
        group = (*experts, *rules.axes("expert_ffn"))
        split = tuple(axis for axis in tokens if axis in group)
        return cls(experts, split, tuple(axis for axis in group if axis not in split))


def dispatch_experts(
    x: Float[Array, "tokens embed"],
    slots: Int[Array, "tokens top_k"],
    gates: Float[Array, "tokens top_k"],
    params: Any,
    specs: Any,
    layer: Int[Array, ""],
    compute: Compute,
    *,
    method: Dispatch,
    rules: Rules,
    max_num_tokens: int | None = None,
    scale_inputs: bool = False,
    exchange: Exchange = "padded",
    compute_unsorted: ComputeUnsorted | None = None,
    row_alignment: int = 1,
) -> Float[Array, "tokens embed"]:
    """The sum over each token's expert slots of gate times what the expert makes of the token.

    The slots of one token differ; -1 is no slot. `params` is a tree of [layers, slots, ...] with
    its PartitionSpecs. With `scale_inputs` the gates multiply what experts get, not what they give
    (Llama 4); otherwise `compute_unsorted`, if there is one, is asked first. More than
    `max_num_tokens` tokens on a rank go in several rounds. `compute` gets the rows of each slot
    from a multiple of `row_alignment` on.
    """
    group = ExpertGroup.of(rules)
    num_slots = jax.tree.leaves(params)[0].shape[1] // rules.size("experts")
    send = {
        "allreduce": _allreduce,
        "allgather": _allgather,
        "all_to_all": partial(_all_to_all, num_slots=num_slots, exchange=exchange),
    }[method]

    def body(x: Array, slots: Array, gates: Array, params: Any, layer: Array) -> Array:
        def experts(tokens: Tokens) -> Array:
            local = tokens.slots - axis_index(group.experts) * num_slots
            if compute_unsorted is not None and not scale_inputs:
                held = (local >= 0) & (local < num_slots)
                pairs = compute_unsorted(tokens.x, jnp.where(held, local, -1), params, layer)
                if pairs is not None:
                    return add_pairs(tokens, pairs, held)
            rows = sort_by_slot(local, num_slots, row_alignment)
            return run_rows(tokens, rows, params, layer, compute, scale_inputs)

        one_round = partial(send, experts=experts, group=group)
        return _in_rounds(one_round, Tokens(x, slots, gates), max_num_tokens)

    tokens = rules.spec("tokens", None)
    with jax.named_scope(f"experts_{method}"):
        return island(
            body, in_specs=(tokens, tokens, tokens, specs, rules.spec()), out_specs=tokens
        )(x, slots, gates, params, layer)


class SortedPairs(NamedTuple):
    """Pairs of a token and one of its slots on this rank, sorted by slot."""

    token: Int[Array, "rows"]
    choice: Int[Array, "rows"]
    """Which of the token's slots."""
    slot: Int[Array, "rows"]
    """Local slot; any for padding."""
    sizes: Int[Array, "slots"]
    """Rows of each slot; all others are padding."""
    row_of_pair: Int[Array, "tokens top_k"]
    """Where each pair stands; 0 for those that are not held."""
    held: Shaped[Array, "tokens top_k"]
    """Whether the pair's slot is on this rank."""


def sort_by_slot(
    local_slots: Int[Array, "tokens top_k"], num_slots: int, row_alignment: int
) -> SortedPairs:
    """Sorts the pairs whose local slot is in [0, num_slots); there is room for the worst case."""
    count, top_k = local_slots.shape
    held = (local_slots >= 0) & (local_slots < num_slots)
    flat = jnp.where(held, local_slots, num_slots).reshape(-1)
    # Not `flat`: sorting puts other slots last anyway, and needs no kernel before it.
    flat_slots = local_slots.reshape(-1)
    order, place, sizes = sort_rows(flat_slots, num_slots, row_alignment=row_alignment)
    # The slots of a token differ, so at most this many are here.
    kept = order[: room_for(count * min(top_k, num_slots), num_slots, row_alignment)]
    return SortedPairs(
        token=kept // top_k,
        choice=kept % top_k,
        slot=jnp.minimum(flat[kept], num_slots - 1),
        sizes=sizes,
        row_of_pair=jnp.where(held, place.reshape(count, top_k), 0),
        held=held,
    )


def run_rows(
    tokens: Tokens,
    rows: SortedPairs,
    params: Any,
    layer: Int[Array, ""],
    compute: Compute,
    scale_inputs: bool,
) -> Float[Array, "tokens embed"]:
    """Runs this rank's experts on the rows and adds up those of each token."""
    x, x_of_row = tokens.x, rows.token
    if scale_inputs:
        scale = tokens.gates[rows.token, rows.choice].astype(jnp.float32)
        inputs = x.at[rows.token].get(mode="promise_in_bounds")
        x, x_of_row = (inputs * scale[:, None]).astype(x.dtype), None
    results = compute(x, x_of_row, rows.sizes, rows.slot, params, layer)
    # Gathered by pair, not scattered by row: the order of the sum is then always the same.
    return add_pairs(tokens, results[rows.row_of_pair], rows.held, gated=not scale_inputs)


def add_pairs(
    tokens: Tokens,
    pairs: Float[Array, "tokens top_k embed"],
    held: Shaped[Array, "tokens top_k"],
    *,
    gated: bool = True,
) -> Float[Array, "tokens embed"]:
    """The sum of what a token's held slots made of it, each times its gate if `gated`."""
    wide = pairs.astype(jnp.float32)
    if gated:
        wide = wide * tokens.gates[..., None]
    # Whatever stands in the place of others, NaN too, must not come near the sum.
    return jnp.where(held[..., None], wide, 0).sum(1).astype(tokens.x.dtype)


def _allreduce(tokens: Tokens, *, experts: Experts, group: ExpertGroup) -> Array:
    sums = experts(_gather(tokens, group.split))
    # The scatter comes first: less is left to reduce.
    return psum(psum_scatter(sums, group.split), group.whole)


def _allgather(tokens: Tokens, *, experts: Experts, group: ExpertGroup) -> Array:
    sums = psum_scatter(experts(_gather(tokens, group.split)), group.split)
    count = sums.shape[0]
    padded = _pad(sums, -(-count // axis_size(group.whole)) * axis_size(group.whole), 0)
    return all_gather(psum_scatter(padded, group.whole), group.whole)[:count]


def _all_to_all(
    tokens: Tokens, *, experts: Experts, group: ExpertGroup, num_slots: int, exchange: Exchange
) -> Array:
    """The tensor ranks of an expert see the same tokens, each expert rank its own part of them."""
    gathered = tuple(axis for axis in group.split if axis not in group.experts)
    reduced = tuple(axis for axis in group.whole if axis not in group.experts)
    shared = tuple(axis for axis in group.whole if axis in group.experts)
    tokens = _gather(tokens, gathered)
    count, ranks = tokens.x.shape[0], axis_size(shared)
    tokens = _pad_tokens(tokens, -(-count // ranks) * ranks)
    own = Tokens._make(own_part(part, shared) for part in tokens)
    sums = _visit_experts(own, experts, num_slots, group.experts, exchange)
    sums = all_gather(psum(sums, reduced), shared)[:count]
    return psum_scatter(sums, gathered)


def _visit_experts(
    tokens: Tokens, experts: Experts, num_slots: int, axes: Axes, exchange: Exchange
) -> Array:
    """Sends each token once to each rank that holds one of its slots, and adds up what returns."""
    ranks = axis_size(axes)
    if ranks == 1:
        return experts(tokens)
    (count, top_k), embed = tokens.slots.shape, tokens.x.shape[1]
    # Of slot -1 the owner is -1, no rank, whatever num_slots is.
    owner = tokens.slots // num_slots
    goes = jnp.any(owner[..., None] == jnp.arange(ranks), axis=1)
    place = jnp.cumsum(goes, axis=0) - 1
    sent = goes.sum(0, dtype=jnp.int32)
    arriving = all_to_all(sent, axes)
    move = partial(_exchange, axes=axes, exchange=exchange)

    # Integers are scattered and rows gathered, which is one pass over the wide array.
    rank_of_block = jnp.broadcast_to(jnp.arange(ranks), goes.shape)
    token_of_row = jnp.full((ranks, count), count)
    token_of_row = token_of_row.at[rank_of_block, jnp.where(goes, place, count)].set(
        jnp.arange(count)[:, None], mode="drop"
    )
    message = _pack(tokens)
    empty = jnp.iinfo(message.dtype).max
    blocks = message.at[token_of_row].get(mode="fill", fill_value=empty)
    arrived = move(blocks, sent, arriving, fill=empty).reshape(ranks * count, -1)
    results = experts(_unpack(arrived, like=tokens))
    returned = move(results.reshape(ranks, count, embed), arriving, sent, fill=0)

    # The ranks that each token went to: the largest of zeros and ones, the lower rank first.
    visited, rank = lax.top_k(goes.astype(jnp.int32), min(top_k, ranks))
    parts = returned[rank, jnp.take_along_axis(place, rank, axis=1)].astype(jnp.float32)
    return jnp.where(visited[..., None] == 1, parts, 0).sum(1).astype(tokens.x.dtype)


def _exchange(
    blocks: Shaped[Array, "ranks capacity width"],
    sent: Int[Array, "ranks"],
    arriving: Int[Array, "ranks"],
    *,
    axes: Axes,
    fill: int,
    exchange: Exchange,
) -> Shaped[Array, "ranks capacity width"]:
    """Block r goes to rank r, and block r of the result came from there.

    `sent` and `arriving` count the rows at the head of each block that matter. "padded" moves the
    others too; "ragged" leaves `fill` in their place.
    """
    if exchange == "padded":
        return all_to_all(blocks, axes)
    ranks, capacity, width = blocks.shape
    flat = blocks.reshape(ranks * capacity, width)
    starts = jnp.arange(ranks, dtype=jnp.int32) * capacity
    here = jnp.full(ranks, axis_index(axes) * capacity, jnp.int32)
    received = lax.ragged_all_to_all(
        flat, jnp.full_like(flat, fill), starts, sent, here, arriving, axis_name=axes
    )
    return received.reshape(blocks.shape)


def _gather(tokens: Tokens, axes: Axes) -> Tokens:
    if axis_size(axes) == 1:
        return tokens
    return _unpack(all_gather(_pack(tokens), axes), like=tokens)


def _pack(tokens: Tokens) -> Shaped[Array, "tokens width"]:
    """One row of bits a token, so that one collective moves it all; all ones mean slot -1."""
    bits = _bits(tokens.x.dtype)
    parts = (lax.bitcast_convert_type(part, bits) for part in tokens)
    return jnp.concatenate([part.reshape(part.shape[0], -1) for part in parts], axis=1)


def _unpack(message: Shaped[Array, "rows width"], *, like: Tokens) -> Tokens:
    parts, start = [], 0
    for part in like:
        ratio = part.dtype.itemsize // message.dtype.itemsize
        length = part.shape[1] * ratio
        columns = message[:, start : start + length]
        if ratio > 1:
            columns = columns.reshape(-1, part.shape[1], ratio)
        parts.append(lax.bitcast_convert_type(columns, part.dtype))
        start += length
    return Tokens._make(parts)


def _bits(dtype: Any) -> jnp.dtype:
    return jnp.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}")


def _in_rounds(one_round: Callable[[Tokens], Array], tokens: Tokens, limit: int | None) -> Array:
    """Runs equal chunks of at most `limit` tokens one after the other."""
    count, embed = tokens.x.shape
    if limit is None or count <= limit:
        return one_round(tokens)
    rounds = -(-count // limit)
    size = -(-count // rounds)
    padded = _pad_tokens(tokens, rounds * size)
    chunks = Tokens._make(part.reshape(rounds, size, -1) for part in padded)
    return lax.map(one_round, chunks).reshape(rounds * size, embed)[:count]


def _pad_tokens(tokens: Tokens, count: int) -> Tokens:
    """Adds tokens without a slot."""
    return Tokens(
        _pad(tokens.x, count, 0), _pad(tokens.slots, count, -1), _pad(tokens.gates, count, 0)
    )


def _pad(x: Array, count: int, fill: int) -> Array:
    return jnp.pad(x, ((0, count - x.shape[0]), (0, 0)), constant_values=fill)
