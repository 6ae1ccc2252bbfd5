"""Llama 4's text model (Meta, 2025): layers in chunks or without rope, experts in some of them."""

from collections.abc import Collection, Mapping
from typing import Any

from llmjax.config import ExpertConfig, ModelConfig, TemperatureTuning
from llmjax.models.family import (
    ROTARY_BUFFERS,
    Family,
    Sources,
    read_dense_config,
    read_layers,
    require,
)
from llmjax.models.sources import (
    LAYER,
    ExpertNames,
    backbone_sources,
    expert_sources,
    mlp_sources,
)
from llmjax.parallel.head_slots import HeadSlots

NAMES = ExpertNames(
    prefix="feed_forward.", router="router", shared="shared_expert", fused_by_row=True
)


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Layers with rope attend inside chunks; the others to everything, the further the sharper."""
    count, ffn = require(hf, "num_hidden_layers"), require(hf, "intermediate_size")
    interval = hf.get("no_rope_layer_interval") or 4
    default = [int((layer + 1) % interval != 0) for layer in range(count)]
    rotated = [bool(turned) for turned in hf.get("no_rope_layers") or default]
    step = hf.get("interleave_moe_layer_step") or 1
    sparse = hf.get("moe_layers")
    sparse = range(step - 1, count, step) if sparse is None else sparse
    bias = bool(hf.get("attention_bias", False))
    tuning = None
    if hf.get("attn_temperature_tuning", True):
        tuning = TemperatureTuning(
            floor_scale=float(hf.get("floor_scale") or 8192), scale=float(hf.get("attn_scale", 0.1))
        )
    experts = ExpertConfig(
        num_experts=require(hf, "num_local_experts"),
        top_k=require(hf, "num_experts_per_tok"),
        ffn=ffn,
        shared_ffn=ffn,
        scoring="sigmoid",
        scale_inputs=True,
    )
    return read_dense_config(
        {"attention_chunk_size": 8192, "rms_norm_eps": 1e-5, **hf},
        experts=experts,
        intermediate_size=hf.get("intermediate_size_mlp") or ffn,
        layers=read_layers(
            {"attention_chunk_size": 8192, **hf},
            ["chunked_attention" if turned else "full_attention" for turned in rotated],
            experts=[layer in set(sparse) for layer in range(count)],
            rotated=rotated,
        ),
        rope_interleaved=True,
        qk_unit_norm=bool(hf.get("use_qk_norm", True)),
        temperature_tuning=tuning,
        qkv_bias=bias,
        output_bias=bias,
    )


def sources(config: ModelConfig, slots: HeadSlots, names: Collection[str]) -> Sources:
    """Dense and sparse layers share the prefix `feed_forward`."""
    return {
        **backbone_sources(config, slots),
        **mlp_sources(config, LAYER + "feed_forward."),
        **expert_sources(config, names, NAMES),
    }


FAMILY = Family(
    architectures=("Llama4ForCausalLM",),
    model_types={"llama4_text": "Llama4ForCausalLM"},
    read_config=read_config,
    sources=sources,
    ignored=ROTARY_BUFFERS,
)
