"""Head slots: key/value heads repeated or padded, query heads regrouped, so that ranks divide them.

Where key/value heads are fewer than the ranks or do not divide over them, a head is stored in
several slots, or a slot stays empty; each rank then holds the key/value head that its queries
need. An empty query slot has zero weights on both sides of attention, so results are exact.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadSlots:
    """Which head each slot holds; -1 is an empty slot."""

    kv: np.ndarray
    """[kv_slots] key/value head."""
    q: np.ndarray
    """[kv_slots, group] query heads that read the slot."""

    @property
    def num_kv(self) -> int:
        """Key/value slots."""
        return self.q.shape[0]

    @property
    def group(self) -> int:
        """Query slots of a key/value slot."""
        return self.q.shape[1]


def assign_head_slots(num_heads: int, num_kv_heads: int, ranks: int) -> HeadSlots:
    """The cheapest slots that divide over the ranks.

    The cost counts query slots once and key/value slots twice: both are computed, the latter are
    also cached. 9 query and 3 key/value heads become 12 and 4 slots on 2 or 4 ranks, 16 and 8 on 8.
    """
    heads_per_kv = num_heads // num_kv_heads
    best: tuple[int, int, int] | None = None
    for group in range(1, heads_per_kv + 1):
        slots_per_kv = -(-heads_per_kv // group)
        kv_slots = -(-num_kv_heads * slots_per_kv // ranks) * ranks
        candidate = (kv_slots * (group + 2), kv_slots, group)
        best = min(best, candidate) if best else candidate
    assert best is not None
    _, kv_slots, group = best
    kv = np.full(kv_slots, -1)
    q = np.full((kv_slots, group), -1)
    slot = 0
    for head in range(num_kv_heads):
        for first in range(0, heads_per_kv, group):
            held = np.arange(first, min(first + group, heads_per_kv))
            kv[slot], q[slot, : len(held)] = head, head * heads_per_kv + held
            slot += 1
    return HeadSlots(kv=kv, q=q)
