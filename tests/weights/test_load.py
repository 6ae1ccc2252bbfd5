"""Streaming a checkpoint onto a mesh, with a checkpoint that counts what is read."""

import itertools
import logging
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from llmjax.models.source import Source, read_region
from llmjax.weights.hf import HFCheckpoint
from llmjax.weights.interface import CheckpointError, TensorInfo
from llmjax.weights.load import AbstractParam, load_weights

P = PartitionSpec


class MemoryCheckpoint:
    """Tensors in memory, and the names that were read."""

    path = Path("memory")
    config = {}
    generation_config = {}

    def __init__(self, arrays):
        self.arrays = arrays
        self.tensors = {n: TensorInfo(shape=a.shape, dtype=a.dtype) for n, a in arrays.items()}
        self.names_read = []

    def read(self, name, rows=None):
        self.names_read.append(name)
        return self.arrays[name] if rows is None else self.arrays[name][rows]


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 2, 2), ("pp", "ep", "tp"), axis_types=(AxisType.Explicit,) * 3)


def random(shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def abstract(shape, spec, *, stacked=False, layers=None, dtype=jnp.float32, by_expert=False):
    layers = tuple(range(shape[0])) if stacked else layers
    return AbstractParam(
        shape=shape, dtype=jnp.dtype(dtype), spec=spec, layers=layers, by_expert=by_expert
    )


SLOTS = np.array([[0, 1, -1], [2, -1, 0]])
SOURCES = {
    "plain": Source(name="t", shape=(12, 10)),
    "split": Source(name="t", shape=(12, 10), split=(3, 4, 10)),
    "transposed": Source(name="t", shape=(12, 10), split=(3, 4, 10), transpose=(2, 0, 1)),
    "slots": Source(
        name="t", shape=(12, 10), split=(3, 4, 10), transpose=(2, 0, 1), slots=(1, SLOTS)
    ),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_reading_a_part_equals_slicing_the_whole_padded_with_zeros(source):
    tensor = random((12, 10))
    whole = read_region(source, tensor, tuple(slice(0, n + 2) for n in source.filled_shape))
    assert np.any(whole)
    for axis, size in enumerate(source.filled_shape):
        assert not np.any(np.take(whole, [size, size + 1], axis=axis))
    parts = [[slice(0, 1), slice(1, n + 1), slice(n, n + 2)] for n in source.filled_shape]
    for index in itertools.product(*parts):
        np.testing.assert_array_equal(read_region(source, tensor, index), whole[index])


def test_slots_repeat_heads_and_leave_empty_ones_zero():
    tensor = random((12, 10))
    source = SOURCES["slots"]
    values = read_region(source, tensor, tuple(slice(0, n) for n in source.filled_shape))
    heads = tensor.reshape(3, 4, 10)
    for slot, head in np.ndenumerate(SLOTS):
        expected = heads[head].T if head >= 0 else np.zeros((10, 4))
        np.testing.assert_array_equal(values[:, *slot, :], expected)


@pytest.mark.parametrize("spec", [P(), P("tp"), P(None, "tp"), P(("ep", "tp")), P("tp", "ep")])
def test_a_single_parameter_arrives_under_every_layout(mesh, spec):
    tensor = random((16, 8))
    checkpoint = MemoryCheckpoint({"t": tensor})
    source = Source(name="t", shape=(16, 8), transpose=(1, 0))
    params = {"w": abstract((8, 16), spec)}
    loaded = load_weights(params, {"w": (source,)}, checkpoint, mesh)["w"]
    np.testing.assert_array_equal(loaded, tensor.T)
    assert loaded.sharding.is_equivalent_to(NamedSharding(mesh, spec), loaded.ndim)
    assert checkpoint.names_read == ["t"]


@pytest.mark.parametrize(
    "spec", [P(), P("pp"), P("pp", "tp"), P("pp", None, ("ep", "tp")), P(("pp", "ep"), "tp")]
)
def test_a_stack_arrives_under_every_layout(mesh, spec):
    arrays = {f"layers.{i}.w": random((8, 12), seed=i) for i in range(4)}
    checkpoint = MemoryCheckpoint(arrays)
    source = Source(name="layers.{layer}.w", shape=(8, 12))
    params = {"w": abstract((4, 8, 12), spec, stacked=True)}
    loaded = load_weights(params, {"w": (source,)}, checkpoint, mesh)["w"]
    np.testing.assert_array_equal(loaded, np.stack(list(arrays.values())))
    assert loaded.sharding.is_equivalent_to(NamedSharding(mesh, spec), loaded.ndim)
    assert sorted(checkpoint.names_read) == sorted(arrays)


def test_a_parameter_says_which_layer_a_row_holds_and_which_rows_are_zero(mesh):
    arrays = {f"{i}.w": random((8,), seed=i) for i in range(3)}
    source = Source(name="{layer}.w", shape=(8,))
    params = {"w": abstract((4, 8), P("pp"), layers=(0, 1, 2, -1))}
    loaded = load_weights(params, {"w": (source,)}, MemoryCheckpoint(arrays), mesh)["w"]
    np.testing.assert_array_equal(loaded, [*arrays.values(), np.zeros(8)])


def test_sources_fill_their_regions_and_the_rest_stays_zero(mesh):
    arrays = {"up": random((6, 4)), "gate": random((6, 4), seed=1)}
    sources = tuple(
        Source(
            name=name,
            shape=(6, 4),
            split=(1, 6, 4),
            transpose=(2, 0, 1),
            region=(slice(None), slice(i, i + 1), slice(None)),
            optional=name == "absent",
        )
        for i, name in enumerate(["gate", "up", "absent"])
    )
    params = {"w": abstract((4, 3, 8), P("tp", None, "ep"))}
    loaded = load_weights(params, {"w": sources}, MemoryCheckpoint(arrays), mesh)["w"]
    expected = np.zeros((4, 3, 8), np.float32)
    expected[:, 0, :6], expected[:, 1, :6] = arrays["gate"].T, arrays["up"].T
    np.testing.assert_array_equal(loaded, expected)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    ("stored", "wanted"), [(np.float32, jnp.bfloat16), (ml_dtypes.bfloat16, jnp.float32)]
)
def test_values_are_cast_to_the_dtype_of_the_parameter(mesh, stacked, stored, wanted):
    tensor = random((8, 4), stored)
    shape, spec = ((1, 8, 4), P(None, "tp")) if stacked else ((8, 4), P("tp"))
    params = {"w": abstract(shape, spec, stacked=stacked, dtype=wanted)}
    sources = {"w": (Source(name="w", shape=(8, 4)),)}
    loaded = load_weights(params, sources, MemoryCheckpoint({"w": tensor}), mesh)["w"]
    assert loaded.dtype == wanted
    np.testing.assert_array_equal(np.asarray(loaded).reshape(8, 4), tensor.astype(wanted))


def test_missing_misshaped_and_extra_tensors_are_named_before_anything_is_read(mesh):
    arrays = {"0.w": random((8,)), "1.w": random((9,)), "extra": random((2, 3))}
    arrays["rotary.inv_freq"] = random((4,))
    checkpoint = MemoryCheckpoint(arrays)
    params = {"w": abstract((3, 8), P(), stacked=True)}
    sources = {"w": (Source(name="{layer}.w", shape=(8,)),)}
    with pytest.raises(CheckpointError) as raised:
        load_weights(params, sources, checkpoint, mesh, ignored=[r"rotary\..*"])
    message = str(raised.value)
    assert "1.w has shape (9,), the model needs (8,)" in message
    assert "2.w is missing; shape (8,) is needed" in message
    assert "extra of shape (2, 3) has no place in the model" in message
    assert "rotary" not in message and "0.w" not in message
    assert checkpoint.names_read == []


def test_tensors_that_the_model_drops_are_counted_and_named_in_one_line(mesh, caplog):
    arrays = {f"vision.{i}": random((2,)) for i in range(9)} | {"w": random((8,))}
    params, sources = {"w": abstract((8,), P())}, {"w": (Source(name="w", shape=(8,)),)}
    with caplog.at_level(logging.INFO, logger="llmjax"):
        load_weights(params, sources, MemoryCheckpoint(arrays), mesh, ignored=[r"vision\..*"])
    assert [record.levelname for record in caplog.records] == ["INFO"]
    names = ", ".join(f"vision.{i}" for i in range(8))
    assert caplog.messages == [f"9 tensors of the checkpoint are not used: {names}, ..."]


def test_nothing_is_said_where_no_tensor_is_dropped(mesh, caplog):
    params, sources = {"w": abstract((8,), P())}, {"w": (Source(name="w", shape=(8,)),)}
    with caplog.at_level(logging.INFO, logger="llmjax"):
        load_weights(params, sources, MemoryCheckpoint({"w": random((8,))}), mesh)
    assert caplog.messages == []


def test_of_many_problems_eight_are_listed_and_the_rest_counted(mesh):
    params = {"w": abstract((20, 8), P(), stacked=True)}
    sources = {"w": (Source(name="{layer}.w", shape=(8,)),)}
    with pytest.raises(CheckpointError, match="and 12 more") as raised:
        load_weights(params, sources, MemoryCheckpoint({}), mesh)
    assert str(raised.value).count("is missing") == 8


def test_a_source_larger_than_its_region_is_refused(mesh):
    params = {"w": abstract((4,), P())}
    with pytest.raises(ValueError, match=r"gives shape \(8,\).* region \(4,\) of parameter w"):
        load_weights(params, {"w": (Source(name="w", shape=(8,)),)}, MemoryCheckpoint({}), mesh)


def peak_of_numpy(load):
    """Counts numpy's own allocations: on the CPU backend the devices' memory is the host's too."""
    load()  # compiling allocates too
    tracemalloc.start()
    try:
        load()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_host_holds_a_few_tensors_however_many_layers_there_are(mesh):
    num_layers, shape = 32, (256, 512)
    tensor = random(shape)
    checkpoint = MemoryCheckpoint({f"{i}.w": tensor for i in range(num_layers)})
    checkpoint.read = lambda name, rows=None: tensor.copy()
    params = {"w": abstract((num_layers, *shape), P("pp", "tp"), stacked=True)}
    sources = {"w": (Source(name="{layer}.w", shape=shape),)}
    peak = peak_of_numpy(lambda: load_weights(params, sources, checkpoint, mesh))
    # The tensor being read, and for each of two stages the shards of this row and, until the
    # runtime lets go of them, of the row before. The whole stack is 32 tensors.
    assert tensor.nbytes < peak < 6 * tensor.nbytes


EXPERTS, EXPERT_SHAPE = 12, (4, 6)
SEPARATE = tuple(
    Source(
        name=f"{{layer}}.{index}.w",
        shape=EXPERT_SHAPE,
        split=(1, *EXPERT_SHAPE),
        region=(slice(index, index + 1), slice(None), slice(None)),
    )
    for index in range(EXPERTS)
)
FUSED = tuple(
    Source(
        name="{layer}.w",
        shape=(EXPERTS, *EXPERT_SHAPE),
        rows=slice(index, index + 1),
        region=(slice(index, index + 1), slice(None), slice(None)),
    )
    for index in range(EXPERTS)
)


@pytest.mark.parametrize("spec", [P(), P("pp", "ep"), P(None, "ep", "tp"), P("pp", ("ep", "tp"))])
@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
def test_a_stack_of_experts_arrives_under_every_layout(mesh, spec, fused):
    values, slots = random((2, EXPERTS, *EXPERT_SHAPE)), 16
    arrays = {f"{i}.w": values[i] for i in range(2)}
    if not fused:
        arrays = {f"{i}.{e}.w": values[i, e] for i in range(2) for e in range(EXPERTS)}
    checkpoint = MemoryCheckpoint(arrays)
    param = abstract((2, slots, *EXPERT_SHAPE), spec, stacked=True, by_expert=True)
    sources = {"w": FUSED if fused else SEPARATE}
    loaded = load_weights({"w": param}, sources, checkpoint, mesh)["w"]
    empty = np.zeros((2, slots - EXPERTS, *EXPERT_SHAPE))
    np.testing.assert_array_equal(loaded, np.concatenate([values, empty], axis=1))
    assert loaded.sharding.is_equivalent_to(NamedSharding(mesh, spec), loaded.ndim)
    assert len(checkpoint.names_read) == 2 * EXPERTS


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
def test_the_host_holds_a_few_experts_however_many_a_layer_has(mesh, tmp_path, fused):
    count, shape = 32, (128, 256)
    expert = random(shape).astype(ml_dtypes.bfloat16)
    sources = tuple(
        Source(
            name="experts" if fused else f"{index}.w",
            shape=(count, *shape) if fused else shape,
            rows=slice(index, index + 1) if fused else None,
            split=(1, *shape),
            region=(slice(index, index + 1), slice(None), slice(None)),
        )
        for index in range(count)
    )
    apart = {f"{index}.w": expert for index in range(count)}
    together = {"experts": np.stack([expert] * count)}
    save_file(together if fused else apart, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    param = abstract((1, count, *shape), P(None, "ep", "tp"), stacked=True, by_expert=True)
    peak = peak_of_numpy(
        lambda: load_weights({"w": param}, {"w": sources}, HFCheckpoint(tmp_path), mesh)
    )
    # Two ranks' shards of an expert each and, until the runtime lets go of them, those before.
    assert expert.nbytes < peak < 6 * expert.nbytes


def test_every_device_holds_its_share_of_the_bytes_and_no_more(mesh):
    params = {"w": abstract((4, 8, 12), P("pp", "tp"), stacked=True)}
    sources = {"w": (Source(name="{layer}.w", shape=(8, 12)),)}
    arrays = {f"{i}.w": random((8, 12), seed=i) for i in range(4)}
    loaded = load_weights(params, sources, MemoryCheckpoint(arrays), mesh)["w"]
    assert {shard.data.shape for shard in loaded.addressable_shards} == {(2, 4, 12)}


def test_progress_counts_the_bytes_of_the_checkpoint(mesh, capsys):
    arrays = {"w": random((8, 12))}
    params = {"w": abstract((8, 12), P("tp"))}
    sources = {"w": (Source(name="w", shape=(8, 12)),)}
    load_weights(params, sources, MemoryCheckpoint(arrays), mesh, progress=True)
    assert "loading weights: 100%" in capsys.readouterr().err
    load_weights(params, sources, MemoryCheckpoint(arrays), mesh, progress=False)
    assert capsys.readouterr().err == ""
