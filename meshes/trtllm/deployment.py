"""A whole configuration: every key is honoured, dropped as asked, or refused with the reason."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from meshes.documents import read_document
from meshes.errors import PlanError
from meshes.plan import ParallelPlan
from meshes.trtllm.expert_placement import check_load_balancer
from meshes.trtllm.keys import KEYS, Fixed, Noted, Refused
from meshes.trtllm.mapping import to_mapping
from meshes.trtllm.options import find_cache_problem, make_options
from meshes.trtllm.sizes import make_plan
from meshes.trtllm.words import Given, Words


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A plan and the engine's options, as one configuration asks for them."""

    plan: ParallelPlan
    options: Mapping[str, Any]
    """Options of the engine; their ranges are not checked here."""
    names: Mapping[str, str]
    """Option -> the key that set it, as the user wrote it."""
    notes: tuple[str, ...] = ()
    """What the user should be told: values that were beaten, keys that were dropped."""


def load_deployment(
    path: str | Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    allow_unsupported: Iterable[str] = (),
) -> Deployment:
    """Reads a file of mesh axes or of TensorRT-LLM's keys, or a preset.

    Args:
        path: the file, a section of it (`file.yaml#worker_config.gen`), or a preset's name.
        overrides: TensorRT-LLM's keys that beat those of the file.
        allow_unsupported: keys to drop.

    Raises:
        PlanError: see `read_deployment`; or the file mixes both vocabularies.
    """
    content, origin = read_document(path), f"The plan {str(path)!r}"
    top = {key.partition(".")[0] for key in KEYS}
    axes = {field.name for field in fields(ParallelPlan)}
    own = [key for key in content if key in axes - top]
    foreign = [key for key in content if key in top - axes]
    if own and foreign:
        raise PlanError(
            f"{origin} mixes mesh axes ({', '.join(own)}) with TensorRT-LLM's keys "
            f"({', '.join(foreign)}): use one vocabulary, for example "
            "tensor_parallel_size = ep * tp and moe_expert_parallel_size = ep."
        )
    if own:
        content = to_mapping(ParallelPlan.from_mapping(content, origin=origin))
    return read_deployment(
        content, overrides=overrides, origin=origin, allow_unsupported=allow_unsupported
    )


def read_deployment(
    mapping: Mapping[str, Any],
    *,
    overrides: Mapping[str, Any] | None = None,
    origin: str = "LLM()",
    allow_unsupported: Iterable[str] = (),
) -> Deployment:
    """Turns TensorRT-LLM's keys into a plan and options; a key with the value None is not given.

    Raises:
        PlanError: a key is unknown, cannot be honoured, or clashes with another; the sentence
            names the key, the reason and what would work.
    """
    words = Words.from_mapping(mapping, origin)
    winners = Words.from_mapping(overrides or {}, "LLM()")
    notes = [
        f"{given} beats {words[target]} of {origin.replace('The plan', 'the plan')}."
        for target, given in winners.items()
        if target in words and words[target].value != given.value
    ]
    words.update(winners)
    notes += _drop(words, allow_unsupported)
    plan = make_plan(words)
    check_load_balancer(words.value("moe_config.load_balancer"), num_ranks=plan.ep)
    problems = [problem for given in words.values() if (problem := _find_problem(given))]
    problems += find_cache_problem(words)
    if problems:
        raise PlanError(
            f"{origin} asks for what cannot be honoured: {'; '.join(problems)}. Change these keys, "
            "or drop them with --allow-unsupported KEY (in Python: allow_unsupported=[KEY])."
        )
    options, names = make_options(words)
    notes += [note for given in words.values() if (note := _find_note(given))]
    return Deployment(plan=plan, options=options, names=names, notes=tuple(notes))


def _drop(words: Words, names: Iterable[str]) -> list[str]:
    """Removes keys, or whole sections, that the user lets go; returns what to tell."""
    notes: list[str] = []
    for name in names:
        gone = [
            target
            for target, given in words.items()
            if given.key == name or given.key.startswith(f"{name}.")
        ]
        if not gone:
            keys = ", ".join(sorted(given.key for given in words.values())) or "none"
            raise PlanError(
                f"--allow-unsupported {name}: no such key is given. Keys that are: {keys}."
            )
        notes += [
            f"{words.pop(target)} is dropped, as --allow-unsupported says." for target in gone
        ]
    return notes


def _find_problem(given: Given) -> str | None:
    """Why a key cannot be honoured; None if it can."""
    fate = KEYS.get(given.key)
    match fate:
        case None:
            return _describe_unknown(given)
        case Refused():
            return f"{given.key} ({fate.reason})"
        case Fixed() if not _is_among(given.value, fate.values):
            return f"{given} ({fate.reason}: use {_list_values(fate.values)})"
        case Noted() if not _is_among(given.value, fate.values):
            return f"{given} (unknown: use {_list_values(fate.values)})"
    return None


def _find_note(given: Given) -> str | None:
    fate = KEYS.get(given.key)
    return f"{given}: {fate.note}." if isinstance(fate, Noted) else None


def _is_among(value: Any, accepted: tuple[Any, ...]) -> bool:
    """Whether a value is accepted: names in upper or lower case, and 1 is not True."""
    names = [one.upper() for one in accepted if isinstance(one, str)]
    if isinstance(value, str):
        return value.upper() in names
    return any(type(value) is type(one) and value == one for one in accepted)


def _list_values(values: tuple[Any, ...]) -> str:
    spelled = [str(one).lower() if isinstance(one, bool) else str(one) for one in values]
    return " or ".join(spelled)


def _describe_unknown(given: Given) -> str:
    if engines := sorted(_find_engines(given)):
        return f"{given.key} (holds several engines: give one, such as file.yaml#{engines[0]})"
    name = given.key[:100]
    close = difflib.get_close_matches(name, KEYS, n=1)
    return f"{name} (unknown" + (f": did you mean {close[0]}?)" if close else ")")


def _find_engines(given: Given) -> Iterator[str]:
    """Sections of an unknown key that configure an engine each."""
    if isinstance(given.value, Mapping):
        for key, entry in given.value.items():
            if isinstance(entry, Mapping) and "tensor_parallel_size" in entry:
                yield f"{given.key}.{key}"
