"""Qwen2 and Qwen2.5 (Yang et al., 2024): biases on queries, keys and values."""

from collections.abc import Mapping
from typing import Any

from llmjax.config import ModelConfig
from llmjax.models.family import (
    ROTARY_BUFFERS,
    Family,
    dense_sources,
    read_dense_config,
    sliding_windows,
)


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The biases are part of the architecture; config.json does not name them."""
    return read_dense_config(hf, qkv_bias=True, windows=qwen_windows(hf))


def qwen_windows(hf: Mapping[str, Any]) -> tuple[int, ...]:
    """Layers from `max_window_layers` up slide a window, where `use_sliding_window` is on."""
    if not hf.get("use_sliding_window"):
        return ()
    layers, first = hf["num_hidden_layers"], hf.get("max_window_layers", 28)
    kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    return sliding_windows({"layer_types": kinds, **hf}, default="full_attention")


FAMILY = Family(
    architectures=("Qwen2ForCausalLM",),
    read_config=read_config,
    sources=dense_sources,
    ignored=ROTARY_BUFFERS,
)
