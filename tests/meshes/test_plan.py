from pathlib import Path

import pytest

from meshes import ParallelPlan, PlanError, presets


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("tp2", ParallelPlan(tp=2)),
        ("tp4", ParallelPlan(tp=4)),
        ("tp8", ParallelPlan(tp=8)),
        ("dp4-tp2", ParallelPlan(dp=4, tp=2)),
        ("attention-dp8", ParallelPlan(tp=8, attention_dp=True)),
        ("attention-dp2-tp4", ParallelPlan(ep=2, tp=4, attention_dp="partial")),
    ],
)
def test_a_preset_is_the_plan_that_its_name_says(name, plan):
    assert ParallelPlan.from_yaml(name) == plan


def test_every_preset_loads():
    assert len(presets()) >= 6
    for name in presets():
        assert isinstance(ParallelPlan.from_yaml(name), ParallelPlan)


def test_a_plan_is_read_from_a_file_by_its_path(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text("dp: 2\nep: 2\ntp: 2\nattention_dp: partial\n")
    plan = ParallelPlan(dp=2, ep=2, tp=2, attention_dp="partial")
    assert ParallelPlan.from_yaml(file) == ParallelPlan.from_yaml(str(file)) == plan


def test_a_plan_multiplies_its_sizes_into_devices_and_tensor_ranks():
    plan = ParallelPlan(pp=2, dp=3, cp=5, ep=7, tp=11)
    assert plan.sizes == {"pp": 2, "dp": 3, "cp": 5, "ep": 7, "tp": 11}
    assert list(plan.sizes) == ["pp", "dp", "cp", "ep", "tp"]
    assert (plan.num_devices, plan.tensor_parallel_size) == (2310, 77)


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (ParallelPlan(), "one device"),
        (ParallelPlan(tp=4), "tp=4"),
        (ParallelPlan(dp=2, tp=2, attention_dp=True), "dp=2,tp=2,attention_dp"),
        (ParallelPlan(ep=2, tp=2, attention_dp="partial"), "ep=2,tp=2,attention_dp=partial"),
    ],
)
def test_a_plan_prints_the_sizes_that_differ_from_one_device(plan, text):
    assert str(plan) == text


@pytest.mark.parametrize("size", [0, -1, 1.5, "2", True, None])
@pytest.mark.parametrize("axis", ["pp", "dp", "cp", "ep", "tp"])
def test_a_size_that_is_no_whole_number_from_one_up_is_refused_by_name(axis, size):
    with pytest.raises(PlanError) as error:
        ParallelPlan.from_mapping({axis: size})
    assert str(error.value) == f"{axis}={size!r} is not a size: use a whole number from 1 up."


def test_an_unknown_attention_placement_is_refused_with_the_known_ones():
    with pytest.raises(PlanError) as error:
        ParallelPlan.from_mapping({"attention_dp": "full"})
    assert str(error.value) == (
        "attention_dp='full' does not exist: use False (heads over ep and tp), True (requests over "
        'both) or "partial" (requests over ep, heads over tp).'
    )


def test_an_unknown_key_is_refused_with_the_known_ones():
    with pytest.raises(PlanError) as error:
        ParallelPlan.from_mapping({"tp": 2, "tensor": 4}, origin="The plan 'mine'")
    assert str(error.value) == (
        "The plan 'mine' has the unknown key 'tensor': use pp, dp, cp, ep, tp, attention_dp, "
        "pp_partition, cp_type, gpus_per_node."
    )


def test_a_name_that_is_neither_file_nor_preset_is_refused_with_the_presets():
    with pytest.raises(PlanError) as error:
        ParallelPlan.from_yaml("tp3")
    assert str(error.value).startswith("The plan 'tp3' is neither a YAML file nor a preset (")
    assert all(name in str(error.value) for name in presets())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00", "is not UTF-8 text: give a YAML file"),
        (b"tp: [", "is not valid YAML: "),
        (b"- tp\n- dp\n", "must map axes to sizes, such as `tp: 4`"),
        (b"", "must map axes to sizes, such as `tp: 4`"),
        (b"tp: 2\nlayers: 3\n", "has the unknown key 'layers'"),
        (b"tp: two\n", "tp='two' is not a size"),
    ],
)
def test_a_file_that_holds_no_plan_is_refused_with_the_reason(tmp_path: Path, content, message):
    file = tmp_path / "plan.yaml"
    file.write_bytes(content)
    with pytest.raises(PlanError) as error:
        ParallelPlan.from_yaml(file)
    assert message in str(error.value)
