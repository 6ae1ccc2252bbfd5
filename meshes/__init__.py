"""Where things are: axis names, plans, rules and the mesh. Knows no model."""

from meshes.axes import LOGICAL_AXES, MESH_AXES
from meshes.documents import presets
from meshes.errors import PlanError
from meshes.plan import ParallelPlan
from meshes.rules import Rules
from meshes.topology import make_mesh

__all__ = [
    "LOGICAL_AXES",
    "MESH_AXES",
    "ParallelPlan",
    "PlanError",
    "Rules",
    "make_mesh",
    "presets",
]
