"""What a family of models says about itself, and what dense decoders have in common."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmjax.config import ConfigError, LayerConfig, ModelConfig, RopeConfig
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
    sources: Callable[[ModelConfig, HeadSlots, Collection[str]], Sources]
    """Where each weight comes from; told the tensors' names, for families of several spellings."""
    model_types: Mapping[str, str]
    """`model_type`, by which a multimodal model says what text model it holds -> architecture."""
    ignored: tuple[str, ...] = ()
    """Patterns of tensors that the family knowingly drops; `{beyond}` stands for the index of any
    layer after the last one, where checkpoints keep layers that predict further tokens."""


LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
"""What config.json may call a layer's attention."""
ROTARY_BUFFERS = (r".*rotary_emb\.inv_freq",)
"""Buffers that old checkpoints carry and that are computed here."""


def read_dense_config(hf: Mapping[str, Any], **special: Any) -> ModelConfig:
    """Reads the keys that dense decoders share; `special` holds what a family has of its own.

    Raises:
        ConfigError: a key that must be there is missing.
    """
    activation = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
    act = hf.get("hidden_act") or hf.get("hidden_activation") or "silu"
    if act not in activation:
        raise ConfigError(
            f"config.json gives hidden_act={act!r}: known are {', '.join(activation)}."
        )
    heads, hidden = require(hf, "num_attention_heads"), require(hf, "hidden_size")
    # gpt-oss names no type; what is quantised reads as bfloat16.
    unnamed_dtype = "bfloat16" if hf.get("quantization_config") else "float32"
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
        "dtype": str(hf.get("dtype") or hf.get("torch_dtype") or unnamed_dtype),
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


def read_layers(
    hf: Mapping[str, Any],
    kinds: Sequence[str] | str = "full_attention",
    *,
    experts: Sequence[bool] | bool = False,
    local_rope: bool = False,
    rotated: Sequence[bool] | bool = True,
) -> tuple[LayerConfig, ...]:
    """What each layer does, from config.json's `layer_types`, or `kinds` where it has none.

    Args:
        experts: which layers hold a mixture of experts.
        local_rope: layers with a sliding window have a rotary embedding of their own.
        rotated: which layers have a rotary embedding at all.
    """
    count = require(hf, "num_hidden_layers")
    types = hf.get("layer_types") or ([kinds] * count if isinstance(kinds, str) else kinds)
    sparse_layers = [experts] * count if isinstance(experts, bool) else experts
    rotated_layers = [rotated] * count if isinstance(rotated, bool) else rotated
    for key, number in (("layer_types", len(types)), ("no_rope_layers", len(rotated_layers))):
        if number != count:
            raise ConfigError(
                f"config.json gives {number} {key} for num_hidden_layers={count}: "
                "there must be one for each layer."
            )
    layers = []
    for kind, sparse, turned in zip(types, sparse_layers, rotated_layers, strict=True):
        if kind not in LAYER_TYPES:
            raise ConfigError(
                f"config.json gives the layer type {kind!r}: known are {', '.join(LAYER_TYPES)}."
            )
        local = kind == "sliding_attention" and local_rope
        layers.append(
            LayerConfig(
                window=(hf.get("sliding_window") or 0) if kind == "sliding_attention" else 0,
                chunk=(hf.get("attention_chunk_size") or 0) if kind == "chunked_attention" else 0,
                rope="none" if not turned else "local" if local else "global",
                ffn="experts" if sparse else "dense",
            )
        )
    return tuple(layers)


def refuse_unless(hf: Mapping[str, Any], key: str, *values: Any) -> None:
    """Raises ConfigError where a key that is there has another value than what is implemented."""
    value = hf.get(key, values[0])
    if value not in values:
        known = " or ".join(repr(known) for known in values)
        raise ConfigError(
            f"config.json gives {key}={value!r}, and only {known} is implemented for "
            f"{hf['architectures'][0]}."
        )


def require(hf: Mapping[str, Any], key: str) -> Any:
    """The value of a key that config.json must have."""
    if hf.get(key) is None:
        raise ConfigError(
            f"config.json has no {key}: the checkpoint's configuration is incomplete."
        )
    return hf[key]
