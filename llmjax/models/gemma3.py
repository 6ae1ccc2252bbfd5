"""Gemma 3's text model (Google, 2025): norms on both sides, local layers with their own rope."""

from collections.abc import Collection, Mapping
from typing import Any

from llmjax.config import ModelConfig
from llmjax.models.family import (
    ROTARY_BUFFERS,
    Family,
    Sources,
    read_dense_config,
    read_layers,
    read_rope,
    refuse_unless,
)
from llmjax.models.sources import LAYER, backbone_sources, mlp_sources
from llmjax.parallel.head_slots import HeadSlots

DEFAULTS: dict[str, Any] = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}
"""What published configurations leave out, because Hugging Face's class has it."""
NORMS = {
    "attention_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Every sixth layer attends to everything, with the stretched rope; the others locally."""
    refuse_unless(hf, "use_bidirectional_attention", False, None)
    hf = {**DEFAULTS, **hf}
    if "hidden_activation" in hf:
        hf["hidden_act"] = hf["hidden_activation"]
    count = hf["num_hidden_layers"]
    period = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6
    kinds = [
        "sliding_attention" if (layer + 1) % period else "full_attention" for layer in range(count)
    ]
    nested = hf.get("rope_parameters") or {}
    # Newer files hold one mapping for each type of layer, older ones a base for the local layers.
    if "full_attention" in nested:
        rope = read_rope({**hf, "rope_parameters": nested["full_attention"]})
        local = read_rope({**hf, "rope_parameters": nested["sliding_attention"]})
    else:
        rope = read_rope(hf)
        base = hf.get("rope_local_base_freq", 10000.0)
        local = read_rope({"rope_parameters": {"rope_type": "default", "rope_theta": base}})
    bias = bool(hf.get("attention_bias", False))
    return read_dense_config(
        {**hf, "rope_parameters": None, "rope_scaling": None},
        rope=rope,
        local_rope=local,
        layers=read_layers(hf, kinds, local_rope=True),
        norm_offset=1.0,
        post_norms=True,
        qk_norm=True,
        qkv_bias=bias,
        output_bias=bias,
        attention_scale=hf["query_pre_attn_scalar"] ** -0.5,
        attention_soft_cap=hf.get("attn_logit_softcapping"),
        logit_soft_cap=hf.get("final_logit_softcapping"),
        embedding_scale=hf["hidden_size"] ** 0.5,
    )


def sources(config: ModelConfig, slots: HeadSlots, names: Collection[str]) -> Sources:
    """Llama's names but for the norms."""
    return {
        **backbone_sources(config, slots, NORMS),
        **mlp_sources(config, LAYER + "mlp."),
    }


FAMILY = Family(
    architectures=("Gemma3ForCausalLM",),
    model_types={"gemma3_text": "Gemma3ForCausalLM"},
    read_config=read_config,
    sources=sources,
    ignored=ROTARY_BUFFERS,
)
