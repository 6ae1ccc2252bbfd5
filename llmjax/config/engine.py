"""Options of the engine, and the other names that users know for them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

import jax.numpy as jnp

from llmjax.config.checks import (
    COUNT_OR_NONE,
    RISING,
    SWITCH,
    Check,
    ConfigError,
    are_few,
    at_least,
    between,
    check,
    is_one_of,
    is_seed,
)
from meshes.trtllm import FIELD_KEYS

LogitsProcessor = Callable[[jnp.ndarray, jnp.ndarray, jnp.ndarray], jnp.ndarray]
"""A JAX function (logits [vocab], generated counts [vocab], position) -> logits [vocab]."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Options of the engine, in TensorRT-LLM's words; vLLM's words are accepted too (`ALIASES`).

    Raises:
        ConfigError: a value out of its range, with the range.
    """

    max_batch_size: int | None = None
    """Running requests of each batch rank; None: 8 on CPU, 256 on a GPU."""
    max_num_tokens: int | None = None
    """Tokens of a step and batch rank, decodes included; None: 512 on CPU, 8192 on a GPU."""
    max_seq_len: int | None = None
    """Prompt plus generated tokens; None: the model's context, or what the KV cache holds."""
    tokens_per_block: int | None = None
    """Tokens of a page of the KV cache; None: 16 on CPU, 64 on a GPU."""
    enable_block_reuse: bool = True
    """Share pages between requests with the same prefix."""
    enable_chunked_prefill: bool = True
    """Split prompts that are longer than the token budget of a step."""
    free_gpu_memory_fraction: float = 0.9
    """Share of the memory that weights and temporaries leave which the KV cache takes."""
    kv_cache_max_tokens: int | None = None
    """Tokens that the KV cache of a batch rank holds; None: by memory."""
    disable_overlap_scheduler: bool = False
    """Read the tokens of a step before the next one is dispatched."""
    dtype: str | None = None
    """Type of weights, activations and cache; None: float32 on CPU, the checkpoint's on a GPU."""
    moe_dispatch: Literal["auto", "allreduce", "allgather", "all_to_all"] = "auto"
    """How tokens reach the experts' ranks; auto: the cheapest one for each step shape."""
    moe_max_num_tokens: int | None = None
    """Tokens that the experts of a rank take at once, more go in rounds; None: all of a step."""
    attention_dp_balance: bool = False
    """Hold prefills back until all batch ranks have one, so that ranks prefill together."""
    attention_dp_timeout_iters: int = 50
    """With balance: steps after which a rank without prefills is no longer waited for."""
    attention_dp_batching_wait_iters: int = 10
    """With balance: further steps in which prefills of all ranks gather before they run."""
    batch_buckets: tuple[int, ...] = ()
    """Batch sizes a rank for which steps are compiled; empty: derived from max_batch_size."""
    token_buckets: tuple[int, ...] = ()
    """Prefill tokens a rank for which steps are compiled; empty: derived from max_num_tokens."""
    stream_interval: int = 1
    """Tokens that a stream brings at a time, after the first one."""
    print_iter_log: bool = False
    """Print a line on stderr for each step."""
    layer_loop: Literal["scan", "unroll"] | None = None
    """How layers run; None: a scan, which compiles once what all layers share."""
    compile_cache: bool | str = True
    """Keep compiled programs in the user's cache folder, in the named folder, or not at all."""
    compiler_options: Mapping[str, Any] = field(default_factory=dict)
    """XLA options of the step."""
    max_logprobs: int = 20
    """Most alternatives for which log-probabilities can be asked."""
    logits_processors: Mapping[str, LogitsProcessor] = field(default_factory=dict)
    """JAX functions that requests may name; they are compiled into the step."""
    seed: int = 0
    """Seeds requests that bring no seed of their own."""

    def __post_init__(self) -> None:
        for key, (is_valid, range_text) in ENGINE_RANGES.items():
            check(is_valid(getattr(self, key)), key, getattr(self, key), range_text)

    @classmethod
    def from_keywords(
        cls, keywords: Mapping[str, Any], *, names: Mapping[str, str] | None = None
    ) -> Self:
        """Reads options in TensorRT-LLM's or vLLM's words; unknown ones are refused by name.

        Args:
            keywords: the options.
            names: what the user calls an option, where that is another name.
        """
        known = {entry.name for entry in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in keywords.items():
            name = ALIASES.get(key, key)
            if name not in known:
                meant = f"Did you mean {FIELD_KEYS[key]}? " if key in FIELD_KEYS else ""
                raise ConfigError(
                    f"LLM() has no option {key!r}. {meant}"
                    f"Options: {', '.join(sorted(known | set(ALIASES)))}; "
                    "and the keys of TensorRT-LLM in docs/trtllm.md."
                )
            if name in values:
                raise ConfigError(f"{key} and {name} are the same option: give one of them.")
            values[name] = resolve_dtype_name(value) if name == "dtype" else value
            if name in ENGINE_RANGES:
                is_valid, range_text = ENGINE_RANGES[name]
                called = (names or {}).get(name, key)
                check(is_valid(values[name]), called, values[name], range_text)
        return cls(**values)


ALIASES = {
    "max_num_seqs": "max_batch_size",
    "max_num_batched_tokens": "max_num_tokens",
    "max_model_len": "max_seq_len",
    "block_size": "tokens_per_block",
    "enable_prefix_caching": "enable_block_reuse",
    "kv_cache_free_gpu_memory_fraction": "free_gpu_memory_fraction",
}
"""Other names of engine options -> ours."""

DTYPES = ("float32", "bfloat16", "float16")
"""Types in which a model can run."""

DISPATCHES = ("allreduce", "allgather", "all_to_all")
"""Ways of tokens to the ranks of their experts and back."""


def resolve_dtype_name(dtype: Any) -> str | None:
    """A name from `DTYPES` for a name, a NumPy or JAX type, or "auto" (None).

    Raises:
        ConfigError: another type, with the known ones.
    """
    if dtype is None or dtype == "auto":
        return None
    short = {
        "fp32": "float32",
        "bf16": "bfloat16",
        "fp16": "float16",
        "half": "float16",
        "float": "float32",
    }
    try:
        name = short.get(dtype, dtype) if isinstance(dtype, str) else jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    check(name in DTYPES, "dtype", dtype, ", ".join(DTYPES) + ' or "auto"')
    return name


ENGINE_RANGES: dict[str, Check] = {
    "max_batch_size": COUNT_OR_NONE,
    "max_num_tokens": COUNT_OR_NONE,
    "max_seq_len": COUNT_OR_NONE,
    "tokens_per_block": COUNT_OR_NONE,
    "kv_cache_max_tokens": COUNT_OR_NONE,
    "free_gpu_memory_fraction": (
        between(0, 1, above=True),
        "a number above 0 and at most 1",
    ),
    "enable_block_reuse": SWITCH,
    "enable_chunked_prefill": SWITCH,
    "disable_overlap_scheduler": SWITCH,
    "print_iter_log": SWITCH,
    "stream_interval": (at_least(1), "a whole number from 1 up"),
    "layer_loop": (is_one_of(None, "scan", "unroll"), '"scan", "unroll" or None'),
    "moe_dispatch": (
        is_one_of("auto", *DISPATCHES),
        '"auto", ' + " or ".join(f'"{name}"' for name in DISPATCHES),
    ),
    "moe_max_num_tokens": COUNT_OR_NONE,
    "attention_dp_balance": SWITCH,
    "attention_dp_timeout_iters": (at_least(0), "a whole number from 0 up"),
    "attention_dp_batching_wait_iters": (at_least(0), "a whole number from 0 up"),
    "max_logprobs": (at_least(0), "a whole number from 0 up"),
    "dtype": (is_one_of(None, *DTYPES), ", ".join(DTYPES)),
    "logits_processors": (are_few, "at most 31 functions"),
    "batch_buckets": RISING,
    "token_buckets": RISING,
    "seed": (is_seed, "a whole number from 0 to 2**63 - 1"),
}
"""Engine option -> whether a value is in range, and the range in words."""
