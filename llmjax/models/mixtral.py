"""Mixtral (Jiang et al., 2024): experts in every layer."""

from collections.abc import Collection, Mapping
from typing import Any

from llmjax.config import ExpertConfig, ModelConfig
from llmjax.models.family import (
    ROTARY_BUFFERS,
    Family,
    Sources,
    read_dense_config,
    read_layers,
    require,
)
from llmjax.models.sources import (
    ExpertNames,
    backbone_sources,
    expert_sources,
)
from llmjax.parallel.head_slots import HeadSlots

NAMES = ExpertNames(prefix="block_sparse_moe.", gate="w1", up="w3", down="w2")
FUSED_NAMES = ExpertNames()
"""Fused experts come with names like those of other families."""


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """A window, where one is given, slides in all layers."""
    experts = ExpertConfig(
        num_experts=require(hf, "num_local_experts"),
        top_k=require(hf, "num_experts_per_tok"),
        ffn=require(hf, "intermediate_size"),
        normalize=True,
    )
    return read_dense_config(
        {"rms_norm_eps": 1e-5, **hf},
        experts=experts,
        layers=read_layers(hf, "sliding_attention", experts=True),
    )


def sources(config: ModelConfig, slots: HeadSlots, names: Collection[str]) -> Sources:
    """Experts are called w1 (gate), w3 (up) and w2 (down)."""
    published = any(".block_sparse_moe." in name for name in names)
    return {
        **backbone_sources(config, slots),
        **expert_sources(config, names, NAMES if published else FUSED_NAMES),
    }


FAMILY = Family(
    architectures=("MixtralForCausalLM",),
    model_types={"mixtral": "MixtralForCausalLM"},
    read_config=read_config,
    sources=sources,
    ignored=ROTARY_BUFFERS,
)
