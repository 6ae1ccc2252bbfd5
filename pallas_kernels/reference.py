"""What each operation means, in plain XLA: the kernels are tested against these functions."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.activation import ACTIVATIONS
from pallas_kernels.groups import group_begin
from pallas_kernels.softmax import KV_BLOCK, QUERY_BLOCK, Softmax, add_keys, empty_softmax, sees

ROW_BLOCK = 64
"""Rows of one group that are multiplied together."""
BYTES_AT_ONCE = 256 * 1024**2
"""Matrices that are copied for products at the same time, where that is not one by one."""


def paged_attention(
    q: Float[Array, "tokens heads d"],
    k_pages: Float[Array, "layers pages page kv_heads d"],
    v_pages: Float[Array, "layers pages page kv_heads dv"] | None,
    layer: Int[Array, ""] | int,
    page_table: Int[Array, "rows width"],
    query_start: Int[Array, "rows_plus_one"],
    lengths: Int[Array, "rows"],
    *,
    scale: float,
    max_query_length: int,
    window: Int[Array, ""] | int | None = None,
    chunk: Int[Array, ""] | int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "heads"] | None = None,
    k_scale: Float[Array, ""] | float | None = None,
    v_scale: Float[Array, ""] | float | None = None,
    value_dim: int | None = None,
    last_position: Int[Array, "rows"] | None = None,
    page_stride: int = 1,
    first_page: Int[Array, ""] | int = 0,
) -> tuple[Float[Array, "tokens heads dv"], Float[Array, "tokens heads"]]:
    """Causal attention of ragged rows of queries over a paged cache, and its log-sum-exp.

    Row r owns the queries `q[query_start[r]:query_start[r + 1]]`; the last of them stands at
    position `lengths[r] - 1`, and the keys of all of them are in the pages already. A `window` of w
    sees the last w positions, a `chunk` of c those since the last multiple of c; None, 0 or less is
    all. Without `v_pages`, values are the first `value_dim` features of the keys. Queries outside
    every row give 0, and -inf as log-sum-exp. What is in the pages, float8 perhaps, is multiplied
    with `k_scale` and `v_scale`; None is 1. Values that are features of keys have the scale of the
    keys.

    With a `page_stride` of s the pages of a row are every s-th of its sequence, from page
    `first_page` on, `lengths` counts the keys that are here, and the last query of each row stands
    at `last_position`.

    The softmax is taken online over blocks of `KV_BLOCK` positions, as many as the longest row
    needs, so that short rows never pay for the width of the page table.
    """
    tokens, heads, d = q.shape
    page, kv_heads = k_pages.shape[2:4]
    dv = value_dim or k_pages.shape[4] if v_pages is None else v_pages.shape[4]
    group = heads // kv_heads
    if v_pages is None:
        v_scale = k_scale
    key_scale = scale if k_scale is None else scale * k_scale
    last = lengths - 1 if last_position is None else last_position
    row, token, position = _query_blocks(query_start, lengths, last, tokens, max_query_length)
    queries = q.at[token].get(mode="fill", fill_value=0)
    queries = queries.reshape(*token.shape, kv_heads, group, d)
    pages_per_round = max(1, min(KV_BLOCK // page, page_table.shape[1]))
    span = pages_per_round * page
    row_pages, row_length = page_table[row], lengths[row]

    def read(pages: Array, index: Array) -> Array:
        column = index * pages_per_round + jnp.arange(pages_per_round)
        ids = row_pages.at[:, column].get(mode="clip")
        held = pages[layer, ids].reshape(len(row), span, kv_heads, -1)
        return held.astype(q.dtype) if pages.dtype.itemsize == 1 else held

    def one_round(index: Array, carry: Softmax) -> Softmax:
        here = index * span + jnp.arange(span)
        cached = here < row_length[:, None]
        key_position = (here // page * page_stride + first_page) * page + here % page
        keys = read(k_pages, index)
        # Unwritten positions may hold anything, NaN included, which a zero weight would keep.
        values = keys[..., :dv] if v_pages is None else read(v_pages, index)
        values = jnp.where(cached[:, :, None, None], values, 0)
        visible = sees(position[..., None], key_position, window=window, chunk=chunk)
        visible &= cached[:, None]
        return add_keys(carry, queries, keys, values, visible, scale=key_scale, soft_cap=soft_cap)

    rounds = (jnp.max(lengths, initial=0) + span - 1) // span
    start = empty_softmax((*token.shape, kv_heads, group), dv)
    highest, total, sums = lax.fori_loop(0, rounds, one_round, start)
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(kv_heads, group)
        shift = jnp.maximum(highest, sink)
        keep = jnp.exp(highest - shift)
        highest, sums = shift, sums * keep[..., None]
        total = total * keep + jnp.exp(sink - shift)
    out = sums / jnp.where(total == 0, 1.0, total)[..., None]
    if v_scale is not None:
        out *= v_scale
    lse = highest + jnp.log(total)
    out = out.astype(q.dtype).reshape(*token.shape, heads, dv)
    return (
        jnp.zeros((tokens, heads, dv), q.dtype).at[token].set(out, mode="drop"),
        jnp.full((tokens, heads), -jnp.inf)
        .at[token]
        .set(lse.reshape(*token.shape, heads), mode="drop"),
    )


def store_rows(
    pages: Float[Array, "layers pages page kv_heads d"],
    layer: Int[Array, ""] | int,
    rows: Float[Array, "tokens kv_heads d"],
    slots: Int[Array, "tokens"],
) -> Float[Array, "layers pages page kv_heads d"]:
    """Stores a row for each token at slots = page * page_size + offset, -1 nowhere."""
    count, page = pages.shape[1:3]
    index = jnp.where(slots >= 0, slots // page, count)
    return pages.at[layer, index, slots % page].set(rows.astype(pages.dtype), mode="drop")


def grouped_gemm(
    lhs: Float[Array, "rows k"],
    rhs: Float[Array, "layers groups k n"],
    group_sizes: Int[Array, "all_groups"],
    layer: Int[Array, ""] | int,
    *,
    bias: Float[Array, "layers groups n"] | None = None,
    activation: str | None = None,
    first_group: Int[Array, ""] | int = 0,
    row_alignment: int = 1,
) -> Float[Array, "rows out"]:
    """Multiplies each group's rows with that group's matrix; rows of absent groups give 0.

    Group g owns the `group_sizes[g]` rows from `groups.group_begin` on. `rhs` and `bias` hold the
    groups from `first_group` on. Sums are float32. With an `activation`, the first half of
    the n columns is the gate and the second half what it gates, and n / 2 columns come out.

    The work follows the rows: one product per block of `ROW_BLOCK` rows of one group.
    """

    def multiply(row: Array, group: Array) -> Array:
        rows = lhs.at[row].get(mode="fill", fill_value=0)
        return jnp.dot(rows, rhs[layer, group], preferred_element_type=jnp.float32)

    return _for_each_group(
        multiply, group_sizes, layer, bias, activation, first_group, row_alignment,
        groups=rhs.shape[1], matrix_bytes=rhs.shape[2] * rhs.shape[3] * rhs.dtype.itemsize,
        out=jnp.zeros((lhs.shape[0], rhs.shape[3]), lhs.dtype),
    )  # fmt: skip


def quantized_grouped_gemm(
    lhs: Float[Array, "rows k"],
    lhs_scales: Float[Array, "k_blocks rows"],
    rhs: Float[Array, "layers groups n k"],
    rhs_scales: Float[Array, "layers groups n_blocks k_blocks"],
    group_sizes: Int[Array, "all_groups"],
    layer: Int[Array, ""] | int,
    *,
    bias: Float[Array, "layers groups n"] | None = None,
    activation: str | None = None,
    first_group: Int[Array, ""] | int = 0,
    row_alignment: int = 1,
) -> Float[Array, "rows out"]:
    """`grouped_gemm` of scaled operands, in bfloat16: scales multiply blocks of rows and matrices.

    Matrices are transposed, and their scales stand for squares.
    """
    n, k = rhs.shape[2:]
    block = k // rhs_scales.shape[3]

    def multiply(row: Array, group: Array) -> Array:
        rows = lhs.at[row].get(mode="fill", fill_value=0).astype(jnp.float32)
        row_scales = lhs_scales.at[:, row].get(mode="fill", fill_value=0)
        rows *= jnp.repeat(row_scales.T, block, axis=1)
        scales = jnp.repeat(rhs_scales[layer, group], n // rhs_scales.shape[2], axis=0)
        weights = rhs[layer, group].astype(jnp.float32) * jnp.repeat(scales, block, axis=1)
        return jnp.dot(rows, weights.T)

    return _for_each_group(
        multiply, group_sizes, layer, bias, activation, first_group, row_alignment,
        groups=rhs.shape[1], matrix_bytes=4 * n * k,
        out=jnp.zeros((lhs.shape[0], n), jnp.bfloat16),
    )  # fmt: skip


def _for_each_group(
    multiply: Callable[[Array, Array], Array], group_sizes: Array, layer: Array | int,
    bias: Array | None, activation: str | None, first_group: Array | int, row_alignment: int, *,
    groups: int, matrix_bytes: int, out: Array,
) -> Array:  # fmt: skip
    """Fills the rows of `out` with float32 products `multiply(rows, group)`, finished.

    A CPU takes one block after the other. On other devices a loop whose length they would have to
    tell the host costs more than the products: they take several at once, of as many as there may
    be, and copy the matrices of those.
    """
    rows = out.shape[0]
    block = min(rows, ROW_BLOCK)
    before = jnp.cumsum(group_sizes) - group_sizes
    starts = group_begin(before, jnp.arange(before.size, dtype=before.dtype), row_alignment)
    sizes = lax.dynamic_slice_in_dim(group_sizes, first_group, groups)
    starts = lax.dynamic_slice_in_dim(starts, first_group, groups)
    blocks = -(-sizes // block)
    block_ends = jnp.cumsum(blocks)

    def one_block(index: Array) -> tuple[Array, Array]:
        group = jnp.searchsorted(block_ends, index, side="right")
        offset = (index - (block_ends - blocks)[group]) * block + jnp.arange(block)
        real = (index < block_ends[-1]) & (offset < sizes[group])
        row = jnp.where(real, starts[group] + offset, rows)
        product = multiply(row, group)
        if bias is not None:
            product += bias[layer, group].astype(jnp.float32)
        if activation is not None:
            product = ACTIVATIONS[activation](*jnp.split(product, 2, axis=1))
        return row, product.astype(out.dtype)

    def one_by_one(out: Array) -> Array:
        def fill(index: Array, out: Array) -> Array:
            row, product = one_block(index)
            return out.at[row].set(product, mode="drop")

        return lax.fori_loop(0, block_ends[-1], fill, out)

    def several_at_once(out: Array) -> Array:
        most = rows // block + min(groups, rows)
        count = max(1, min(most, BYTES_AT_ONCE // matrix_bytes))

        def fill(index: Array, out: Array) -> Array:
            row, product = jax.vmap(one_block)(index * count + jnp.arange(count))
            return out.at[row].set(product, mode="drop")

        return lax.fori_loop(0, -(-most // count), fill, out)

    if activation is not None:
        out = out[:, : out.shape[1] // 2]
    return lax.platform_dependent(out, cpu=one_by_one, default=several_at_once)


def _query_blocks(
    query_start: Array, lengths: Array, last: Array, tokens: int, max_query_length: int
) -> tuple[Array, Array, Array]:
    """Cuts ragged rows into blocks: row [blocks], token and position [blocks, block].

    Padding carries the token `tokens`, one past the last, and the position -1.
    """
    rows = lengths.shape[0]
    block = min(max_query_length, QUERY_BLOCK)
    # Each row ends in at most one block that is not full.
    blocks = rows if max_query_length == 1 else tokens // block + rows
    count = jnp.where(lengths > 0, query_start[1:] - query_start[:-1], 0)
    per_row = count if max_query_length == 1 else -(-count // block)
    ends = jnp.cumsum(per_row)
    index = jnp.arange(blocks)
    row = jnp.minimum(jnp.searchsorted(ends, index, side="right"), rows - 1)
    offset = ((index - (ends - per_row)[row]) * block)[:, None] + jnp.arange(block)
    real = (index < ends[-1])[:, None] & (offset < count[row][:, None])
    token = jnp.where(real, query_start[row][:, None] + offset, tokens)
    position = jnp.where(real, (last + 1 - count)[row][:, None] + offset, -1)
    return row, token, position
