"""Layouts as tables: one plan in detail, or several side by side."""

from collections.abc import Sequence

from llmjax.explore.layout import Layout, TensorLayout
from llmjax.explore.table import Table
from meshes import LOGICAL_AXES, ParallelPlan, Rules


def list_tensors(layout: Layout) -> Table:
    """Every weight and the KV cache: shape, spec, and bytes in all, on a device and added."""
    return Table(
        title=f"{layout.plan}: weights {format_bytes(layout.num_bytes)}, "
        f"{format_bytes(layout.device_bytes)} on each of {layout.plan.num_devices} devices",
        columns=("tensor", "shape", "on the mesh", "a device holds", "in all", "a device", "added"),
        rows=tuple(
            (
                tensor.name,
                format_shape(tensor.shape),
                format_spec(tensor, layout.plan),
                format_shape(tensor.shard_shape),
                format_bytes(tensor.num_bytes),
                format_bytes(tensor.device_bytes),
                format_bytes(tensor.added_bytes),
            )
            for tensor in (*layout.weights, layout.kv_cache)
        ),
    )


def compare_specs(layouts: Sequence[Layout]) -> Table:
    """The mesh axes of every tensor, one column a plan."""
    names = [tensor.name for tensor in (*layouts[0].weights, layouts[0].kv_cache)]
    return Table(
        title="Mesh axes that each tensor is split over",
        columns=("tensor", *(str(layout.plan) for layout in layouts)),
        rows=tuple(
            (name, *(format_spec(layout[name], layout.plan) for layout in layouts))
            for name in names
        ),
    )


def compare_bytes(layouts: Sequence[Layout]) -> Table:
    """Bytes on a device under several plans."""
    return Table(
        title="Bytes on each device",
        columns=("plan", "devices", "weights", "of them added", "KV cache", "of it added"),
        rows=tuple(
            (
                str(layout.plan),
                str(layout.plan.num_devices),
                format_bytes(layout.device_bytes),
                _format_share(layout.added_bytes, layout.num_bytes),
                format_bytes(layout.kv_cache.device_bytes),
                _format_share(layout.kv_cache.added_bytes, layout.kv_cache.num_bytes),
            )
            for layout in layouts
        ),
    )


def compare_rules(plans: Sequence[ParallelPlan]) -> Table:
    """The mesh axes of every logical axis, one column a plan; axes of size one are left out."""
    tables = [(plan, Rules(plan).table) for plan in plans]
    return Table(
        title="Mesh axes that each logical axis lies on",
        columns=("logical axis", *(str(plan) for plan in plans)),
        rows=tuple(
            (name, *(format_axes(table[name], plan) for plan, table in tables))
            for name in LOGICAL_AXES
        ),
    )


def format_spec(tensor: TensorLayout, plan: ParallelPlan) -> str:
    """The spec, an entry for each tensor axis; mesh axes of size one are left out."""
    return ", ".join(format_axes(axes, plan) for axes in tensor.mesh_axes)


def format_axes(axes: tuple[str, ...], plan: ParallelPlan) -> str:
    """Mesh axes, without those of size one."""
    wide = [axis for axis in axes if plan.sizes[axis] > 1]
    return "*".join(wide) or "-"


def format_shape(shape: tuple[int, ...]) -> str:
    """Sizes between crosses."""
    return " x ".join(map(str, shape))


def format_bytes(count: int) -> str:
    """Bytes in the unit that leaves three or four digits."""
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def _format_share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}"
