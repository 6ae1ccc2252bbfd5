"""Tokenizers, chat templates, and text from a stream of ids."""

from llmjax.tokenizer.chat_template import ChatTemplateError
from llmjax.tokenizer.load import load_tokenizer
from llmjax.tokenizer.stream import StreamDecoder
from llmjax.tokenizer.tokenizer import Tokenizer

__all__ = ["ChatTemplateError", "StreamDecoder", "Tokenizer", "load_tokenizer"]
