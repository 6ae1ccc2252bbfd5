"""The golden models on any plan, and what Hugging Face says of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmjax import LLM
from meshes import ParallelPlan

GOLDEN = Path(__file__).parent.parent / "golden"
SMALL = {
    "max_batch_size": 4,
    "max_num_tokens": 32,
    "max_seq_len": 64,
    "kv_cache_max_tokens": 256,
    "tokens_per_block": 4,
    "batch_buckets": (4,),
    "token_buckets": (32,),
}
"""Two programs a plan: compiling them is what these tests cost."""


@dataclass(frozen=True, kw_only=True)
class Golden:
    """A tiny checkpoint, and float32 results of Hugging Face transformers on it."""

    folder: Path
    input_ids: np.ndarray
    """[prompts, positions]"""
    logits: np.ndarray
    """[prompts, positions, vocab], of `input_ids`."""
    greedy: list[int]
    """A prompt and its greedy continuation."""
    prompt_length: int
    """How many of `greedy` are the prompt."""


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """`golden(family)`, the checkpoint of that name."""

    @cache
    def read(family: str) -> Golden:
        stored = np.load(GOLDEN / family / "io.npz")
        return Golden(
            folder=GOLDEN / family,
            input_ids=stored["input_ids"],
            logits=stored["logits"],
            greedy=stored["greedy"][0].tolist(),
            prompt_length=stored["prompt"].shape[1],
        )

    return read


@pytest.fixture(scope="session")
def llm_on() -> Callable[..., LLM]:
    """`llm_on(family, plan, **options)`, built once a session."""

    @cache
    def build(family: str, plan: ParallelPlan, **options: Any) -> LLM:
        return LLM(GOLDEN / family, plan=plan, progress=False, **(SMALL | options))

    return build
