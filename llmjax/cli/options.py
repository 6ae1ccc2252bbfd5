"""Options that several commands take, each with its help, and groups of them."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any

import typer

from llmjax.config import DISPATCHES

layout_option = functools.partial(typer.Option, rich_help_panel="Layout")
sampling_option = functools.partial(typer.Option, rich_help_panel="Sampling")
process_option = functools.partial(typer.Option, rich_help_panel="Several processes")

Model = Annotated[str, typer.Option(help="Folder, GGUF file, hub id, or the embedded model.")]
MaxTokens = Annotated[int, sampling_option(help="Most tokens to generate.")]
Temperature = Annotated[float | None, sampling_option(help="0 takes the most likely token.")]
TopP = Annotated[float | None, sampling_option(help="Keep the likeliest tokens up to this mass.")]
TopK = Annotated[int | None, sampling_option(help="Keep this many tokens; 0 keeps all.")]
Seed = Annotated[int | None, sampling_option(help="Same seed, same text.")]
Stop = Annotated[
    list[str] | None, sampling_option(help="Text that ends the answer; may be repeated.")
]
Tp = Annotated[
    int | None, layout_option("--tp", help="Tensor parallel ranks (ep * tp of the mesh).")
]
Dp = Annotated[int | None, layout_option("--dp", help="Data parallel replicas.")]
AttentionDp = Annotated[
    bool | None,
    layout_option(
        "--attention-dp/--no-attention-dp", help="Requests, not heads, over the tp ranks."
    ),
]
Ep = Annotated[int | None, layout_option("--ep", help="Expert parallel ranks; they divide --tp.")]
MoeTp = Annotated[
    int | None, layout_option("--moe-tp", help="Ranks inside each expert: --tp / --ep.")
]
Cp = Annotated[int | None, layout_option("--cp", help="Context ranks.")]
CpType = Annotated[
    str | None, layout_option(help="RING, or HELIX: context ranks split feed-forward layers too.")
]
Pp = Annotated[int | None, layout_option("--pp", help="Pipeline stages.")]
PpPartition = Annotated[
    str | None, layout_option(metavar="N,N,...", help="Layers of each stage, such as 17,15.")
]
Dispatch = Annotated[
    str | None,
    layout_option(help=f"How tokens reach their experts: auto, {', '.join(DISPATCHES)}."),
]
Plan = Annotated[
    str | None,
    layout_option(
        "--plan",
        "--config",
        help="YAML file of mesh axes or of TensorRT-LLM's keys, or a preset's name. "
        "Other options beat it.",
    ),
]
AllowUnsupported = Annotated[
    list[str] | None,
    layout_option(
        metavar="KEY", help="Drop this key of the file, which would be refused; may be repeated."
    ),
]
VirtualDevices = Annotated[
    int | None, layout_option(min=1, help="Use this many virtual CPU devices.")
]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or auto.")]
MaxSeqLen = Annotated[int | None, typer.Option(help="Prompt and generated tokens of a request.")]
Upcycle = Annotated[
    str | None,
    typer.Option(
        metavar="EXPERTSxTOP_K",
        help="Make experts of a dense model's layers, such as 8x2; its text stays the same.",
    ),
]
Coordinator = Annotated[str | None, process_option(help="Address and port of process 0.")]
NumHosts = Annotated[int, process_option(help="Processes of the run.")]
HostId = Annotated[int, process_option(help="Number of this process, from 0.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say what happens.")]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen; None leaves it to the checkpoint."""

    temperature: Temperature = None
    top_p: TopP = None
    top_k: TopK = None
    seed: Seed = None
    stop: Stop = None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the model lies: a file, and sizes that beat it."""

    tp: Tp = None
    ep: Ep = None
    moe_tp: MoeTp = None
    dp: Dp = None
    cp: Cp = None
    cp_type: CpType = None
    pp: Pp = None
    pp_partition: PpPartition = None
    attention_dp: AttentionDp = None
    dispatch: Dispatch = None
    plan: Plan = None
    allow_unsupported: AllowUnsupported = None

    def keywords(self) -> dict[str, Any]:
        """The sizes under TensorRT-LLM's names, as `LLM` takes them."""
        return dict(
            tensor_parallel_size=self.tp,
            moe_expert_parallel_size=self.ep,
            moe_tensor_parallel_size=self.moe_tp,
            data_parallel_size=self.dp,
            context_parallel_size=self.cp,
            cp_config={"cp_type": self.cp_type.upper()} if self.cp_type else None,
            pipeline_parallel_size=self.pp,
            pp_partition=_read_counts(self.pp_partition),
            enable_attention_dp=self.attention_dp,
            moe_dispatch=self.dispatch,
        )


def _read_counts(text: str | None) -> list[Any] | None:
    """ "17,15" -> [17, 15]; what is no number stays as it is, for the plan to refuse."""
    if text is None:
        return None
    return [int(part) if part.strip().isdigit() else part for part in text.split(",")]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the engine is built for."""

    dtype: Dtype = None
    max_seq_len: MaxSeqLen = None


@dataclass(frozen=True, kw_only=True)
class Devices:
    """Devices and processes of the run, in the words of `session.start`."""

    virtual_devices: VirtualDevices = None
    coordinator: Coordinator = None
    num_hosts: NumHosts = 1
    host_id: HostId = 0
    verbose: Verbose = False


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Makes an option of each field of a command's parameters that are dataclasses."""
    signature = inspect.signature(command)
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        group = parameter.annotation
        if isinstance(group, type) and is_dataclass(group):
            groups[name] = group
            parameters += inspect.signature(group).parameters.values()
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    run.__dict__["__signature__"] = signature.replace(parameters=parameters)
    return run
