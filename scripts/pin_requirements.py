"""Pins everything that the project installs, in constraints.txt and in pyproject.toml alike.

    uv run scripts/pin_requirements.py             # keeps today's pins, adds what is new
    uv run scripts/pin_requirements.py --upgrade   # takes the newest versions allowed

Extras and dependency groups are included. The pins hold for every platform and Python version, so
some carry a marker. No address of a package index is recorded.
"""

import argparse
import re
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PIN_LIST = re.compile(r"^constraint-dependencies = \[\n(.*?)^\]\n", re.MULTILINE | re.DOTALL)


def pyproject_with_pins(pyproject: str, pins: list[str]) -> str:
    """Returns the text of pyproject.toml with its list of pins replaced by `pins`.

    Raises:
        ValueError: pyproject.toml has no `constraint-dependencies` list to replace.
    """
    lines = "".join(f'    "{pin}",\n' for pin in pins)
    replaced, count = PIN_LIST.subn(f"constraint-dependencies = [\n{lines}]\n", pyproject)
    if count != 1:
        raise ValueError("pyproject.toml needs one `constraint-dependencies = [` list in [tool.uv]")
    return replaced


def compile_pins(pyproject: str, previous: str, *, upgrade: bool) -> list[str]:
    """Resolves the project for every platform and returns one `name==version` line a package."""
    with tempfile.TemporaryDirectory() as folder:
        # The old pins must not constrain the new ones, so uv sees a copy without them; it still
        # prefers the versions of the previous output file unless told to upgrade.
        project, output = Path(folder, "pyproject.toml"), Path(folder, "constraints.txt")
        project.write_text(pyproject_with_pins(pyproject, []))
        output.write_text(previous)
        command = ["uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.12"]
        command += ["--all-extras", "--group", "dev", "--group", "model"]
        command += ["--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links"]
        command += ["--upgrade"] if upgrade else []
        subprocess.run([*command, project.name, "-o", output.name], cwd=folder, check=True)
        return [line.replace('"', "'") for line in output.read_text().splitlines() if line]


def main() -> None:
    parser = argparse.ArgumentParser(description="Pins everything that the project installs.")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions allowed")
    upgrade = parser.parse_args().upgrade
    pyproject, constraints = ROOT / "pyproject.toml", ROOT / "constraints.txt"
    previous = constraints.read_text() if constraints.exists() else ""
    pins = compile_pins(pyproject.read_text(), previous, upgrade=upgrade)
    constraints.write_text("".join(f"{pin}\n" for pin in pins))
    pyproject.write_text(pyproject_with_pins(pyproject.read_text(), pins))


if __name__ == "__main__":
    main()
