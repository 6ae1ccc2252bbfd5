"""The part of a step that one batch rank computes, and its share of the prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from llmjax.engine.rank import Rank
from llmjax.engine.request import Request
from llmjax.engine.schedule import SchedulerConfig, Work


@dataclass(eq=False, kw_only=True)
class RankStep:
    """The works of one rank, while a step is put together, and what it may still take."""

    rank: Rank
    token_budget: int
    prefill_budget: int
    prefill_tokens: int
    """Prompt tokens that the step may still take."""
    next_token_at: int
    """The tick in which tokens that this step samples can be fed."""
    decodes: list[Work] = field(default_factory=list)
    prefills: list[Work] = field(default_factory=list)

    @property
    def takes_prefill(self) -> bool:
        """Whether a prompt, or a part of one, still fits."""
        return bool(self.token_budget and self.prefill_budget and self.prefill_tokens)

    @property
    def num_prefilled(self) -> int:
        """Prompt tokens that the step feeds."""
        return sum(work.count for work in self.prefills)

    def decode(self, request: Request) -> None:
        """Schedule the one token that is not computed yet, the last of the request's pages."""
        start = request.num_computed
        on_device = start >= len(request.token_ids)
        self.decodes.append(Work(request, start, 1, True, tuple(request.pages), on_device))
        self.token_budget -= 1
        request.ready_at = self.next_token_at
        request.num_computed += 1
        request.in_flight += 1
        request.pending_samples += 1

    def add(self, request: Request) -> None:
        """Schedule as many of the request's next tokens as the budget allows."""
        start = request.num_computed
        count = min(request.num_uncomputed, self.token_budget, self.prefill_tokens)
        num_pages = self.rank.blocks.pages_for(start + count)
        work = Work(
            request=request,
            start=start,
            count=count,
            samples=count == request.num_uncomputed,
            pages=tuple(request.pages[:num_pages]),
            token_on_device=start >= request.num_tokens,
        )
        if work.is_decode:
            self.decodes.append(work)
        else:
            self.prefills.append(work)
            self.prefill_budget -= 1
            self.prefill_tokens -= count
        self.token_budget -= count
        if work.samples:
            request.ready_at = self.next_token_at
        request.num_computed += count
        request.in_flight += 1
        request.pending_samples += work.samples


def share_of_prefill(
    ranks: Sequence[Rank], waiting: Sequence[Request], config: SchedulerConfig
) -> int:
    """Prompt tokens that a rank may feed in this tick: the same for each stage of a pipeline.

    All stages of a tick are padded to the longest prefill among them. So the tokens that the
    other stages carry and those that wait are dealt out equally, up to the next size for which
    a step is compiled: below it nothing is saved.
    """
    if config.num_stages == 1 or not config.enable_chunked_prefill:
        return config.max_num_tokens
    num_slots = sum(len(rank.free_slots) for rank in ranks)
    queued = [request.num_tokens for request in waiting[:num_slots]]
    # Ranks take prompts in turn, and none takes less than a whole one.
    per_rank = max(-(-sum(queued) // config.num_ranks), max(queued, default=0))
    prefill = per_rank + max(rank.num_prefill_tokens for rank in ranks)
    share = max(-(-prefill // config.num_stages), 1)
    if not config.prefill_sizes:
        return share
    return next((size for size in config.prefill_sizes if size >= share), config.max_num_tokens)
