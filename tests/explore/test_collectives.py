"""The reader of compiled programs: on programs whose collectives are known, and on known text."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llmjax.explore import Collective, read_collectives
from llmjax.explore.hlo import parse_program, type_bytes
from meshes import ParallelPlan, make_mesh

PLAN = ParallelPlan(dp=2, ep=2, tp=2)
SIZES = PLAN.sizes


def compile_island(body: Callable[..., Any], *shape: int, out_specs: Any = None) -> str:
    """A program in which every device runs `body` on its own float32 array of that shape."""
    mesh = make_mesh(PLAN)
    spec = PartitionSpec(("dp", "ep", "tp"))
    run = jax.shard_map(
        body, mesh=mesh, in_specs=spec, out_specs=out_specs or spec, check_vma=False
    )
    whole = jax.ShapeDtypeStruct(
        (8 * shape[0], *shape[1:]), jnp.float32, sharding=NamedSharding(mesh, spec)
    )
    return text_of(jax.jit(run).lower(whole))


def text_of(lowered: Any) -> str:
    """The compiled program, as XLA prints it."""
    return lowered.compile().as_text()


@pytest.mark.parametrize(
    ("kind", "send", "num_bytes"),
    [
        ("all-reduce", lambda x, axes: lax.psum(x, axes), 96),
        ("all-gather", lambda x, axes: lax.all_gather(x, axes, tiled=True), 96),
        ("reduce-scatter", lambda x, axes: lax.psum_scatter(x, axes, tiled=True), 96),
        ("all-to-all", lambda x, axes: lax.all_to_all(x, axes, 0, 0, tiled=True), 96),
    ],
)
@pytest.mark.parametrize("axes", [("tp",), ("ep",), ("dp",), ("dp", "tp"), ("dp", "ep", "tp")])
def test_a_collective_is_found_with_its_axes_and_bytes(kind, send, num_bytes, axes):
    ranks = 2 ** len(axes)
    # 8 rows of 3 numbers, which every number of ranks divides; an all-gather is given its part.
    rows = 8 // ranks if kind == "all-gather" else 8
    found = read_collectives(compile_island(lambda x: send(x, axes), rows, 3), SIZES)
    assert found == (
        Collective(
            part="",
            kind=kind,
            axes=axes,
            ranks=ranks,
            num_bytes=num_bytes,
            count=1,
            when="always",
        ),
    )


def test_a_permute_names_the_axis_that_it_goes_along():
    program = compile_island(lambda x: lax.ppermute(x, "ep", [(0, 1), (1, 0)]), 8, 3)
    (found,) = read_collectives(program, SIZES)
    assert (found.kind, found.axes, found.ranks) == ("collective-permute", ("ep",), 2)
    assert found.num_bytes == 96


def test_a_sum_that_sharding_asks_for_is_found_whatever_xla_calls_its_mesh():
    mesh = make_mesh(PLAN)

    def multiply(x, w):
        return jnp.einsum("tf,fe->te", x, w, out_sharding=PartitionSpec("dp", None))

    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=_on(mesh, "dp", ("ep", "tp")))
        w = jax.ShapeDtypeStruct((8, 5), jnp.float32, sharding=_on(mesh, ("ep", "tp"), None))
        program = text_of(jax.jit(multiply).lower(x, w))
    (found,) = read_collectives(program, SIZES)
    assert (found.kind, found.axes, found.ranks) == ("all-reduce", ("ep", "tp"), 4)
    assert found.num_bytes == 2 * 5 * 4


def test_loops_multiply_and_branches_are_marked():
    def body(x):
        def outer(x, _):
            with jax.named_scope("inner"):
                x, _ = lax.scan(lambda x, _: (lax.psum(x, "tp") * 0.5, None), x, length=3)
            return jnp.sin(lax.psum(x, "ep")), None

        x, _ = lax.scan(outer, x, length=5)
        return lax.cond(x[0, 0] > 0, lambda x: lax.pmax(x, "dp"), jnp.cos, x)

    found = {one.axes: one for one in read_collectives(compile_island(body, 2, 2), SIZES)}
    assert {axes: (one.part, one.count, one.when) for axes, one in found.items()} == {
        ("tp",): ("inner", 15, "always"),
        ("ep",): ("", 5, "always"),
        ("dp",): ("", 1, "branch"),
    }
    assert found["tp",].total_bytes == 15 * 16


def test_a_loop_whose_rounds_depend_on_data_is_counted_for_one_round():
    def body(x):
        return lax.while_loop(lambda x: lax.psum(x, "dp")[0] < 9, lambda x: lax.psum(x, "tp"), x)

    found = read_collectives(compile_island(body, 2), SIZES)
    assert {(one.axes, one.count, one.when) for one in found} == {
        (("tp",), 1, "round"),
        (("dp",), 1, "round"),
    }


def test_bfloat16_sums_count_16_bits_although_xla_on_cpu_widens_them():
    mesh = make_mesh(PLAN)
    spec = PartitionSpec("tp")
    run = jax.shard_map(
        lambda x: lax.psum(x, "tp"), mesh=mesh, in_specs=spec, out_specs=PartitionSpec()
    )
    x = jax.ShapeDtypeStruct((16,), jnp.bfloat16, sharding=NamedSharding(mesh, spec))
    program = text_of(jax.jit(run).lower(x))
    assert "f32[8]" in program, "XLA no longer widens these sums on CPU"
    (found,) = read_collectives(program, SIZES)
    assert found.num_bytes == 8 * 2


def test_a_program_of_one_device_sends_nothing():
    assert read_collectives(text_of(jax.jit(jnp.sin).lower(1.0)), SIZES) == ()


GPU = """HloModule jit_step

%add (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[] parameter(0)
  %y = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%x, %y)
}

%wrapped (p: bf16[8,4]) -> bf16[2,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  ROOT %rs = bf16[2,4]{1,0} reduce-scatter(%p), replica_groups=GROUPS, dimensions={0}, to_apply=%add
}

ENTRY %main (a: bf16[8,4]) -> bf16[2,4] {
  %a = bf16[8,4]{1,0} parameter(0)
  %ar-start = bf16[8,4]{1,0} all-reduce-start(%a), replica_groups=GROUPS, to_apply=%add
  %ar-done = bf16[8,4]{1,0} all-reduce-done(%ar-start)
  %ag-start = (bf16[8,4]{1,0}, bf16[32,4]{1,0}) all-gather-start(%ar-done), replica_groups=GROUPS
  %ag-done = bf16[32,4]{1,0} all-gather-done(%ag-start)
  %rs-start = ((bf16[8,4]{1,0}), bf16[2,4]{1,0}) async-start(%ar-done), calls=%wrapped
  ROOT %rs-done = bf16[2,4]{1,0} async-done(%rs-start), calls=%wrapped
}
"""


@pytest.mark.parametrize(
    "groups",
    [
        "{{0,1,2,3},{4,5,6,7}}",
        "[2,4]<=[8]",
        "[2,4]<=[2,4]T(0,1)",
        "mesh['a'=2,'b'=4] {'b'}",
        "mesh['a'=8] {'a':(2)4}",
    ],
)
def test_asynchronous_collectives_are_counted_once_however_their_groups_are_written(groups):
    found = read_collectives(GPU.replace("GROUPS", groups), SIZES)
    assert [(one.kind, one.axes, one.num_bytes, one.count) for one in found] == [
        ("all-reduce", ("ep", "tp"), 64, 1),
        ("all-gather", ("ep", "tp"), 256, 1),
        ("reduce-scatter", ("ep", "tp"), 64, 1),
    ]


def test_groups_across_the_outer_axis_are_told_from_those_inside():
    program = GPU.replace("GROUPS", "[4,2]<=[2,4]T(1,0)")
    assert {one.axes for one in read_collectives(program, SIZES)} == {("dp",)}
    program = GPU.replace("GROUPS", "{}")
    assert {one.ranks for one in read_collectives(program, SIZES)} == {8}


def test_an_unknown_way_to_write_groups_is_refused():
    with pytest.raises(ValueError, match="An unknown way to write replica groups"):
        read_collectives(GPU.replace("GROUPS", "everyone"), SIZES)
    with pytest.raises(ValueError, match="holds no ENTRY computation"):
        parse_program("nothing")


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("f32[]", 4),
        ("bf16[8,64]{1,0}", 1024),
        ("pred[3]{0}", 3),
        ("f8e4m3fn[16]{0}", 16),
        ("s4[16]{0}", 8),
        ("c64[2]{0}", 16),
        ("(f32[2]{0}, /*index=1*/s32[3]{0}, token[])", 20),
        ("s32[<=8]{0}", 32),
    ],
)
def test_a_type_takes_its_bytes(text, num_bytes):
    assert type_bytes(text) == num_bytes


def _on(mesh: Mesh, *axes: Any) -> NamedSharding:
    assert mesh.axis_types == (AxisType.Explicit,) * 5
    return NamedSharding(mesh, PartitionSpec(*axes))
