"""How fast: arrays in, arrays out. Knows no mesh and no model."""

from pallas_kernels.grouped_gemm import SortedRows, grouped_gemm, sort_rows
from pallas_kernels.paged_attention import paged_attention, store_rows

__all__ = [
    "SortedRows",
    "grouped_gemm",
    "paged_attention",
    "sort_rows",
    "store_rows",
]
