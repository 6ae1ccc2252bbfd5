"""What a family of models says about itself, and what dense decoders have in common."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmjax.config import ConfigError, ModelConfig, RopeConfig
from llmjax.models.source import Source
from llmjax.parallel.head_slots import HeadSlots

Sources = dict[str, tuple[Source, ...]]
"""Path of a weight -> the checkpoint tensors that fill it."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family: how its config.json reads, and where its weights lie."""

    architectures: tuple[str, ...]
    """Names in config.json's `architectures`."""
    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    """config.json -> our words."""
    sources: Callable[[ModelConfig, HeadSlots], Sources]
    """Where each weight comes from."""
    ignored: tuple[str, ...] = ()
    """Patterns of tensors that the family knowingly drops."""


ROTARY_BUFFERS = (r".*rotary_emb\.inv_freq",)
"""Buffers that old checkpoints carry and that are computed here."""


def read_dense_config(hf: Mapping[str, Any], **special: Any) -> ModelConfig:
    """Reads the keys that dense decoders share; `special` holds what a family has of its own.

    Raises:
        ConfigError: a key that must be there is missing.
    """
    activation = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
    act = hf.get("hidden_act", "silu")
    if act not in activation:
        raise ConfigError(
            f"config.json gives hidden_act={act!r}: known are {', '.join(activation)}."
        )
    heads, hidden = require(hf, "num_attention_heads"), require(hf, "hidden_size")
    values = {
        "architecture": hf["architectures"][0],
        "vocab_size": require(hf, "vocab_size"),
        "hidden_size": hidden,
        "num_layers": require(hf, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": hf.get("head_dim") or hidden // heads,
        "intermediate_size": require(hf, "intermediate_size"),
        "max_position_embeddings": hf.get("max_position_embeddings", 2048),
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "rope": read_rope(hf),
        "activation": activation[act],
        "tie_word_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "dtype": str(hf.get("dtype") or hf.get("torch_dtype") or "float32"),
    }
    return ModelConfig(**{**values, **special})


def read_rope(hf: Mapping[str, Any]) -> RopeConfig:
    """Reads rope as `rope_parameters` or, in older files, as `rope_theta` and `rope_scaling`."""
    scaling = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    values: dict[str, Any] = {
        "theta": float(scaling.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    }
    values["kind"] = kind
    for key in RopeConfig.__dataclass_fields__:
        if scaling.get(key) is not None:
            value = scaling[key]
            values[key] = tuple(value) if isinstance(value, list) else value
    partial = values.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if partial is not None:
        values["partial_rotary_factor"] = partial
    # YaRN stretches from the length it was trained at, which older files give outside the mapping.
    if kind != "default" and "original_max_position_embeddings" not in values:
        length = hf.get("original_max_position_embeddings") or hf.get("max_position_embeddings")
        values["original_max_position_embeddings"] = length
    if kind == "longrope" and "factor" not in values:
        longest = hf.get("max_position_embeddings", 0)
        values["factor"] = longest / values["original_max_position_embeddings"]
    return RopeConfig(**values)


def sliding_windows(hf: Mapping[str, Any], *, default: str) -> tuple[int, ...]:
    """Window of each layer from `layer_types`, which `default` fills where it is missing."""
    kinds = hf.get("layer_types") or [default] * hf["num_hidden_layers"]
    window = hf.get("sliding_window") or 0
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    return windows if any(windows) else ()


def dense_sources(config: ModelConfig, slots: HeadSlots) -> Sources:
    """Weights of a dense decoder in the names of Hugging Face's Llama and its relatives."""
    vocab, embed = config.vocab_size, config.hidden_size
    layer = "model.layers.{layer}."
    sources: Sources = {
        "embedding": (Source(name="model.embed_tokens.weight", shape=(vocab, embed)),),
        "norm.scale": (Source(name="model.norm.weight", shape=(embed,)),),
        "layers.attention_norm.scale": (
            Source(name=layer + "input_layernorm.weight", shape=(embed,)),
        ),
        "layers.mlp_norm.scale": (
            Source(name=layer + "post_attention_layernorm.weight", shape=(embed,)),
        ),
        **attention_sources(config, slots, layer + "self_attn."),
        **mlp_sources(config, layer + "mlp."),
    }
    if not config.tie_word_embeddings:
        sources["output"] = (Source(name="lm_head.weight", shape=(vocab, embed)),)
    return sources


def attention_sources(config: ModelConfig, slots: HeadSlots, prefix: str) -> Sources:
    """Query, key and value rows side by side in each key/value slot; output columns likewise."""
    embed, head_dim, group = config.hidden_size, config.head_dim, slots.group
    q_rows, kv_rows = config.num_heads * head_dim, config.num_kv_heads * head_dim
    everything = slice(None)
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
                region=(everything, everything, place, everything),
            )
        )
        biases.append(
            Source(
                name=f"{prefix}{name}.bias",
                shape=(rows,),
                split=(heads, head_dim),
                slots=(0, held),
                region=(everything, place, everything),
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
    if config.qk_norm:
        for norm in ("q_norm", "k_norm"):
            sources[f"layers.attention.{norm}.scale"] = (
                Source(name=f"{prefix}{norm}.weight", shape=(head_dim,)),
            )
    return sources


def mlp_sources(config: ModelConfig, prefix: str) -> Sources:
    """Gate and up beside each other, down; padded features follow as zeros."""
    embed, ffn = config.hidden_size, config.intermediate_size
    everything = slice(None)
    kernels, biases = [], []
    for index, name in enumerate(("gate_proj", "up_proj")):
        place = slice(index, index + 1)
        kernels.append(
            Source(
                name=f"{prefix}{name}.weight",
                shape=(ffn, embed),
                split=(1, ffn, embed),
                transpose=(2, 0, 1),
                region=(everything, place, everything),
            )
        )
        biases.append(
            Source(
                name=f"{prefix}{name}.bias",
                shape=(ffn,),
                split=(1, ffn),
                region=(place, everything),
            )
        )
    sources: Sources = {
        "layers.mlp.gate_up": tuple(kernels),
        "layers.mlp.down": (
            Source(name=prefix + "down_proj.weight", shape=(embed, ffn), transpose=(1, 0)),
        ),
    }
    if config.mlp_bias:
        sources["layers.mlp.gate_up_bias"] = tuple(biases)
        sources["layers.mlp.down_bias"] = (Source(name=prefix + "down_proj.bias", shape=(embed,)),)
    return sources


def require(hf: Mapping[str, Any], key: str) -> Any:
    """The value of a key that config.json must have."""
    if hf.get(key) is None:
        raise ConfigError(
            f"config.json has no {key}: the checkpoint's configuration is incomplete."
        )
    return hf[key]
