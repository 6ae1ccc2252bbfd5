"""Reads a folder in Hugging Face's layout: config.json and one or more safetensors files.

Format of the files: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON
header, then the tensors without gaps).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from llmjax.weights.interface import CheckpointError, TensorInfo

_DTYPES: Mapping[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_PICKLES = (".bin", ".pt", ".pth")
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class _Location:
    file: Path
    offset: int


class HFCheckpoint:
    """A folder of safetensors; tensors are read as views of the mapped files."""

    def __init__(self, path: Path, *, needs_weights: bool = True):
        """Opens a folder; without `needs_weights` a config.json is enough, and no tensors are."""
        self.path = path
        files = _find_weights(path) if needs_weights else []
        self.config = read_json(path / "config.json")
        generation = path / "generation_config.json"
        self.generation_config = read_json(generation) if generation.exists() else {}
        self.tensors: dict[str, TensorInfo] = {}
        self._locations: dict[str, _Location] = {}
        for file in files:
            for name, (info, offset) in _read_header(file).items():
                if name in self.tensors:
                    raise CheckpointError(
                        f"{path} holds {name} twice, in {self._locations[name].file.name} and in "
                        f"{file.name}; remove the file that does not belong to the model."
                    )
                self.tensors[name] = info
                self._locations[name] = _Location(file=file, offset=offset)

    def read(self, name: str, rows: slice | None = None) -> Shaped[np.ndarray, "..."]:
        """Map the tensor's bytes; they leave memory when the view is dropped."""
        info, location = self.tensors[name], self._locations[name]
        if info.num_bytes == 0:
            whole = np.empty(info.shape, info.dtype)
        else:
            whole = np.memmap(
                location.file, info.dtype, mode="r", offset=location.offset, shape=info.shape
            )
        return whole if rows is None else whole[rows]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        CheckpointError: the file is missing, is not UTF-8, is not JSON or is no object.
    """
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}; a model folder needs config.json and safetensors "
            "files, as Hugging Face's save_pretrained writes them."
        ) from None
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8 or download it again."
        ) from None
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{path} is not JSON (line {error.lineno}, column {error.colno}: {error.msg}); "
            "mend it or download it again."
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a JSON {type(content).__name__}, not an object of keys and values."
        )
    return content


def _find_weights(path: Path) -> list[Path]:
    """List the safetensors files that make up the model.

    Raises:
        CheckpointError: there are none, or the index names files that are not there.
    """
    if (path / _INDEX).exists():
        return _read_index(path)
    if (path / "model.safetensors").exists():
        return [path / "model.safetensors"]
    files = sorted(path.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)
    if pickles:
        raise CheckpointError(
            f"{path} has only pickle weights ({pickles[0]}), which can run any code and are never "
            "read; convert them to safetensors with Hugging Face's "
            "save_pretrained(folder, safe_serialization=True)."
        )
    ggufs = sorted(path.glob("*.gguf"))
    if ggufs:
        raise CheckpointError(f"{path} has no safetensors files; give the file {ggufs[0]} itself.")
    content = "no safetensors files" if any(path.iterdir()) else "nothing in it"
    raise CheckpointError(
        f"{path} has {content}; a model folder needs config.json and *.safetensors."
    )


def _read_index(path: Path) -> list[Path]:
    weight_map = read_json(path / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(
            f"{path / _INDEX} has no weight_map from tensor names to files; download it again."
        )
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(
            f"{path / _INDEX} names {outside[0]}, which is not a file of the same folder."
        )
    missing = [name for name in names if not (path / name).exists()]
    if missing:
        raise CheckpointError(
            f"{path / _INDEX} names {len(names)} files, of which {len(missing)} are missing: "
            f"{', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}; download them again."
        )
    return [path / name for name in names]


def _read_header(file: Path) -> dict[str, tuple[TensorInfo, int]]:
    """Return each tensor's info and its offset in the file, checked against the file's length."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise _damaged(file, f"its header needs {8 + length} bytes and the file has {size}")
        try:
            header = json.loads(stream.read(length).decode("utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError):
            raise _damaged(file, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _damaged(file, "its header is not an object of tensors")
    header.pop("__metadata__", None)
    return {name: _locate(file, name, entry, 8 + length, size) for name, entry in header.items()}


def _locate(
    file: Path, name: str, entry: Any, data_start: int, size: int
) -> tuple[TensorInfo, int]:
    try:
        shape, dtype_name = tuple(int(n) for n in entry["shape"]), entry["dtype"]
        begin, end = (int(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise _damaged(file, f"the header's entry of {name} is incomplete") from None
    if dtype_name not in _DTYPES:
        raise CheckpointError(
            f"{file}: tensor {name} has dtype {dtype_name}, which is not supported; "
            f"use one of {', '.join(_DTYPES)}."
        )
    info = TensorInfo(shape=shape, dtype=np.dtype(_DTYPES[dtype_name]))
    if min(shape, default=0) < 0 or begin < 0 or end - begin != info.num_bytes:
        raise _damaged(
            file,
            f"tensor {name} of shape {shape} and dtype {dtype_name} needs {math.prod(shape)} x "
            f"{info.dtype.itemsize} bytes, its header gives {end - begin}",
        )
    if data_start + end > size:
        raise _damaged(
            file, f"tensor {name} ends at byte {data_start + end} and the file has {size}"
        )
    return info, data_start + begin


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{file} is truncated or corrupt: {what}; download it again.")
