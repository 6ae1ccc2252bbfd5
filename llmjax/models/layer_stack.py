"""How a model's layers are stacked, divided over pipeline stages, and run in loops."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from llmjax.config import ModelConfig
from meshes import Rules

LONGEST_PERIOD = 8
"""Layers after which a pattern may repeat."""


@dataclass(frozen=True, kw_only=True)
class Loop:
    """A run of layers whose kinds repeat."""

    kinds: tuple[str, ...]
    """Kind of the feed-forward part in each layer of a period."""
    repeats: int
    """Periods."""
    first: int
    """First layer of the run, counted in the stage."""
    first_of_kind: dict[str, int]
    """First row of the run in each kind's stack."""

    def row(self, offset: int) -> tuple[int, int]:
        """(first row, rows a period) of the layer at `offset` in its kind's stack."""
        kind = self.kinds[offset]
        before = self.kinds[:offset].count(kind)
        return self.first_of_kind[kind] + before, self.kinds.count(kind)


@dataclass(frozen=True)
class LayerStack:
    """The one program that all pipeline stages run, and which layers each of them fills it with.

    Attention and norms of all layers are alike and share a stack; the feed-forward parts have a
    stack for each kind. All stages run the same kinds in the same order. A stage that has no layer
    at some point skips it: its rows there are empty.
    """

    kinds: tuple[str, ...]
    """Kind of the feed-forward part of each layer of a stage."""
    layers: tuple[tuple[int, ...], ...]
    """For each stage, the model's layer at each point of the program, -1 for none."""

    @property
    def rows(self) -> tuple[int, ...]:
        """The model's layer in each row of the stack of attention."""
        return tuple(layer for stage in self.layers for layer in stage)

    def rows_of_kind(self, kind: str) -> tuple[int, ...]:
        """The model's layer in each row of a kind's stack."""
        return tuple(
            layer
            for stage in self.layers
            for layer, own in zip(stage, self.kinds, strict=True)
            if own == kind
        )

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """The program cut into runs of repeated periods."""
        loops, start = [], 0
        while start < len(self.kinds):
            period, repeats = _find_period(self.kinds[start:])
            loops.append(
                Loop(
                    kinds=self.kinds[start : start + period],
                    repeats=repeats,
                    first=start,
                    first_of_kind={
                        kind: self.kinds[:start].count(kind) for kind in set(self.kinds)
                    },
                )
            )
            start += period * repeats
        return tuple(loops)


def stack_layers(config: ModelConfig, rules: Rules) -> LayerStack:
    """Divides the layers over the stages as the plan says, or with one more in the first ones."""
    stages, kinds = rules.size("layers"), [layer.ffn for layer in config.layers]
    counts = rules.plan.pp_partition or [
        config.num_layers // stages + (stage < config.num_layers % stages)
        for stage in range(stages)
    ]
    bounds = [sum(counts[:stage]) for stage in range(stages + 1)]
    parts = [range(bounds[stage], bounds[stage + 1]) for stage in range(stages)]
    program: tuple[str, ...] = ()
    for part in parts:
        program = _merge(program, tuple(kinds[layer] for layer in part))
    return LayerStack(
        program, tuple(_place(program, part, [kinds[layer] for layer in part]) for part in parts)
    )


def _find_period(kinds: Sequence[str]) -> tuple[int, int]:
    """(period, repeats) that cover most of the beginning, the shortest period first."""
    best = (1, 1)
    for period in range(1, min(LONGEST_PERIOD, len(kinds)) + 1):
        repeats = 1
        while kinds[repeats * period : (repeats + 1) * period] == kinds[:period]:
            repeats += 1
        if (repeats > 1 or period == 1) and period * repeats > best[0] * best[1]:
            best = (period, repeats)
    return best


def _merge(first: Sequence[str], second: Sequence[str]) -> tuple[str, ...]:
    """The shortest sequence that holds both in order."""
    if not first or not second:
        return (*first, *second)
    rows: list[list[tuple[str, ...]]] = [[tuple(second[j:]) for j in range(len(second) + 1)]]
    for i in reversed(range(len(first))):
        below, row = rows[-1], [()] * len(second) + [tuple(first[i:])]
        for j in reversed(range(len(second))):
            if first[i] == second[j]:
                row[j] = (first[i], *below[j + 1])
            else:
                row[j] = min((first[i], *below[j]), (second[j], *row[j + 1]), key=len)
        rows.append(row)
    return rows[-1][0]


def _place(program: Sequence[str], layers: Sequence[int], kinds: Sequence[str]) -> tuple[int, ...]:
    """Puts a stage's layers at the first points of the program that fit them."""
    placed, at = [-1] * len(program), 0
    for layer, kind in zip(layers, kinds, strict=True):
        at = program.index(kind, at)
        placed[at] = layer
        at += 1
    return tuple(placed)
