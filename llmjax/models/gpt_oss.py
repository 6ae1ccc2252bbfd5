"""gpt-oss (OpenAI, 2025): attention sinks, windows in every other layer, experts with biases."""

from collections.abc import Collection, Mapping
from typing import Any

from llmjax.config import ExpertConfig, ModelConfig
from llmjax.models.family import (
    ROTARY_BUFFERS,
    Family,
    Sources,
    read_dense_config,
    read_layers,
    refuse_unless,
    require,
)
from llmjax.models.sources import (
    ExpertNames,
    backbone_sources,
    expert_sources,
)
from llmjax.parallel.head_slots import HeadSlots

NAMES = ExpertNames(router="router", fused_by_row=True, interleaved=True)


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """A softmax over the chosen experts is one over all, divided by what the chosen have of it."""
    refuse_unless(hf, "swiglu_limit", 7.0)
    refuse_unless(hf, "swiglu_alpha", 1.702)
    count, bias = require(hf, "num_hidden_layers"), bool(hf.get("attention_bias", True))
    kinds = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(count)]
    experts = ExpertConfig(
        num_experts=require(hf, "num_local_experts"),
        top_k=require(hf, "num_experts_per_tok"),
        ffn=require(hf, "intermediate_size"),
        normalize=True,
        router_bias=True,
        bias=True,
        activation="clamped_swiglu",
    )
    return read_dense_config(
        {"head_dim": 64, "rms_norm_eps": 1e-5, **hf},
        experts=experts,
        layers=read_layers(hf, kinds, experts=True),
        sinks=True,
        qkv_bias=bias,
        output_bias=bias,
    )


def sources(config: ModelConfig, slots: HeadSlots, names: Collection[str]) -> Sources:
    """Experts are fused, gate and up taking turns."""
    return {
        **backbone_sources(config, slots),
        **expert_sources(config, names, NAMES),
    }


FAMILY = Family(
    architectures=("GptOssForCausalLM",),
    model_types={"gpt_oss": "GptOssForCausalLM"},
    read_config=read_config,
    sources=sources,
    ignored=ROTARY_BUFFERS,
)
