"""When new requests may start, so that batch ranks prefill in the same steps.

A step lasts as long as its fullest rank: where one rank prefills and the others decode, they wait.
Source: `attention_dp_config` of TensorRT-LLM (enable_balance, timeout_iters, batching_wait_iters).
There a prompt under way is held back too; here it goes on, and others may join it.
"""

from collections.abc import Sequence


class PrefillAlignment:
    """Holds new requests back until each batch rank has one, but not for long.

    A rank that has nothing to decode is never kept waiting. Counts steps, reads no clock: all
    processes decide alike.
    """

    def __init__(self, *, timeout_iters: int, batching_wait_iters: int):
        self.timeout_iters, self.batching_wait_iters = timeout_iters, batching_wait_iters
        self._waited = 0
        self._gathered = 0

    def lets_in(self, *, decoding: Sequence[bool], prefilling: Sequence[bool]) -> bool:
        """Whether new requests may start in this step, given what each rank has to do.

        Args:
            decoding: whether the rank decodes in this step.
            prefilling: whether the rank has a prompt under way, or would get a new one.
        """
        if not any(prefilling):
            return True
        all_decode = all(decoding)
        if all(prefilling):
            self._waited = 0
            hold = all_decode and self._gathered < self.batching_wait_iters
            self._gathered = self._gathered + 1 if hold else 0
        else:
            self._waited += 1
            hold = all_decode and self._waited < self.timeout_iters
            self._waited = self._waited if hold else 0
        return not hold
