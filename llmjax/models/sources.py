"""Where the weights of decoders lie in checkpoints, in the names that families share."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from llmjax.config import ModelConfig
from llmjax.models.family import Sources
from llmjax.models.source import Source
from llmjax.parallel.head_slots import HeadSlots

LAYER = "model.layers.{layer}."
"""Prefix of ALL in one layer."""
ALL = slice(None)


def outer_sources(config: ModelConfig) -> Sources:
    """Embedding, final norm and head."""
    vocab, embed = config.vocab_size, config.hidden_size
    sources: Sources = {
        "embedding": (Source(name="model.embed_tokens.weight", shape=(vocab, embed)),),
        "norm.scale": (Source(name="model.norm.weight", shape=(embed,)),),
    }
    if not config.tie_word_embeddings:
        sources["output"] = (Source(name="lm_head.weight", shape=(vocab, embed)),)
    return sources


def norm_sources(config: ModelConfig, names: Mapping[str, str]) -> Sources:
    """Norms of the residual stream in each layer: ours -> the checkpoint's."""
    return {
        f"layers.{own}.scale": (Source(name=f"{LAYER}{name}.weight", shape=(config.hidden_size,)),)
        for own, name in names.items()
    }


PRE_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
"""Most families' norms."""


def backbone_sources(
    config: ModelConfig, slots: HeadSlots, norms: Mapping[str, str] = PRE_NORMS
) -> Sources:
    """All but feed-forward layers, in the names of Hugging Face's Llama and its relatives."""
    return {
        **outer_sources(config),
        **norm_sources(config, norms),
        **attention_sources(config, slots),
    }


def dense_sources(config: ModelConfig, slots: HeadSlots, names: Collection[str]) -> Sources:
    """Weights of a dense decoder in the names of Hugging Face's Llama and its relatives."""
    return {**backbone_sources(config, slots), **mlp_sources(config, LAYER + "mlp.")}


def attention_sources(config: ModelConfig, slots: HeadSlots) -> Sources:
    """Query, key and value rows side by side in each key/value slot; output columns likewise."""
    embed, head_dim, group = config.hidden_size, config.head_dim, slots.group
    q_rows, kv_rows = config.num_heads * head_dim, config.num_kv_heads * head_dim
    prefix = LAYER + "self_attn."
    parts = {
        "q_proj": (config.num_heads, q_rows, slots.q, slice(0, group)),
        "k_proj": (config.num_kv_heads, kv_rows, slots.kv[:, None], slice(group, group + 1)),
        "v_proj": (config.num_kv_heads, kv_rows, slots.kv[:, None], slice(group + 1, group + 2)),
    }
    kernels, biases = [], []
    for name, (heads, rows, held, place) in parts.items():
        kernels.append(
            Source(
                name=f"{prefix}{name}.weight",
                shape=(rows, embed),
                split=(heads, head_dim, embed),
                transpose=(2, 0, 1),
                slots=(1, held),
                region=(ALL, ALL, place, ALL),
            )
        )
        biases.append(
            Source(
                name=f"{prefix}{name}.bias",
                shape=(rows,),
                split=(heads, head_dim),
                slots=(0, held),
                region=(ALL, place, ALL),
            )
        )
    sources: Sources = {
        "layers.attention.qkv": tuple(kernels),
        "layers.attention.out": (
            Source(
                name=prefix + "o_proj.weight",
                shape=(embed, q_rows),
                split=(embed, config.num_heads, head_dim),
                transpose=(1, 2, 0),
                slots=(0, slots.q),
            ),
        ),
    }
    if config.qkv_bias:
        sources["layers.attention.qkv_bias"] = tuple(biases)
    if config.output_bias:
        sources["layers.attention.out_bias"] = (
            Source(name=prefix + "o_proj.bias", shape=(embed,)),
        )
    if config.sinks:
        sources["layers.attention.sinks"] = (
            Source(name=prefix + "sinks", shape=(config.num_heads,), slots=(0, slots.q)),
        )
    if config.qk_norm:
        for norm in ("q_norm", "k_norm"):
            sources[f"layers.attention.{norm}.scale"] = (
                Source(name=f"{prefix}{norm}.weight", shape=(head_dim,)),
            )
    return sources


def latent_sources(config: ModelConfig, slots: HeadSlots) -> Sources:
    """Multi-head latent attention in DeepSeek's names; its products by head, for absorption."""
    assert config.latent is not None
    latent, embed, heads = config.latent, config.hidden_size, config.num_heads
    prefix, held = LAYER + "self_attn.", (0, slots.kv)
    first, down = latent.q_rank or 0, latent.cached_dim
    query_dim, both = latent.nope_dim + latent.rope_dim, latent.nope_dim + latent.value_dim
    compressed = [("kv_a_proj_with_mqa", down, slice(first, first + down))]
    if latent.q_rank:
        compressed.insert(0, ("q_a_proj", first, slice(0, first)))
    inner = latent.q_rank or embed
    kv_up: dict[str, Any] = dict(
        name=prefix + "kv_b_proj.weight",
        shape=(heads * both, latent.kv_rank),
        split=(heads, both, latent.kv_rank),
    )
    sources: Sources = {
        "layers.attention.fused_a": tuple(
            Source(
                name=f"{prefix}{name}.weight",
                shape=(rows, embed),
                transpose=(1, 0),
                region=(ALL, place),
            )
            for name, rows, place in compressed
        ),
        "layers.attention.kv_norm.scale": (
            Source(name=prefix + "kv_a_layernorm.weight", shape=(latent.kv_rank,)),
        ),
        "layers.attention.q_up": (
            Source(
                name=prefix + ("q_b_proj.weight" if latent.q_rank else "q_proj.weight"),
                shape=(heads * query_dim, inner),
                split=(heads, query_dim, inner),
                transpose=(0, 2, 1),
                slots=held,
            ),
        ),
        "layers.attention.k_up": (
            Source(**kv_up, part=(1, slice(0, latent.nope_dim)), slots=held),
        ),
        "layers.attention.v_up": (
            Source(
                **kv_up, part=(1, slice(latent.nope_dim, both)), transpose=(0, 2, 1), slots=held
            ),
        ),
        "layers.attention.out": (
            Source(
                name=prefix + "o_proj.weight",
                shape=(embed, heads * latent.value_dim),
                split=(embed, heads, latent.value_dim),
                transpose=(1, 2, 0),
                slots=held,
            ),
        ),
    }
    if latent.q_rank:
        sources["layers.attention.q_norm.scale"] = (
            Source(name=prefix + "q_a_layernorm.weight", shape=(first,)),
        )
    if config.qkv_bias:
        sources["layers.attention.fused_a_bias"] = tuple(
            Source(name=f"{prefix}{name}.bias", shape=(rows,), region=(place,))
            for name, rows, place in compressed
        )
    if config.output_bias:
        sources["layers.attention.out_bias"] = (
            Source(name=prefix + "o_proj.bias", shape=(embed,)),
        )
    return sources


def mlp_sources(
    config: ModelConfig, prefix: str, *, own: str = "mlp", ffn: int | None = None
) -> Sources:
    """Gate and up beside each other, down; padded features follow as zeros."""
    embed, ffn = config.hidden_size, ffn or config.intermediate_size
    kernels, biases = [], []
    for index, name in enumerate(("gate_proj", "up_proj")):
        place = slice(index, index + 1)
        kernels.append(
            Source(
                name=f"{prefix}{name}.weight",
                shape=(ffn, embed),
                split=(1, ffn, embed),
                transpose=(2, 0, 1),
                region=(ALL, place, ALL),
            )
        )
        biases.append(
            Source(
                name=f"{prefix}{name}.bias",
                shape=(ffn,),
                split=(1, ffn),
                region=(place, ALL),
            )
        )
    sources: Sources = {
        f"{own}.gate_up": tuple(kernels),
        f"{own}.down": (
            Source(name=prefix + "down_proj.weight", shape=(embed, ffn), transpose=(1, 0)),
        ),
    }
    if config.mlp_bias:
        sources[f"{own}.gate_up_bias"] = tuple(biases)
        sources[f"{own}.down_bias"] = (Source(name=prefix + "down_proj.bias", shape=(embed,)),)
    return sources


@dataclass(frozen=True, kw_only=True)
class ExpertNames:
    """What a family calls the parts of a mixture of experts, within a layer."""

    prefix: str = "mlp."
    router: str = "gate"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_experts"
    fused_by_row: bool = False
    """Fused experts are stored as [experts, in, out]; otherwise as [experts, out, in]."""
    interleaved: bool = False
    """Fused gate and up take turns; otherwise all of gate comes first."""


def expert_sources(config: ModelConfig, names: Collection[str], words: ExpertNames) -> Sources:
    """Router, experts and shared expert; experts as the checkpoint has them, one by one or fused.

    Expert slots beyond the experts follow as zeros.
    """
    assert config.experts is not None
    experts, embed, prefix = config.experts, config.hidden_size, LAYER + words.prefix
    router, count = prefix + words.router, experts.num_experts
    sources: Sources = {
        "moe.router": (Source(name=router + ".weight", shape=(count, embed), transpose=(1, 0)),)
    }
    if experts.router_bias:
        sources["moe.router_bias"] = (Source(name=router + ".bias", shape=(count,)),)
    if experts.correction_bias:
        sources["moe.correction_bias"] = (
            Source(name=router + ".e_score_correction_bias", shape=(count,)),
        )
    if experts.shared_ffn:
        shared = f"{prefix}{words.shared}."
        sources |= mlp_sources(config, shared, own="moe.shared", ffn=experts.shared_ffn)
    fused = any(name.endswith("experts.gate_up_proj") for name in names)
    if fused or experts.bias:
        return sources | _fused_sources(config, prefix + "experts.", words)
    return sources | _single_sources(config, prefix + "experts.", words)


def _single_sources(config: ModelConfig, prefix: str, words: ExpertNames) -> Sources:
    """Three matrices an expert."""
    assert config.experts is not None
    ffn, embed = config.experts.ffn, config.hidden_size
    gate_up, down = [], []
    for index in range(config.experts.num_experts):
        slot = slice(index, index + 1)
        for half, name in enumerate((words.gate, words.up)):
            gate_up.append(
                Source(
                    name=f"{prefix}{index}.{name}.weight",
                    shape=(ffn, embed),
                    split=(1, 1, ffn, embed),
                    transpose=(0, 3, 1, 2),
                    region=(slot, ALL, slice(half, half + 1), ALL),
                )
            )
        down.append(
            Source(
                name=f"{prefix}{index}.{words.down}.weight",
                shape=(embed, ffn),
                split=(1, embed, ffn),
                transpose=(0, 2, 1),
                region=(slot, ALL, ALL),
            )
        )
    return {"experts.gate_up": tuple(gate_up), "experts.down": tuple(down)}


def _fused_sources(config: ModelConfig, prefix: str, words: ExpertNames) -> Sources:
    """Two matrices for all experts of a layer, of which each expert reads its own rows."""
    assert config.experts is not None
    count, ffn, embed = config.experts.num_experts, config.experts.ffn, config.hidden_size
    # Where gate and up take turns, they are the last of the axes that make up 2 * ffn.
    both = (ffn, 2) if words.interleaved else (2, ffn)
    order = (2, 1) if words.interleaved else (1, 2)
    if words.fused_by_row:
        shape, split = (count, embed, 2 * ffn), (1, embed, *both)
        transpose = (0, 1, *(axis + 1 for axis in order))
        down, down_transpose = (count, ffn, embed), None
    else:
        shape, split = (count, 2 * ffn, embed), (1, *both, embed)
        transpose = (0, 3, *order)
        down, down_transpose = (count, embed, ffn), (0, 2, 1)
    places: dict[str, dict[str, Any]] = {
        "gate_up": dict(name="gate_up_proj", shape=shape, split=split, transpose=transpose),
        "down": dict(name="down_proj", shape=down, transpose=down_transpose),
    }
    if config.experts.bias:
        places["gate_up_bias"] = dict(
            name="gate_up_proj_bias",
            shape=(count, 2 * ffn),
            split=(1, *both),
            transpose=(0, *order),
        )
        places["down_bias"] = dict(name="down_proj_bias", shape=(count, embed))
    return {
        f"experts.{own}": tuple(_source_of_expert(index, prefix, place) for index in range(count))
        for own, place in places.items()
    }


def _source_of_expert(index: int, prefix: str, place: Mapping[str, Any]) -> Source:
    """One expert's rows of a fused tensor, and its slot."""
    expert, rank = slice(index, index + 1), len(place.get("split") or place["shape"])
    region = (expert, *[ALL] * (rank - 1))
    return Source(**{**place, "name": prefix + place["name"]}, rows=expert, region=region)
