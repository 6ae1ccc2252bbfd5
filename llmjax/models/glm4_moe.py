"""GLM-4.5 and 4.6 (Zhipu AI, 2025): DeepSeek-V3's experts behind grouped-query attention."""

from collections.abc import Collection, Mapping
from typing import Any

from llmjax.config import ExpertConfig, ModelConfig
from llmjax.models.deepseek import sparse_layers
from llmjax.models.family import (
    ROTARY_BUFFERS,
    Family,
    Sources,
    read_dense_config,
    read_layers,
    require,
)
from llmjax.models.sources import ExpertNames, dense_sources, expert_sources
from llmjax.parallel.head_slots import HeadSlots


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Rope turns half of a head's features, unless config.json says otherwise."""
    ffn = require(hf, "moe_intermediate_size")
    experts = ExpertConfig(
        num_experts=require(hf, "n_routed_experts"),
        top_k=require(hf, "num_experts_per_tok"),
        ffn=ffn,
        shared_ffn=ffn * (hf.get("n_shared_experts") or 0),
        scoring="sigmoid",
        normalize=bool(hf.get("norm_topk_prob", True)),
        scaling_factor=float(hf.get("routed_scaling_factor") or 1.0),
        num_groups=hf.get("n_group") or 1,
        top_groups=hf.get("topk_group") or 1,
        correction_bias=True,
    )
    return read_dense_config(
        {"partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5, **hf},
        experts=experts,
        layers=read_layers(hf, experts=sparse_layers(hf)),
        qkv_bias=bool(hf.get("attention_bias", False)),
        qk_norm=bool(hf.get("use_qk_norm", False)),
    )


def sources(config: ModelConfig, slots: HeadSlots, names: Collection[str]) -> Sources:
    """Dense and sparse layers share the prefix `mlp`."""
    return {
        **dense_sources(config, slots, names),
        **expert_sources(config, names, ExpertNames()),
    }


FAMILY = Family(
    architectures=("Glm4MoeForCausalLM",),
    model_types={"glm4_moe": "Glm4MoeForCausalLM"},
    read_config=read_config,
    sources=sources,
    # It ends with a layer that predicts a further token, which nothing here uses.
    ignored=(*ROTARY_BUFFERS, r"model\.layers\.{beyond}\..*"),
)
