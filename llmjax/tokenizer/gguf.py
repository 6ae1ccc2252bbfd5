"""Builds a fast tokenizer from the vocabulary inside a GGUF file."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from llmjax.weights.gguf_file import GGUFFile
from llmjax.weights.interface import CheckpointError

_GPT2_SPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_DIGITS_THEN_GPT2 = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), _GPT2_SPLIT]
)
# The split of Llama 3 and, with one digit at a time, of Qwen 2.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split_words(digits: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS.format(digits=digits)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@dataclass(frozen=True, kw_only=True)
class _Splitting:
    """How text is cut up before its pieces are merged."""

    pre_tokenizer: pre_tokenizers.PreTokenizer
    normalizer: normalizers.Normalizer | None = None
    ignore_merges: bool = False
    """A piece that is a token as it stands is taken without merging."""
    adds_bos: bool = False
    """Where the file does not say."""


_LLAMA3 = _Splitting(pre_tokenizer=_split_words("{1,3}"), ignore_merges=True, adds_bos=True)
_SPLITTINGS: Mapping[str, _Splitting] = {
    "default": _Splitting(pre_tokenizer=_GPT2_SPLIT),
    "gpt-2": _Splitting(pre_tokenizer=_GPT2_SPLIT),
    "smollm": _Splitting(pre_tokenizer=_DIGITS_THEN_GPT2),
    "starcoder": _Splitting(pre_tokenizer=_DIGITS_THEN_GPT2),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _Splitting(pre_tokenizer=_split_words(""), normalizer=normalizers.NFC()),
}


def build_tokenizer(file: GGUFFile) -> Tokenizer | None:
    """Build the tokenizer of a GGUF file; None where the file has no vocabulary.

    Raises:
        CheckpointError: the file's kind of tokenizer is not supported.
    """
    metadata = file.metadata
    model = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if model in (None, "none", "no_vocab") or tokens is None:
        return None
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if model != "gpt2" or pre not in _SPLITTINGS:
        raise CheckpointError(
            f"{file.path} has a tokenizer of model {model} and pre-tokenizer {pre}; model gpt2 "
            f"with {', '.join(_SPLITTINGS)} is read. Use the model's Hugging Face folder, which "
            "holds tokenizer.json."
        )
    splitting = _SPLITTINGS[pre]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        BPE(vocab=vocabulary, merges=merges, ignore_merges=splitting.ignore_merges)
    )
    if splitting.normalizer is not None:
        tokenizer.normalizer = splitting.normalizer
    tokenizer.pre_tokenizer = splitting.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    _add_whole_tokens(tokenizer, tokens, metadata.get("tokenizer.ggml.token_type", []))
    _add_text_ends(tokenizer, tokens, metadata, splitting)
    return tokenizer


def _add_whole_tokens(tokenizer: Tokenizer, tokens: list[str], kinds: list[int]) -> None:
    """Mark the tokens that are found in text before it is split."""
    for token, kind in zip(tokens, kinds, strict=False):
        if kind == gguf.TokenType.CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == gguf.TokenType.USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])


def _add_text_ends(
    tokenizer: Tokenizer, tokens: list[str], metadata: Mapping[str, Any], splitting: _Splitting
) -> None:
    """Have encoding put the tokens for begin and end around a text, where the file wants them."""
    template = ["$A"]
    special = []
    for end, default in (("bos", splitting.adds_bos), ("eos", False)):
        number = metadata.get(f"tokenizer.ggml.{end}_token_id")
        if number is None or not metadata.get(f"tokenizer.ggml.add_{end}_token", default):
            continue
        special.append((tokens[number], number))
        template = [tokens[number], *template] if end == "bos" else [*template, tokens[number]]
    if special:
        tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
