"""How fast: arrays in, arrays out. Knows no mesh and no model."""

from pallas_kernels.grouped_gemm import grouped_gemm
from pallas_kernels.paged_attention import paged_attention, store_rows, write_pages

__all__ = ["grouped_gemm", "paged_attention", "store_rows", "write_pages"]
