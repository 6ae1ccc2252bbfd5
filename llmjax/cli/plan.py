"""`llmjax plan`: what a plan does with a model, and what another plan does otherwise."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from llmjax import describe
from llmjax.cli import options
from llmjax.cli.session import start

MaxBatchSize = Annotated[int | None, typer.Option(help="Requests of a batch rank.")]
MaxNumTokens = Annotated[int | None, typer.Option(help="Tokens of a step and batch rank.")]
DeviceGib = Annotated[
    float, typer.Option(help="Memory of a device in GiB, for what buffers of experts may take.")
]
Diff = Annotated[
    str | None,
    typer.Option(metavar="PLAN", help="Show only what this other plan does otherwise."),
]


@options.grouped
def show_plan(
    layout: options.Layout,
    limits: options.Limits,
    model: options.Model = "smollm2-135m-instruct",
    max_batch_size: MaxBatchSize = None,
    max_num_tokens: MaxNumTokens = None,
    device_gib: DeviceGib = 80,
    diff: Diff = None,
    virtual_devices: options.VirtualDevices = None,
) -> None:
    """Shows where a plan lays a model and what its steps send, without weights and without a GPU.

    Where the devices here are too few, virtual ones stand in for them.
    """
    start(virtual_devices)
    sizes: dict[str, Any] = dict(
        max_batch_size=max_batch_size,
        max_num_tokens=max_num_tokens,
        device_gib=device_gib,
        allow_unsupported=layout.allow_unsupported or (),
        **asdict(limits),
    )
    description = describe(layout.plan, model, **layout.keywords(), **sizes)
    print(description if diff is None else description.diff(describe(diff, model, **sizes)))
