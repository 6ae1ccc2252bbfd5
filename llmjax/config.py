"""Configuration of models, engine and sampling: the only validation of user input."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

import jax.numpy as jnp

from meshes.errors import shorten


class ConfigError(ValueError):
    """A value that a user gave and that cannot be honoured."""


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding; frequencies are computed in `llmjax/layers/rope.py`."""

    theta: float = 10000.0
    """Base of the geometric series of wavelengths."""
    kind: str = "default"
    """Scaling rule: default, linear, dynamic, llama3, yarn or longrope."""
    factor: float = 1.0
    """How many times longer than the original context."""
    original_max_position_embeddings: int | None = None
    """Context length before scaling."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths longer than original / low_freq_factor are divided by `factor`."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths shorter than original / high_freq_factor stay."""
    beta_fast: float = 32.0
    """yarn: rotations above which a frequency stays."""
    beta_slow: float = 1.0
    """yarn: rotations below which a frequency is divided by `factor`."""
    attention_factor: float | None = None
    """yarn and longrope: factor on cosine and sine; None derives it."""
    mscale: float | None = None
    """yarn of DeepSeek: numerator of the attention factor."""
    mscale_all_dim: float | None = None
    """yarn of DeepSeek: denominator of the attention factor."""
    truncate: bool = True
    """yarn: round the bounds of the ramp to whole frequencies."""
    short_factor: tuple[float, ...] = ()
    """longrope: divisors of each frequency within the original context."""
    long_factor: tuple[float, ...] = ()
    """longrope: divisors of each frequency beyond it."""
    partial_rotary_factor: float = 1.0
    """Share of the head's features that is rotated."""


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """In what a decoder layer may differ from its neighbours."""

    window: int = 0
    """Tokens that a sliding window sees; 0 is full attention."""
    chunk: int = 0
    """Tokens of the chunks inside which attention stays; 0 is full attention."""
    rope: Literal["global", "local", "none"] = "global"
    """Which rotary embedding turns queries and keys."""
    ffn: Literal["dense", "experts"] = "dense"
    """Kind of the feed-forward part."""


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, 2024): what is cached is one vector a token."""

    q_rank: int | None
    """Features that queries are computed from; None: the residual stream itself."""
    kv_rank: int
    """Features of the latent that keys and values are computed from."""
    nope_dim: int
    """Features of a head's query and key without position."""
    rope_dim: int
    """Features with position; the key's are shared by all heads."""
    value_dim: int
    """Features of a head's value."""

    @property
    def cached_dim(self) -> int:
        """Numbers cached for each token and layer."""
        return self.kv_rank + self.rope_dim


@dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """A mixture of experts and its router.

    A token's gate for an expert is its score, over all experts if `scoring` is softmax. The `top_k`
    experts are those of the highest score plus correction bias, within the `top_groups` best of
    `num_groups` groups.
    """

    num_experts: int
    """Routed experts."""
    top_k: int
    """Experts of a token."""
    ffn: int
    """Features inside one expert."""
    shared_ffn: int = 0
    """Features of the expert that every token passes; 0: there is none."""
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    """Router logits -> scores."""
    normalize: bool = False
    """Divide a token's gates by their sum."""
    scaling_factor: float = 1.0
    """Multiplies the gates."""
    num_groups: int = 1
    """Equal groups that neighbouring experts form."""
    top_groups: int = 1
    """Groups that a token's experts may lie in."""
    group_best: int = 2
    """A group is as good as the sum of its best so many experts."""
    correction_bias: bool = False
    """A learned number for each expert is added to its score, for the choice only."""
    router_bias: bool = False
    """Bias on the router logits."""
    bias: bool = False
    """Biases in the experts' products."""
    scale_inputs: bool = False
    """Gates multiply what goes into the experts, not what comes out."""
    activation: Literal["silu", "clamped_swiglu"] = "silu"
    """Gate inside the experts."""


@dataclass(frozen=True, kw_only=True)
class TemperatureTuning:
    """Queries of layers without rope grow with the logarithm of their position (Llama 4)."""

    floor_scale: float
    """Positions between two values of the factor."""
    scale: float
    """Factor on the logarithm."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a decoder, in this project's words; each family fills it from `config.json`."""

    architecture: str
    """Name under which Hugging Face knows it, such as LlamaForCausalLM."""
    vocab_size: int
    """Rows of the embedding."""
    hidden_size: int
    """Features of the residual stream."""
    num_layers: int
    """Decoder layers."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key/value heads."""
    head_dim: int
    """Features of a head."""
    intermediate_size: int
    """Features of the dense feed-forward layer."""
    max_position_embeddings: int
    """Longest context, in tokens."""
    layers: tuple[LayerConfig, ...] = ()
    """In what each layer differs; empty: in nothing."""
    norm_eps: float = 1e-6
    """Added to the mean square in RMS norms."""
    norm_offset: float = 0.0
    """Added to the learned scale of RMS norms."""
    post_norms: bool = False
    """Attention and feed-forward are normed again before they are added to the residual stream."""
    rope: RopeConfig = RopeConfig()
    """Rotary embedding."""
    local_rope: RopeConfig | None = None
    """Rotary embedding of layers that say "local"."""
    rope_interleaved: bool = False
    """Rope turns neighbouring features (0, 1), (2, 3); otherwise (0, half), (1, half + 1)."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections."""
    output_bias: bool = False
    """Bias on the attention's output projection."""
    mlp_bias: bool = False
    """Biases in the dense feed-forward layer."""
    qk_norm: bool = False
    """RMS norm with a learned scale over each query and key head, before rope."""
    qk_unit_norm: bool = False
    """RMS norm without a scale over each query and key head, after rope, in layers with rope."""
    temperature_tuning: TemperatureTuning | None = None
    """Growth of queries with their position, in layers without rope."""
    attention_scale: float | None = None
    """Factor on attention scores; None: head_dim ** -0.5."""
    attention_soft_cap: float | None = None
    """Attention scores s become cap * tanh(s / cap)."""
    sinks: bool = False
    """A learned score of each head joins the softmax and takes weight, but has no value."""
    latent: LatentConfig | None = None
    """Multi-head latent attention in the place of grouped-query attention."""
    experts: ExpertConfig | None = None
    """Mixture of experts of the layers that say "experts"."""
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    """Gate of the dense feed-forward layer."""
    embedding_scale: float = 1.0
    """Multiplies the embedding, but not the head that shares its weights."""
    logit_soft_cap: float | None = None
    """Logits l become cap * tanh(l / cap)."""
    tie_word_embeddings: bool = False
    """The head is the embedding, transposed."""
    dtype: str = "float32"
    """Type in which the checkpoint is stored."""

    def __post_init__(self) -> None:
        for key in (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
        ):
            if not isinstance(getattr(self, key), int) or getattr(self, key) < 1:
                raise ConfigError(
                    f"config.json gives {key}={getattr(self, key)!r}: "
                    "it must be a whole number from 1 up."
                )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"config.json gives num_attention_heads={self.num_heads}, which "
                f"num_key_value_heads={self.num_kv_heads} does not divide: each key/value head "
                "serves the same number of query heads."
            )
        if not self.layers:
            object.__setattr__(self, "layers", (LayerConfig(),) * self.num_layers)
        if len(self.layers) != self.num_layers:
            raise ConfigError(
                f"config.json describes {len(self.layers)} layers one by one, and "
                f"num_hidden_layers is {self.num_layers}: the two must be equal."
            )


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
        for key, (is_valid, range_text) in _ENGINE_RANGES.items():
            _check(is_valid(getattr(self, key)), key, getattr(self, key), range_text)

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
                raise ConfigError(
                    f"LLM() has no option {key!r}. "
                    f"Options: {', '.join(sorted(known | set(ALIASES)))}; "
                    "and the keys of TensorRT-LLM in docs/trtllm.md."
                )
            if name in values:
                raise ConfigError(f"{key} and {name} are the same option: give one of them.")
            values[name] = resolve_dtype_name(value) if name == "dtype" else value
            if name in _ENGINE_RANGES:
                is_valid, range_text = _ENGINE_RANGES[name]
                called = (names or {}).get(name, key)
                _check(is_valid(values[name]), called, values[name], range_text)
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
    _check(name in DTYPES, "dtype", dtype, ", ".join(DTYPES) + ' or "auto"')
    return name


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when generation ends, in vLLM's words.

    Raises:
        ConfigError: a value out of its range, with the range.
    """

    n: int = 1
    """Completions of each prompt."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 or -1 keeps all."""
    top_p: float = 1.0
    """Keep the most likely tokens whose probabilities reach p together."""
    min_p: float = 0.0
    """Keep tokens at least this probable, relative to the most likely one."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens of prompt and output."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of generated tokens."""
    frequency_penalty: float = 0.0
    """Subtracted once for each time that a token was generated."""
    seed: int | None = None
    """Same seed, same tokens, whatever else is in the batch and whatever the plan."""
    max_tokens: int | None = 16
    """Most generated tokens; None: up to the context's end."""
    min_tokens: int = 0
    """Stop tokens are impossible before this many."""
    stop: str | Sequence[str] = ()
    """Texts that end generation."""
    stop_token_ids: Sequence[int] = ()
    """Tokens that end generation, besides the model's own."""
    ignore_eos: bool = False
    """Go on after the model's own stop tokens."""
    include_stop_str_in_output: bool = False
    """Leave the stop text at the end of the output."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    logprobs: int | None = None
    """Return log-probabilities of this many alternatives with each token."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id -> number added to its logit."""
    logits_processors: Sequence[str] = ()
    """Names of functions that `LLM(logits_processors={name: function})` was given."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "top_k", 0 if self.top_k in (None, -1) else self.top_k)
        for key, (is_valid, range_text) in _SAMPLING_RANGES.items():
            _check(is_valid(getattr(self, key)), key, getattr(self, key), range_text)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ConfigError(
                f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}: "
                f"lower it to at most {self.max_tokens}."
            )

    @property
    def needs_state(self) -> bool:
        """Whether the sampler keeps counts, biases or stop tokens of the request on the device."""
        return bool(
            self.repetition_penalty != 1.0
            or self.presence_penalty
            or self.frequency_penalty
            or self.min_tokens
            or self.logit_bias
            or self.logits_processors
        )


def _check(valid: bool, key: str, value: Any, range_text: str) -> None:
    if not valid:
        raise ConfigError(f"{key}={shorten(value)} is out of range: use {range_text}.")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _is_finite(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value)


def _at_least(lowest: int) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        return _is_whole(value) and value >= lowest

    return check


def _absent_or(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def check_present(value: Any) -> bool:
        return value is None or check(value)

    return check_present


def _between(lowest: float, highest: float, *, above: bool = False) -> Callable[[Any], bool]:
    """Numbers from `lowest`, which `above` leaves out, to `highest`."""

    def check(value: Any) -> bool:
        inside = _is_finite(value) and lowest <= value <= highest
        return inside and not (above and value == lowest)

    return check


def _are_texts(values: Any) -> bool:
    return all(isinstance(text, str) and text for text in values)


def _are_tokens(values: Any) -> bool:
    return all(_is_whole(token) and token >= 0 for token in values)


def _are_biases(values: Any) -> bool:
    return _are_tokens(values) and all(_is_number(bias) for bias in values.values())


def _is_seed(value: Any) -> bool:
    return _is_whole(value) and 0 <= value < 2**63


def _is_one_of(*values: Any) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        return value in values

    return check


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def _are_rising(values: Any) -> bool:
    whole = all(_is_whole(size) and size >= 1 for size in values)
    return whole and list(values) == sorted(set(values))


def _are_few(values: Any) -> bool:
    return len(values) <= 31


_COUNT_OR_NONE = (_absent_or(_at_least(1)), "a whole number from 1 up, or None")
_RISING = (_are_rising, "rising whole numbers from 1 up")
_SWITCH = (_is_switch, "True or False")

_ENGINE_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_batch_size": _COUNT_OR_NONE,
    "max_num_tokens": _COUNT_OR_NONE,
    "max_seq_len": _COUNT_OR_NONE,
    "tokens_per_block": _COUNT_OR_NONE,
    "kv_cache_max_tokens": _COUNT_OR_NONE,
    "free_gpu_memory_fraction": (
        _between(0, 1, above=True),
        "a number above 0 and at most 1",
    ),
    "enable_block_reuse": _SWITCH,
    "enable_chunked_prefill": _SWITCH,
    "disable_overlap_scheduler": _SWITCH,
    "print_iter_log": _SWITCH,
    "stream_interval": (_at_least(1), "a whole number from 1 up"),
    "layer_loop": (_is_one_of(None, "scan", "unroll"), '"scan", "unroll" or None'),
    "moe_dispatch": (
        _is_one_of("auto", *DISPATCHES),
        '"auto", ' + " or ".join(f'"{name}"' for name in DISPATCHES),
    ),
    "moe_max_num_tokens": _COUNT_OR_NONE,
    "attention_dp_balance": _SWITCH,
    "attention_dp_timeout_iters": (_at_least(0), "a whole number from 0 up"),
    "attention_dp_batching_wait_iters": (_at_least(0), "a whole number from 0 up"),
    "max_logprobs": (_at_least(0), "a whole number from 0 up"),
    "dtype": (_is_one_of(None, *DTYPES), ", ".join(DTYPES)),
    "logits_processors": (_are_few, "at most 31 functions"),
    "batch_buckets": _RISING,
    "token_buckets": _RISING,
    "seed": (_is_seed, "a whole number from 0 to 2**63 - 1"),
}
"""Engine option -> whether a value is in range, and the range in words."""

_SAMPLING_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "n": (_at_least(1), "a whole number from 1 up"),
    "temperature": (_between(0, math.inf), "a number from 0 up"),
    "top_k": (_at_least(0), "a whole number from 1 up, or 0 to keep all"),
    "top_p": (_between(0, 1, above=True), "a number above 0 and at most 1"),
    "min_p": (_between(0, 1), "a number from 0 to 1"),
    "repetition_penalty": (_between(0, math.inf, above=True), "a number above 0"),
    "presence_penalty": (_between(-2, 2), "a number from -2 to 2"),
    "frequency_penalty": (_between(-2, 2), "a number from -2 to 2"),
    "seed": (_absent_or(_is_seed), "a whole number from 0 to 2**63 - 1, or None"),
    "max_tokens": (_absent_or(_at_least(1)), "a whole number from 1 up, or None"),
    "min_tokens": (_at_least(0), "a whole number from 0 up"),
    "stop": (_are_texts, "texts that are not empty"),
    "stop_token_ids": (_are_tokens, "token ids from 0 up"),
    "logprobs": (_absent_or(_at_least(0)), "a whole number from 0 up, or None"),
    "prompt_logprobs": (_absent_or(_at_least(0)), "a whole number from 0 up, or None"),
    "logit_bias": (_are_biases, "token ids from 0 up, each with a number"),
}
"""Sampling option -> whether a value is in range, and the range in words."""
