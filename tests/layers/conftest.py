"""A sampler on any plan, fed with logits instead of hidden states."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import jax
import numpy as np
import pytest

from llmjax.layers.logit_adjustments import Processor
from llmjax.layers.logprobs import Logprobs, score
from llmjax.layers.sampler import Sampled, SampleRows, sample
from llmjax.layers.sampler_state import SamplerState, SlotContent, fill_slot, init_state
from meshes import ParallelPlan, Rules, make_mesh

OPTIONS = {
    "valid": (np.bool_, True),
    "slot": (np.int32, -1),
    "uses_state": (np.bool_, False),
    "position": (np.int32, 0),
    "min_position": (np.int32, 0),
    "seed": (np.uint32, 0),
    "temperature": (np.float32, 0),
    "top_k": (np.int32, 0),
    "top_p": (np.float32, 1),
    "min_p": (np.float32, 0),
    "repetition_penalty": (np.float32, 1),
    "presence_penalty": (np.float32, 0),
    "frequency_penalty": (np.float32, 0),
    "num_logprobs": (np.int32, -1),
    "processors": (np.int32, 0),
}


class SamplerOnPlan:
    """Samples on a plan; numpy in, numpy out."""

    vocab = 61
    """Not a multiple of any number of ranks, so that every plan has padding."""
    padded_vocab = 64
    slots = 8
    max_bias = 4
    max_stop_ids = 2

    def __init__(
        self, plan: ParallelPlan, max_logprobs: int, processors: tuple[Processor, ...]
    ) -> None:
        self.rules = Rules(plan)
        self.mesh = make_mesh(plan)
        shape = {"rules": self.rules, "vocab_size": self.vocab, "max_logprobs": max_logprobs}
        self.sample_function = partial(sample, **shape, processors=processors)
        self._sample = jax.jit(self.sample_function, donate_argnums=3)
        self._score = jax.jit(partial(score, **shape, axis="requests"))
        self._fill = jax.jit(partial(fill_slot, rules=self.rules), donate_argnums=0)
        self._init = jax.jit(
            partial(
                init_state,
                slots=self.slots,
                padded_vocab_size=self.padded_vocab,
                max_bias=self.max_bias,
                max_stop_ids=self.max_stop_ids,
                rules=self.rules,
            )
        )

    def __call__(
        self,
        logits: np.ndarray,
        options: Sequence[dict[str, Any]] | dict[str, Any],
        state: SamplerState | None = None,
    ) -> tuple[Sampled, SamplerState]:
        """Samples a token a row; one dictionary of options for all rows, or one for each."""
        with jax.set_mesh(self.mesh):
            state = state or self.empty_state()
            arguments = self.arguments(logits, options)
            sampled, new_state = self._sample(*arguments, state)
            return jax.tree.map(np.asarray, sampled), new_state

    def score(self, logits: np.ndarray, targets: np.ndarray) -> Logprobs:
        """Log-probabilities of the targets."""
        with jax.set_mesh(self.mesh):
            hidden, head, _ = self.arguments(logits, {})
            scores = self._score(hidden, head, self._put(targets, "requests"))
            return jax.tree.map(np.asarray, scores)

    def empty_state(self) -> SamplerState:
        """A state without requests."""
        with jax.set_mesh(self.mesh):
            return self._init()

    def fill(
        self,
        state: SamplerState,
        slot: int,
        *,
        ids: Sequence[int] = (),
        kinds: Sequence[int] = (),
        bias: dict[int, float] | None = None,
        stop_ids: Sequence[int] = (),
        reset: bool = True,
    ) -> SamplerState:
        """Writes a request into a slot in one chunk of 16 ids."""
        bias = bias or {}
        content = (
            np.int32(slot),
            _padded(ids, 16, np.int32, 0),
            _padded(kinds, 16, np.int32, 0),
            _padded(list(bias), self.max_bias, np.int32, -1),
            _padded(list(bias.values()), self.max_bias, np.float32, 0),
            _padded(stop_ids, self.max_stop_ids, np.int32, -1),
            np.bool_(reset),
        )
        with jax.set_mesh(self.mesh):
            return self._fill(state, SlotContent._make(map(self._put, content)))

    def arguments(
        self, logits: np.ndarray, options: Sequence[dict[str, Any]] | dict[str, Any]
    ) -> tuple[jax.Array, jax.Array, SampleRows]:
        """What `sample` takes, on the mesh."""
        if isinstance(options, dict):
            options = [options] * len(logits)
        # Padding must never win, so it looks most attractive here.
        padding = np.full((len(logits), self.padded_vocab - self.vocab), 1e4)
        hidden = np.concatenate([logits, padding], axis=1).astype(np.float32)
        columns = {
            name: np.array([row.get(name, default) for row in options], dtype)
            for name, (dtype, default) in OPTIONS.items()
        }
        rows = {name: self._put(column, "sampler_requests") for name, column in columns.items()}
        head = np.eye(self.padded_vocab, dtype=np.float32)
        return (
            self._put(hidden, "requests", None),
            self._put(head, None, "vocab"),
            SampleRows(**rows),
        )

    def _put(self, array: np.ndarray | np.generic, *axes: str | None) -> jax.Array:
        return jax.device_put(array, self.rules.sharding(self.mesh, *axes))


@pytest.fixture(scope="session")
def sampler_on() -> Callable[..., SamplerOnPlan]:
    """`sampler_on(plan, max_logprobs, processors)`, compiled once a session."""

    @cache
    def build(
        plan: ParallelPlan, max_logprobs: int = 0, processors: tuple[Processor, ...] = ()
    ) -> SamplerOnPlan:
        return SamplerOnPlan(plan, max_logprobs, processors)

    return build


def _padded(values: Sequence[float], length: int, dtype: Any, fill: int) -> np.ndarray:
    padded = np.full(length, fill, dtype)
    padded[: len(values)] = values
    return padded
