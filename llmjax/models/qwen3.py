"""Qwen3 (Yang et al., 2025): norms on query and key heads, and a head size of its own."""

from collections.abc import Mapping
from typing import Any

from llmjax.config import ModelConfig
from llmjax.models.family import Family, read_dense_config, read_layers
from llmjax.models.qwen2 import qwen_layer_types
from llmjax.models.sources import dense_sources


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Biases, where there are any, cover all four attention projections."""
    bias = bool(hf.get("attention_bias", False))
    special = dict(
        qk_norm=True, qkv_bias=bias, output_bias=bias, layers=read_layers(hf, qwen_layer_types(hf))
    )
    # The published default: Qwen3's heads are not hidden / heads wide.
    return read_dense_config({"head_dim": 128, **hf}, **special)


FAMILY = Family(
    architectures=("Qwen3ForCausalLM",),
    # The text model of Qwen3-VL is Qwen3: without images its three rotary positions are one.
    model_types={"qwen3": "Qwen3ForCausalLM", "qwen3_vl_text": "Qwen3ForCausalLM"},
    read_config=read_config,
    sources=dense_sources,
)
