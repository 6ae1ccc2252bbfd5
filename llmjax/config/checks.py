"""Checks of values that users give, and the sentence for those that are out of range."""

import math
from collections.abc import Callable
from typing import Any

from meshes.errors import shorten

Check = tuple[Callable[[Any], bool], str]
"""Whether a value is in range, and the range in words."""


class ConfigError(ValueError):
    """A value that a user gave and that cannot be honoured."""


def check(valid: bool, key: str, value: Any, range_text: str) -> None:
    if not valid:
        raise ConfigError(f"{key}={shorten(value)} is out of range: use {range_text}.")


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def at_least(lowest: int) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        return is_whole(value) and value >= lowest

    return check


def absent_or(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def check_present(value: Any) -> bool:
        return value is None or check(value)

    return check_present


def between(lowest: float, highest: float, *, above: bool = False) -> Callable[[Any], bool]:
    """Numbers from `lowest`, which `above` leaves out, to `highest`."""

    def check(value: Any) -> bool:
        inside = is_finite(value) and lowest <= value <= highest
        return inside and not (above and value == lowest)

    return check


def are_texts(values: Any) -> bool:
    return all(isinstance(text, str) and text for text in values)


def are_tokens(values: Any) -> bool:
    return all(is_whole(token) and token >= 0 for token in values)


def are_biases(values: Any) -> bool:
    return are_tokens(values) and all(is_number(bias) for bias in values.values())


def is_seed(value: Any) -> bool:
    return is_whole(value) and 0 <= value < 2**63


def is_one_of(*values: Any) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        return value in values

    return check


def is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def are_rising(values: Any) -> bool:
    whole = all(is_whole(size) and size >= 1 for size in values)
    return whole and list(values) == sorted(set(values))


def are_few(values: Any) -> bool:
    return len(values) <= 31


COUNT_OR_NONE = (absent_or(at_least(1)), "a whole number from 1 up, or None")
RISING = (are_rising, "rising whole numbers from 1 up")
SWITCH = (is_switch, "True or False")
