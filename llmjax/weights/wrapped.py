"""Presents a multimodal checkpoint as that of the text model inside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from llmjax.models.wrappers import lift_tensor_name, lift_text_config
from llmjax.weights.interface import Checkpoint, TensorInfo


def unwrap_text(checkpoint: Checkpoint) -> Checkpoint:
    """The text model of a multimodal checkpoint; any other checkpoint as it is."""
    config = lift_text_config(checkpoint.config)
    return checkpoint if config is None else TextCheckpoint(checkpoint, config)


class TextCheckpoint:
    """The text model inside another checkpoint; tensors of other parts keep their names."""

    def __init__(self, outer: Checkpoint, config: dict[str, Any]):
        self._outer = outer
        self._names = {lift_tensor_name(name): name for name in outer.tensors}
        self.config = config
        self.tensors: Mapping[str, TensorInfo] = {
            name: outer.tensors[stored] for name, stored in self._names.items()
        }

    @property
    def path(self) -> Path:
        """Folder or file it was opened from."""
        return self._outer.path

    @property
    def generation_config(self) -> dict[str, Any]:
        """Defaults for generation."""
        return self._outer.generation_config

    def read(self, name: str, rows: slice | None = None) -> Shaped[np.ndarray, "..."]:
        """Read a tensor by the text model's name."""
        return self._outer.read(self._names[name], rows)
