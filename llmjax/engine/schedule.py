"""What a scheduler is bound by, and what it says: limits, works and schedules."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from llmjax.config import ConfigError
from llmjax.engine.request import Request


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of a step and of the memory behind it; all but `num_ranks` are for one batch rank."""

    num_ranks: int
    """Batch ranks, each with its own pages and slots."""
    max_batch_size: int
    """Running requests."""
    max_num_tokens: int
    """Tokens in a step."""
    max_prefill_requests: int
    """Prefill rows in a step."""
    page_size: int
    """Positions in a page."""
    num_pages: int
    """Pages of the KV cache."""
    max_seq_len: int
    """Prompt and generated tokens of a request."""
    num_stages: int = 1
    """Pipeline stages: steps after which a sampled token is there to be fed."""
    prefill_sizes: tuple[int, ...] = ()
    """Prefill tokens for which steps are compiled, rising; empty: any number."""
    enable_block_reuse: bool = True
    """Reuse the pages of a known prefix."""
    enable_chunked_prefill: bool = True
    """Spread a prompt over several steps where the token budget asks for it."""
    attention_dp_balance: bool = False
    """Let new requests start where each rank has one, and spread a step's prompts over ranks."""
    attention_dp_timeout_iters: int = 50
    """Steps after which a new request no longer waits for those of other ranks."""
    attention_dp_batching_wait_iters: int = 10
    """Further steps in which new requests of all ranks gather."""

    def __post_init__(self) -> None:
        if self.max_num_tokens < self.max_batch_size:
            raise ConfigError(
                f"max_num_tokens={self.max_num_tokens} must be at least "
                f"max_batch_size={self.max_batch_size}, so that every running request can take "
                f"part in a step. Raise the first or lower the second."
            )
        if not self.enable_chunked_prefill and self.max_num_tokens < self.max_seq_len:
            raise ConfigError(
                f"without chunked prefill max_num_tokens={self.max_num_tokens} must hold a whole "
                f"prompt: use at least max_seq_len={self.max_seq_len}, or set "
                f"enable_chunked_prefill=True."
            )

    @property
    def micro_batch_size(self) -> int:
        """Most requests that decode in a step: an equal share for each stage."""
        return -(-self.max_batch_size // self.num_stages)

    def check_fits(self, request: Request) -> None:
        """Raises ValueError for a request that could never finish."""
        num_prompt = len(request.prompt_ids)
        if num_prompt == 0 or request.max_tokens < 1:
            raise ValueError(
                f"request {request.id} has {num_prompt} prompt tokens and "
                f"max_tokens={request.max_tokens}: each must be at least 1"
            )
        if num_prompt >= self.max_seq_len:
            raise ValueError(
                f"the prompt has {num_prompt} tokens and max_seq_len={self.max_seq_len} counts "
                f"the generated ones too: use at most {self.max_seq_len - 1} prompt tokens"
            )
        # The last sampled token is never fed.
        num_fed = min(num_prompt + request.max_tokens, self.max_seq_len) - 1
        num_slots = self.num_pages * self.page_size
        if num_fed > num_slots:
            raise ValueError(
                f"the request may need the keys and values of {num_fed} tokens and a batch rank "
                f"has room for {num_slots} (num_pages={self.num_pages} * "
                f"page_size={self.page_size}): use a shorter prompt, "
                f"max_tokens <= {max(num_slots + 1 - num_prompt, 0)}, or more KV cache"
            )


class Work(NamedTuple):
    """The tokens that one request feeds in one step.

    A tuple, because a step makes one for each request: a frozen dataclass takes ten times as long.
    """

    request: Request
    start: int
    """Position of the first token."""
    count: int
    """Tokens, at positions start to start + count - 1."""
    samples: bool
    """Whether the successor of the last token is sampled."""
    pages: tuple[int, ...]
    """Pages of all positions up to the last token."""
    token_on_device: bool
    """Whether the host has not read the token at `start` yet."""

    @property
    def is_decode(self) -> bool:
        """Whether it is one token with a sampled successor: a generated one or a prompt's last."""
        return self.samples and self.count == 1


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One step: for each batch rank its decode works, then its prefill works."""

    index: int
    ranks: tuple[tuple[Work, ...], ...]
    admitted: tuple[Request, ...]
    """Requests that got a slot in this step, for the first time or after a preemption."""
    preempted: tuple[Request, ...]
    """Requests that lost their slot since the last step."""

    @cached_property
    def rows(self) -> tuple[tuple[list[Work], list[Work]], ...]:
        """The decode works and the prefill works of each batch rank."""
        return tuple(_split(works) for works in self.ranks)

    @cached_property
    def num_tokens(self) -> int:
        """Tokens that all batch ranks feed together."""
        return sum(work.count for works in self.ranks for work in works)


def _split(works: tuple[Work, ...]) -> tuple[list[Work], list[Work]]:
    decodes: list[Work] = []
    prefills: list[Work] = []
    for work in works:
        (decodes if work.is_decode else prefills).append(work)
    return decodes, prefills
