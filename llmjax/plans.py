"""A plan and the engine's options, from whichever words they were given in."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llmjax.config import ALIASES, ConfigError, EngineConfig
from meshes import ParallelPlan, PlanError
from meshes.errors import shorten
from meshes.trtllm import (
    KEYS,
    PLAN_KEYS,
    Deployment,
    load_deployment,
    read_deployment,
    to_mapping,
)

logger = logging.getLogger(__name__)


def resolve(
    plan: ParallelPlan | str | Path | None,
    keywords: Mapping[str, Any],
    *,
    allow_unsupported: Iterable[str] = (),
) -> tuple[ParallelPlan, dict[str, Any]]:
    """The plan, and options that `EngineConfig.from_keywords` accepts; logs what was beaten.

    Args:
        plan: a plan, a YAML file of mesh axes or of TensorRT-LLM's keys, a preset's name, or None.
        keywords: TensorRT-LLM's keys, vLLM's words and options of the engine; they beat a file.
        allow_unsupported: keys of TensorRT-LLM to drop.

    Raises:
        PlanError: a plan beside sizes, or a key that cannot be honoured.
        ConfigError: an unknown option, one that is given twice, or a value out of its range.
    """
    given = _rename(keywords)
    tops = {key.partition(".")[0] for key in KEYS}
    words = {name: value for name, value in given.items() if name in tops}
    deployment = _read(plan, words, allow_unsupported)
    options, notes = dict(deployment.options), list(deployment.notes)
    for name, value in given.items():
        if name in words:
            continue
        key = deployment.names.get(name)
        if key is not None and key.partition(".")[0] in words:
            raise ConfigError(f"{key} and {name} are the same option: give one of them.")
        if key is not None and options[name] != value:
            beaten = f"{key}={shorten(options[name])}"
            notes.append(f"{name}={shorten(value)} beats {beaten} of the plan {str(plan)!r}.")
        options[name] = value
    EngineConfig.from_keywords(options, names=deployment.names)
    for note in notes:
        logger.warning("%s", note)
    return deployment.plan, options


def _rename(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Our names for vLLM's words, without what is None."""
    spelled: dict[str, str] = {}
    for key, value in keywords.items():
        if value is None:
            continue
        first = spelled.setdefault(ALIASES.get(key, key), key)
        if first != key:
            raise ConfigError(f"{first} and {key} are the same option: give one of them.")
    return {name: keywords[key] for name, key in spelled.items()}


def _read(
    plan: ParallelPlan | str | Path | None,
    words: Mapping[str, Any],
    allow_unsupported: Iterable[str],
) -> Deployment:
    if plan is None:
        return read_deployment(words, allow_unsupported=allow_unsupported)
    if not isinstance(plan, ParallelPlan):
        return load_deployment(plan, overrides=words, allow_unsupported=allow_unsupported)
    sizes = [key for key in words if key in PLAN_KEYS]
    if sizes:
        raise PlanError(
            f"A plan and {', '.join(sizes)} were given: "
            "put the sizes into the plan, or leave it out."
        )
    return read_deployment({**to_mapping(plan), **words}, allow_unsupported=allow_unsupported)
