"""What tests of kernels share: pages in any order, results in float32, programs for a GPU."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import reference

PAGE, LAYER = 16, 1
NO_PAGE = 2**30
"""What a table has where a row needs no page."""


def deal_pages(
    rng: np.random.Generator, lengths: Sequence[int] | np.ndarray, page: int
) -> tuple[np.ndarray, np.ndarray]:
    """A table of shuffled pages, and which positions of each page a row owns."""
    rows, width = len(lengths), max(1, -(-max(lengths) // page))
    pool = rows * width + 2
    table = rng.permutation(pool)[: rows * width].reshape(rows, width).astype(np.int32)
    owned = np.zeros((pool, page), bool)
    for row, length in enumerate(lengths):
        used = -(-length // page)
        for column in range(used):
            owned[table[row, column]] = np.arange(page) < length - column * page
        table[row, used:] = NO_PAGE
    return table, owned


def fill_pages(
    rng: np.random.Generator,
    owned: np.ndarray,
    kv_heads: int,
    features: int,
    dtype: Any = jnp.bfloat16,
) -> jax.Array:
    """Random pages of two layers, NaN in every position that no row owns."""
    values = rng.normal(size=(2, *owned.shape, kv_heads, features))
    return jnp.asarray(np.where(owned[None, :, :, None, None], values, np.nan), dtype)


def float32_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array | None,
    layer: int,
    table: jax.Array,
    start: jax.Array,
    lengths: jax.Array,
    **options: Any,
) -> Any:
    """The reference in float32; it takes a table of real pages, and masks what is not owned."""
    return reference.paged_attention(
        q.astype(jnp.float32),
        k_pages.astype(jnp.float32),
        None if v_pages is None else v_pages.astype(jnp.float32),
        layer,
        jnp.where(table == NO_PAGE, 0, table),
        start,
        lengths,
        scale=0.125,
        **options,
    )


def assert_equal_attention(got: Any, want: Any, *, lse_atol: float = 1e-5) -> None:
    out, lse = (np.asarray(array, np.float32) for array in got)
    np.testing.assert_allclose(out, want[0], atol=2**-6)
    np.testing.assert_allclose(lse, want[1], atol=lse_atol)


def assert_lowers_for_cuda(run: Callable, *arguments: Any, **named: Any) -> None:
    """A kernel lowers here, where no GPU is, for a GPU."""
    lowered = jax.jit(run).trace(*arguments, **named).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
