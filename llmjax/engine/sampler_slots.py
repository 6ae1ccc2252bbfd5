"""What the sampler is told of a request: columns of each step, and its slot on the devices."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int32

from llmjax.distributed import place
from llmjax.engine.batch import sampling_columns
from llmjax.engine.request import Request
from llmjax.layers.sampler_state import (
    GENERATED,
    PROMPT,
    UNUSED,
    SamplerState,
    SlotContent,
    fill_slot,
    init_state,
)
from meshes import Rules

FILL_CHUNK = 1024
"""Token ids that one call of `fill_slot` takes."""
MAX_BIAS = 1024
"""Most entries of a request's logit bias."""
MAX_STOP_IDS = 64
"""Most stop tokens that `min_tokens` can hold back."""


class SamplerSlots:
    """Hands requests to the sampler; of those whose sampling needs a state it fills the slots."""

    def __init__(self, rules: Rules, mesh: Mesh, *, per_rank: int, processors: Sequence[str]):
        """`per_rank` slots belong to a batch rank; requests name their `processors`."""
        self.rules, self.per_rank, self.processors = rules, per_rank, list(processors)
        self._whole = rules.sharding(mesh)
        self._columns: dict[int, np.ndarray] = {}

    def empty(self, padded_vocab_size: int) -> SamplerState:
        """Slots that no request has filled."""
        return init_state(
            slots=self.rules.size("requests") * self.per_rank,
            padded_vocab_size=padded_vocab_size,
            max_bias=MAX_BIAS,
            max_stop_ids=MAX_STOP_IDS,
            rules=self.rules,
        )

    def compile(self, state: SamplerState) -> None:
        """Compiles the program that fills a slot: one for all requests."""
        fill = jax.jit(partial(fill_slot, rules=self.rules), donate_argnums=0)
        nothing = self._content(0, [], [], {}, frozenset(), reset=True)
        self._fill_slot = fill.lower(state, nothing).compile()

    def fill(self, state: SamplerState, request: Request) -> SamplerState:
        """Writes a request's tokens, biases and stop tokens into its slot; the state is donated."""
        assert request.rank is not None and request.slot is not None
        slot = request.rank * self.per_rank + request.slot
        ids = request.token_ids
        prompt = len(request.prompt_ids)
        kinds = [PROMPT] * prompt + [GENERATED] * (len(ids) - prompt)
        for start in range(0, len(ids), FILL_CHUNK):
            part = slice(start, start + FILL_CHUNK)
            content = self._content(
                slot,
                ids[part],
                kinds[part],
                request.params.logit_bias,
                request.stop_ids,
                reset=start == 0,
            )
            state = self._fill_slot(state, content)
        return state

    def columns(self, request: Request) -> Int32[np.ndarray, " columns"]:
        """What stays the same of a request in every step, made once."""
        columns = self._columns.get(request.id)
        if columns is None:
            names = request.params.logits_processors
            processors = sum(1 << self.processors.index(name) for name in names)
            columns = sampling_columns(request, processors=processors)
            self._columns[request.id] = columns
        return columns

    def forget(self, request: Request) -> None:
        """Drops what is kept of a request on the host."""
        self._columns.pop(request.id, None)

    def _content(
        self,
        slot: int,
        ids: Sequence[int],
        kinds: Sequence[int],
        bias: Mapping[int, float],
        stop_ids: frozenset[int],
        *,
        reset: bool,
    ) -> SlotContent:
        arrays = dict(
            slot=np.int32(slot),
            ids=_pad(ids, FILL_CHUNK, 0, np.int32),
            kinds=_pad(kinds, FILL_CHUNK, UNUSED, np.int32),
            bias_ids=_pad(list(bias), MAX_BIAS, -1, np.int32),
            bias_values=_pad(list(bias.values()), MAX_BIAS, 0, np.float32),
            stop_ids=_pad(sorted(stop_ids), MAX_STOP_IDS, -1, np.int32),
            reset=np.bool_(reset),
        )
        whole = {name: place(np.asarray(array), self._whole) for name, array in arrays.items()}
        return SlotContent(**whole)


def _pad(values: Sequence[Any], length: int, fill: int, dtype: Any) -> np.ndarray:
    array = np.full(length, fill, dtype)
    array[: len(values)] = values
    return array
