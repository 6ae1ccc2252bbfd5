"""Attention of ragged queries over a paged cache."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import backend
from jaxtyping import Array, Float, Int

from pallas_kernels import reference
from pallas_kernels.paged_attention.arguments import (
    check_heads,
    check_numbers,
    check_rows,
    check_stored,
)
from pallas_kernels.paged_attention.configs import decode_config, mla_config, prefill_config
from pallas_kernels.paged_attention.limits import first_visible, keys_before, pack_limits
from pallas_kernels.paged_attention.single_rows import split_rows
from pallas_kernels.picks import check_hopper, check_implementation, log_fallback, log_pick

__all__ = ["paged_attention", "store_rows"]

type Attended = tuple[Array, Array]
"""Outputs and log-sum-exps."""

# Kernels are imported where they are chosen: Mosaic takes two seconds, which a CPU need not wait.

IMPLEMENTATIONS = (
    "decode_sm90", "mla_decode_sm90", "prefill_sm90", "mla_prefill_sm90", "reference"
)  # fmt: skip


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
    implementation: str | None = None,
) -> tuple[Float[Array, "tokens heads dv"], Float[Array, "tokens heads"]]:
    """Causal attention of ragged rows of queries over a paged cache, and its log-sum-exp.

    Row r owns the queries `q[query_start[r]:query_start[r + 1]]`; the last of them stands at
    position `lengths[r] - 1`, and the keys of all of them are in the pages already. A `window` of w
    sees the last w positions, a `chunk` of c those since the last multiple of c; None, 0 or less is
    all. Queries outside every row give 0, and -inf as log-sum-exp. Without `v_pages`, values are
    the first `value_dim` features of the keys, as in multi-head latent attention. With
    `max_query_length=1` and as many queries as rows, row r owns query r. What is in the pages is
    multiplied with `k_scale` and `v_scale`, so that they may hold float8; None is 1. Values that
    are features of keys have the scale of the keys. No row has more than `max_query_length`
    queries; the others of a row would be left out if it is 1.

    Raises ValueError for operands that do not fit each other.

    With a `page_stride` of s the pages of a row are every s-th of its sequence, from page
    `first_page` on, `lengths` counts the keys that are here, and the last query of each row stands
    at `last_position`, which without it is `lengths - 1`.

    `implementation=None` takes the Hopper kernel for one query a row or for many where it can run,
    else the XLA reference. Naming one raises NotImplementedError for what it does not cover.
    """
    check_implementation(implementation, IMPLEMENTATIONS)
    check_heads(q, k_pages, v_pages, value_dim, sinks)
    check_rows(page_table, query_start, lengths)
    check_numbers(max_query_length, soft_cap)
    tokens, heads, _ = q.shape
    if not tokens or not lengths.size:
        dv = value_dim or k_pages.shape[4] if v_pages is None else v_pages.shape[4]
        return jnp.zeros((tokens, heads, dv), q.dtype), jnp.full((tokens, heads), -jnp.inf)
    operands = (q, k_pages, v_pages, layer, page_table, query_start, lengths)
    options: dict[str, Any] = dict(
        scale=float(scale),
        window=window,
        chunk=chunk,
        soft_cap=None if soft_cap is None else float(soft_cap),
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    if implementation != "reference":
        one_each = max_query_length == 1 and q.shape[0] == lengths.shape[0]
        latent = "" if v_pages is not None else "mla_"
        name = implementation or latent + ("decode_sm90" if one_each else "prefill_sm90")
        device = backend.get_default_device()
        try:
            check_hopper(device)
            begins = isinstance(first_page, int) and first_page == 0
            dealt = last_position is not None or page_stride > 1 or not begins
            if dealt and not one_each:
                raise NotImplementedError("takes all pages of a sequence")
            if name.endswith("decode_sm90") and not one_each:
                raise NotImplementedError(
                    f"takes one query a row, got {q.shape[0]} queries in {lengths.shape[0]} rows "
                    f"of up to {max_query_length}"
                )
            here, limited = operands, options
            if dealt:
                last = lengths - 1 if last_position is None else last_position
                here, limited = _restrict(operands, options, last, page_stride, first_page)
            if name == "mla_decode_sm90":
                attended = _decode_latent(device, here, limited, value_dim)
            elif name == "mla_prefill_sm90":
                attended = _prefill_latent(device, here, limited, value_dim)
            elif v_pages is None:
                raise NotImplementedError("takes values of their own")
            elif name == "prefill_sm90":
                attended = _prefill(device, here, limited)
            else:
                attended = _decode(device, here, limited)
        except NotImplementedError as error:
            if implementation is not None:
                raise
            log_fallback("paged_attention", device, str(error))
        else:
            log_pick("paged_attention", name, device)
            return attended
    return reference.paged_attention(
        *operands,
        max_query_length=max_query_length,
        value_dim=value_dim,
        last_position=last_position,
        page_stride=page_stride,
        first_page=first_page,
        **options,
    )


def store_rows(
    pools: Sequence[Float[Array, "layers pages page kv_heads _"]],
    layer: Int[Array, ""] | int,
    rows: Sequence[Float[Array, "tokens kv_heads _"]],
    slots: Int[Array, "tokens"],
) -> tuple[Array, ...]:
    """Stores a row of each array for each token at slots = page * page_size + offset, -1 nowhere.

    Slots differ, but for -1. Donated pools are written in place, by the Hopper kernel where
    it can run.

    Raises ValueError unless there is a row for each slot.
    """
    check_stored(pools, rows, slots)
    if not pools:
        return ()
    device = backend.get_default_device()
    try:
        check_hopper(device)
        from pallas_kernels.paged_attention import store_sm90

        stored = store_sm90.store_rows(pools, layer, rows, slots, num_sms=device.core_count)
    except NotImplementedError as error:
        log_fallback("store_rows", device, str(error), is_slow=False)
        return tuple(
            reference.store_rows(pool, layer, row, slots)
            for pool, row in zip(pools, rows, strict=True)
        )
    log_pick("store_rows", "store_sm90", device)
    return stored


def _restrict(
    operands: tuple[Any, ...],
    options: dict[str, Any],
    last_position: Array,
    page_stride: int,
    first_page: Array | int,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns operands and options that name keys by their place here, not in the sequence."""
    *others, lengths = operands
    page = operands[1].shape[2]
    place = functools.partial(
        keys_before, page=page, page_stride=page_stride, first_page=first_page
    )
    lengths = jnp.minimum(lengths, place(last_position + 1))
    limits = pack_limits(options["window"], options["chunk"])
    if limits is None:
        return (*others, lengths), options
    lows = place(first_visible(last_position, limits))
    lengths = jnp.where(lows < lengths, lengths, 0)
    lows = jnp.where(lengths > 0, lows, 0)
    return (*others, lengths), options | dict(window=None, chunk=None, lows=lows)


def _decode(device: Any, operands: tuple[Any, ...], options: dict[str, Any]) -> Attended:
    from pallas_kernels.paged_attention import decode_sm90

    # Row r owns query r.
    q, k_pages, v_pages, layer, page_table, _, lengths = operands
    config = decode_config(
        heads=q.shape[1],
        kv_heads=k_pages.shape[3],
        d=q.shape[2],
        dv=v_pages.shape[4],
        num_sms=device.core_count,
        stored=k_pages.dtype.itemsize,
    )
    decode = _traced_once(decode_sm90.paged_decode, "scale", "soft_cap", "config")
    return decode(q, k_pages, v_pages, layer, page_table, lengths, **options, config=config)


def _decode_latent(
    device: Any, operands: tuple[Any, ...], options: dict[str, Any], value_dim: int | None
) -> Attended:
    from pallas_kernels.paged_attention import mla_decode_sm90

    q, pages, v_pages, layer, page_table, _, lengths = operands
    if v_pages is not None or value_dim is None:
        raise NotImplementedError("takes values that are the first `value_dim` features of keys")
    unknown = ("window", "chunk", "lows", "soft_cap", "sinks", "k_scale", "v_scale")
    options = _without(unknown, options)
    config = mla_config(num_sms=device.core_count)
    decode = _traced_once(mla_decode_sm90.mla_decode, "scale", "value_dim", "config")
    return decode(
        q, pages, layer, page_table, lengths,
        **options, value_dim=value_dim, config=config,
    )  # fmt: skip


def _prefill_latent(
    device: Any, operands: tuple[Any, ...], options: dict[str, Any], value_dim: int | None
) -> Attended:
    """Each query as a row of its own: with many heads one fills the tensor cores."""
    q, k_pages, v_pages, layer, page_table, query_start, lengths = operands
    table, lengths = split_rows(page_table, query_start, lengths, tokens=q.shape[0])
    alone = (q, k_pages, v_pages, layer, table, query_start, lengths)
    return _decode_latent(device, alone, options, value_dim)


def _prefill(device: Any, operands: tuple[Any, ...], options: dict[str, Any]) -> Attended:
    from pallas_kernels.paged_attention import prefill_sm90

    q, _, v_pages, *_ = operands
    options = _without(("lows",), options)
    config = prefill_config(
        d=q.shape[2],
        dv=v_pages.shape[4],
        num_sms=device.core_count,
        stored=v_pages.dtype.itemsize,
    )
    prefill = _traced_once(prefill_sm90.paged_prefill, "scale", "soft_cap", "config")
    return prefill(*operands, **options, config=config)


@functools.cache
def _traced_once(kernel: Callable, *static: str) -> Callable[..., Attended]:
    """A kernel that is traced once for its shapes, and lowered once in a program.

    Lowering takes seconds, and a model with layers of two kinds calls the kernel in each.
    """
    return jax.jit(kernel, static_argnames=static)


def _without(unknown: tuple[str, ...], options: dict[str, Any]) -> dict[str, Any]:
    """Returns what a kernel knows of the options; raises NotImplementedError if more is given."""
    for name in unknown:
        if options.get(name) is not None:
            raise NotImplementedError(f"takes no {name}")
    return {name: option for name, option in options.items() if name not in unknown}
