"""Qwen3 mixtures of experts (Yang et al., 2025): dense layers may stand among the sparse ones."""

from collections.abc import Collection, Mapping
from typing import Any

from llmjax.config import ExpertConfig, ModelConfig
from llmjax.models.family import Family, Sources, read_dense_config, read_layers, require
from llmjax.models.qwen2 import qwen_layer_types
from llmjax.models.sources import ExpertNames, dense_sources, expert_sources
from llmjax.parallel.head_slots import HeadSlots


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Every `decoder_sparse_step`-th layer has experts, those of `mlp_only_layers` left out."""
    count, step = require(hf, "num_hidden_layers"), hf.get("decoder_sparse_step", 1)
    dense = set(hf.get("mlp_only_layers") or ())
    sparse = [(layer + 1) % step == 0 and layer not in dense for layer in range(count)]
    bias = bool(hf.get("attention_bias", False))
    experts = ExpertConfig(
        num_experts=hf.get("num_experts") or require(hf, "num_local_experts"),
        top_k=require(hf, "num_experts_per_tok"),
        ffn=require(hf, "moe_intermediate_size"),
        normalize=bool(hf.get("norm_topk_prob", False)),
    )
    return read_dense_config(
        hf,
        experts=experts,
        layers=read_layers(hf, qwen_layer_types(hf), experts=sparse),
        qk_norm=True,
        qkv_bias=bias,
        output_bias=bias,
    )


def sources(config: ModelConfig, slots: HeadSlots, names: Collection[str]) -> Sources:
    """Dense and sparse layers share the prefix `mlp`."""
    return {
        **dense_sources(config, slots, names),
        **expert_sources(config, names, ExpertNames()),
    }


FAMILY = Family(
    architectures=("Qwen3MoeForCausalLM",),
    model_types={"qwen3_moe": "Qwen3MoeForCausalLM"},
    read_config=read_config,
    sources=sources,
)
