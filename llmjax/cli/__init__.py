"""The command line: `llmjax generate`, `llmjax chat`, `llmjax plan` and `llmjax info`."""

import importlib.metadata
import io
import os
import sys
import time
from dataclasses import asdict
from typing import Annotated, Any, NoReturn

import jax
import typer
from rich.console import Console
from rich.table import Table

from llmjax import CheckpointError, ConfigError, PlanError
from llmjax.cli import options
from llmjax.cli.info import describe_environment
from llmjax.cli.plan import show_plan
from llmjax.cli.session import Session, read_stdin, read_turn, start
from llmjax.distributed import DistributedError
from llmjax.tokenizer import ChatTemplateError

USER_ERRORS = (
    ConfigError,
    PlanError,
    CheckpointError,
    ChatTemplateError,
    DistributedError,
    OSError,
)
"""Errors whose own sentence says what to do; a traceback would only distract."""
PEER_SECONDS = 5
"""Time for the lifeline to say which process died, where a collective notices first."""

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def print_version(asked: bool) -> None:
    """Answers --version."""
    if asked:
        print(f"llmjax {importlib.metadata.version('llmjax')}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Say which.")
    ] = False,
) -> None:
    """Large language models on a JAX mesh."""


@app.command()
@options.grouped
def generate(
    prompts: Annotated[
        list[str], typer.Argument(help="Texts to answer or to continue; - reads standard input.")
    ],
    sampling: options.Sampling,
    layout: options.Layout,
    limits: options.Limits,
    devices: options.Devices,
    model: options.Model = "smollm2-135m-instruct",
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text; without it, chat with the model.")
    ] = False,
    max_tokens: options.MaxTokens = 256,
    upcycle: options.Upcycle = None,
) -> None:
    """Generates text from prompts: one is printed as it comes, several when all are done."""
    start(**asdict(devices))
    texts = [read_stdin() if prompt == "-" else prompt for prompt in prompts]
    session = Session(
        model,
        sampling=asdict(sampling) | {"max_tokens": max_tokens},
        layout=layout,
        limits=limits,
        usual_batch_size=min(len(prompts), 8),
        upcycle=upcycle,
    )
    tokenizer = session.llm.tokenizer
    chats = not raw and tokenizer is not None and tokenizer.has_chat_template
    inputs: list[Any] = [[{"role": "user", "content": text}] if chats else text for text in texts]
    if len(inputs) == 1:
        session.answer(inputs[0])
        return
    started = time.perf_counter()
    outputs = session.llm.generate(inputs, session.params)
    seconds = time.perf_counter() - started
    for text, output in zip(texts, outputs, strict=True):
        session.show(f"> {text}\n{output.outputs[0].text}\n\n")
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    session.say(
        f"{tokens} tokens for {len(outputs)} prompts in {seconds:.1f} s: "
        f"{tokens / seconds:.1f} tokens/s"
    )


@app.command()
@options.grouped
def chat(
    sampling: options.Sampling,
    layout: options.Layout,
    limits: options.Limits,
    devices: options.Devices,
    model: options.Model = "smollm2-135m-instruct",
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_tokens: options.MaxTokens = 512,
    upcycle: options.Upcycle = None,
) -> None:
    """Holds a conversation; an empty line or the end of the input ends it."""
    start(**asdict(devices))
    session = Session(
        model,
        sampling=asdict(sampling) | {"max_tokens": max_tokens},
        layout=layout,
        limits=limits,
        usual_batch_size=1,
        upcycle=upcycle,
    )
    messages = [{"role": "system", "content": system}] if system else []
    while text := read_turn():
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": session.answer(messages)})


app.command("plan")(show_plan)


@app.command()
def info(virtual_devices: options.VirtualDevices = None) -> None:
    """Shows versions, devices, plans that ship with it, and the kernels that would be picked."""
    start(virtual_devices)
    table = Table(show_header=False, box=None)
    for name, value in describe_environment():
        table.add_row(name, value)
    Console().print(table)


def main() -> None:
    """Runs the command; what a user can mend is printed as one sentence."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that cannot show a character is no reason to stop.
        sys.stdout.reconfigure(errors="replace")
    try:
        app()
    except SystemExit as end:
        if end.code:
            end_now(end.code if isinstance(end.code, int) else 1)
        raise
    except USER_ERRORS as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        end_now(1)
    except jax.errors.JaxRuntimeError:
        if jax.process_count() > 1:
            time.sleep(PEER_SECONDS)
        raise


def end_now(code: int) -> NoReturn:
    """Ends the process without JAX's farewell, which would wait for processes that still run."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
