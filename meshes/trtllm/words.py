"""What a configuration says, by what it sets: the common form of YAML, keywords and flags."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from meshes.errors import PlanError, shorten
from meshes.plan import is_size
from meshes.trtllm.keys import KEYS, SECTIONS, Honoured


@dataclass(frozen=True)
class Given:
    """A value, under the key that the user wrote."""

    key: str
    value: Any

    def __str__(self) -> str:
        return f"{self.key}={shorten(self.value)}"


class Words(dict[str, Given]):
    """What a key sets -> the key and its value; a key that sets nothing stands for itself."""

    @classmethod
    def from_mapping(cls, mapping: Mapping[Any, Any], origin: str) -> "Words":
        """Reads keys and sections; a key whose value is None is not given.

        Raises:
            PlanError: a section is no mapping, or two keys set the same.
        """
        words = cls()
        for given in _flatten(mapping, origin):
            fate = KEYS.get(given.key)
            target = fate.target if isinstance(fate, Honoured) else given.key
            if target in words:
                raise PlanError(
                    f"{origin} gives {words[target]} and {given}, which are the same: "
                    "keep one of them."
                )
            words[target] = given
        return words

    def value(self, target: str, default: Any = None) -> Any:
        """What was given, or the default."""
        return self[target].value if target in self else default

    def size(self, target: str) -> int | None:
        """A whole number from 1 up, or None where nothing was given.

        Raises:
            PlanError: it is anything else.
        """
        if target not in self:
            return None
        value = self[target].value
        if not is_size(value):
            raise PlanError(f"{self[target]} is not a size: use a whole number from 1 up.")
        return value


def _flatten(mapping: Mapping[Any, Any], origin: str) -> Iterator[Given]:
    for key, value in mapping.items():
        if value is None:
            continue
        if key not in SECTIONS:
            yield Given(str(key), value)
        elif isinstance(value, Mapping):
            present = {inner: entry for inner, entry in value.items() if entry is not None}
            yield from (Given(f"{key}.{inner}", entry) for inner, entry in present.items())
        else:
            first = next(name for name in KEYS if name.startswith(f"{key}."))
            raise PlanError(
                f"{origin} gives {key}={shorten(value)}: it must hold a mapping, such as "
                f"`{key}: {{{first.partition('.')[2]}: ...}}`."
            )
