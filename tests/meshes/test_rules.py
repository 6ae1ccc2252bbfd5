from itertools import combinations
from typing import Any

import pytest
from jax.sharding import PartitionSpec as P

from meshes import LOGICAL_AXES, MESH_AXES, ParallelPlan, PlanError, Rules, make_mesh

MODEL = ("ep", "tp")
PLACED_ALIKE = {
    "layers": ("pp",),
    "context": ("cp",),
    "head_dim": (),
    "embed": (),
    "ffn": MODEL,
    "vocab": ("pp", "ep", "tp"),
    "experts": ("ep",),
    "expert_ffn": ("tp",),
}
"""What attention data parallelism leaves where it is."""
TABLE = {
    False: {
        "requests": ("dp",),
        "tokens": ("dp", "cp"),
        "pages": ("dp", "cp"),
        "heads": MODEL,
        "kv_heads": MODEL,
        "ffn_tokens": ("dp", "cp"),
        "sampler_requests": ("dp",),
    },
    True: {
        "requests": ("dp", "ep", "tp"),
        "tokens": ("dp", "cp", "ep", "tp"),
        "pages": ("dp", "cp", "ep", "tp"),
        "heads": (),
        "kv_heads": (),
        "ffn_tokens": ("dp", "cp"),
        "sampler_requests": ("dp",),
    },
    "partial": {
        "requests": ("dp", "ep"),
        "tokens": ("dp", "cp", "ep"),
        "pages": ("dp", "cp", "ep"),
        "heads": ("tp",),
        "kv_heads": ("tp",),
        "ffn_tokens": ("dp", "cp"),
        "sampler_requests": ("dp",),
    },
}
ATTENTION = pytest.mark.parametrize("attention", TABLE, ids=str)

TOGETHER = [
    ("layers", "pages", None, "kv_heads", "head_dim"),
    ("layers", "embed", "kv_heads", None, "head_dim"),
    ("layers", "ffn", "embed"),
    ("vocab", "embed"),
    ("tokens", "embed"),
    ("tokens", "kv_heads", None, "head_dim"),
    ("ffn_tokens", None, "ffn"),
    ("sampler_requests", "vocab"),
    ("layers", "experts", "embed", "expert_ffn"),
]
"""Axes that tensors of a model carry side by side."""


def rules(attention, **sizes) -> Rules:
    return Rules(ParallelPlan(attention_dp=attention, **sizes))


@ATTENTION
def test_every_logical_axis_lies_where_the_table_says(attention):
    assert rules(attention).table == PLACED_ALIKE | TABLE[attention]
    assert set(rules(attention).table) == set(LOGICAL_AXES)


@ATTENTION
def test_axes_stand_in_mesh_order(attention):
    for axes in rules(attention).table.values():
        assert axes == tuple(axis for axis in MESH_AXES if axis in axes)


@ATTENTION
@pytest.mark.parametrize("axes", TOGETHER, ids=str)
def test_what_a_model_puts_side_by_side_never_collides(attention, axes):
    assert len(rules(attention).spec(*axes)) == len(axes)


@ATTENTION
def test_two_axes_on_one_mesh_axis_are_refused_and_all_others_accepted(attention):
    table = rules(attention).table
    refused = 0
    for first, second in combinations(LOGICAL_AXES, 2):
        shared = set(table[first]) & set(table[second])
        if not shared:
            rules(attention).spec(first, second)
            continue
        refused += 1
        with pytest.raises(PlanError, match="both lie on the mesh axis") as error:
            rules(attention).spec(first, second)
        assert f"{first!r} and {second!r}" in str(error.value)
        assert any(f"mesh axis {axis!r}" in str(error.value) for axis in shared)
    assert refused > 10


def test_a_collision_is_refused_with_both_names_and_the_mesh_axis():
    with pytest.raises(PlanError) as error:
        rules(True).spec("tokens", "ffn")
    assert str(error.value) == (
        "A tensor with the axes ('tokens', 'ffn') cannot be placed: 'tokens' and 'ffn' both lie on "
        "the mesh axis 'ep'. Give one of them another name, or None to leave it whole."
    )


def test_an_unknown_logical_axis_is_refused_with_the_known_ones():
    with pytest.raises(PlanError) as error:
        rules(False).spec("embed", "head")
    assert str(error.value) == f"Unknown logical axis 'head': use {', '.join(LOGICAL_AXES)}."


def test_a_size_is_the_product_of_the_mesh_axes_that_the_axis_lies_on():
    sizes = {"pp": 2, "dp": 3, "cp": 5, "ep": 7, "tp": 11}
    partial = rules("partial", **sizes)
    assert partial.size("vocab") == 2 * 7 * 11
    assert partial.size("tokens") == 3 * 5 * 7
    assert partial.size("requests") == 3 * 7
    assert partial.size("kv_heads") == 11
    assert partial.size("embed") == partial.size(None) == 1


@ATTENTION
def test_with_helix_context_ranks_are_tensor_ranks_of_what_does_not_depend_on_the_context(
    attention,
):
    plan: Any = dict(pp=2, dp=2, cp=2, ep=2, tp=2, attention_dp=attention)
    ring, helix = (Rules(ParallelPlan(**plan, cp_type=kind)).table for kind in ("RING", "HELIX"))
    moved = {name: axes for name, axes in helix.items() if axes != ring[name]}
    assert moved == {
        "ffn": ("cp", *MODEL),
        "ffn_tokens": ("dp",),
        "vocab": ("pp", "cp", *MODEL),
        "experts": ("cp", "ep"),
    }


def test_a_spec_names_mesh_axes_whole_axes_and_replicated_ones():
    assert rules(False).spec("layers", None, "embed", "ffn") == P(("pp",), None, None, MODEL)
    assert rules(False).spec() == P()


def test_a_sharding_splits_an_array_over_the_mesh():
    plan = ParallelPlan(dp=2, ep=2, tp=2, attention_dp="partial")
    sharding = Rules(plan).sharding(make_mesh(plan), "pages", "kv_heads", None)
    assert sharding.shard_shape((8, 6, 5)) == (2, 3, 5)
