"""Options that several commands take, each with its help."""

from typing import Annotated

import typer

LAYOUT, SAMPLING, PROCESSES = "Layout", "Sampling", "Several processes"

Model = Annotated[str, typer.Option(help="Folder, GGUF file, hub id, or the embedded model.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate.", rich_help_panel=SAMPLING)]
Temperature = Annotated[
    float | None, typer.Option(help="0 takes the most likely token.", rich_help_panel=SAMPLING)
]
TopP = Annotated[
    float | None,
    typer.Option(help="Keep the likeliest tokens up to this mass.", rich_help_panel=SAMPLING),
]
TopK = Annotated[
    int | None,
    typer.Option(help="Keep this many tokens; 0 keeps all.", rich_help_panel=SAMPLING),
]
Seed = Annotated[int | None, typer.Option(help="Same seed, same text.", rich_help_panel=SAMPLING)]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="Text that ends the answer; may be repeated.", rich_help_panel=SAMPLING),
]
Tp = Annotated[
    int | None,
    typer.Option(
        "--tp", help="Tensor parallel ranks (ep * tp of the mesh).", rich_help_panel=LAYOUT
    ),
]
Dp = Annotated[
    int | None, typer.Option("--dp", help="Data parallel replicas.", rich_help_panel=LAYOUT)
]
AttentionDp = Annotated[
    bool | None,
    typer.Option(
        "--attention-dp/--no-attention-dp",
        help="Requests, not heads, over the tp ranks.",
        rich_help_panel=LAYOUT,
    ),
]
Plan = Annotated[
    str | None,
    typer.Option(help="YAML file of mesh axes, or a preset's name.", rich_help_panel=LAYOUT),
]
VirtualDevices = Annotated[
    int | None,
    typer.Option(min=1, help="Use this many virtual CPU devices.", rich_help_panel=LAYOUT),
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")]
MaxSeqLen = Annotated[int | None, typer.Option(help="Prompt and generated tokens of a request.")]
Coordinator = Annotated[
    str | None, typer.Option(help="Address and port of process 0.", rich_help_panel=PROCESSES)
]
NumHosts = Annotated[int, typer.Option(help="Processes of the run.", rich_help_panel=PROCESSES)]
HostId = Annotated[
    int, typer.Option(help="Number of this process, from 0.", rich_help_panel=PROCESSES)
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say what happens.")]
