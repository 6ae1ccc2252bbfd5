"""What every checkpoint format offers, whatever its files look like."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Shaped


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or not the one that the model needs."""


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Shape and dtype of a tensor as `Checkpoint.read` returns it."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint(Protocol):
    """An opened checkpoint: its configuration, and tensors that are read one at a time."""

    @property
    def path(self) -> Path:
        """Folder or file it was opened from."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """The model's configuration in the spelling of Hugging Face's config.json."""
        ...

    @property
    def generation_config(self) -> dict[str, Any]:
        """Defaults for generation, such as eos_token_id; empty where there are none."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor, by its name in Hugging Face's spelling."""
        ...

    def read(self, name: str, rows: slice | None = None) -> Shaped[np.ndarray, "..."]:
        """Return a tensor, as a view of the mapped file where the format allows it.

        `rows` are the part of the first axis that is wanted; None is all of it.
        """
        ...
