"""YAML files of plans, read strictly: what PyYAML would pass over in silence is refused."""

from collections.abc import Hashable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from meshes.errors import PlanError

MERGE = "tag:yaml.org,2002:merge"


def read_document(path: str | Path, *, what: str = "The plan") -> dict[str, Any]:
    """Reads a YAML file, the preset of that name, or with `file.yaml#a.b` a section of a file.

    Args:
        path: the file.
        what: the subject of the sentences in which it is refused.

    Raises:
        PlanError: there is no such file or section, it is no mapping, or a key stands in it twice.
    """
    name, _, section = _split_section(str(path))
    what = f"{what} {str(path)!r}"
    content = _parse(_read_text(name, what), what)
    for part in section.split(".") if section else ():
        if not isinstance(content, Mapping) or part not in content:
            raise PlanError(f"{what} has no section {section!r}.")
        content = content[part]
    if not isinstance(content, dict):
        raise PlanError(f"{what} must map axes to sizes, such as `tp: 4`.")
    return content


def presets() -> list[str]:
    """Names of the plans that ship with the package."""
    folder = resources.files("meshes") / "presets"
    return sorted(
        Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which PyYAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == MERGE:
                continue
            line = key.start_mark.line + 1
            first = lines.setdefault((key.tag, key.value), line)
            if first != line:
                raise yaml.YAMLError(
                    f"the key {key.value!r} stands in line {first} and again in line {line}: "
                    "keep one of them."
                )
        return super().construct_mapping(node, deep)


def _split_section(path: str) -> tuple[str, str, str]:
    return (path, "", "") if Path(path).is_file() else path.partition("#")


def _read_text(name: str, what: str) -> str:
    file = Path(name)
    preset = resources.files("meshes") / "presets" / f"{name}.yaml"
    try:
        return file.read_text("utf-8-sig") if file.is_file() else preset.read_text()
    except FileNotFoundError:
        raise PlanError(
            f"{what} is neither a YAML file nor a preset ({', '.join(presets())})."
        ) from None
    except UnicodeDecodeError:
        raise PlanError(f"{what} is not UTF-8 text: give a YAML file.") from None


def _parse(text: str, what: str) -> Any:
    try:
        return yaml.load(text, _StrictLoader)
    except RecursionError:
        raise PlanError(f"{what} is not valid YAML: it is nested too deeply.") from None
    except (yaml.YAMLError, ValueError) as error:
        # A date or a number that does not exist is a ValueError to PyYAML.
        raise PlanError(f"{what} is not valid YAML: {_summarise(error)}") from None


def _summarise(error: Exception) -> str:
    """What PyYAML says in several lines, in one."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f"{error.problem}, in line {error.problem_mark.line + 1}."
    return str(error).splitlines()[0]
