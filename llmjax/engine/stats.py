"""What an engine has done, in numbers."""

from dataclasses import dataclass, field
from math import inf

from llmjax.engine.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Tick:
    """One step as it ran: each pipeline stage on its own micro-batch, the first stage first."""

    stages: tuple[Schedule | None, ...]
    """What each stage computed; None where it had nothing to do."""
    tokens: tuple[int, ...]
    """Tokens that each stage computed on all batch ranks; padding does not count."""
    room: int
    """Tokens for which each stage was compiled, on all batch ranks."""


@dataclass(kw_only=True)
class EngineStats:
    """Counts since the engine was built."""

    steps: int = 0
    """Steps dispatched."""
    overlapped_steps: int = 0
    """Steps dispatched before the tokens of the step before were read."""
    chunked_prefills: int = 0
    """Prefill chunks that did not reach the end of their prompt."""
    padded_tokens: int = 0
    """Tokens computed for nothing at the first stage, because a bucket was not full."""
    tokens: int = 0
    """Tokens fed, prefill and decode together."""
    compilations: int = 0
    """Programs compiled after warm-up; anything but 0 is a fault."""
    ticks: int = 0
    """Steps read."""
    sampled_tokens: int = 0
    """Tokens that requests got."""
    stage_tokens: list[int] = field(default_factory=list)
    """Tokens that each pipeline stage computed in the steps read."""
    stage_room: int = 0
    """Tokens that each stage could have computed in them."""

    @property
    def stage_occupancy(self) -> tuple[float, ...]:
        """Part of its work that each stage did for a request; the rest was padding or waiting."""
        return tuple(tokens / self.stage_room for tokens in self.stage_tokens)

    @property
    def ticks_per_token(self) -> float:
        """Steps for a token of any request, such as stages / requests while all decode."""
        return self.ticks / self.sampled_tokens if self.sampled_tokens else inf

    def count_tick(self, tick: Tick) -> None:
        """Adds what the stages computed."""
        self.ticks += 1
        self.stage_room += tick.room
        before = self.stage_tokens or [0] * len(tick.tokens)
        self.stage_tokens = [sum(pair) for pair in zip(before, tick.tokens, strict=True)]
