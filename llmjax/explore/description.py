"""A plan as a value: where everything lies and what devices send, to print and to compare."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmjax.config import EngineConfig, ModelConfig
from llmjax.explore.collectives import Collective
from llmjax.explore.layout import Layout, TensorLayout, lay_out, read_config
from llmjax.explore.steps import Step, read_steps
from llmjax.explore.table import Report, Table
from llmjax.explore.tables import format_axes, format_bytes, format_shape, format_spec
from llmjax.explore.traffic import ExpertTraffic, list_traffic
from llmjax.models.layer_stack import LayerStack, stack_layers
from llmjax.plans import resolve
from meshes import ParallelPlan, Rules

WHEN = {"always": "", "branch": "in a branch", "round": "each round"}
"""`Collective.when` in the words of a table."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """A model on a plan; prints as text and shows as HTML in a notebook."""

    model: str
    """What was described."""
    dtype: str
    """Type of weights, activations and cache."""
    layout: Layout
    """Shape, spec and bytes of every weight, and of the cache."""
    stack: LayerStack
    """The layers of each pipeline stage."""
    steps: tuple[Step, ...]
    """What the compiled decode step and prefill step send."""
    traffic: tuple[ExpertTraffic, ...]
    """How steps of every size send tokens to their experts; empty for a model without experts."""
    buffer_budget: int
    """Bytes on a device that the buffers of an expert layer may take."""

    @property
    def plan(self) -> ParallelPlan:
        """The plan that was described."""
        return self.layout.plan

    @property
    def kv_token_bytes(self) -> float:
        """Bytes of KV cache for a token, on all devices that hold a part of it together."""
        cache = self.layout.kv_cache
        return cache.num_bytes / (cache.shape[1] * cache.shape[2])

    @property
    def kv_token_device_bytes(self) -> float:
        """Bytes of KV cache for a token of its batch rank, on each device.

        Of context ranks one has the token: this is their mean.
        """
        cache = self.layout.kv_cache
        held = cache.device_bytes / (cache.shard_shape[1] * cache.shard_shape[2])
        return held / Rules(self.plan).size("context")

    def report(self) -> Report:
        """All of it as tables."""
        count = self.plan.num_devices
        return Report(
            title=f"{self.model} in {self.dtype} on {self.plan}, {count} device{'s' * (count > 1)}",
            tables=(
                self._sum_up(),
                *self._list_stages(),
                _list_weights(self.layout),
                *self._list_traffic(),
                *(_list_collectives(step, self.plan) for step in self.steps),
            ),
        )

    def diff(self, other: "Description") -> Report:
        """What is different in another description; rows that are equal are left out."""
        names = (_name(self, other), _name(other, self))
        tables = [
            _compare_rows("Bytes", _sizes(self), _sizes(other), names),
            _compare_rows("Weights", _weights(self), _weights(other), names),
            _compare_rows("Expert dispatch", _traffic(self), _traffic(other), names),
        ]
        for mine, theirs in zip(self.steps, other.steps, strict=True):
            title = f"Calls and bytes that a {mine.name} step sends"
            tables.append(_compare_rows(title, _calls(mine, self), _calls(theirs, other), names))
        differing = tuple(table for table in tables if table.rows)
        return Report(
            title=f"{names[0]} and {names[1]}" + (": no difference" if not differing else ""),
            tables=differing,
        )

    def __str__(self) -> str:
        return str(self.report())

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return self.report()._repr_html_()

    def _sum_up(self) -> Table:
        rows = tuple((name, *sizes) for name, sizes in _sizes(self).items())
        return Table(title="Bytes", columns=("", "in all", "a device"), rows=rows)

    def _list_stages(self) -> tuple[Table, ...]:
        stages = self.stack.layers
        rows = []
        for stage, places in enumerate(stages):
            layers = [layer for layer in places if layer >= 0]
            empty = len(places) - len(layers)
            rows.append((str(stage), f"{layers[0]} to {layers[-1]}", str(len(layers)), str(empty)))
        title = (
            "Pipeline stages: each has all places for layers, and empty ones take memory and time"
        )
        columns = ("stage", "layers", "count", "empty places")
        return (Table(title=title, columns=columns, rows=tuple(rows)),) if len(stages) > 1 else ()

    def _list_traffic(self) -> tuple[Table, ...]:
        columns = ("tokens", "dispatch", "rounds", "a device sends", "its buffers", "largest round")
        rows = tuple((tokens, *cells) for tokens, cells in _traffic(self).items())
        budget = f"fit into {format_bytes(self.buffer_budget)}"
        if self.buffer_budget == 0:
            budget = "fit, which is none: the weights alone take all memory of a device"
        title = (
            "Expert dispatch of a layer, by tokens of a batch rank; the largest round is the most "
            f"tokens whose buffers {budget}"
        )
        return (Table(title=title, columns=columns, rows=rows),) if rows else ()


def describe(
    plan: ParallelPlan | str | Path | None,
    model: str | Path | ModelConfig,
    *,
    device_gib: float = 80,
    allow_unsupported: Sequence[str] = (),
    **options: Any,
) -> Description:
    """Describes a model on a plan: no weights are read, and no device of the plan is needed.

    The steps are compiled for the devices that are here if they are enough, otherwise for virtual
    CPU devices in a process beside this one. Sizes that are not given are those of `LLM` there.

    Args:
        plan, allow_unsupported, options: what `LLM` takes. `max_batch_size` and `max_num_tokens`
            are the sizes of the steps; `dtype` is by default the checkpoint's.
        model: what `LLM` takes, or its configuration.
        device_gib: memory of a device. Buffers of experts may take what the KV cache leaves:
            1 - `free_gpu_memory_fraction` of what is free beside the weights.

    Raises:
        CheckpointError, ConfigError, PlanError: what was asked for does not exist or does not fit.
    """
    plan, given = resolve(plan, options, allow_unsupported=allow_unsupported)
    engine = EngineConfig.from_keywords(given)
    config = model if isinstance(model, ModelConfig) else read_config(model)
    plan.check_layers(config.num_layers)
    engine = replace(engine, dtype=engine.dtype or config.dtype)
    layout = lay_out(config, plan, dtype=str(engine.dtype))
    programs = read_steps(config, plan, engine)
    free = max(0, device_gib * 2**30 - layout.device_bytes)
    budget = int(free * (1 - engine.free_gpu_memory_fraction))
    return Description(
        model=config.architecture if isinstance(model, ModelConfig) else str(model),
        dtype=str(engine.dtype),
        layout=layout,
        stack=stack_layers(config, Rules(plan)),
        steps=programs.steps,
        traffic=list_traffic(
            config, Rules(plan), engine, token_counts=programs.token_counts, budget=budget
        ),
        buffer_budget=budget,
    )


def _list_weights(layout: Layout) -> Table:
    return Table(
        title="Weights",
        columns=("weight", "axes", "shape", "on the mesh", "in all", "a device"),
        rows=tuple(
            (
                tensor.name,
                ", ".join(axis or "-" for axis in tensor.axes),
                format_shape(tensor.shape),
                format_spec(tensor, layout.plan),
                format_bytes(tensor.num_bytes),
                format_bytes(tensor.device_bytes),
            )
            for tensor in layout.weights
        ),
    )


def _list_collectives(step: Step, plan: ParallelPlan) -> Table:
    always = sum(one.total_bytes for one in step.collectives if one.when == "always")
    return Table(
        title=f"A {step.name} step of {step.tokens} tokens and {step.rows} requests a batch rank, "
        f"compiled for {step.platform}: "
        + (
            f"collectives take {format_bytes(always)} on a device" if always else "it sends nothing"
        ),
        columns=("part", "collective", "over", "devices", "calls", "a call", "in all", "when"),
        rows=tuple(
            (
                one.part or "-",
                one.kind,
                format_axes(one.axes, plan),
                str(one.ranks),
                str(one.count),
                format_bytes(one.num_bytes),
                format_bytes(one.total_bytes),
                WHEN[one.when],
            )
            for one in step.collectives
        ),
    )


Cells = dict[str, tuple[str, ...]]
"""Name of a row -> its cells."""


def _compare_rows(title: str, mine: Cells, theirs: Cells, names: tuple[str, str]) -> Table:
    """The rows that differ, with the cells of both sides."""
    rows = tuple(
        (name, ", ".join(mine.get(name, ("-",))), ", ".join(theirs.get(name, ("-",))))
        for name in dict.fromkeys((*mine, *theirs))
        if mine.get(name) != theirs.get(name)
    )
    return Table(title=title, columns=("", *names), rows=rows)


def _name(one: Description, other: Description) -> str:
    """The plan; with the model and its type where the plans are the same."""
    same = one.plan == other.plan
    return f"{one.model} in {one.dtype}" if same else str(one.plan)


def _sizes(description: Description) -> Cells:
    layout = description.layout
    return {
        "weights": (format_bytes(layout.num_bytes), format_bytes(layout.device_bytes)),
        "KV cache, a token": (
            format_bytes(round(description.kv_token_bytes)),
            format_bytes(round(description.kv_token_device_bytes)),
        ),
    }


def _weights(description: Description) -> Cells:
    return {
        tensor.name: _describe_tensor(tensor, description.plan)
        for tensor in description.layout.weights
    }


def _describe_tensor(tensor: TensorLayout, plan: ParallelPlan) -> tuple[str, ...]:
    shape, size = format_shape(tensor.shape), format_bytes(tensor.device_bytes)
    return (f"{shape} over {format_spec(tensor, plan)}", f"{size} a device")


def _traffic(description: Description) -> Cells:
    """Tokens of a batch rank -> their dispatch."""
    return {
        str(one.tokens): (
            one.method,
            str(one.rounds),
            format_bytes(one.sent_bytes),
            format_bytes(one.buffer_bytes),
            str(one.largest_round),
        )
        for one in description.traffic
    }


def _calls(step: Step, description: Description) -> Cells:
    """Like collectives of the same part as one row, whatever their sizes."""
    calls: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for one in step.collectives:
        name = _name_collective(one, description.plan)
        calls[name] += one.count
        sizes[name] += one.total_bytes
    return {name: (str(calls[name]), format_bytes(sizes[name])) for name in calls}


def _name_collective(one: Collective, plan: ParallelPlan) -> str:
    name = f"{one.kind} over {format_axes(one.axes, plan)}"
    parts = (one.part, name, WHEN[one.when])
    return ", ".join(part for part in parts if part)
