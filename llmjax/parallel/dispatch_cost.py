"""What an expert dispatch costs: bytes that a device sends, bytes of its buffers, and the cheapest.

Both are worked out from shapes, no device is asked. Rings are assumed: a reduce-scatter or
all-gather of r ranks sends r - 1 parts, an all-reduce both.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import get_args

from llmjax.parallel.collectives import Axes
from llmjax.parallel.expert_dispatch import Dispatch, Exchange, ExpertGroup
from meshes import Rules
from pallas_kernels import preferred_row_alignment, room_for

LATENCY_BYTES = 2**20
"""A collective takes as long as sending this many bytes, on top of what it sends.

An assumption, not a measurement: 5 microseconds at 200 GB/s.
"""


@dataclass(frozen=True, kw_only=True)
class ExpertLoad:
    """A layer of experts and the tokens that come to it in a step."""

    tokens: int
    """Tokens of a rank, as they lie before the dispatch."""
    embed: int
    """Features of a token."""
    ffn: int
    """Features inside an expert."""
    num_slots: int
    """Expert slots of all ranks."""
    top_k: int
    """Slots of a token."""
    itemsize: int = 2
    """Bytes of an activation."""
    max_num_tokens: int | None = None
    """Tokens of a rank that one round takes; None: all."""
    exchange: Exchange = "padded"
    """How `all_to_all` sends."""

    @property
    def rounds(self) -> int:
        """Rounds in which the tokens go."""
        return -(-self.tokens // (self.max_num_tokens or self.tokens))

    @property
    def tokens_a_round(self) -> int:
        """Tokens of a rank and round, padding included."""
        return -(-self.tokens // self.rounds)

    @property
    def result_bytes(self) -> int:
        """Bytes of one token's result."""
        return self.embed * self.itemsize

    @property
    def message_bytes(self) -> int:
        """Bytes of one token with its slots and gates."""
        return self.result_bytes + 8 * self.top_k


def choose_dispatch(load: ExpertLoad, *, rules: Rules) -> Dispatch:
    """The dispatch that sends least, each collective counted as `LATENCY_BYTES` more."""
    return min(get_args(Dispatch), key=partial(_cost, load=load, rules=rules))


def rows_a_slot(load: ExpertLoad, *, rules: Rules) -> float:
    """Rows that an expert slot gets in a round under even routing, whatever the dispatch."""
    return load.tokens_a_round * _Sizes.of(load, rules).split * load.top_k / load.num_slots


def sent_bytes(method: Dispatch, load: ExpertLoad, *, rules: Rules) -> int:
    """Bytes that a device sends for one layer; for "ragged", on average under even routing."""
    return sum(_collectives(method, load, rules))


def buffer_bytes(method: Dispatch, load: ExpertLoad, *, rules: Rules) -> int:
    """Bytes of a device's buffers for one layer, as if none shared memory.

    They are those of the worst routing. Gate, up and their product count as features of an expert,
    and tokens that a kernel fetches row by row as if they had been gathered.
    """
    sizes = _Sizes.of(load, rules)
    held = min(load.top_k, load.num_slots // sizes.experts)
    features = 3 * load.ffn // rules.size("expert_ffn")
    row = 2 * load.result_bytes + features * load.itemsize
    tokens, message, result = load.tokens_a_round, load.message_bytes, load.result_bytes
    alignment = preferred_row_alignment(rows_a_slot(load, rules=rules))
    slots = load.num_slots // sizes.experts
    # Rounds cut the tokens out of a copy, and put their results into a whole.
    copies = load.tokens * (message + result) if load.rounds > 1 else 0
    if method != "all_to_all" or sizes.experts == 1:
        seen = tokens * sizes.split
        rows = room_for(seen * held, slots, alignment)
        return copies + seen * (message + result) + rows * row
    gathered = tokens * sizes.split_ffn
    own = -(-gathered // sizes.whole_experts)
    seen = own * sizes.experts
    # Sent and arrived messages, the rows of the experts, results that go and that come back.
    rows = room_for(seen * held, slots, alignment)
    return copies + (gathered + 2 * seen) * (message + result) + rows * row


def largest_max_num_tokens(method: Dispatch, load: ExpertLoad, budget: int, *, rules: Rules) -> int:
    """The most tokens a round whose buffers fit into `budget` bytes; 0 where not even one does."""
    needed: Callable[[int], int] = partial(_bytes_of_rounds, method, load, rules)
    return bisect_right(range(1, load.tokens + 1), budget, key=needed)


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Ranks of the groups of an expert dispatch."""

    experts: int
    split: int
    whole: int
    split_ffn: int
    whole_ffn: int
    whole_experts: int

    @classmethod
    def of(cls, load: ExpertLoad, rules: Rules) -> "_Sizes":
        group, sizes = ExpertGroup.of(rules), rules.plan.sizes

        def size(axes: Axes, among: Axes) -> int:
            return prod(sizes[axis] for axis in axes if axis in among)

        ffn = rules.axes("expert_ffn")
        return cls(
            experts=size(group.experts, group.experts),
            split=size(group.split, group.split),
            whole=size(group.whole, group.whole),
            split_ffn=size(group.split, ffn),
            whole_ffn=size(group.whole, ffn),
            whole_experts=size(group.whole, group.experts),
        )


def _collectives(method: Dispatch, load: ExpertLoad, rules: Rules) -> list[int]:
    """Bytes that a device sends in each collective of all rounds."""
    sizes = _Sizes.of(load, rules)
    tokens, message, result = load.tokens_a_round, load.message_bytes, load.result_bytes
    if method == "all_to_all":
        gathered = tokens * sizes.split_ffn
        own = -(-gathered // sizes.whole_experts)
        visits = own * _ranks_visited(load, sizes)
        counts = [4 * (sizes.experts - 1)] if load.exchange == "ragged" else []
        sent = [
            (sizes.split_ffn - 1) * tokens * message,
            *counts,
            visits * message,
            visits * result,
            2 * (sizes.whole_ffn - 1) * own * result // sizes.whole_ffn,
            (sizes.whole_experts - 1) * own * result,
            (sizes.split_ffn - 1) * tokens * result,
        ]
    else:
        part = -(-tokens // sizes.whole)
        reduced = (sizes.whole - 1) * part * result
        sent = [(sizes.split - 1) * tokens * message, (sizes.split - 1) * tokens * result]
        sent += [2 * reduced] if method == "allreduce" else [reduced, reduced]
    return [round(bytes_sent) for bytes_sent in sent if bytes_sent] * load.rounds


def _ranks_visited(load: ExpertLoad, sizes: _Sizes) -> float:
    """Other ranks to which a token goes; for "ragged", on average under even routing."""
    if load.exchange == "padded":
        return float(sizes.experts - 1)
    elsewhere = load.num_slots - load.num_slots // sizes.experts
    missed = prod((elsewhere - i) / (load.num_slots - i) for i in range(load.top_k))
    return (sizes.experts - 1) * (1 - missed)


def _cost(method: Dispatch, load: ExpertLoad, rules: Rules) -> int:
    sent = _collectives(method, load, rules)
    return sum(sent) + LATENCY_BYTES * len(sent)


def _bytes_of_rounds(method: Dispatch, load: ExpertLoad, rules: Rules, limit: int) -> int:
    return buffer_bytes(method, replace(load, max_num_tokens=limit), rules=rules)
