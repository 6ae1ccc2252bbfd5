"""How fast: arrays in, arrays out. Knows no mesh and no model."""

from pallas_kernels.paged_attention import paged_attention, write_pages

__all__ = ["paged_attention", "write_pages"]
