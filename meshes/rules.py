"""The table of rules: which mesh axes each logical axis lies on.

Every strategy is a row or a column of this table; turning attention data parallelism on
changes PartitionSpecs, never the mesh.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshes.axes import LOGICAL_AXES, MESH_AXES
from meshes.errors import PlanError
from meshes.plan import ParallelPlan


@dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axes, for one plan.

    Source: "Parallelism" page of TensorRT-LLM; the names of the logical axes are in `meshes.axes`.
    """

    plan: ParallelPlan

    @cached_property
    def table(self) -> dict[str, tuple[str, ...]]:
        """Mesh axes of every logical axis, in mesh order."""
        model = ("ep", "tp")
        batch, heads = {
            False: (("dp",), model),
            True: (("dp", *model), ()),
            "partial": (("dp", "ep"), ("tp",)),
        }[self.plan.attention_dp]
        tokens = _ordered((*batch, "cp"))
        # With Helix, context ranks are tensor ranks wherever nothing depends on the context.
        helix = ("cp",) if self.plan.cp_type == "HELIX" else ()
        ffn, vocab = (*helix, *model), ("pp", *helix, *model)
        return {
            "layers": ("pp",),
            "requests": batch,
            "tokens": tokens,
            "context": ("cp",),
            "pages": tokens,
            "heads": heads,
            "kv_heads": heads,
            "head_dim": (),
            "embed": (),
            "ffn": ffn,
            "ffn_tokens": _without(tokens, ffn),
            "vocab": vocab,
            "sampler_requests": _without(batch, vocab),
            "experts": (*helix, "ep"),
            "expert_ffn": ("tp",),
        }

    def axes(self, logical: str | None) -> tuple[str, ...]:
        """Mesh axes of a logical axis; None is replicated.

        Raises:
            PlanError: the name is not in `meshes.axes.LOGICAL_AXES`.
        """
        if logical is None:
            return ()
        if logical not in self.table:
            raise PlanError(f"Unknown logical axis {logical!r}: use {', '.join(LOGICAL_AXES)}.")
        return self.table[logical]

    def size(self, logical: str | None) -> int:
        """Number of ranks that a logical axis is split over."""
        return prod(self.plan.sizes[axis] for axis in self.axes(logical))

    def spec(self, *logical: str | None) -> PartitionSpec:
        """PartitionSpec of a tensor whose axes carry these names.

        Raises:
            PlanError: two of the axes lie on the same mesh axis.
        """
        entries = [self.axes(name) for name in logical]
        owner: dict[str, str | None] = {}
        for name, axes in zip(logical, entries, strict=True):
            for axis in axes:
                if axis in owner:
                    raise PlanError(
                        f"A tensor with the axes {logical} cannot be placed: {owner[axis]!r} and "
                        f"{name!r} both lie on the mesh axis {axis!r}. Give one of them another "
                        "name, or None to leave it whole."
                    )
                owner[axis] = name
        return PartitionSpec(*(axes or None for axes in entries))

    def sharding(self, mesh: Mesh, *logical: str | None) -> NamedSharding:
        """The spec on a mesh."""
        return NamedSharding(mesh, self.spec(*logical))


def _ordered(axes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(axis for axis in MESH_AXES if axis in axes)


def _without(axes: tuple[str, ...], removed: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(axis for axis in axes if axis not in removed)
