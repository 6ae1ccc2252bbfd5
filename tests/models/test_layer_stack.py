"""Layers of several kinds, stacked for pipeline stages, run once each and in order."""

import pytest

from llmjax.config import LayerConfig, ModelConfig
from llmjax.models.layer_stack import LayerStack, stack_layers
from meshes import ParallelPlan, Rules

D, E = "dense", "experts"
PATTERNS = {
    "all alike": [D] * 7,
    "dense first": [D] * 3 + [E] * 5,
    "turns": [D, E] * 4,
    "one in four": [D, D, D, E] * 3,
    "one in four and a rest": [D, D, D, E] * 2 + [D, D],
    "no pattern": [D, E, E, D, E, D, D, D, E],
    "one layer": [E],
}
STAGES = (1, 2, 3, 4)


def model(kinds: list[str]) -> ModelConfig:
    return ModelConfig(
        architecture="Test",
        vocab_size=8,
        hidden_size=4,
        num_layers=len(kinds),
        num_heads=1,
        num_kv_heads=1,
        head_dim=4,
        intermediate_size=4,
        max_position_embeddings=8,
        layers=tuple(LayerConfig(ffn="experts" if kind == E else "dense") for kind in kinds),
    )


def stack(kinds: list[str], pp: int = 1, partition: tuple[int, ...] | None = None) -> LayerStack:
    return stack_layers(model(kinds), Rules(ParallelPlan(pp=pp, pp_partition=partition)))


def walk(stack: LayerStack, stage: int) -> list[tuple[int, str, int]]:
    """What a stage runs: (row of the stack of attention, kind, row of the kind's stack)."""
    seen = []
    for loop in stack.loops:
        for repeat in range(loop.repeats):
            for offset, kind in enumerate(loop.kinds):
                first, step = loop.row(offset)
                row = loop.first + offset + repeat * len(loop.kinds)
                seen.append((row, kind, first + repeat * step))
    points = len(stack.kinds)
    of_kind = {kind: stack.kinds.count(kind) for kind in stack.kinds}
    return [(stage * points + row, kind, stage * of_kind[kind] + own) for row, kind, own in seen]


@pytest.mark.parametrize("pp", STAGES)
@pytest.mark.parametrize("kinds", PATTERNS.values(), ids=PATTERNS)
def test_the_stages_run_every_layer_once_in_order_and_with_its_own_weights(kinds, pp):
    layers = stack(kinds, pp)
    ran = []
    for stage in range(pp):
        for row, kind, own in walk(layers, stage):
            layer = layers.rows[row]
            # A point that a stage skips has nothing in either stack.
            assert layers.rows_of_kind(kind)[own] == layer
            if layer >= 0:
                assert kinds[layer] == kind
                ran.append(layer)
    assert ran == list(range(len(kinds)))


@pytest.mark.parametrize("kinds", PATTERNS.values(), ids=PATTERNS)
def test_one_stage_has_no_empty_rows(kinds):
    assert stack(kinds).rows == tuple(range(len(kinds)))


@pytest.mark.parametrize(
    ("pattern", "loops"),
    [
        ("all alike", [((D,), 7)]),
        ("dense first", [((D,), 3), ((E,), 5)]),
        ("turns", [((D, E), 4)]),
        ("one in four", [((D, D, D, E), 3)]),
        ("one in four and a rest", [((D, D, D, E), 2), ((D,), 2)]),
    ],
)
def test_layers_that_repeat_become_one_loop(pattern, loops):
    found = [(loop.kinds, loop.repeats) for loop in stack(PATTERNS[pattern]).loops]
    assert found == loops


def test_layers_that_do_not_divide_go_to_the_first_stages():
    counts = [sum(layer >= 0 for layer in stage) for stage in stack([D] * 7, pp=3).layers]
    assert counts == [3, 2, 2]


def test_a_partition_says_how_many_layers_each_stage_has():
    layers = stack([D] * 7, pp=3, partition=(1, 4, 2)).layers
    assert layers == ((0, -1, -1, -1), (1, 2, 3, 4), (5, 6, -1, -1))


def test_stages_of_other_kinds_share_the_shortest_program_that_holds_both():
    layers = stack([D, E, E, E], pp=2, partition=(2, 2))
    assert layers.kinds == (D, E, E)
    assert layers.layers == ((0, 1, -1), (-1, 2, 3))
    assert layers.rows_of_kind(D) == (0, -1)
    assert layers.rows_of_kind(E) == (1, -1, 2, 3)


def test_a_stage_may_hold_all_layers_of_a_kind():
    layers = stack([D, D, E, E], pp=2)
    assert len(layers.kinds) == 4
    assert layers.layers == ((0, 1, -1, -1), (-1, -1, 2, 3))
