"""Prompts as users give them, and their token ids."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llmjax.config import ConfigError
from llmjax.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text, token ids, or chat messages."""

_FORMS = "give text, a list of token ids, or a list of chat messages"


def as_batch(prompts: Any) -> list[Prompt]:
    """A list of prompts from one prompt or several.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping) or not hasattr(prompts, "__iter__"):
        raise ConfigError(f"{prompts!r} is no prompt: {_FORMS}, or a list of such prompts.")
    prompts = list(prompts)
    return [prompts] if prompts and isinstance(prompts[0], int | np.integer | Mapping) else prompts


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer | None) -> list[int]:
    """Token ids of a prompt; messages go through the chat template.

    Raises:
        ConfigError: the prompt is empty, or it needs a tokenizer where there is none.
        ChatTemplateError: the model is not made for chat, or refuses the messages.
    """
    if not isinstance(prompt, str | Sequence | np.ndarray):
        raise ConfigError(f"{prompt!r} is no prompt: {_FORMS}.")
    if not len(prompt):
        raise ConfigError("A prompt is empty: give at least one token.")
    if not isinstance(prompt, str) and not isinstance(prompt[0], Mapping):
        return [_as_token(token) for token in prompt]
    if tokenizer is None:
        raise ConfigError("This model's folder has no tokenizer: give token ids, not text.")
    if isinstance(prompt, str):
        return _encode_text(prompt, tokenizer, add_special_tokens=True)
    messages: Any = prompt
    # The template writes the special tokens itself.
    text = tokenizer.apply_chat_template(messages)
    return _encode_text(text, tokenizer, add_special_tokens=False)


def prompt_text(prompt: Prompt, ids: Sequence[int], tokenizer: Tokenizer | None) -> str | None:
    """The text that a model reads; None where token ids were given."""
    if isinstance(prompt, str):
        return prompt
    if tokenizer is not None and isinstance(prompt[0], Mapping):
        return tokenizer.decode(ids, skip_special_tokens=False)
    return None


def _encode_text(text: str, tokenizer: Tokenizer, *, add_special_tokens: bool) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # Bytes of a command line that are no UTF-8 arrive as lone surrogates.
        raise ConfigError(
            f"A prompt is not valid text at character {error.start} "
            f"({text[error.start]!r}): give it in UTF-8."
        ) from None
    return tokenizer.encode(text, add_special_tokens=add_special_tokens)


def _as_token(token: Any) -> int:
    if isinstance(token, int | np.integer) and not isinstance(token, bool):
        return int(token)
    raise ConfigError(f"A prompt holds {token!r}: {_FORMS}.")
