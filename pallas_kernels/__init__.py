"""How fast: arrays in, arrays out. Knows no mesh and no model."""

from pallas_kernels.block_attention import NO_ROW, Places, block_attention, visible_blocks
from pallas_kernels.grouped_gemm import (
    QuantizedMatrices,
    QuantizedRows,
    Router,
    SortedRows,
    expert_rows,
    grouped_gemm,
    preferred_row_alignment,
    quantize_matrices,
    quantize_rows,
    room_for,
    route_tokens,
    sort_rows,
)
from pallas_kernels.paged_attention import paged_attention, store_rows

__all__ = [
    "NO_ROW",
    "Places",
    "QuantizedMatrices",
    "QuantizedRows",
    "Router",
    "SortedRows",
    "block_attention",
    "route_tokens",
    "expert_rows",
    "grouped_gemm",
    "paged_attention",
    "preferred_row_alignment",
    "quantize_matrices",
    "quantize_rows",
    "room_for",
    "sort_rows",
    "store_rows",
    "visible_blocks",
]
