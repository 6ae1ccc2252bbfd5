"""Presents a GGUF file as a Hugging Face checkpoint: its configuration, names and row order."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from jaxtyping import Float, Shaped

from llmjax.weights.gguf_file import GGUFFile, GGUFTensor, read_gguf
from llmjax.weights.interface import CheckpointError, TensorInfo

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
# Divisors of each rope frequency: part of the configuration, not a weight.
_ROPE_FREQS = "rope_freqs.weight"
# Types that are stored as they are; all others are dequantised to float32.
_PLAIN_DTYPES: Mapping[gguf.GGMLQuantizationType, Any] = {
    gguf.GGMLQuantizationType.F64: np.float64,
    gguf.GGMLQuantizationType.F32: np.float32,
    gguf.GGMLQuantizationType.F16: np.float16,
    gguf.GGMLQuantizationType.BF16: ml_dtypes.bfloat16,
}
# Few enough for the processor's cache.
_VALUES_AT_ONCE = 1 << 17


class GGUFCheckpoint:
    """A GGUF file of the llama, qwen2 or qwen3 architecture."""

    def __init__(self, path: Path):
        self.path = path
        self._file = read_gguf(path)
        self._names = _map_names(self._file)
        self.config = _read_config(self._file)
        self.generation_config = _read_generation_config(self._file.metadata)
        self.tensors: dict[str, TensorInfo] = {}
        for name, gguf_name in self._names.items():
            tensor = self._file.tensors[gguf_name]
            dtype = _dtype_when_read(path, gguf_name, tensor)
            self.tensors[name] = TensorInfo(shape=tensor.shape, dtype=dtype)

    def read(self, name: str, rows: slice | None = None) -> Shaped[np.ndarray, "..."]:
        """Read a tensor; quantised ones become float32."""
        values = _read_values(self.path, self._file.tensors[self._names[name]])
        heads = self._rotated_heads(name)
        values = values if heads is None else _undo_rope_order(values, heads)
        return values if rows is None else values[rows]

    def _rotated_heads(self, name: str) -> int | None:
        """Head count of a query or key projection whose rows the file has reordered."""
        if self.config["model_type"] != "llama":
            return None
        if ".q_proj." in name:
            return self.config["num_attention_heads"]
        return self.config["num_key_value_heads"] if ".k_proj." in name else None


def _undo_rope_order(values: Shaped[np.ndarray, "rows ..."], heads: int) -> np.ndarray:
    """Restore Hugging Face's row order: halves of a head's rows, where llama.cpp wants pairs."""
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _read_values(path: Path, tensor: GGUFTensor) -> Shaped[np.ndarray, "..."]:
    plain = _PLAIN_DTYPES.get(tensor.kind)
    if plain is not None:
        return np.memmap(path, plain, mode="r", offset=tensor.offset, shape=tensor.shape)
    stored = np.memmap(path, np.uint8, mode="r", offset=tensor.offset, shape=(tensor.num_bytes,))
    block, block_bytes = gguf.GGML_QUANT_SIZES[tensor.kind]
    packed = stored.view(np.ndarray).reshape(-1, block_bytes)
    values = np.empty((len(packed), block), np.float32)
    # The library works on 16 rows at a time, which is slow where rows are short.
    step = max(1, _VALUES_AT_ONCE // block)
    for start in range(0, len(packed), step):
        part = packed[start : start + step]
        values[start : start + step] = gguf.dequantize(part.reshape(1, -1), tensor.kind).reshape(
            -1, block
        )
    return values.reshape(tensor.shape)


def _dtype_when_read(path: Path, name: str, tensor: GGUFTensor) -> np.dtype:
    """Say which dtype a tensor is read as, having tried that its type can be dequantised."""
    plain = _PLAIN_DTYPES.get(tensor.kind)
    if plain is not None:
        return np.dtype(plain)
    _, block_bytes = gguf.GGML_QUANT_SIZES[tensor.kind]
    try:
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), tensor.kind)
    except NotImplementedError:
        raise CheckpointError(
            f"{path}: tensor {name} has type {tensor.kind.name}, which cannot be dequantised; use "
            "another quantisation of the model, such as Q8_0 or Q4_K."
        ) from None
    return np.dtype(np.float32)


def _map_names(file: GGUFFile) -> dict[str, str]:
    """Map Hugging Face's tensor names to the file's; unknown tensors keep their names."""
    names = {}
    for name in file.tensors:
        stem, _, suffix = name.rpartition(".")
        layer = _LAYER_TENSOR.fullmatch(name)
        if name == _ROPE_FREQS:
            continue
        if layer and layer[2] in _LAYER_NAMES:
            names[f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{layer[3]}"] = name
        elif stem in _TOP_NAMES:
            names[f"{_TOP_NAMES[stem]}.{suffix}"] = name
        else:
            # The loader names it as a tensor without a place in the model.
            names[name] = name
    return names


def _read_config(file: GGUFFile) -> dict[str, Any]:
    """Write the file's metadata as a config.json."""
    metadata, tensors, path = file.metadata, file.tensors, file.path
    architecture = metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise CheckpointError(
            f"{path} has the architecture {architecture}; GGUF files of "
            f"{', '.join(_ARCHITECTURES)} are read. Other families load from safetensors."
        )
    read = _KeyReader(path, metadata, architecture)
    read.refuse("expert_count", "mixture-of-experts models load from safetensors")
    read.refuse("attention.sliding_window", "sliding windows load from safetensors")
    hidden_size, num_heads = read.integer("embedding_length"), read.integer("attention.head_count")
    head_dim = read.integer(
        "attention.key_length", read.integer("rope.dimension_count", hidden_size // num_heads)
    )
    for key in ("attention.value_length", "rope.dimension_count"):
        if read.integer(key, head_dim) != head_dim:
            raise CheckpointError(
                f"{path}: {architecture}.{key} is {read.integer(key)} but the heads have "
                f"{head_dim} dimensions; they must be equal."
            )
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{path} has no tensor token_embd.weight, the embedding.")
    config = {
        "architectures": [_ARCHITECTURES[architecture]],
        "model_type": architecture,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden_size,
        "num_hidden_layers": read.integer("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": read.integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "intermediate_size": read.integer("feed_forward_length"),
        "max_position_embeddings": read.integer("context_length"),
        "rms_norm_eps": read.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _read_rope(file, read),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": _stored_dtype(embedding),
    }
    return config | _read_generation_config(metadata)


def _read_rope(file: GGUFFile, read: "_KeyReader") -> dict[str, Any]:
    """Write rope's metadata as Hugging Face's rope_parameters."""
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": read.number("rope.freq_base", 1e4),
    }
    kind = read.text("rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": read.number("rope.scaling.factor")}
        original = read.integer("rope.scaling.original_context_length", 0)
        if original:
            rope["original_max_position_embeddings"] = original
    elif kind != "none":
        raise CheckpointError(
            f"{file.path}: rope scaling {kind} is not read from GGUF; use the model's safetensors."
        )
    if _ROPE_FREQS in file.tensors:
        if kind != "none":
            raise CheckpointError(
                f"{file.path} has both {_ROPE_FREQS} and rope scaling {kind}; one must go."
            )
        factors: Float[np.ndarray, " half_head"] = _read_values(
            file.path, file.tensors[_ROPE_FREQS]
        )
        # Llama 3's scaling, already computed per frequency. longrope takes divisors as they are;
        # the same list on both sides of the context length, and no factor on cosine and sine.
        rope |= {
            "rope_type": "longrope",
            "short_factor": factors.tolist(),
            "long_factor": factors.tolist(),
            "attention_factor": 1.0,
            "original_max_position_embeddings": read.integer("context_length"),
        }
    return rope


def _stored_dtype(embedding: GGUFTensor) -> str:
    """Name the dtype to compute in: that of plain weights; bfloat16 for quantised ones."""
    dtypes = {gguf.GGMLQuantizationType.F32: "float32", gguf.GGMLQuantizationType.F16: "float16"}
    return dtypes.get(embedding.kind, "bfloat16")


def _read_generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Collect the special token ids; a turn may end by more ids than the text does."""
    ids = {key: metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")}
    ends = list(dict.fromkeys(value for value in ids.values() if value is not None))
    others = {"bos_token_id": "bos_token_id", "pad_token_id": "padding_token_id"}
    found = {key: metadata.get(f"tokenizer.ggml.{name}") for key, name in others.items()}
    config = {key: value for key, value in found.items() if value is not None}
    return config | ({"eos_token_id": ends} if ends else {})


class _KeyReader:
    """Reads the keys of one architecture, naming those that are missing or of another type."""

    def __init__(self, path: Path, metadata: Mapping[str, Any], architecture: str):
        self._path = path
        self._metadata = metadata
        self._architecture = architecture

    def integer(self, key: str, default: int | None = None) -> int:
        return self._get(key, int, default)

    def number(self, key: str, default: float | None = None) -> float:
        return float(self._get(key, (int, float), default))

    def text(self, key: str, default: str | None = None) -> str:
        return self._get(key, str, default)

    def refuse(self, key: str, advice: str) -> None:
        """Refuse a feature that a non-zero value would turn on."""
        value = self._metadata.get(f"{self._architecture}.{key}", 0)
        if value:
            raise CheckpointError(f"{self._path}: {self._architecture}.{key} is {value}; {advice}.")

    def _get(self, key: str, kind: Any, default: Any) -> Any:
        value = self._metadata.get(f"{self._architecture}.{key}", default)
        if not isinstance(value, kind):
            what = "missing" if value is None else f"{value!r}, which cannot be used"
            raise CheckpointError(f"{self._path}: {self._architecture}.{key} is {what}.")
        return value
