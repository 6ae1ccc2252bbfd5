"""DeepSeek-V2, V3 and R1 (DeepSeek-AI, 2024): latent attention, group-limited routing."""

from collections.abc import Collection, Mapping
from typing import Any

from llmjax.config import ConfigError, ExpertConfig, LatentConfig, ModelConfig
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
    LAYER,
    PRE_NORMS,
    ExpertNames,
    expert_sources,
    latent_sources,
    mlp_sources,
    norm_sources,
    outer_sources,
)
from llmjax.parallel.head_slots import HeadSlots

V2, V3 = "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The first layers are dense; V3 scores experts by sigmoids and corrects their load."""
    latent = LatentConfig(
        q_rank=hf.get("q_lora_rank"),
        kv_rank=require(hf, "kv_lora_rank"),
        nope_dim=require(hf, "qk_nope_head_dim"),
        rope_dim=require(hf, "qk_rope_head_dim"),
        value_dim=require(hf, "v_head_dim"),
    )
    heads, bias = require(hf, "num_attention_heads"), bool(hf.get("attention_bias", False))
    special: dict[str, Any] = {
        "latent": latent,
        "num_kv_heads": heads,
        "head_dim": latent.nope_dim + latent.rope_dim,
        "layers": read_layers(hf, experts=sparse_layers(hf)),
        "qkv_bias": bias,
        "output_bias": bias,
        "rope_interleaved": bool(hf.get("rope_interleave", True)),
    }
    if hf.get("n_routed_experts"):
        special["experts"] = read_experts(hf)
    return read_dense_config(hf, **special)


def sparse_layers(hf: Mapping[str, Any]) -> list[bool]:
    """Layers with experts: all but the first ones, or every so many of them."""
    count, step = require(hf, "num_hidden_layers"), hf.get("moe_layer_freq") or 1
    first = hf.get("first_k_dense_replace") or 0
    if not hf.get("n_routed_experts"):
        return [False] * count
    return [layer >= first and layer % step == 0 for layer in range(count)]


def read_experts(hf: Mapping[str, Any]) -> ExpertConfig:
    """Routing as `topk_method` names it; V3 knows one method only."""
    v3 = hf["architectures"][0] == V3
    method = "noaux_tc" if v3 else hf.get("topk_method", "greedy")
    if v3:
        refuse_unless(hf, "topk_method", "noaux_tc", None)
        refuse_unless(hf, "scoring_func", "sigmoid", None)
    elif method not in ("greedy", "group_limited_greedy"):
        raise ConfigError(
            f"config.json gives topk_method={method!r}: greedy and group_limited_greedy are "
            "implemented for DeepSeek-V2."
        )
    grouped = method != "greedy"
    ffn = require(hf, "moe_intermediate_size")
    return ExpertConfig(
        num_experts=require(hf, "n_routed_experts"),
        top_k=require(hf, "num_experts_per_tok"),
        ffn=ffn,
        shared_ffn=ffn * (hf.get("n_shared_experts") or 0),
        scoring="sigmoid" if v3 else "softmax",
        # Hugging Face's V2 leaves gates as they are, whatever norm_topk_prob says.
        normalize=v3 and bool(hf.get("norm_topk_prob", True)),
        scaling_factor=float(hf.get("routed_scaling_factor") or 1.0),
        num_groups=(hf.get("n_group") or 1) if grouped else 1,
        top_groups=(hf.get("topk_group") or 1) if grouped else 1,
        group_best=2 if v3 else 1,
        correction_bias=v3,
    )


def sources(config: ModelConfig, slots: HeadSlots, names: Collection[str]) -> Sources:
    """Dense and sparse layers share the prefix `mlp`."""
    return {
        **outer_sources(config),
        **norm_sources(config, PRE_NORMS),
        **latent_sources(config, slots),
        **mlp_sources(config, LAYER + "mlp."),
        **(expert_sources(config, names, ExpertNames()) if config.experts else {}),
    }


FAMILY = Family(
    architectures=(V2, V3),
    model_types={"deepseek_v2": V2, "deepseek_v3": V3, "kimi_k2": V3},
    read_config=read_config,
    sources=sources,
    # V3 ends with layers that predict further tokens, which nothing here uses.
    ignored=(*ROTARY_BUFFERS, r"model\.layers\.{beyond}\..*"),
)
