"""What tests of kernels share: pages in any order, results in float32, programs for a GPU."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import reference
from pallas_kernels.groups import group_begin

PAGE, LAYER = 16, 1
NO_PAGE = 2**30
"""What a table has where a row needs no page."""
STATIC = frozenset({"max_query_length", "soft_cap", "value_dim", "page_stride"})
"""Options of the reference that are no arrays."""


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
    """The reference in float32; it takes a table of real pages, and masks what is not owned.

    It runs on the CPU: a GPU's compiler takes up to a minute for it.
    """
    table = jnp.where(table == NO_PAGE, 0, table)
    arrays = q, k_pages, v_pages, layer, table, start, lengths

    def run(q: Any, k_pages: Any, v_pages: Any, *others: Any, **options: Any) -> Any:
        wide: Any = [None if x is None else x.astype(jnp.float32) for x in (q, k_pages, v_pages)]
        return reference.paged_attention(*wide, *others, scale=0.125, **fixed, **options)

    fixed = {name: options.pop(name) for name in STATIC & options.keys()}
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.default_device(cpu), jax.default_matmul_precision("highest"):
        return jax.jit(run)(*jax.device_put(arrays, cpu), **jax.device_put(options, cpu))


def assert_equal_attention(got: Any, want: Any, *, lse_atol: float = 1e-5) -> None:
    out, lse = (np.asarray(array, np.float32) for array in got)
    np.testing.assert_allclose(out, want[0], atol=2**-6)
    np.testing.assert_allclose(lse, want[1], atol=lse_atol)


def group_rows(sizes: Sequence[int] | np.ndarray, alignment: int) -> list[np.ndarray]:
    """Where the rows of each group stand."""
    before = jnp.asarray(np.cumsum(sizes) - sizes)
    begins = np.asarray(group_begin(before, jnp.arange(len(sizes)), alignment))
    return [begin + np.arange(size) for begin, size in zip(begins, sizes, strict=True)]


def assert_lowers_for_cuda(run: Callable, *arguments: Any, **named: Any) -> None:
    """A kernel lowers here, where no GPU is, for a GPU."""
    lowered = jax.jit(run).trace(*arguments, **named).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def scatter(*arrays: Any) -> tuple[list[Any], jax.Array, list[Any]]:
    """Rows in any order among some of NaN, an index, and what it finds, some rows several times.

    Rows that are not finite in the first array are not looked for.
    """
    rng, count = np.random.default_rng(0), arrays[0].shape[0]
    finite = np.flatnonzero(np.isfinite(np.asarray(arrays[0], np.float32)).all(1))
    drawn = rng.choice(finite, count) if finite.size else np.zeros(count, int)
    places = rng.permutation(2 * count)[:count]
    scattered = [
        jnp.full((2 * count, *rows.shape[1:]), jnp.nan, rows.dtype).at[places].set(rows)
        for rows in arrays
    ]
    return scattered, jnp.asarray(places[drawn], jnp.int32), [rows[drawn] for rows in arrays]
