"""The project around the code: pins, public names, and where mesh axes may be named."""

import ast
import importlib
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import meshes

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ["llmjax", "meshes", "pallas_kernels"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text().splitlines()


def axis_names_written_in(file: Path) -> list[str]:
    """Lists `file:line: "axis"` for each string in the source that is exactly a mesh axis."""
    return [
        f'{file.relative_to(ROOT)}:{node.lineno}: "{node.value}"'
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and node.value in meshes.MESH_AXES
    ]


def test_pyproject_and_constraints_hold_the_same_pins():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert pyproject["tool"]["uv"]["constraint-dependencies"] == CONSTRAINTS


def test_every_constraint_is_one_exact_version_and_no_address():
    assert len(CONSTRAINTS) > 100
    for line in CONSTRAINTS:
        requirement = Requirement(line)
        assert re.fullmatch(r"==[0-9][0-9a-z.+!]*", str(requirement.specifier)), line
        assert requirement.url is None, line


def test_every_distribution_that_uv_installed_is_pinned_at_its_version():
    pins: dict[str, str] = {
        canonicalize_name(requirement.name): str(requirement.specifier).removeprefix("==")
        for requirement in map(Requirement, CONSTRAINTS)
        if requirement.marker is None or requirement.marker.evaluate()
    }
    installed: dict[str, str] = {
        canonicalize_name(distribution.name): distribution.version
        for distribution in metadata.distributions()
        if (distribution.read_text("INSTALLER") or "").strip() == "uv"
    }
    del installed["llmjax"]
    assert installed, "uv installed nothing here but the project"
    unpinned = {name: version for name, version in installed.items() if pins.get(name) != version}
    assert not unpinned, "run `uv run scripts/pin_requirements.py`, then `uv sync`"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_of_a_package_exists(package):
    module = importlib.import_module(package)
    assert module.__all__, f"{package}/__init__.py needs its public names in __all__"
    assert [name for name in module.__all__ if not hasattr(module, name)] == []
    assert len(set(module.__all__)) == len(module.__all__)


def test_mesh_axes_are_named_only_in_meshes_and_in_parallel():
    assert axis_names_written_in(ROOT / "meshes" / "axes.py"), "the search itself finds nothing"
    allowed = ROOT / "llmjax" / "parallel"
    files = [*ROOT.glob("llmjax/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py")]
    found = [
        place
        for file in files
        if not file.is_relative_to(allowed)
        for place in axis_names_written_in(file)
    ]
    assert not found, "say it in logical names, and let meshes/rules.py place them"


def test_continuous_integration_ends_with_the_test_command_of_the_readme():
    last = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert last == "uv run pytest"
    assert f"pip install uv && {last}" in (ROOT / "README.md").read_text()
