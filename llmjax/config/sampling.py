"""How tokens are chosen and when generation ends."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llmjax.config.checks import (
    Check,
    ConfigError,
    absent_or,
    are_biases,
    are_texts,
    are_tokens,
    at_least,
    between,
    check,
    is_seed,
)


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
        for key, (is_valid, range_text) in SAMPLING_RANGES.items():
            check(is_valid(getattr(self, key)), key, getattr(self, key), range_text)
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


SAMPLING_RANGES: dict[str, Check] = {
    "n": (at_least(1), "a whole number from 1 up"),
    "temperature": (between(0, math.inf), "a number from 0 up"),
    "top_k": (at_least(0), "a whole number from 1 up, or 0 to keep all"),
    "top_p": (between(0, 1, above=True), "a number above 0 and at most 1"),
    "min_p": (between(0, 1), "a number from 0 to 1"),
    "repetition_penalty": (between(0, math.inf, above=True), "a number above 0"),
    "presence_penalty": (between(-2, 2), "a number from -2 to 2"),
    "frequency_penalty": (between(-2, 2), "a number from -2 to 2"),
    "seed": (absent_or(is_seed), "a whole number from 0 to 2**63 - 1, or None"),
    "max_tokens": (absent_or(at_least(1)), "a whole number from 1 up, or None"),
    "min_tokens": (at_least(0), "a whole number from 0 up"),
    "stop": (are_texts, "texts that are not empty"),
    "stop_token_ids": (are_tokens, "token ids from 0 up"),
    "logprobs": (absent_or(at_least(0)), "a whole number from 0 up, or None"),
    "prompt_logprobs": (absent_or(at_least(0)), "a whole number from 0 up, or None"),
    "logit_bias": (are_biases, "token ids from 0 up, each with a number"),
}
"""Sampling option -> whether a value is in range, and the range in words."""
