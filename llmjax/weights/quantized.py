"""Presents a quantised checkpoint as a plain one: tensors are dequantised as they are read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from jaxtyping import Float32, Shaped, UInt8

from llmjax.weights.interface import Checkpoint, CheckpointError, TensorInfo

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_BYTES = np.arange(256, dtype=np.uint8)
_FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
_FP8_VALUES = _BYTES.view(_FP8).astype(np.float32)
# The four bits of a value of MXFP4, the lower half of a byte first.
_FP4_VALUES = np.array(
    [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32
)
# Both values of a byte as one number, so that a look-up moves them together.
_FP4_PAIRS = np.stack([_FP4_VALUES[_BYTES & 15], _FP4_VALUES[_BYTES >> 4]], axis=-1)
_FP4_PAIRS = _FP4_PAIRS.view(np.int64)[:, 0]
_OUTPUTS_AT_ONCE = 32


def dequantize(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint whose tensors read as bfloat16; one that is not quantised as it is.

    Raises:
        CheckpointError: it is quantised by a method that is not read.
    """
    settings = _find_settings(checkpoint.config)
    if settings is None:
        return checkpoint
    method = settings.get("quant_method")
    if method == "fp8" and _is_shape(settings.get("weight_block_size")):
        return DequantizedCheckpoint(checkpoint, find_fp8(checkpoint, settings))
    if method == "mxfp4":
        return DequantizedCheckpoint(checkpoint, find_mxfp4(checkpoint))
    what = "fp8 without weight_block_size" if method == "fp8" else method
    raise CheckpointError(
        f"{checkpoint.path} is quantised by {what}, which is not read: fp8 with a scale for each "
        "block (as DeepSeek-V3) and mxfp4 (as gpt-oss) are. Use the model's checkpoint in bfloat16 "
        "or, of llama, qwen2 and qwen3, a GGUF file."
    )


class QuantizedTensor(Protocol):
    """A tensor that others of the checkpoint make up."""

    @property
    def parts(self) -> tuple[str, str]:
        """The stored values and their scales."""
        ...

    def shape(self, stored: Mapping[str, TensorInfo]) -> tuple[int, ...]:
        """Shape of the values."""
        ...

    def read(self, stored: Checkpoint, rows: slice | None) -> Shaped[np.ndarray, "..."]:
        """The values of rows of the first axis."""
        ...


class DequantizedCheckpoint:
    """Another checkpoint, of which some tensors are decoded."""

    def __init__(self, stored: Checkpoint, quantized: Mapping[str, QuantizedTensor]):
        self._stored, self._quantized = stored, quantized
        parts = {part for tensor in quantized.values() for part in tensor.parts}
        self.tensors = {name: info for name, info in stored.tensors.items() if name not in parts}
        for name, tensor in quantized.items():
            self.tensors[name] = TensorInfo(shape=tensor.shape(stored.tensors), dtype=BFLOAT16)

    @property
    def path(self) -> Path:
        """Folder or file it was opened from."""
        return self._stored.path

    @property
    def config(self) -> dict[str, Any]:
        """The model's configuration."""
        return self._stored.config

    @property
    def generation_config(self) -> dict[str, Any]:
        """Defaults for generation."""
        return self._stored.generation_config

    def read(self, name: str, rows: slice | None = None) -> Shaped[np.ndarray, "..."]:
        """Read a tensor, dequantised where it is quantised."""
        tensor = self._quantized.get(name)
        return self._stored.read(name, rows) if tensor is None else tensor.read(self._stored, rows)


@dataclass(frozen=True, kw_only=True)
class Fp8Tensor:
    """float8 e4m3 values, each block of a matrix with a scale that multiplies it."""

    name: str
    block: tuple[int, int]

    @property
    def parts(self) -> tuple[str, str]:
        return (self.name, self.name + "_scale_inv")

    def shape(self, stored: Mapping[str, TensorInfo]) -> tuple[int, ...]:
        return stored[self.name].shape

    def read(self, stored: Checkpoint, rows: slice | None) -> Shaped[np.ndarray, "..."]:
        # Only the matrices of a tensor that holds several are worth reading apart.
        apart = rows if len(stored.tensors[self.name].shape) > 2 else None
        values, scales = (stored.read(part, apart) for part in self.parts)
        whole = np.empty(values.shape, BFLOAT16)
        for index in np.ndindex(values.shape[:-2]):
            decode_fp8(values[index], scales[index], self.block, out=whole[index])
        return whole if rows is None or apart is not None else whole[rows]


@dataclass(frozen=True, kw_only=True)
class Mxfp4Tensor:
    """Experts' matrices in four bits, each 32 neighbours with a power of two as their scale.

    Source: OCP Microscaling Formats (MX) Specification, version 1.0.
    """

    name: str

    @property
    def parts(self) -> tuple[str, str]:
        return (self.name + "_blocks", self.name + "_scales")

    def shape(self, stored: Mapping[str, TensorInfo]) -> tuple[int, ...]:
        experts, outputs, groups, half = stored[self.parts[0]].shape
        return (experts, 2 * groups * half, outputs)

    def read(self, stored: Checkpoint, rows: slice | None) -> Shaped[np.ndarray, "..."]:
        """Outputs come last, as in gpt-oss's own tensors in bfloat16."""
        blocks, scales = (stored.read(part, rows) for part in self.parts)
        return decode_mxfp4(blocks, scales).swapaxes(1, 2)


def find_fp8(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> dict[str, QuantizedTensor]:
    """The float8 tensors, each of which must have its scales.

    Raises:
        CheckpointError: scales are missing or do not fit.
    """
    block = settings["weight_block_size"]
    found: dict[str, QuantizedTensor] = {}
    for name, info in checkpoint.tensors.items():
        if info.dtype != _FP8:
            continue
        *others, height, width = info.shape
        tensor = Fp8Tensor(name=name, block=(block[0], block[1]))
        scales = (*others, -(-height // block[0]), -(-width // block[1]))
        _check_scales(checkpoint, *tensor.parts, scales)
        found[name] = tensor
    return found


def find_mxfp4(checkpoint: Checkpoint) -> dict[str, QuantizedTensor]:
    """The tensors stored as blocks, each of which must have its scales.

    Raises:
        CheckpointError: scales are missing or do not fit.
    """
    found: dict[str, QuantizedTensor] = {}
    for stored, info in checkpoint.tensors.items():
        if stored.endswith("_blocks"):
            tensor = Mxfp4Tensor(name=stored.removesuffix("_blocks"))
            _check_scales(checkpoint, *tensor.parts, info.shape[:-1])
            found[tensor.name] = tensor
    return found


def _check_scales(
    checkpoint: Checkpoint, name: str, scales: str, expected: tuple[int, ...]
) -> None:
    info = checkpoint.tensors.get(scales)
    if info is None or info.shape != expected:
        held = "is missing" if info is None else f"has shape {info.shape}"
        raise CheckpointError(
            f"{checkpoint.path}: {name} of shape {checkpoint.tensors[name].shape} needs {scales} "
            f"of shape {expected}, which {held}; download the checkpoint again."
        )


def decode_fp8(
    values: Shaped[np.ndarray, "height width"],
    scales: Shaped[np.ndarray, "rows columns"],
    block: tuple[int, int],
    *,
    out: Shaped[np.ndarray, "height width"],
) -> None:
    """Multiply each block by its scale, a row of blocks at a time, in float32."""
    height, width = block
    for row, scale in enumerate(scales.astype(np.float32)):
        place = slice(row * height, (row + 1) * height)
        # A table of 256 entries is several times as fast as a cast.
        part: Float32[np.ndarray, "rows width"] = _FP8_VALUES.take(
            values[place].view(np.uint8), mode="clip"
        )
        out[place] = part * np.repeat(scale, width)[: part.shape[1]]


def decode_mxfp4(
    blocks: UInt8[np.ndarray, "experts outputs groups half"],
    scales: UInt8[np.ndarray, "experts outputs groups"],
) -> Shaped[np.ndarray, "experts outputs inputs"]:
    """Two values a byte, times 2 ** (scale - 127): exact in bfloat16."""
    experts, outputs, groups, half = blocks.shape
    whole = np.empty((experts, outputs, groups, 2 * half), BFLOAT16)
    for expert in range(experts):
        # Few enough at a time for the processor's cache.
        for start in range(0, outputs, _OUTPUTS_AT_ONCE):
            place = (expert, slice(start, start + _OUTPUTS_AT_ONCE))
            values = _FP4_PAIRS[blocks[place]].view(np.float32)
            powers = np.ldexp(np.float32(1), scales[place].astype(np.int32) - 127)
            whole[place] = values * powers[..., None]
    return whole.reshape(experts, outputs, -1)


def _find_settings(hf: Mapping[str, Any]) -> Mapping[str, Any] | None:
    text = hf.get("text_config")
    inner = text.get("quantization_config") if isinstance(text, Mapping) else None
    return hf.get("quantization_config") or inner


def _is_shape(block: Any) -> bool:
    return isinstance(block, Sequence) and len(block) == 2
