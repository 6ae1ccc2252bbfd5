"""Layouts to look at: tables and pictures of a plan, computed without a device.

Everything here prints as text and shows as HTML in a notebook.
"""

from llmjax.explore.layout import Layout, TensorLayout, lay_out
from llmjax.explore.pictures import draw_mesh, draw_shards
from llmjax.explore.table import Table
from llmjax.explore.tables import compare_bytes, compare_rules, compare_specs, list_tensors

__all__ = [
    "Layout",
    "Table",
    "TensorLayout",
    "compare_bytes",
    "compare_rules",
    "compare_specs",
    "draw_mesh",
    "draw_shards",
    "lay_out",
    "list_tensors",
]
