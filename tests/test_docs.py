"""README and docs say what is there: paths exist, and the rules table is the code's."""

import re
from pathlib import Path

import pytest

from meshes import LOGICAL_AXES, ParallelPlan, Rules

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACEMENTS = {
    "attention TP": ParallelPlan(),
    "attention DP, full": ParallelPlan(attention_dp=True),
    "attention DP, partial": ParallelPlan(attention_dp="partial"),
}


def render_rules() -> str:
    """The rules as the Markdown table of docs/architecture.md."""
    tables = [Rules(plan).table for plan in PLACEMENTS.values()]
    rows = [["logical axis", "meaning", *PLACEMENTS], ["---"] * (2 + len(PLACEMENTS))]
    for name, meaning in LOGICAL_AXES.items():
        places = (", ".join(table[name]) or "-" for table in tables)
        rows.append([f"`{name}`", meaning, *places])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def paths_of_the_tree(readme: str) -> list[str]:
    """Paths of the annotated tree: entries of four more spaces lie inside the folder above."""
    _, _, section = readme.partition("## Where things are\n")
    entries = re.findall(r"^ {4}( *)([\w./]+) {2,}\S", section, flags=re.MULTILINE)
    paths, folders = [], {}
    for indent, name in entries:
        depth = len(indent) // 2
        folders[depth] = name
        paths.append("".join(folders[level] for level in range(depth + 1)))
    return paths


def test_the_rules_table_of_the_architecture_page_is_that_of_the_code():
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert render_rules() in page, f"put this table into docs/architecture.md:\n{render_rules()}"


def test_every_path_of_the_readme_tree_exists():
    paths = paths_of_the_tree((ROOT / "README.md").read_text())
    assert "llmjax/engine/step.py" in paths, "the search itself finds nothing"
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_readme_tree_names_every_module_of_the_top_folders():
    paths = paths_of_the_tree((ROOT / "README.md").read_text())
    present = [
        f"{package}/{entry.name}{'/' * entry.is_dir()}"
        for package in ("llmjax", "meshes", "pallas_kernels")
        for entry in (ROOT / package).iterdir()
        if entry.suffix == ".py" or any(entry.glob("*.py")) or any(entry.glob("*.yaml"))
    ]
    assert len(present) > 15, "the search itself finds nothing"
    missing = [path for path in present if path not in paths and "/__" not in path]
    assert missing == [], "add them to the tree in README.md"


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_every_file_that_a_page_links_to_exists(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []
