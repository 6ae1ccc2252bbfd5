"""Attention whose tokens and cache are split over context ranks; runs inside an island."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from llmjax.layers.kv_cache import Placement
from llmjax.parallel.collectives import Axes, axis_index, axis_size
from llmjax.parallel.context import (
    Attended,
    PageDeal,
    TokenDeal,
    add_sinks,
    collect,
    merge,
    merge_ranks,
    pass_on,
)
from pallas_kernels import NO_ROW, Places, block_attention, paged_attention, store_rows

CONTEXT_TILE = 256
"""Tokens of a rank whose queries are collected at once, to read what is cached already."""

type Pages = tuple[Array, ...]


class ContextAttention:
    """One layer's attention, written once for a rank of a context group.

    New keys are all stored before any are read: a cache that is read first gets copied.
    """

    def __init__(
        self,
        pages: Pages,
        layer: Int[Array, ""],
        placement: Placement,
        options: dict[str, Any],
        *,
        axes: Axes,
    ):
        """`options` are those of the attention kernels, but for sinks; `pages` lead to the rest."""
        self.axes, self.layer, self.placement, self.options = axes, layer, placement, options
        self.pages = pages
        self.rank, ranks = axis_index(axes), axis_size(axes)
        self.deal = PageDeal(pages[0].shape[2], ranks)
        prefill_rows = placement.prefill_start.shape[1] - 1
        decodes = placement.lengths.shape[1] - prefill_rows
        self.tokens = TokenDeal(decodes, placement.all_slots.shape[1] - decodes, ranks)

    def __call__(
        self,
        q: Float[Array, "tokens heads d"],
        new: Sequence[Float[Array, "tokens kv_heads _"]],
        sinks: Float[Array, " heads"] | None,
    ) -> tuple[Float[Array, "tokens heads dv"], Pages]:
        """Stores the new keys and values, and attends to all that each token sees."""
        own_decodes, prefilled = self.tokens.own_decodes, None
        if self.tokens.prefills:
            prefilled = self._pass_round(q[own_decodes:], [rows[own_decodes:] for rows in new])
        attended = self._decode(q[:own_decodes], [rows[:own_decodes] for rows in new])
        if prefilled is not None:
            prefilled = self._add_context(q[own_decodes:], prefilled)
            attended = jax.tree.map(_join, attended, prefilled)
        out = attended.out if sinks is None else add_sinks(attended, sinks)
        return out.astype(q.dtype), self.pages

    def _decode(self, q: Array, new: Sequence[Array]) -> Attended:
        """Every rank reads its own pages for all decode tokens."""
        # One collective for queries, keys and values.
        flat = jnp.concatenate([x.reshape(len(x), -1) for x in (q, *new)], axis=1)
        flat, count, arrays = collect(flat, self.axes), self.tokens.decodes, []
        for like in (q, *new):
            width = like.shape[1] * like.shape[2]
            arrays.append(flat[:, :width].reshape(count, *like.shape[1:]))
            flat = flat[:, width:]
        self._store(arrays[1:], np.arange(count))
        last = self.placement.lengths[0, :count] - 1
        rows = slice(0, count)
        return merge_ranks(
            self._read_pages(arrays[0], rows, jnp.arange(count + 1), last + 1, last, 1), self.axes
        )

    def _pass_round(self, q: Array, new: Sequence[Array]) -> Attended:
        """The ring: this rank's queries meet each rank's new keys, and this rank keeps its own."""
        ranks, widths = self.tokens.ranks, np.cumsum([rows.shape[-1] for rows in new])
        block, attended = jnp.concatenate(new, axis=-1), None
        for hop in range(ranks):
            source = (self.rank - hop) % ranks
            # Sent on before it is used, so that it travels meanwhile.
            following = pass_on(block, self.axes) if hop < ranks - 1 else block
            arrays = jnp.split(block, widths[:-1], axis=-1)
            self._store(arrays, self._prefills_of(source))
            part = Attended(
                *block_attention(
                    q,
                    arrays[0],
                    arrays[1] if len(arrays) > 1 else None,
                    self._places(self.rank),
                    self._places(source),
                    **self.options,
                )
            )
            attended = part if attended is None else _merge_two(attended, part)
            block = following
        assert attended is not None
        return attended

    def _add_context(self, q: Array, attended: Attended) -> Attended:
        """Adds what the prefills' rows have cached already, if any row has."""
        tile = min(len(q), CONTEXT_TILE)
        tiles = -(-len(q) // tile)

        def read_all() -> Attended:
            padded = jnp.pad(q, ((0, tiles * tile - len(q)), (0, 0), (0, 0)))
            out, lse = lax.map(
                self._read_context, (jnp.arange(tiles), padded.reshape(tiles, tile, *q.shape[1:]))
            )
            found = Attended(*(x.reshape(-1, *x.shape[2:])[: len(q)] for x in (out, lse)))
            return _merge_two(attended, found)

        def skip() -> Attended:
            return attended

        return lax.cond(self.placement.has_context[0], read_all, skip)

    def _read_context(self, tile: tuple[Array, Array]) -> Attended:
        """Every rank reads its own pages for one tile of each rank's queries."""
        index, q = tile
        count = len(q) * self.tokens.ranks
        begin, decodes = index * count, self.tokens.decodes
        starts, lengths = self.placement.prefill_start[0], self.placement.lengths[0, decodes:]
        cached = lengths - (starts[1:] - starts[:-1])
        stops = jnp.minimum(starts[1:], begin + count)
        return merge_ranks(
            self._read_pages(
                collect(q, self.axes),
                slice(decodes, None),
                jnp.clip(starts - begin, 0, count),
                cached,
                lengths - 1 - (starts[1:] - stops),
                count,
            ),
            self.axes,
        )

    def _read_pages(
        self,
        q: Array,
        rows: slice,
        starts: Array,
        cached: Array,
        last_position: Array,
        longest: int,
    ) -> Attended:
        """Attends to the first `cached` positions of each row, as far as they are on this rank."""
        out, lse = paged_attention(
            q,
            self.pages[0],
            self.pages[1] if len(self.pages) > 1 else None,
            self.layer,
            self.placement.page_table[0, rows],
            starts,
            self.deal.count(cached, self.rank),
            max_query_length=longest,
            last_position=last_position,
            page_stride=self.tokens.ranks,
            first_page=self.rank,
            **self.options,
        )
        return Attended(out, lse)

    def _store(self, new: Sequence[Array], tokens: Array | np.ndarray) -> None:
        """Stores the keys and values of these tokens of the batch rank that are this rank's."""
        slots = self.deal.own(self.placement.all_slots[0, tokens], self.rank)
        self.pages = store_rows(self.pages, self.layer, new, slots)

    def _prefills_of(self, rank: Array | int) -> Array:
        return jnp.asarray(self.tokens.held[:, self.tokens.own_decodes :])[rank]

    def _places(self, rank: Array | int) -> Places:
        """Rows and positions of a rank's prefill tokens."""
        tokens = self._prefills_of(rank)
        starts = self.placement.prefill_start[0]
        row = jnp.searchsorted(starts[1:], tokens - self.tokens.decodes, side="right")
        is_real = self.placement.all_slots[0, tokens] >= 0
        return Places(jnp.where(is_real, row, NO_ROW), self.placement.all_positions[0, tokens])


def _merge_two(first: Attended, second: Attended) -> Attended:
    return merge(jnp.stack([first.out, second.out]), jnp.stack([first.lse, second.lse]))


def _join(first: Array, second: Array) -> Array:
    return jnp.concatenate([first, second])
