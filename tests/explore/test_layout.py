"""Tables and pictures of layouts, against the arrays that they describe."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from llmjax.explore import (
    Layout,
    compare_bytes,
    compare_rules,
    compare_specs,
    draw_mesh,
    draw_shards,
    lay_out,
    list_tensors,
)
from llmjax.layers.kv_cache import KVCache, empty_cache
from llmjax.models.registry import find_family
from llmjax.weights import EMBEDDED_MODEL, open_checkpoint
from llmjax.weights.model import declared_params
from meshes import ParallelPlan, Rules, make_mesh

CHECKPOINT = open_checkpoint(
    Path(__file__).resolve().parent.parent / "golden" / "llama_odd_llama3rope"
)
CONFIG = find_family(CHECKPOINT.config).read_config(CHECKPOINT.config)
PLANS = [
    ParallelPlan(),
    ParallelPlan(tp=8),
    ParallelPlan(dp=2, tp=4),
    ParallelPlan(ep=2, tp=2, attention_dp=True),
    ParallelPlan(ep=2, tp=4, attention_dp="partial"),
]

on_every_plan = pytest.mark.parametrize("plan", PLANS, ids=str)


def lay_out_tiny(plan: ParallelPlan) -> Layout:
    return lay_out(CONFIG, plan, dtype="float32", cache_tokens=100, page_size=4)


def make_arrays(plan: ParallelPlan, layout: Layout) -> dict[str, jax.Array]:
    """Zeros in the place of the weights and of the cache's keys, on the devices that hold them."""
    rules, mesh = Rules(plan), make_mesh(plan)
    arrays = {}
    with jax.set_mesh(mesh):
        for name, param in declared_params(CONFIG, rules, jnp.dtype("float32")).items():
            arrays[name] = jnp.zeros(param.shape, param.dtype, out_sharding=param.out_sharding)
        shape = layout.kv_cache.shape
        arrays["kv_cache"] = empty_cache(KVCache._make([shape, shape]), jnp.float32, rules).k
    return arrays


@on_every_plan
def test_a_layout_gives_the_bytes_and_shapes_that_devices_hold(plan):
    layout = lay_out_tiny(plan)
    arrays = make_arrays(plan, layout)
    assert [tensor.name for tensor in layout.weights] == [*arrays][:-1]
    for name, array in arrays.items():
        tensor, both = layout[name], 2 if name == "kv_cache" else 1
        assert tensor.num_bytes == both * array.nbytes
        assert len(array.addressable_shards) == plan.num_devices
        for shard in array.addressable_shards:
            assert tensor.shard_shape == shard.data.shape
            assert tensor.device_bytes == both * shard.data.nbytes
    assert layout.device_bytes == sum(tensor.device_bytes for tensor in layout.weights)


@on_every_plan
def test_a_picture_of_shards_puts_each_device_where_jax_puts_it(plan):
    layout = lay_out_tiny(plan)
    for name, array in make_arrays(plan, layout).items():
        held: dict[str, list[int]] = {}
        for device, index in array.sharding.devices_indices_map(array.shape).items():
            held.setdefault(str(index), []).append(device.id)
        drawn = [cell for row in draw_shards(layout, name).rows for cell in row[1:]]
        expected = [
            ("devices " if len(ids) > 1 else "device ") + ", ".join(map(str, ids))
            for ids in held.values()
        ]
        assert sorted(drawn) == sorted(expected)


def test_a_picture_of_shards_names_the_slices_in_their_order():
    drawn = draw_shards(lay_out_tiny(ParallelPlan(dp=2, tp=4)), "kv_cache")
    assert drawn.columns == ("", "axis 3: 0", "axis 3: 1", "axis 3: 2", "axis 3: 3")
    assert drawn.rows[1] == ("axis 1: 13 to 25", "device 4", "device 5", "device 6", "device 7")


def test_a_picture_of_a_mesh_counts_devices_as_the_mesh_does():
    plan = ParallelPlan(dp=2, ep=2, tp=2)
    drawn = draw_mesh(plan)
    assert drawn.columns == ("", "tp=0", "tp=1")
    devices = make_mesh(plan).devices
    for row, names in enumerate(drawn.rows):
        dp, ep = divmod(row, 2)
        ids = [device.id for device in devices[0, dp, 0, ep]]
        assert names == (f"dp={dp}, ep={ep}", *(f"device {number}" for number in ids))


def test_what_head_slots_and_padding_add_is_counted():
    config = replace(
        CONFIG, num_heads=9, num_kv_heads=3, head_dim=8, num_layers=2, layers=(), vocab_size=30
    )
    layout = lay_out(config, ParallelPlan(tp=4), dtype="float32", cache_tokens=64)
    # 9 query and 3 key/value heads become 4 slots of 3 queries, a key and a value.
    assert layout["layers.attention.qkv"].added_bytes == 2 * config.hidden_size * (5 * 8) * 4
    assert layout["embedding"].added_bytes == 2 * config.hidden_size * 4
    assert layout.kv_cache.added_bytes * 4 == layout.kv_cache.num_bytes
    assert lay_out(config, ParallelPlan(), cache_tokens=64).added_bytes == 0


def test_a_plan_for_more_devices_than_there_are_is_laid_out():
    config = replace(
        CONFIG,
        hidden_size=16384,
        num_heads=128,
        num_kv_heads=8,
        head_dim=128,
        num_layers=126,
        layers=(),
    )
    config = replace(config, intermediate_size=53248, vocab_size=128256)
    layout = lay_out(config, ParallelPlan(dp=32, tp=16))
    assert layout.num_bytes > 800e9
    assert layout["mlp.down"].device_bytes * 16 == layout["mlp.down"].num_bytes


def test_layers_that_stages_do_not_divide_are_padded_and_counted_as_added():
    layout = lay_out(replace(CONFIG, num_layers=2, layers=()), ParallelPlan(pp=4))
    scale = layout["layers.attention_norm.scale"]
    assert (scale.shape[0], scale.shard_shape[0]) == (4, 1)
    assert scale.added_bytes * 2 == scale.num_bytes


def test_the_embedded_model_is_laid_out_by_its_name():
    layout = lay_out(EMBEDDED_MODEL, ParallelPlan(tp=2), dtype="float32")
    assert layout["embedding"].shape == (49152, 576)
    with pytest.raises(KeyError, match="There is no tensor 'nothing': use embedding"):
        layout["nothing"]


def test_tables_hold_a_row_for_each_thing_and_a_column_for_each_plan():
    layouts = [lay_out_tiny(plan) for plan in PLANS]
    tensors = [tensor.name for tensor in layouts[0].weights] + ["kv_cache"]
    assert [row[0] for row in list_tensors(layouts[1]).rows] == tensors
    specs = compare_specs(layouts)
    assert [row[0] for row in specs.rows] == tensors
    assert specs.columns == ("tensor", *map(str, PLANS))
    assert specs.rows[-1] == (
        "kv_cache",
        "-, -, -, -, -",
        "-, -, -, tp, -",
        "-, dp, -, tp, -",
        "-, ep*tp, -, -, -",
        "-, ep, -, tp, -",
    )
    assert [row[0] for row in compare_bytes(layouts).rows] == [str(plan) for plan in PLANS]
    assert ("vocab", "-", "tp", "tp", "ep*tp", "ep*tp") in compare_rules(PLANS).rows


def test_a_table_prints_in_columns_and_shows_as_escaped_html():
    table = replace(draw_mesh(ParallelPlan(tp=2)), title="a < b")
    assert str(table).splitlines() == [
        "a < b",
        "  tp=0      tp=1",
        "  --------  --------",
        "  device 0  device 1",
    ]
    html = table._repr_html_()
    assert "a &lt; b" in html and html.count("background") == 2 and html.count("<td") == 3
