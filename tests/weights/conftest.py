"""Folders that must load alike."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.models.registry import find_family
from llmjax.weights import open_checkpoint
from llmjax.weights.model import load_model
from meshes import ParallelPlan, Rules, make_mesh


@pytest.fixture
def assert_same_weights() -> Callable[[Path, Path], None]:
    """`assert_same_weights(folder, other)` compares what two folders load as."""

    def compare(folder: Path, other: Path) -> None:
        expected, loaded = load(folder), load(other)
        assert len(jax.tree.leaves(expected)) > 5
        jax.tree.map(np.testing.assert_array_equal, loaded, expected)

    return compare


def load(folder: Path) -> dict[str, Any]:
    checkpoint = open_checkpoint(folder)
    family = find_family(checkpoint.config)
    config = family.read_config(checkpoint.config)
    plan, dtype = ParallelPlan(ep=2, tp=2), jnp.dtype("float32")
    rules, mesh = Rules(plan), make_mesh(plan)
    return load_model(checkpoint, family, config, rules, mesh, dtype=dtype, progress=False)
