"""Sparse upcycling (Komatsuzaki et al., 2022): a dense model as a mixture of its own copies.

All experts of a layer are its feed-forward part, and the gates of a token sum to 1: whatever a
random router chooses, the text is the dense model's, through all that experts need. So an expert
plan can be checked with a known answer.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from llmjax.config import ConfigError, ExpertConfig, ModelConfig
from llmjax.models.family import Family, Sources
from llmjax.models.source import Source
from llmjax.parallel.head_slots import HeadSlots
from llmjax.weights.interface import Checkpoint, TensorInfo

_ROUTER = "upcycled.layers.{layer}.router.weight"
_PARTS = ("gate_up", "down", "gate_up_bias", "down_bias")


@dataclass(frozen=True, kw_only=True)
class Upcycling:
    """How many copies there are, and how many of them a token passes."""

    num_experts: int
    top_k: int

    @classmethod
    def parse(cls, text: str) -> "Upcycling":
        """Reads "8x2": 8 experts, of which a token takes 2.

        Raises:
            ConfigError: the text has another form, or asks for more experts than there are.
        """
        found = re.fullmatch(r"(\d+)x(\d+)", text)
        if found is None or not 1 <= int(found[2]) <= int(found[1]):
            raise ConfigError(
                f"upcycle={text!r} is not understood: give the number of experts and how many of "
                'them a token takes, at most all, such as "8x2".'
            )
        return cls(num_experts=int(found[1]), top_k=int(found[2]))


def upcycle(checkpoint: Checkpoint, family: Family, experts: str) -> tuple[Checkpoint, Family]:
    """A dense model as one with experts, such as "8x2"; no copy is made before it is loaded.

    Raises:
        ConfigError: `experts` is not understood, or the model cannot have them.
    """
    upcycling = Upcycling.parse(experts)
    dense = family.read_config(checkpoint.config)
    sparse = replace(
        family,
        read_config=partial(_read_config, family, upcycling),
        sources=partial(_find_sources, family, dense),
    )
    return UpcycledCheckpoint(checkpoint, add_experts(dense, upcycling)), sparse


def add_experts(config: ModelConfig, upcycling: Upcycling) -> ModelConfig:
    """The configuration with experts in all layers.

    Raises:
        ConfigError: the model has experts already, or a gate that experts do not know.
    """
    if config.experts is not None:
        raise ConfigError(
            f"upcycle makes experts of a dense model, and {config.architecture} already has "
            f"{config.experts.num_experts} of them: leave it out."
        )
    if config.activation != "silu":
        raise ConfigError(
            f"upcycle needs a feed-forward part with silu, and {config.architecture} has "
            f"{config.activation}: experts with that gate are not implemented."
        )
    experts = ExpertConfig(
        num_experts=upcycling.num_experts,
        top_k=upcycling.top_k,
        ffn=config.intermediate_size,
        normalize=True,
        bias=config.mlp_bias,
    )
    layers = tuple(replace(layer, ffn="experts") for layer in config.layers)
    return replace(config, experts=experts, layers=layers)


class UpcycledCheckpoint:
    """Another checkpoint and, for each layer, a random router."""

    def __init__(self, dense: Checkpoint, config: ModelConfig):
        assert config.experts is not None
        self._dense = dense
        shape = (config.experts.num_experts, config.hidden_size)
        info = TensorInfo(shape=shape, dtype=np.dtype(np.float32))
        # The seed of a router is its layer: all processes draw the same.
        self._seeds = {_ROUTER.format(layer=layer): layer for layer in range(config.num_layers)}
        self.tensors: Mapping[str, TensorInfo] = {
            **dense.tensors,
            **dict.fromkeys(self._seeds, info),
        }

    @property
    def path(self) -> Path:
        """Folder or file it was opened from."""
        return self._dense.path

    @property
    def config(self) -> dict[str, Any]:
        """The dense model's configuration."""
        return self._dense.config

    @property
    def generation_config(self) -> dict[str, Any]:
        """Defaults for generation."""
        return self._dense.generation_config

    def read(self, name: str, rows: slice | None = None) -> Shaped[np.ndarray, "..."]:
        """Read a tensor, or draw a router whose logits have the variance 1."""
        if name not in self._seeds:
            return self._dense.read(name, rows)
        shape = self.tensors[name].shape
        values = np.random.default_rng(self._seeds[name]).standard_normal(shape, np.float32)
        values *= shape[1] ** -0.5
        return values if rows is None else values[rows]


def _read_config(family: Family, upcycling: Upcycling, hf: Mapping[str, Any]) -> ModelConfig:
    return add_experts(family.read_config(hf), upcycling)


def _find_sources(
    family: Family,
    dense: ModelConfig,
    config: ModelConfig,
    slots: HeadSlots,
    names: Collection[str],
) -> Sources:
    """The dense model's sources, those of the feed-forward part once for each expert."""
    assert config.experts is not None
    count, sources = config.experts.num_experts, family.sources(dense, slots, names)
    for part in _PARTS:
        found = sources.pop(f"mlp.{part}", ())
        if found:
            sources[f"experts.{part}"] = tuple(
                _fill_expert(source, index) for index in range(count) for source in found
            )
    router = Source(name=_ROUTER, shape=(count, config.hidden_size), transpose=(1, 0))
    return {**sources, "moe.router": (router,)}


def _fill_expert(source: Source, index: int) -> Source:
    """The same tensor in the place of one expert, whose axis comes first."""
    assert source.part is None and source.slots is None
    axes = range(len(source.split_shape))
    return replace(
        source,
        split=(1, *source.split_shape),
        transpose=(0, *(axis + 1 for axis in source.transpose or axes)),
        region=(slice(index, index + 1), *(source.region or [slice(None)] * len(axes))),
    )
