"""What users get back, and the text that grows while tokens come in."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmjax.engine.engine import TokenLogprobs
from llmjax.engine.request import Request
from llmjax.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True, kw_only=True)
class Logprob:
    """One token's log-probability at one position."""

    logprob: float
    """Under the unmodified logits."""
    rank: int
    """One more than the number of likelier tokens."""
    decoded_token: str | None
    """The token as text, where there is a tokenizer."""


PositionLogprobs = Mapping[int, Logprob]
"""Token id -> log-probability: the token that stands there, then the likeliest."""


@dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """One continuation of a prompt."""

    index: int
    """Which of the prompt's `n` completions."""
    text: str
    """Its text, without stop texts and special tokens; empty without a tokenizer."""
    token_ids: tuple[int, ...]
    """Generated ids, the stop token included."""
    logprobs: tuple[PositionLogprobs, ...] | None
    """One entry a token, where asked for."""
    cumulative_logprob: float | None
    """Sum of the tokens' log-probabilities, where asked for."""
    finish_reason: str | None
    """stop, length or abort; None while it runs."""
    stop_reason: int | str | None
    """The stop text or stop token id that ended it; None for the model's own end."""


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """A prompt and its completions."""

    prompt: str | None
    """The prompt's text; None where token ids were given."""
    prompt_token_ids: tuple[int, ...]
    """The prompt's ids."""
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None
    """One entry a prompt token, None for the first; only where asked for."""
    outputs: tuple[CompletionOutput, ...]
    """`n` completions."""
    num_cached_tokens: int
    """Prompt tokens of the first completion found in the prefix cache."""


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What a stream yields: new text and its tokens."""

    index: int
    """Which of the prompt's `n` completions."""
    text: str
    """Text that is certain by now; the deltas of a completion join to its text."""
    token_ids: tuple[int, ...]
    """New token ids."""
    finish_reason: str | None
    """Set on the last delta of a completion."""

    def __str__(self) -> str:
        return self.text


class Completion:
    """Follows one request: decodes its tokens, looks for stop texts, keeps deltas for a stream."""

    def __init__(
        self,
        request: Request,
        index: int,
        tokenizer: Tokenizer | None,
        *,
        stream_interval: int | None = 1,
    ):
        """A delta comes every `stream_interval` tokens; None where nobody will take deltas."""
        self.request, self.index = request, index
        self._interval = stream_interval
        self._unsent_text = ""
        self._num_sent = 0
        self.text = ""
        self.finish_reason: str | None = None
        self.stop_text: str | None = None
        self.deltas: deque[Delta] = deque()
        params = request.params
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer, params.skip_special_tokens) if tokenizer else None
        self._held = ""
        self.token_ids: list[int] = []

    @property
    def is_finished(self) -> bool:
        """Whether its last delta is out."""
        return self.finish_reason is not None

    def update(self) -> None:
        """Takes in the request's new tokens; sets `stop_text` when one is reached."""
        if self.finish_reason is not None:
            return
        request = self.request
        new = request.token_ids[request.num_prompt + len(self.token_ids) :]
        self.token_ids += new
        text = self._decode(new, self._decoder) if self._decoder is not None else ""
        self.text += text
        if self.stop_text is not None:
            self.finish_reason = "stop"
        elif request.is_finished:
            self.finish_reason = request.finish_reason
        if self._interval is not None and (text or new or self.is_finished):
            self._send(text, self._interval)

    def _decode(self, new: Sequence[int], decoder: StreamDecoder) -> str:
        """Text that is certain with these tokens, up to a stop text."""
        request, params = self.request, self.request.params
        ended = request.is_finished
        # The token that stopped generation is no part of the text.
        if ended and request.finish_reason == "stop" and not params.include_stop_str_in_output:
            new = new[:-1]
        text = self._held + decoder.push(new)
        self._held = ""
        if ended:
            text += decoder.flush()
        # Stop texts, like stop tokens, count only after min_tokens.
        if params.stop and len(self.token_ids) > params.min_tokens:
            text = self._cut_at_stop(text, params.stop)
            if self.stop_text is None and not ended:
                certain = len(text) - _held_back(text, params.stop)
                text, self._held = text[:certain], text[certain:]
        return text

    def _send(self, text: str, interval: int) -> None:
        """Gives a stream what is there, where it is due: the first token, then by intervals."""
        self._unsent_text += text
        passed = len(self.token_ids) // interval > self._num_sent // interval
        if not (passed or self._num_sent == 0 or self.is_finished):
            return
        self.deltas.append(
            Delta(
                index=self.index,
                text=self._unsent_text,
                token_ids=tuple(self.token_ids[self._num_sent :]),
                finish_reason=self.finish_reason,
            )
        )
        self._unsent_text, self._num_sent = "", len(self.token_ids)

    def describe(self, entries: Sequence[TokenLogprobs]) -> CompletionOutput:
        """What the user gets; `entries` are the engine's log-probabilities of its tokens."""
        logprobs = total = None
        if self.request.params.logprobs is not None:
            # The tokens that were in flight when a stop text came are no part of it.
            entries = entries[: len(self.token_ids)]
            logprobs = tuple(describe_logprobs(entry, self._tokenizer) for entry in entries)
            total = sum(entry.logprob for entry in entries)
        return CompletionOutput(
            index=self.index,
            text=self.text,
            token_ids=tuple(self.token_ids),
            logprobs=logprobs,
            cumulative_logprob=total,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_text or self.request.stop_reason,
        )

    def _cut_at_stop(self, text: str, stops: Sequence[str]) -> str:
        found = [(text.find(stop), stop) for stop in stops if stop in text]
        if not found:
            return text
        place, self.stop_text = min(found)
        kept = len(self.stop_text) if self.request.params.include_stop_str_in_output else 0
        return text[: place + kept]


def _held_back(text: str, stops: Sequence[str]) -> int:
    """Length of the text's end that a stop text may begin with."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest


def describe_logprobs(entry: TokenLogprobs, tokenizer: Tokenizer | None) -> PositionLogprobs:
    """Maps token ids to log-probabilities: the token at the position, then the likeliest."""
    listed = [(entry.token, entry.logprob, entry.rank)]
    listed += [(token, logprob, rank) for rank, (token, logprob) in enumerate(entry.top, 1)]
    described: dict[int, Logprob] = {}
    for token, logprob, rank in listed:
        text = tokenizer.token_text(token) if tokenizer else None
        described.setdefault(token, Logprob(logprob=logprob, rank=rank, decoded_token=text))
    return described
