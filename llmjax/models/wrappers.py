"""Multimodal models hold a text model: where its configuration and its tensors lie in theirs."""

import re
from collections.abc import Mapping
from typing import Any

from llmjax.models.registry import FAMILIES

NO_TEXT = tuple(
    rf"(?:model\.)?{part}\..*"
    for part in (
        "vision_tower",
        "vision_model",
        "visual",
        "audio_tower",
        "multi_modal_projector",
        "mm_projector",
    )
)
"""Patterns of tensors that text needs nothing of: encoders of images and sound, and what joins them
to the text model."""
OUTER_KEYS = (
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
    "torch_dtype",
    "quantization_config",
)
"""Keys that the wrapper decides for its text model too, where it has them."""

_PREFIX = re.compile(r"(model\.)?language_model\.")


def lift_text_config(hf: Mapping[str, Any]) -> dict[str, Any] | None:
    """The text model's config.json of a multimodal one; None where there is no known text model."""
    text = hf.get("text_config")
    if not isinstance(text, Mapping):
        return None
    architectures = {kind: name for family in FAMILIES for kind, name in family.model_types.items()}
    architecture = architectures.get(str(text.get("model_type")))
    if architecture is None:
        return None
    outer = {key: hf[key] for key in OUTER_KEYS if hf.get(key) is not None}
    return {**text, **outer, "architectures": [architecture]}


def lift_tensor_name(name: str) -> str:
    """The name that a text model alone gives a tensor; other parts' names stay.

    Files written before 2025 hold whole text models (`language_model.model.norm`), newer ones their
    decoders without the head (`model.language_model.norm`).
    """
    found = _PREFIX.match(name)
    return name if found is None else (found[1] or "") + name[found.end() :]
