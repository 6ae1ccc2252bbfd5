"""The command line: `llmjax generate`."""

import logging
import os
import sys
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def root() -> None:
    """Large language models on a JAX mesh."""


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(help="Texts to answer or to continue.")],
    model: Annotated[
        str, typer.Option(help="Folder, GGUF file, hub id, or the embedded model.")
    ] = "smollm2-135m-instruct",
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text; without it, chat with the model.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this mass.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep this many tokens; 0 keeps all.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text.")] = None,
    tp: Annotated[
        int | None, typer.Option("--tp", help="Tensor parallel ranks (ep * tp of the mesh).")
    ] = None,
    dp: Annotated[int | None, typer.Option("--dp", help="Data parallel replicas.")] = None,
    attention_dp: Annotated[
        bool | None, typer.Option("--attention-dp", help="Requests, not heads, over the tp ranks.")
    ] = None,
    plan: Annotated[
        str | None, typer.Option(help="YAML file of mesh axes, or a preset's name.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "auto",
    max_seq_len: Annotated[
        int | None, typer.Option(help="Prompt and generated tokens of a request.")
    ] = None,
    virtual_devices: Annotated[
        int | None, typer.Option(help="Use this many virtual CPU devices.")
    ] = None,
    coordinator: Annotated[
        str | None, typer.Option(help="Address and port of process 0, for several processes.")
    ] = None,
    num_hosts: Annotated[int, typer.Option(help="Processes of the run.")] = 1,
    host_id: Annotated[int, typer.Option(help="Number of this process, from 0.")] = 0,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what happens.")] = False,
) -> None:
    """Generates text from prompts and prints it as it comes."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s")
    start_devices(virtual_devices, coordinator, num_hosts, host_id)
    from llmjax import LLM, SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
    )
    llm = LLM(
        model,
        plan=plan,
        tensor_parallel_size=tp,
        data_parallel_size=dp,
        enable_attention_dp=attention_dp,
        dtype=dtype,
        max_seq_len=max_seq_len,
        max_batch_size=min(len(prompts), 8),
    )
    chat = not raw and llm.tokenizer is not None and llm.tokenizer.has_chat_template
    inputs: list[Any] = [
        [{"role": "user", "content": prompt}] if chat else prompt for prompt in prompts
    ]
    if len(inputs) == 1:
        for delta in llm.stream(inputs[0], params):
            print(delta, end="", flush=True)
        print()
        return
    for prompt, output in zip(prompts, llm.generate(inputs, params), strict=True):
        print(f"> {prompt}\n{output.outputs[0].text}\n")


def start_devices(
    virtual_devices: int | None, coordinator: str | None, num_hosts: int, host_id: int
) -> None:
    """Sets up JAX's devices, which must happen before anything uses them."""
    if virtual_devices is not None:
        # XLA sizes its threads from NPROC; a collective needs one for each virtual device at once.
        os.environ.setdefault("NPROC", str(max(32, 2 * virtual_devices)))
        import jax

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", virtual_devices)
    if coordinator is not None:
        from llmjax.distributed import initialize

        initialize(coordinator, num_hosts, host_id)


def main() -> None:
    """Runs the command; what a user can mend is printed as one sentence."""
    try:
        app()
    except (ValueError, FileNotFoundError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
