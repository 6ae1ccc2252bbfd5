"""What no implementation of paged attention takes, refused in a sentence before anything runs."""

from collections.abc import Sequence
from typing import Any


def check_heads(q: Any, k_pages: Any, v_pages: Any, value_dim: int | None, sinks: Any) -> None:
    """Raises ValueError for heads of queries, keys and values that do not fit each other."""
    heads, d = q.shape[1:]
    kv_heads, key_dim = k_pages.shape[3:]
    if not kv_heads or heads % kv_heads:
        raise ValueError(
            f"{heads} query heads do not share {kv_heads} key/value heads evenly; their number "
            "must be a multiple of it"
        )
    if d != key_dim:
        raise ValueError(f"queries have {d} features a head and keys {key_dim}; they must agree")
    if v_pages is not None and v_pages.shape[:4] != k_pages.shape[:4]:
        raise ValueError(
            f"keys and values lie in pages of the same layers, pages, positions and heads; got "
            f"{k_pages.shape} and {v_pages.shape}"
        )
    if v_pages is None and value_dim is not None and not 1 <= value_dim <= key_dim:
        raise ValueError(f"value_dim={value_dim} of keys of {key_dim} features; use 1 to {key_dim}")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks holds one score for each of {heads} heads, got {sinks.shape}")


def check_rows(page_table: Any, query_start: Any, lengths: Any) -> None:
    """Raises ValueError for arrays that tell of different numbers of rows."""
    rows = lengths.shape[0]
    if page_table.shape[0] != rows or query_start.shape[0] != rows + 1:
        raise ValueError(
            f"lengths tells of {rows} rows, so page_table needs as many and query_start one more; "
            f"got {page_table.shape[0]} and {query_start.shape[0]}"
        )


def check_numbers(max_query_length: int, soft_cap: float | None) -> None:
    """Raises ValueError for sizes that are none."""
    if max_query_length < 1:
        raise ValueError(f"max_query_length={max_query_length}; rows have at least one query")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap={soft_cap}; use a positive one, or None for no cap")


def check_stored(pools: Sequence[Any], rows: Sequence[Any], slots: Any) -> None:
    """Raises ValueError unless each pool has a row of its own shape for each slot."""
    needed = [(slots.shape[0], *pool.shape[3:]) for pool in pools]
    got = [row.shape for row in rows]
    if needed != got:
        raise ValueError(
            f"{slots.shape[0]} slots of {len(pools)} pools take rows of the shapes {needed}, got "
            f"{got}"
        )
