"""A schedule as one packed array of integers: the only host input of a step.

The array is `[ranks, numbers]`; each batch rank reads its own row. The same table of fields gives
the host its views to fill and the step its slices to read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any

import numpy as np
from jaxtyping import Int32

from llmjax.engine.request import Request
from llmjax.engine.schedule import Schedule, Work
from llmjax.layers.sampler import SampleRows

FLOAT_COLUMNS = frozenset(
    {
        "temperature",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    }
)
"""Fields of `SampleRows` whose integers are the bits of a float32."""
COLUMN = {name: index for index, name in enumerate(SampleRows._fields)}
"""Place of each sampling parameter in its row."""


@dataclass(frozen=True, kw_only=True, order=True)
class Bucket:
    """A shape for which a step is compiled; all sizes are those of one batch rank."""

    prefill_tokens: int
    """Tokens of prefill rows together."""
    decodes: int
    """Rows with one token."""
    prefill_rows: int
    """Rows with any number of tokens."""
    width: int
    """Blocks of a row."""

    @property
    def tokens(self) -> int:
        """Decode tokens, then prefill tokens."""
        return self.decodes + self.prefill_tokens

    @property
    def rows(self) -> int:
        """Decode rows, then prefill rows."""
        return self.decodes + self.prefill_rows

    @property
    def fields(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of everything that the host tells a step."""
        return {
            "ids": (self.tokens,),  # token ids
            "token_source": (self.decodes,),  # slot whose last token is read instead of ids; or -1
            "positions": (self.tokens,),  # position in the request
            "cache_slots": (self.tokens,),  # block * block_size + offset; or -1
            "targets": (self.prefill_tokens,),  # next token, where it is to be scored; or -1
            "page_table": (self.rows, self.width),  # blocks of each row
            "lengths": (self.rows,),  # cached tokens with this step's; 0 for an unused row
            "prefill_start": (self.prefill_rows + 1,),
            "sample_token": (self.rows,),  # token whose hidden state each row samples from
            "sampling": (self.rows, len(COLUMN)),
        }

    @property
    def num_numbers(self) -> int:
        """Length of a rank's packed row."""
        return sum(prod(shape) for shape in self.fields.values())


def split_fields(row: Any, bucket: Bucket) -> dict[str, Any]:
    """Views (NumPy) or slices (JAX) of one rank's packed row."""
    parts, start = {}, 0
    for name, shape in bucket.fields.items():
        parts[name] = row[start : start + prod(shape)].reshape(shape)
        start += prod(shape)
    return parts


def pack_schedule(
    schedule: Schedule,
    bucket: Bucket,
    *,
    page_size: int,
    max_batch_size: int,
    sampling_of: Callable[[Request], Int32[np.ndarray, " columns"]],
) -> Int32[np.ndarray, "ranks numbers"]:
    """Fills a packed row for each batch rank; `sampling_of` gives a request's constant columns."""
    packed = np.zeros((len(schedule.ranks), bucket.num_numbers), np.int32)
    for rank, (decodes, prefills) in enumerate(schedule.rows):
        parts, first_slot = split_fields(packed[rank], bucket), rank * max_batch_size
        for name in ("token_source", "cache_slots", "targets"):
            parts[name].fill(-1)
        if decodes:
            _pack_decodes(parts, decodes, page_size)
            _pack_sampling(parts["sampling"], decodes, first_slot, sampling_of)
        if prefills:
            _pack_prefills(parts, prefills, bucket, page_size)
            rows = parts["sampling"][bucket.decodes :]
            _pack_sampling(rows, prefills, first_slot, sampling_of)
    return packed


def _pack_decodes(parts: dict[str, Any], works: Sequence[Work], page_size: int) -> None:
    """All decode rows at once: a step may have hundreds, and writing one number takes as long."""
    count = len(works)
    starts = np.array([work.start for work in works], np.int32)
    last_pages = np.array([work.pages[-1] for work in works], np.int32)
    num_pages = np.array([len(work.pages) for work in works], np.int32)
    pages = np.fromiter(chain.from_iterable(work.pages for work in works), np.int32)
    table = parts["page_table"][:count]
    table[np.arange(table.shape[1]) < num_pages[:, None]] = pages
    parts["token_source"][:count] = [
        work.request.slot if work.token_on_device else -1 for work in works
    ]
    parts["ids"][:count] = [
        0 if work.token_on_device else work.request.token_ids[work.start] for work in works
    ]
    parts["positions"][:count] = starts
    parts["cache_slots"][:count] = last_pages * page_size + starts % page_size
    parts["lengths"][:count] = starts + 1
    parts["sample_token"][:count] = np.arange(count)


def _pack_prefills(
    parts: dict[str, Any], works: Sequence[Work], bucket: Bucket, page_size: int
) -> None:
    first = bucket.decodes
    for row, work in enumerate(works, bucket.decodes):
        stop, after = work.start + work.count, first + work.count
        positions, pages = np.arange(work.start, stop), np.array(work.pages)
        parts["ids"][first:after] = work.request.token_ids[work.start : stop]
        parts["positions"][first:after] = positions
        slots = pages[positions // page_size] * page_size + positions % page_size
        parts["cache_slots"][first:after] = slots
        parts["page_table"][row, : len(pages)] = pages
        parts["lengths"][row] = stop
        parts["sample_token"][row] = after - 1
        _pack_targets(parts["targets"], work, first - bucket.decodes)
        parts["prefill_start"][row - bucket.decodes + 1 :] = after - bucket.decodes
        first = after


def _pack_targets(targets: np.ndarray, work: Work, first: int) -> None:
    """Names the prompt's next tokens where their log-probabilities are wanted."""
    if work.request.params.prompt_logprobs is None:
        return
    following = work.request.prompt_ids[work.start + 1 : work.start + work.count + 1]
    targets[first : first + len(following)] = following


def _pack_sampling(
    columns: np.ndarray,
    works: Sequence[Work],
    first_slot: int,
    sampling_of: Callable[[Request], Int32[np.ndarray, " columns"]],
) -> None:
    """Says how each row that samples does so; the others stay invalid."""
    rows = columns[: len(works)]
    constant = np.concatenate([sampling_of(work.request) for work in works])
    rows[:] = constant.reshape(rows.shape)
    rows[:, COLUMN["valid"]] = [work.samples for work in works]
    rows[:, COLUMN["position"]] = [work.start + work.count for work in works]
    rows[:, COLUMN["slot"]] = [work.request.slot or 0 for work in works]
    rows[:, COLUMN["slot"]] += first_slot


def sampling_columns(request: Request, *, processors: int) -> Int32[np.ndarray, " columns"]:
    """What stays the same for a request in every step; floats as the bits of float32."""
    params = request.params
    values = {
        "uses_state": params.needs_state,
        "min_position": len(request.prompt_ids) + params.min_tokens,
        "seed": np.uint32(request.seed).view(np.int32),
        "top_k": params.top_k,
        "num_logprobs": -1 if params.logprobs is None else params.logprobs,
        "processors": processors,
    }
    for name in FLOAT_COLUMNS:
        values[name] = np.float32(getattr(params, name)).view(np.int32)
    columns = np.zeros(len(COLUMN), np.int32)
    for name, value in values.items():
        columns[COLUMN[name]] = value
    return columns
