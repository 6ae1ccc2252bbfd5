"""Architecture names -> families."""

from collections.abc import Mapping
from typing import Any

from llmjax.config import ConfigError
from llmjax.models import (
    deepseek,
    gemma3,
    glm4_moe,
    gpt_oss,
    llama,
    llama4,
    mixtral,
    qwen2,
    qwen3,
    qwen3_moe,
)
from llmjax.models.family import Family

FAMILIES = tuple(
    module.FAMILY
    for module in (
        llama,
        qwen2,
        qwen3,
        mixtral,
        qwen3_moe,
        deepseek,
        glm4_moe,
        gpt_oss,
        llama4,
        gemma3,
    )
)
"""Every family that can be loaded."""


def find_family(hf: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
        ConfigError: the architecture is unknown, with the known ones.
    """
    architectures = hf.get("architectures") or []
    by_name = {name: family for family in FAMILIES for name in family.architectures}
    for name in architectures:
        if name in by_name:
            return by_name[name]
    text = hf.get("text_config")
    inside = text.get("model_type") if isinstance(text, Mapping) else None
    holding = f" with a text model of the type {inside}" if inside else ""
    raise ConfigError(
        f"config.json names the architecture {', '.join(architectures) or '(none)'}{holding}, "
        f"which is not implemented: known are {', '.join(sorted(by_name))}."
    )
