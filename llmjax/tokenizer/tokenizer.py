"""Text to token ids and back, with the `tokenizers` library alone."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from llmjax.tokenizer.chat_template import ChatTemplate, ChatTemplateError


class Tokenizer:
    """A model's tokenizer and chat template."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        stop_ids: Iterable[int],
        chat_template: str | None,
    ):
        """Wrap a fast tokenizer.

        Args:
            special_tokens: text by role, such as bos_token; the template may use them.
            stop_ids: tokens that end a text or a turn.
            chat_template: Jinja source, or None where the model has none.
        """
        self._backend = backend
        self._special_tokens = dict(special_tokens)
        self._chat_source = chat_template
        self._chat_template: ChatTemplate | None = None
        self.stop_ids = tuple(dict.fromkeys(stop_ids))

    @property
    def vocab_size(self) -> int:
        """Number of tokens; the model's own vocabulary may be padded beyond it."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_id(self) -> int | None:
        """Token that begins a text, where the tokenizer has one."""
        return self._backend.token_to_id(self._special_tokens.get("bos_token", ""))

    @property
    def has_chat_template(self) -> bool:
        return self._chat_source is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Turn text into ids; special tokens written in the text are recognised.

        A rendered chat prompt already begins with its special tokens: encode it without adding.
        """
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Turn ids into text; bytes that are no character become U+FFFD."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """Show one token as text, special ones included."""
        text = self.decode([token_id], skip_special_tokens=False)
        # SentencePiece's decoder drops the first space of a text, which here is the token's own.
        token = self._backend.id_to_token(token_id) or ""
        return f" {text}" if token.startswith("\u2581") and not text.startswith(" ") else text

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Write a conversation as the prompt that the model was trained on.

        Raises:
            ChatTemplateError: the model has no template, or it refuses the messages.
        """
        if self._chat_source is None:
            raise ChatTemplateError(
                "the model has no chat template, so it is not made for chat; give the prompt as "
                "text, or add a chat_template.jinja to the model's folder."
            )
        if self._chat_template is None:
            self._chat_template = ChatTemplate(self._chat_source, self._special_tokens)
        return self._chat_template.render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables
        )
