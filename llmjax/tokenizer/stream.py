"""Shows text while it is being generated."""

from collections.abc import Sequence

from llmjax.tokenizer.tokenizer import Tokenizer

# What a decoder writes for bytes that are no (complete) character.
_REPLACEMENT = "\ufffd"


class StreamDecoder:
    """Decodes ids as they come, never showing half a character.

    The pieces join to what `decode` gives for all ids, without an incomplete character at the end.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        # Ids of the last piece shown, then those since. The former are decoded again with the
        # latter, because a decoder treats the start of a text in its own way.
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, ids: Sequence[int]) -> str:
        """Add ids and return the text that is certain by now."""
        self._pending += ids
        text = self._pending_text()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._context, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        """Return what is left after the last id, without an incomplete character."""
        text = self._pending_text().rstrip(_REPLACEMENT)
        self._context, self._pending = [], []
        return text

    def _pending_text(self) -> str:
        shown = self._decode(self._context)
        return self._decode(self._context + self._pending)[len(shown) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)
