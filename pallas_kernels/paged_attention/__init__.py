"""Attention of ragged queries over a paged cache."""

from pallas_kernels.reference import paged_attention, write_pages

__all__ = ["paged_attention", "write_pages"]
