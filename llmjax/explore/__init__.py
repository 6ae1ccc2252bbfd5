"""Plans to look at: tables and pictures of layouts, and what compiled steps send and stages ran.

Everything here prints as text and shows as HTML in a notebook.
"""

from llmjax.explore.collectives import Collective, read_collectives
from llmjax.explore.description import Description, describe
from llmjax.explore.layout import Layout, TensorLayout, lay_out
from llmjax.explore.pictures import draw_mesh, draw_shards
from llmjax.explore.steps import Step
from llmjax.explore.table import Report, Table
from llmjax.explore.tables import compare_bytes, compare_rules, compare_specs, list_tensors
from llmjax.explore.timeline import compare_occupancy, draw_timeline, record_ticks
from llmjax.explore.traffic import ExpertTraffic

__all__ = [
    "Collective",
    "Description",
    "ExpertTraffic",
    "Layout",
    "Report",
    "Step",
    "Table",
    "TensorLayout",
    "compare_bytes",
    "compare_occupancy",
    "compare_rules",
    "compare_specs",
    "describe",
    "draw_mesh",
    "draw_shards",
    "draw_timeline",
    "lay_out",
    "list_tensors",
    "read_collectives",
    "record_ticks",
]
