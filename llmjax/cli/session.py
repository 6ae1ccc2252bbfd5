"""What the commands share: devices, the model, and text between it and the terminal."""

import logging
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import jax

from llmjax import LLM, ConfigError, SamplingParams
from llmjax.cli.options import Layout, Limits
from llmjax.distributed import broadcast, initialize
from llmjax.plans import resolve

UNASKED_TEMPERATURE = 0.7
"""Where neither the user nor the checkpoint names one."""


class Session:
    """A model, how it samples, and whether this process speaks for the run."""

    def __init__(
        self,
        model: str,
        *,
        sampling: Mapping[str, Any],
        layout: Layout,
        limits: Limits,
        usual_batch_size: int,
        upcycle: str | None,
    ):
        given = {key: value for key, value in sampling.items() if value is not None}
        # Bad values are refused before the model is loaded.
        SamplingParams(**given)
        plan, engine_options = resolve(
            layout.plan,
            layout.keywords() | asdict(limits),
            allow_unsupported=layout.allow_unsupported or (),
        )
        engine_options.setdefault("max_batch_size", usual_batch_size)
        self.llm = LLM(model, plan=plan, upcycle=upcycle, **engine_options)
        recommended = self.llm.get_default_sampling_params()
        if recommended == SamplingParams():
            recommended = replace(recommended, temperature=UNASKED_TEMPERATURE)
        self.params = replace(recommended, **given)

    def answer(self, prompt: Any) -> str:
        """Prints the answer as it comes, then how fast it came; returns it."""
        started = time.perf_counter()
        text, tokens, first = "", 0, 0.0
        for delta in self.llm.stream(prompt, self.params):
            first = first or time.perf_counter() - started
            tokens += len(delta.token_ids)
            text += delta.text
            self.show(delta.text)
        self.show("\n")
        rest = time.perf_counter() - started - first
        rate = f", then {(tokens - 1) / rest:.1f} tokens/s" if tokens > 1 else ""
        self.say(f"{tokens} tokens: the first after {first:.2f} s{rate}")
        return text

    def show(self, text: str) -> None:
        """Prints a part of the text."""
        if _is_speaker():
            print(text, end="", flush=True)

    def say(self, summary: str) -> None:
        """Tells what was measured, and where, beside the text."""
        if _is_speaker():
            device = self.llm.mesh.devices.flat[0]
            count, dtype = self.llm.mesh.devices.size, self.llm.engine.runner.dtype
            print(summary, file=sys.stderr)
            print(
                f"{self.llm.plan} on {count} x {device.device_kind}, {dtype}",
                file=sys.stderr,
                flush=True,
            )


def start(
    virtual_devices: int | None,
    coordinator: str | None = None,
    num_hosts: int = 1,
    host_id: int = 0,
    *,
    verbose: bool = False,
) -> None:
    """Sets up logging and JAX's devices, which must happen before anything uses them."""
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for package in ("llmjax", "meshes", "pallas_kernels"):
        logging.getLogger(package).setLevel(level)
    if virtual_devices is not None:
        # XLA sizes its threads from NPROC; a collective needs one for each virtual device at once.
        os.environ.setdefault("NPROC", str(max(32, 2 * virtual_devices)))
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", virtual_devices)
    if coordinator is not None:
        _keep_stdout_for_text()
        initialize(coordinator, num_hosts, host_id)


def read_stdin() -> str:
    """Process 0's standard input as a prompt, on every process.

    Raises:
        ConfigError: it is not UTF-8.
    """
    text = None
    if _is_speaker():
        try:
            text = sys.stdin.buffer.read().decode("utf-8").rstrip("\n")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"Standard input is not UTF-8 text (byte {error.start}): convert it first."
            ) from None
    return broadcast(text)


def read_turn() -> str:
    """What the user says next, on every process; empty at the end of the conversation."""
    text = ""
    if _is_speaker():
        try:
            text = input("> ").strip()
        except EOFError:
            print()
    return broadcast(text)


def _is_speaker() -> bool:
    return jax.process_index() == 0


def _keep_stdout_for_text() -> None:
    """Sends to stderr what libraries in C++ write to stdout, such as gloo its connections."""
    text = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(text, "w", encoding=sys.stdout.encoding, errors="replace")
