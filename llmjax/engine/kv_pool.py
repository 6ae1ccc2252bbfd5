"""The size of the KV pool: what was asked for, or what the memory holds."""

from collections.abc import Callable
from math import prod
from typing import Any

import jax
from jax.sharding import Mesh

from llmjax.config import ConfigError, EngineConfig

CPU_POOL_BYTES = 2**30
"""KV cache of all batch ranks on CPU."""
UNASKED_CONTEXT = 8192
"""Tokens of a request that the KV cache on CPU holds at least, where no length was asked for."""


def choose_num_pages(
    engine: EngineConfig, *, longest: int, block_size: int, fit_pages: Callable[[int], int]
) -> int:
    """Pages of a batch rank: what was asked for, or what the memory holds.

    Args:
        longest: tokens of the longest request.
        fit_pages: counts the pages that the memory holds, given the fewest that will do.

    Raises:
        ConfigError: a request of the length that was asked for does not fit.
    """
    if engine.kv_cache_max_tokens:
        pages = -(-engine.kv_cache_max_tokens // block_size)
    else:
        promised = longest if engine.max_seq_len else min(longest, UNASKED_CONTEXT)
        pages = fit_pages(-(-promised // block_size))
    if engine.max_seq_len and pages * block_size < longest:
        raise ConfigError(
            f"max_seq_len={longest} takes {-(-longest // block_size)} pages of KV cache "
            f"for a request, and a batch rank holds {pages}: use max_seq_len="
            f"{pages * block_size} or less, or more memory for the cache."
        )
    return pages


def count_pages(
    mesh: Mesh,
    *,
    page_bytes: int,
    weight_bytes: int,
    measure_temporaries: Callable[[], int],
    fraction: float,
    min_pages: int,
    num_ranks: int,
) -> int:
    """Pages of a batch rank: what the devices have left, or on CPU a stated size.

    All sizes are those of one device. A GPU gives `fraction` of the memory that weights and
    temporaries leave, rounded down to 1/64 of the device, so that programs are found in the cache
    again. On CPU the batch ranks share 1 GiB, and each holds at least one request of full length.

    Raises:
        ConfigError: not even `min_pages` fit.
    """
    device = mesh.local_devices[0]
    if device.platform == "cpu":
        return max(CPU_POOL_BYTES // num_ranks // page_bytes, min_pages)
    limit = device.memory_stats()["bytes_limit"]
    temporary_bytes = measure_temporaries()
    grain = limit // 64
    pool = int((limit - weight_bytes - temporary_bytes) * fraction) // grain * grain
    pages = pool // page_bytes
    if pages < 1:
        raise ConfigError(
            f"No memory is left for the KV cache: of {limit / 2**30:.1f} GiB the weights take "
            f"{weight_bytes / 2**30:.1f} and a step's temporaries {temporary_bytes / 2**30:.1f}. "
            "Use more devices, a smaller dtype or a smaller max_num_tokens."
        )
    return pages


def device_bytes(tree: Any) -> int:
    """Bytes that the arrays of a tree take on one device."""
    return sum(
        prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
