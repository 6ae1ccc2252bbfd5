"""What kernels for paged attention on Hopper do not cover, in words."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.paged_attention.swizzle import NARROWEST


def refuse(kernel: str, problems: Mapping[str, object]) -> None:
    """Raises NotImplementedError with the first problem that is one."""
    for problem, present in problems.items():
        if present:
            raise NotImplementedError(f"{kernel} on Hopper does not cover {problem}")


def page_problems(pages: Array) -> dict[str, object]:
    """Problems of pages [layers, pages, page, kv_heads, d]."""
    layers, count, page = pages.shape[:3]
    pool = layers * count * page
    return {
        f"pages of {page}; it takes powers of 2 from 16 on": page < 16 or page & (page - 1),
        f"a pool of {pool} positions in all layers; it takes fewer than 2^31": pool >= 2**31,
    }


def operand_problems(q: Array, k_pages: Array, v_pages: Array) -> dict[str, object]:
    """Problems of queries and of pages of keys and values, which may be float8."""
    d, dv = q.shape[-1], v_pages.shape[-1]
    multiple = NARROWEST // k_pages.dtype.itemsize
    return {
        f"queries of {q.dtype} and pages of {k_pages.dtype} and {v_pages.dtype}; it takes bfloat16 "
        "or float16, one for all, or pages of float8_e4m3fn": (
            q.dtype not in (jnp.bfloat16, jnp.float16)
            or k_pages.dtype != v_pages.dtype
            or k_pages.dtype not in (q.dtype, jnp.float8_e4m3fn)
        ),
        f"head dimensions {d} and {dv}; it takes multiples of {multiple} up to 256": (
            d % multiple or dv % multiple or max(d, dv) > 256
        ),
        **page_problems(k_pages),
    }
