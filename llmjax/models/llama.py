"""Llama 2 and 3 (Touvron et al., 2023; Grattafiori et al., 2024), SmolLM and Mistral."""

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
    """Llama's optional biases cover all four attention projections; Mistral may slide a window."""
    mistral = hf["architectures"][0] == "MistralForCausalLM"
    bias = bool(hf.get("attention_bias", False))
    return read_dense_config(
        hf,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bool(hf.get("mlp_bias", False)),
        layers=read_layers(hf, "sliding_attention") if mistral else (),
    )


FAMILY = Family(
    architectures=("LlamaForCausalLM", "MistralForCausalLM"),
    model_types={"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"},
    read_config=read_config,
    sources=dense_sources,
    ignored=ROTARY_BUFFERS,
)
