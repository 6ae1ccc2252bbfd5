"""A request as the engine sees it: its tokens, and how far they are computed."""

import enum
from dataclasses import dataclass, field
from typing import Literal

from llmjax.config import SamplingParams

FinishReason = Literal["stop", "length", "abort"]


class RequestStatus(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, kw_only=True)
class Request:
    """One sequence to continue. Everything after `stop_ids` is the scheduler's to change."""

    id: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    """Most tokens to generate; the scheduler lowers it to what the sequence length leaves."""
    stop_ids: frozenset[int]
    """Ids that end the request: end-of-sequence (unless ignored) and `params.stop_token_ids`."""
    seed: int = 0
    """32 bits that the noise of its samples is drawn from."""

    num_prompt: int = field(init=False)
    token_ids: list[int] = field(init=False)
    """The prompt and every sampled token that the host has read."""
    status: RequestStatus = field(default=RequestStatus.WAITING, init=False)
    finish_reason: FinishReason | None = field(default=None, init=False)
    stop_reason: int | str | None = field(default=None, init=False)
    """The stop id or stop string that ended the request; None for end-of-sequence."""

    arrival: int = field(default=-1, init=False)
    """Place in the order in which requests came."""
    rank: int | None = field(default=None, init=False)
    """Batch rank that holds the pages."""
    slot: int | None = field(default=None, init=False)
    """Row of the rank's per-request state on the device."""
    pages: list[int] = field(default_factory=list, init=False)
    num_computed: int = field(default=0, init=False)
    """Positions whose keys and values are dispatched."""
    num_cached: int = field(default=0, init=False)
    """Tokens found in the prefix cache at the first admission."""
    in_flight: int = field(default=0, init=False)
    """Steps dispatched and not yet retired."""
    pending_samples: int = field(default=0, init=False)
    """Sampled tokens that only the device knows."""
    ready_at: int = field(default=0, init=False)
    """The first tick in which the newest sampled token can be fed."""
    num_preemptions: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.num_prompt = len(self.prompt_ids)
        self.token_ids = list(self.prompt_ids)

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt :]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_outputs(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        """Tokens still to be fed, counting those that only the device knows."""
        return len(self.token_ids) + self.pending_samples - self.num_computed

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    @property
    def wants_tokens(self) -> bool:
        """Whether a sample may be added to those read and those still on the device."""
        num_outputs = len(self.token_ids) - self.num_prompt + self.pending_samples
        return num_outputs < self.max_tokens and self.status is not RequestStatus.FINISHED

    def append(self, token: int) -> None:
        """Add a sampled token, and note whether it ends the request."""
        self.token_ids.append(token)
        num_outputs = self.num_outputs
        # The sampler bans stop ids for the first min_tokens tokens, but a processor may force one.
        if token in self.stop_ids and num_outputs > self.params.min_tokens:
            named = token in self.params.stop_token_ids
            self.finish("stop", token if named else None)
        elif num_outputs >= self.max_tokens:
            self.finish("length", None)

    def finish(self, reason: FinishReason, stop_reason: int | str | None) -> None:
        self.status = RequestStatus.FINISHED
        self.finish_reason = reason
        self.stop_reason = stop_reason
