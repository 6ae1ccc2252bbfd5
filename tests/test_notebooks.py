"""Every notebook: paired with its text, free of outputs, and running from top to bottom."""

import time
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
# Either half of a pair is enough to ask for the other.
NAMES = sorted({file.stem for suffix in ("ipynb", "py") for file in FOLDER.glob(f"*.{suffix}")})
SECONDS = 45

every_notebook = pytest.mark.parametrize("name", NAMES)


@every_notebook
def test_a_notebook_and_its_text_hold_the_same_cells(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    text = jupytext.read(FOLDER / f"{name}.py")
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in text.cells
    ], f"run `uv run jupytext --sync notebooks/{name}.py`"


@every_notebook
def test_a_notebook_is_committed_without_outputs(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code, f"{name}.ipynb has no code"
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


@pytest.mark.slow
@every_notebook
def test_a_notebook_runs_from_top_to_bottom_in_time(name):
    notebook = jupytext.read(FOLDER / f"{name}.py")
    client = NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": FOLDER}}
    )
    start = time.monotonic()
    client.execute()
    assert time.monotonic() - start < SECONDS
