"""One batch rank as the scheduler sees it: pages, slots, and the requests that hold them."""

import bisect
from collections import deque
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Self

from llmjax.engine.block_manager import BlockManager
from llmjax.engine.request import Request, RequestStatus
from llmjax.engine.schedule import SchedulerConfig


@dataclass(eq=False, kw_only=True)
class Rank:
    """What one batch rank holds."""

    index: int
    blocks: BlockManager
    free_slots: list[int]
    recent_prefills: deque[int]
    """Prompt tokens that the other stages of a pipeline carry, fed in the ticks before."""
    running: list[Request] = field(default_factory=list)
    """Ordered by arrival."""
    draining: list[Request] = field(default_factory=list)
    """Finished or preempted, but still in flight: their pages and slots cannot be reused yet."""

    @classmethod
    def empty(cls, index: int, config: SchedulerConfig) -> Self:
        """A rank that holds no request."""
        return cls(
            index=index,
            blocks=BlockManager(
                num_pages=config.num_pages,
                page_size=config.page_size,
                enable_block_reuse=config.enable_block_reuse,
            ),
            free_slots=list(range(config.max_batch_size)),
            recent_prefills=deque(maxlen=config.num_stages - 1),
        )

    @property
    def num_tokens(self) -> int:
        return sum(request.num_tokens for request in self.running)

    @property
    def num_prefill_tokens(self) -> int:
        """Prompt tokens in the pipeline and in prompts under way."""
        uncomputed = (request.num_uncomputed for request in self.running)
        return sum(self.recent_prefills) + sum(count for count in uncomputed if count > 1)

    def hold(self, request: Request, pages: list[int], *, num_cached: int) -> None:
        """Let a request run on these pages, which have its first `num_cached` tokens already."""
        request.status = RequestStatus.RUNNING
        request.rank = self.index
        request.slot = self.free_slots.pop(0)
        request.pages = pages
        request.num_computed = num_cached
        bisect.insort(self.running, request, key=attrgetter("arrival"))

    def drop(self, request: Request) -> None:
        """End a request's run; what it holds is free once its steps in flight have retired."""
        self.running.remove(request)
        if request.in_flight:
            self.draining.append(request)
        else:
            self._release(request)

    def release_drained(self, request: Request) -> None:
        """Free what a dropped request still holds, if its last step has retired."""
        if request.in_flight == 0 and request in self.draining:
            self.draining.remove(request)
            self._release(request)

    def _release(self, request: Request) -> None:
        assert request.slot is not None
        self.blocks.release(request.pages)
        bisect.insort(self.free_slots, request.slot)
        request.pages = []
        request.num_computed = 0
        request.rank = request.slot = None
