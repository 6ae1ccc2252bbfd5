"""docs/feature-matrix.md is what the tests declare: each entry names the cells that prove it.

After a change that is meant: `pytest tests/test_feature_matrix.py --update-snapshots`.
"""

from collections.abc import Iterable, Sequence
from string import ascii_uppercase

from strategies import (
    ALTERNATIVES,
    CROWDED,
    CROWDED_MODEL,
    ENGINE_FEATURES,
    FEATURES,
    GOLDEN,
    KINDS,
    PAIRS,
    Strategy,
    covering_cells,
)

PAGE = GOLDEN.parent.parent / "docs" / "feature-matrix.md"
LOGITS = "tests/engine/test_plans.py::test_logits_and_greedy_ids_are_hugging_faces"
REQUESTS = "tests/engine/test_many_requests.py::test_many_requests_get_the_tokens_of_one_device"
LETTERS = dict(zip(CROWDED, ascii_uppercase, strict=False))
"""A letter for each of the plans that many requests crowd."""


def render_page() -> str:
    """The whole page."""
    return f"""# Strategies together, and with features of the engine

Written from the tests' own lists by `uv run pytest tests/test_feature_matrix.py
--update-snapshots`; a test fails where the page differs. Every entry names what proves it, and
all of that runs in CI. The product of all models and all plans, whose worst errors are in
[plan-matrix.md](plan-matrix.md), runs with `uv run pytest -m matrix`.

"ETP" is tensor ranks inside each expert, "pp even" the default partition, whose stages differ by
a layer at most, and "pp uneven" a `pp_partition` that gives the first stage one layer.

## Strategies against each other

A number is a plan of the third table, on which each kind of attention gives Hugging Face's logits
and greedy ids. "or" marks alternatives, of which a plan has one.

{render_pairs()}

## Strategies with features of the engine

A letter is a plan of the last table, a number one of the third.

{render_engine_features()}

## Plans that prove pairs

The models that run on each plan, by their kind of attention. A cell is the test
`{LOGITS}[MODEL-PLAN]`.

{render_plans()}

## Plans that many requests crowd

64 requests of random lengths on `{CROWDED_MODEL}`, half with shared beginnings, in a pool too small
for them: greedy and seeded, some with penalties and with log-probabilities. Each gets the tokens of
one device, and each feature is counted. A row is the test
`{REQUESTS}[NAME]`.

{render_crowded()}
"""


def render_pairs() -> str:
    rows = [[f"**{one}**", *(prove_pair(one, other) for other in FEATURES)] for one in FEATURES]
    return render_table(["", *FEATURES], rows)


def prove_pair(one: str, other: str) -> str:
    """The numbers of the plans that have both."""
    if one == other:
        return ""
    if any({one, other} <= each for each in ALTERNATIVES):
        return "or"
    return list_plans({one, other})


def list_plans(features: Iterable[str]) -> str:
    """The numbers of the plans that have all these features."""
    wanted = set(features)
    return " ".join(str(number) for number, each in enumerate(PAIRS, 1) if wanted <= each.features)


def render_engine_features() -> str:
    crowded = [
        " ".join(LETTERS[name] for name, each in CROWDED.items() if feature in each.features)
        for feature in FEATURES
    ]
    attention = [list_plans([feature]) for feature in FEATURES]
    rows = [
        *([name, *crowded] for name in ENGINE_FEATURES),
        *([f"attention: {kind}", *attention] for kind in KINDS),
    ]
    return render_table(["", *FEATURES], rows)


def render_plans() -> str:
    def model_of(kind: str, strategy: Strategy) -> str:
        return next(model for model, each in KINDS[kind] if each == strategy)

    rows = [
        [str(number), f"`{each}`", *(model_of(kind, each) for kind in KINDS)]
        for number, each in enumerate(PAIRS, 1)
    ]
    return render_table(["", "plan", *KINDS], rows)


def render_crowded() -> str:
    rows = [[LETTERS[name], name, f"`{each}`"] for name, each in CROWDED.items()]
    return render_table(["", "name", "plan"], rows)


def render_table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def test_the_page_is_what_the_tests_declare(request):
    if request.config.getoption("--update-snapshots"):
        PAGE.write_text(render_page())
    assert PAGE.read_text() == render_page(), f"review it: {__doc__}"


def test_no_entry_of_the_tables_is_empty():
    for one in FEATURES:
        assert all(prove_pair(one, other) for other in FEATURES if other != one)
        assert list_plans([one])
        assert any(one in each.features for each in CROWDED.values())


def test_what_the_page_names_are_tests_that_run_in_ci():
    cells = covering_cells()
    assert set(cells) >= {cell for kind in KINDS.values() for cell in kind}
    for test in (LOGITS, REQUESTS):
        file, _, name = test.partition("::")
        lines = (GOLDEN.parent.parent / file).read_text().splitlines()
        place = next(index for index, line in enumerate(lines) if line.startswith(f"def {name}("))
        assert "parametrize" in lines[place - 1] and "mark.matrix" not in lines[place - 2]
