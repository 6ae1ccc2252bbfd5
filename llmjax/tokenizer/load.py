"""Finds the tokenizer in a model's files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from llmjax.tokenizer.gguf import build_tokenizer
from llmjax.tokenizer.tokenizer import Tokenizer
from llmjax.weights.gguf_file import GGUFFile, read_gguf
from llmjax.weights.hf import read_json
from llmjax.weights.interface import CheckpointError

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
# Files of tokenizers that other libraries can turn into tokenizer.json.
_SLOW_TOKENIZERS = ("tokenizer.model", "vocab.json", "spiece.model", "tekken.json")


def load_tokenizer(checkpoint_path: Path) -> Tokenizer | None:
    """Load the tokenizer of a model folder or GGUF file; None where there is none.

    Raises:
        CheckpointError: there is a tokenizer of a kind that cannot be read, or it is damaged.
    """
    if checkpoint_path.is_file():
        return _load_from_gguf(read_gguf(checkpoint_path))
    if (checkpoint_path / "tokenizer.json").exists():
        return _load_from_folder(checkpoint_path)
    slow = [name for name in _SLOW_TOKENIZERS if (checkpoint_path / name).exists()]
    if slow:
        raise CheckpointError(
            f"{checkpoint_path} has {slow[0]} but no tokenizer.json; write one with Hugging Face's "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    return None


def _load_from_gguf(file: GGUFFile) -> Tokenizer | None:
    backend = build_tokenizer(file)
    if backend is None:
        return None
    metadata = file.metadata
    tokens = metadata["tokenizer.ggml.tokens"]
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for key, name in names.items()}
    stops = (metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom"))
    return Tokenizer(
        backend,
        special_tokens={name: tokens[i] for name, i in ids.items() if i is not None},
        stop_ids=(stop for stop in stops if stop is not None),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def _load_from_folder(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise CheckpointError(f"{path} is not a tokenizer ({error}); download it again.") from None
    # A saved tokenizer may carry the padding and truncation of its training.
    backend.no_padding()
    backend.no_truncation()
    config = _read_optional(folder / "tokenizer_config.json")
    _add_missing_tokens(backend, config)
    written = _read_optional(folder / "special_tokens_map.json") | config
    special = {name: _token_text(written.get(name)) for name in _SPECIAL_NAMES}
    special_tokens = {name: text for name, text in special.items() if text is not None}
    stop = backend.token_to_id(special_tokens.get("eos_token", ""))
    return Tokenizer(
        backend,
        special_tokens=special_tokens,
        stop_ids=() if stop is None else (stop,),
        chat_template=_find_chat_template(folder, config),
    )


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _token_text(token: Any) -> str | None:
    """Read a token that is written as text or as an object with its flags."""
    return token.get("content") if isinstance(token, Mapping) else token


def _add_missing_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Add the tokens that only tokenizer_config.json declares, in the order of their ids."""
    declared = config.get("added_tokens_decoder") or {}
    for _, token in sorted(declared.items(), key=_number):
        if backend.token_to_id(token["content"]) is None:
            special = bool(token.get("special"))
            added = tokenizers.AddedToken(
                token["content"], special=special, normalized=bool(token.get("normalized"))
            )
            (backend.add_special_tokens if special else backend.add_tokens)([added])


def _number(item: tuple[str, Any]) -> int:
    return int(item[0])


def _find_chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Find the template in its own file or in the tokenizer's configuration, in that order."""
    if (folder / "chat_template.jinja").exists():
        try:
            return (folder / "chat_template.jinja").read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{folder / 'chat_template.jinja'} is not UTF-8 text (byte {error.start}); save it "
                "as UTF-8 or download it again."
            ) from None
    separate = _read_optional(folder / "chat_template.json")
    template = separate.get("chat_template", config.get("chat_template"))
    if isinstance(template, list):
        # Several named templates, as [{"name": ..., "template": ...}].
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default", next(iter(named.values()), None))
    return template
