"""An engine that compiles quickly, and what its steps send."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from llmjax.explore.collectives import Collective

SMALL: dict[str, Any] = {
    "max_batch_size": 4,
    "max_num_tokens": 32,
    "max_seq_len": 64,
    "kv_cache_max_tokens": 256,
    "tokens_per_block": 4,
    "batch_buckets": (4,),
    "token_buckets": (32,),
}
"""Two programs a plan: compiling them is what these tests cost."""

Sent = Counter[tuple[str, str, tuple[str, ...]]]
"""How often a part of the model uses a kind of collective over these mesh axes."""


def count_sent(collectives: Iterable[Collective]) -> Sent:
    """What embedding and layers send in every step; the head and the sampler are left out."""
    found: Sent = Counter()
    for each in collectives:
        if each.part in ("embed", "attention", "mlp"):
            assert each.when == "always"
            found[each.part, each.kind, each.axes] += each.count
    return found
