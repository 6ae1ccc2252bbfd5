"""Qwen2 and Qwen2.5 (Yang et al., 2024): biases on queries, keys and values."""

from collections.abc import Mapping
from typing import Any

from llmjax.config import ModelConfig
from llmjax.models.family import (
    ROTARY_BUFFERS,
    Family,
    read_dense_config,
    read_layers,
)
from llmjax.models.sources import dense_sources


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The biases are part of the architecture; config.json does not name them."""
    return read_dense_config(hf, qkv_bias=True, layers=read_layers(hf, qwen_layer_types(hf)))


def qwen_layer_types(hf: Mapping[str, Any]) -> list[str]:
    """Layers from `max_window_layers` up slide a window, where `use_sliding_window` is on."""
    count, first = hf["num_hidden_layers"], hf.get("max_window_layers", 28)
    if not hf.get("use_sliding_window"):
        return ["full_attention"] * count
    return ["sliding_attention" if i >= first else "full_attention" for i in range(count)]


FAMILY = Family(
    architectures=("Qwen2ForCausalLM",),
    model_types={"qwen2": "Qwen2ForCausalLM"},
    read_config=read_config,
    sources=dense_sources,
    ignored=ROTARY_BUFFERS,
)
