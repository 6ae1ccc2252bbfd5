"""How fast: arrays in, arrays out. Knows no mesh and no model."""

from pallas_kernels.grouped_gemm import (
    QuantizedMatrices,
    QuantizedRows,
    SortedRows,
    gather_rows,
    grouped_gemm,
    quantize_matrices,
    quantize_rows,
    sort_rows,
    top_k,
)
from pallas_kernels.paged_attention import paged_attention, store_rows

__all__ = [
    "QuantizedMatrices",
    "QuantizedRows",
    "SortedRows",
    "gather_rows",
    "grouped_gemm",
    "paged_attention",
    "quantize_matrices",
    "quantize_rows",
    "sort_rows",
    "store_rows",
    "top_k",
]
