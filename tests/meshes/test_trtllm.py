"""TensorRT-LLM's keys: each has its effect or is refused by name, with the reason."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from meshes import ParallelPlan, PlanError
from meshes.trtllm import KEYS, load_deployment, read_deployment, to_mapping
from meshes.trtllm.keys import Fixed, Honoured, Noted, Refused

DEPLOYMENTS = yaml.safe_load((Path(__file__).parent / "deployments.yaml").read_text())


def nest(key: str, value: Any) -> dict[str, Any]:
    """`a.b` and a value as a mapping of sections."""
    section, _, inner = key.rpartition(".")
    return {section: {inner: value}} if section else {inner: value}


def keys_of(fate: type) -> list[str]:
    return [key for key, known in KEYS.items() if isinstance(known, fate)]


def render_keys() -> str:
    """The keys as the Markdown table of docs/trtllm.md."""
    rows = ["| key | here |", "|---|---|"]
    for key, fate in KEYS.items():
        match fate:
            case Honoured():
                text = fate.meaning
            case Fixed():
                values = " or ".join(f"`{str(value).lower()}`" for value in fate.values)
                text = f"only {values}: {fate.reason}"
            case Noted():
                text = f"accepted with a note: {fate.note}"
            case Refused():
                text = f"refused: {fate.reason}"
        rows.append(f"| `{key}` | {text} |")
    return "\n".join(rows)


def test_the_page_about_the_keys_shows_the_table_of_the_code():
    page = (Path(__file__).parents[2] / "docs" / "trtllm.md").read_text()
    assert render_keys() in page, f"put this table into docs/trtllm.md:\n{render_keys()}"


# Published configurations.


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_published_configuration_is_refused_for_exactly_the_keys_that_do_not_run(name):
    keys, refused = DEPLOYMENTS[name]["keys"], DEPLOYMENTS[name]["refused"]
    if refused:
        with pytest.raises(PlanError) as error:
            read_deployment(keys)
        reasons = str(error.value).partition("honoured: ")[2].partition(". Change")[0]
        named = [reason.partition(" (")[0].partition("=")[0] for reason in reasons.split("; ")]
        assert sorted(named) == sorted(refused)
    deployment = read_deployment(keys, allow_unsupported=refused)
    assert deployment.plan == ParallelPlan(**DEPLOYMENTS[name]["expected"])
    assert sum("is dropped" in note for note in deployment.notes) == len(refused)


def test_one_engine_of_a_file_of_several_is_read_by_its_section(tmp_path):
    file = tmp_path / "slurm.yaml"
    workers = {"gen": {"tensor_parallel_size": 4}, "ctx": {"tensor_parallel_size": 2}}
    file.write_text(yaml.safe_dump({"slurm": {"partition": "a"}, "worker_config": workers}))
    assert load_deployment(f"{file}#worker_config.gen").plan == ParallelPlan(tp=4)
    with pytest.raises(PlanError, match="several engines: give one.*#worker_config.ctx"):
        load_deployment(file)


# The "Parallelism" page.


@pytest.mark.parametrize(
    ("block", "plan"),
    [
        ("tensor_parallel_size: 8\nenable_attention_dp: false", ParallelPlan(tp=8)),
        (
            "tensor_parallel_size: 8\nenable_attention_dp: true",
            ParallelPlan(tp=8, attention_dp=True),
        ),
        ("tensor_parallel_size: 8\nmoe_tensor_parallel_size: 8", ParallelPlan(tp=8)),
        ("tensor_parallel_size: 8\nmoe_expert_parallel_size: 8", ParallelPlan(ep=8)),
        (
            "tensor_parallel_size: 8\nmoe_tensor_parallel_size: 4\nmoe_expert_parallel_size: 2",
            ParallelPlan(ep=2, tp=4),
        ),
        (
            "tensor_parallel_size: 2\npipeline_parallel_size: 2\npp_partition: [20, 12]",
            ParallelPlan(pp=2, tp=2, pp_partition=(20, 12)),
        ),
        ("context_parallel_size: 4\ncp_config: {cp_type: RING}", ParallelPlan(cp=4)),
        (
            "tensor_parallel_size: 2\ncontext_parallel_size: 4\ncp_config: {cp_type: HELIX}",
            ParallelPlan(cp=4, tp=2, cp_type="HELIX"),
        ),
    ],
)
def test_each_configuration_of_the_parallelism_page_is_a_plan(tmp_path, block, plan):
    file = tmp_path / "parallel_config.yaml"
    file.write_text(block)
    assert load_deployment(file).plan == plan


@pytest.mark.parametrize(
    ("block", "sentence"),
    [
        (
            "# TP-8\ntensor_parallel_size: 8\nenable_attention_dp: false\n"
            "# DP-8\ntensor_parallel_size: 8\nenable_attention_dp: true\n",
            "the key 'tensor_parallel_size' stands in line 2 and again in line 5: keep one",
        ),
        (
            "tensor_parallel_size: 8\nmoe_tensor_parallel_size: 8\n\n# EP only\n"
            "tensor_parallel_size: 8\nmoe_expert_parallel_size: 8\n",
            "the key 'tensor_parallel_size' stands in line 1 and again in line 5: keep one",
        ),
    ],
)
def test_the_blocks_of_the_page_as_they_are_printed_repeat_keys(tmp_path, block, sentence):
    (tmp_path / "parallel_config.yaml").write_text(block)
    with pytest.raises(PlanError, match=sentence):
        load_deployment(tmp_path / "parallel_config.yaml")


# Each key.

TP8 = {"tensor_parallel_size": 8}
EFFECTS: list[tuple[str, Any, dict[str, Any], str, Any]] = [
    ("tensor_parallel_size", 4, {}, "plan.tp", 4),
    ("moe_expert_parallel_size", 2, TP8, "plan.ep", 2),
    ("moe_tensor_parallel_size", 2, TP8, "plan.ep", 4),
    ("pipeline_parallel_size", 2, {}, "plan.pp", 2),
    ("pp_partition", [3, 1], {"pipeline_parallel_size": 2}, "plan.pp_partition", (3, 1)),
    ("context_parallel_size", 2, {}, "plan.cp", 2),
    ("cp_config.cp_type", "helix", {"context_parallel_size": 2}, "plan.cp_type", "HELIX"),
    ("data_parallel_size", 2, {}, "plan.dp", 2),
    ("gpus_per_node", 4, {}, "plan.gpus_per_node", 4),
    ("enable_attention_dp", True, TP8, "plan.attention_dp", True),
    ("enable_attention_dp", "partial", TP8, "plan.attention_dp", "partial"),
    (
        "attention_dp_config.enable_balance",
        True,
        {"enable_attention_dp": True},
        "attention_dp_balance",
        True,
    ),
    ("attention_dp_config.timeout_iters", 7, {}, "attention_dp_timeout_iters", 7),
    ("attention_dp_config.batching_wait_iters", 7, {}, "attention_dp_batching_wait_iters", 7),
    ("max_batch_size", 7, {}, "max_batch_size", 7),
    ("max_num_tokens", 7, {}, "max_num_tokens", 7),
    ("max_seq_len", 7, {}, "max_seq_len", 7),
    ("dtype", "bfloat16", {}, "dtype", "bfloat16"),
    ("enable_chunked_prefill", False, {}, "enable_chunked_prefill", False),
    ("disable_overlap_scheduler", True, {}, "disable_overlap_scheduler", True),
    ("stream_interval", 7, {}, "stream_interval", 7),
    ("print_iter_log", True, {}, "print_iter_log", True),
    ("kv_cache_free_gpu_memory_fraction", 0.5, {}, "free_gpu_memory_fraction", 0.5),
    ("kv_cache_config.free_gpu_memory_fraction", 0.5, {}, "free_gpu_memory_fraction", 0.5),
    ("kv_cache_config.tokens_per_block", 7, {}, "tokens_per_block", 7),
    ("kv_cache_config.enable_block_reuse", False, {}, "enable_block_reuse", False),
    ("kv_cache_config.max_tokens", 7, {}, "kv_cache_max_tokens", 7),
    ("kv_cache_config.dtype", "auto", {}, "kv_cache_dtype", None),
    ("kv_cache_config.dtype", "float16", {"dtype": "float16"}, "kv_cache_dtype", None),
    ("cuda_graph_config.batch_sizes", [4, 1, 4], {}, "batch_buckets", (1, 4)),
    ("cuda_graph_config.batch_sizes", [1, 9], {"max_batch_size": 4}, "batch_buckets", (1, 4)),
    ("cuda_graph_config.max_batch_size", 20, {}, "batch_buckets", (1, 4, 16, 20)),
    ("cuda_graph_config.max_batch_size", 20, {}, "max_batch_size", 20),
    ("moe_config.max_num_tokens", 7, {}, "moe_max_num_tokens", 7),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "others", "target", "expected"), EFFECTS)
def test_an_honoured_key_sets_the_plan_or_an_option(key, value, others, target, expected):
    deployment = read_deployment({**others, **nest(key, value)})
    without = read_deployment(others)
    if target.startswith("plan."):
        field = target.removeprefix("plan.")
        assert getattr(deployment.plan, field) == expected != getattr(without.plan, field)
    else:
        assert deployment.options.get(target) == expected
        assert without.options.get(target) != expected or expected is None


def test_every_honoured_key_has_a_test_of_its_effect():
    assert {key for key, *_ in EFFECTS} == set(keys_of(Honoured))


@pytest.mark.parametrize("key", keys_of(Fixed))
def test_a_fixed_key_is_accepted_with_what_happens_anyway_and_else_refused(key):
    fate = KEYS[key]
    assert isinstance(fate, Fixed)
    for value in fate.values:
        assert read_deployment(nest(key, value)).options == {}
    for value in (
        "other",
        77,
        *({True, False} - {v for v in fate.values if v is True or v is False}),
    ):
        with pytest.raises(PlanError) as error:
            read_deployment(nest(key, value))
        assert f"{key}={value!r} ({fate.reason}: use " in str(error.value)


@pytest.mark.parametrize("key", keys_of(Noted))
def test_a_noted_key_is_accepted_with_a_note_and_an_unknown_value_is_refused(key):
    fate = KEYS[key]
    assert isinstance(fate, Noted)
    for value in fate.values:
        assert read_deployment(nest(key, value)).notes == (f"{key}={value!r}: {fate.note}.",)
    with pytest.raises(PlanError, match=r"='other' \(unknown: use "):
        read_deployment(nest(key, "other"))


@pytest.mark.parametrize("key", keys_of(Refused))
def test_a_refused_key_is_named_with_its_reason_and_can_be_dropped(key):
    fate = KEYS[key]
    assert isinstance(fate, Refused)
    mapping = {"tensor_parallel_size": 2, **nest(key, {"num_slots": 4})}
    with pytest.raises(PlanError) as error:
        read_deployment(mapping)
    assert f"{key} ({fate.reason})" in str(error.value)
    deployment = read_deployment(mapping, allow_unsupported=[key])
    assert deployment.plan == ParallelPlan(tp=2)
    [note] = deployment.notes
    assert note.startswith(f"{key}={{") and note.endswith(
        "is dropped, as --allow-unsupported says."
    )


def test_dropping_a_key_leaves_its_section_and_dropping_a_section_leaves_nothing_of_it():
    mapping = {"kv_cache_config": {"dtype": "fp8", "tokens_per_block": 32}}
    one = read_deployment(mapping, allow_unsupported=["kv_cache_config.dtype"])
    assert one.options == {"tokens_per_block": 32}
    assert read_deployment(mapping, allow_unsupported=["kv_cache_config"]).options == {}


@pytest.mark.parametrize("name", ["pipeline_parallel_size", "kv_cache"])
def test_dropping_a_key_that_is_not_given_is_refused_with_those_that_are(name):
    with pytest.raises(
        PlanError, match=f"{name}: no such key is given. Keys that are: max_seq_len"
    ):
        read_deployment({"max_seq_len": 8}, allow_unsupported=[name])


def test_a_key_without_a_value_is_not_given():
    deployment = read_deployment({"speculative_config": None, "cuda_graph_config": None})
    assert deployment == read_deployment({})


# Configurations that contradict themselves, or mean nothing.

BAD: dict[str, str] = {
    "tensor_parallel_size: 8\nmoe_expert_parallel_size: 3": (
        "moe_expert_parallel_size=3 does not divide tensor_parallel_size=8: use 2 or 4."
    ),
    "tensor_parallel_size: 8\nmoe_tensor_parallel_size: 16": (
        "moe_tensor_parallel_size=16 does not divide tensor_parallel_size=8: use 8."
    ),
    "tensor_parallel_size: 8\nmoe_expert_parallel_size: 4\nmoe_tensor_parallel_size: 3": (
        "tensor_parallel_size=8 needs moe_tensor_parallel_size * moe_expert_parallel_size = 8, "
        "got 3 * 4 = 12. With moe_expert_parallel_size=4, use moe_tensor_parallel_size=2."
    ),
    "moe_expert_parallel_size: 2": "does not divide tensor_parallel_size=1: use 1.",
    "tensor_parallel_size: 0": "tensor_parallel_size=0 is not a size",
    "tensor_parallel_size: -8": "tensor_parallel_size=-8 is not a size",
    "tensor_parallel_size: '8'": "tensor_parallel_size='8' is not a size",
    "tensor_parallel_size: 8.0": "tensor_parallel_size=8.0 is not a size",
    "tensor_parallel_size: true": "tensor_parallel_size=True is not a size",
    "tensor_parallel_size: [8]": "tensor_parallel_size=[8] is not a size",
    "moe_expert_parallel_size: 99999999999999999999\ntensor_parallel_size: 8": (
        "moe_expert_parallel_size=99999999999999999999 does not divide"
    ),
    "moe_cluster_parallel_size: 2": "moe_cluster_parallel_size=2 (expert clusters do not exist",
    "tensor_paralel_size: 8": "tensor_paralel_size (unknown: did you mean tensor_parallel_size?)",
    "kv_cache_config: {token_per_block: 8}": "did you mean kv_cache_config.tokens_per_block?",
    "kv_cache_config: 0.9": "gives kv_cache_config=0.9: it must hold a mapping, such as",
    "kv_cache_config: {dtype: fp8}": "kv_cache_config.dtype='fp8' (quantised caches do not run yet",
    "kv_cache_config: {dtype: float16}": "give dtype: float16 too",
    "kv_cache_free_gpu_memory_fraction: 0.8\nkv_cache_config: {free_gpu_memory_fraction: 0.9}": (
        "which are the same: keep one of them"
    ),
    "pp_partition: [4, 4]": "pp_partition=[4, 4] has 2 stages, and pipeline_parallel_size",
    "pipeline_parallel_size: 2\npp_partition: [4, 0]": "is no list of layers a stage",
    "pipeline_parallel_size: 2\npp_partition: 8": "pp_partition=8 is no list of layers a stage",
    "enable_attention_dp: 'yes please'": "enable_attention_dp='yes please' does not exist",
    "attention_dp_config: {enable_balance: true}": "needs several batch ranks: add enable",
    "context_parallel_size: 2\ncp_config: {cp_type: ULYSSES}": "raise that, or use RING",
    "context_parallel_size: 2\ncp_config: {cp_type: STAR}": "use RING, which is exact",
    "context_parallel_size: 2\ncp_config: {cp_type: 3}": "cp_type=3 does not exist here: use RING",
    "cp_config: {cp_type: RING}": "needs context_parallel_size above 1",
    "tensor_parallel_size: 4\ncontext_parallel_size: 2\ncp_config: {cp_type: HELIX}\n"
    "moe_expert_parallel_size: 1": "does not divide tensor_parallel_size=4, over which HELIX",
    "gpus_per_node: 0": "gpus_per_node=0 is not a size",
    "cuda_graph_config: {batch_sizes: all}": "batch_sizes='all' is no list of sizes",
    "cuda_graph_config: {batch_sizes: []}": "batch_sizes=[] is no list of sizes",
    "cuda_graph_config: {batch_sizes: [1, -2]}": "batch_sizes=[1, -2] is no list of sizes",
    "cuda_graph_config: {batch_sizes: [1, 2], max_batch_size: 4}": "the largest size is 2",
    "cuda_graph_config: {max_batch_size: 0}": "cuda_graph_config.max_batch_size=0 is not a size",
    "moe_config: {load_balancer: nowhere.yaml}": "load_balancer='nowhere.yaml' is no file",
    "moe_config: {load_balancer: [1]}": "load_balancer=[1] is neither a path nor a mapping",
    "moe_config: {load_balancer: {slots: 4}}": "has the unknown key 'slots': use num_slots",
    "moe_config: {load_balancer: {}}": "num_slots=None must be a multiple of",
    "tensor_parallel_size: 4\nmoe_expert_parallel_size: 4\n"
    "moe_config: {load_balancer: {num_slots: 9}}": "num_slots=9 must be a multiple of",
    "moe_config: {load_balancer: {num_slots: 2, layer_updates_per_iter: -1}}": (
        "layer_updates_per_iter=-1 is out of range"
    ),
    "moe_config: {load_balancer: {num_slots: 2, initial_global_assignments: {3: [0]}}}": (
        "gives layer 3 1 experts, and num_slots=2"
    ),
    "moe_config: {load_balancer: {num_slots: 1, initial_global_assignments: {a: [0]}}}": (
        "has the key 'a', which is no layer's number"
    ),
    "moe_config: {load_balancer: {num_slots: 1, initial_global_assignments: {0: [x]}}}": (
        "of layer 0 must hold expert ids"
    ),
    "tp: 4\nmoe_expert_parallel_size: 4": "mixes mesh axes (tp) with TensorRT-LLM's keys (moe_exp",
    "tensor_parallel_size: 4\ntensor_parallel_size: 4": "in line 1 and again in line 2",
    "kv_cache_config:\n  dtype: auto\n  'dtype': auto": "stands in line 2 and again in line 3",
    "tp: 2\ntp: 4": "the key 'tp' stands in line 1 and again in line 2",
    "tensor_parallel_size: 2020-99-99": "is not valid YAML: month must be in 1..12",
    f"a: {'[' * 3000}": "is not valid YAML",
    "tensor_parallel_size: !!python/object:os.system {}": "is not valid YAML: could not determine",
    "a: 1\n---\nb: 2": "but found another document, in line 2.",
    "a: 1\n  b: 2": "mapping values are not allowed here, in line 2.",
    "a: \0": "is not valid YAML: unacceptable character #x0000",
    "? [1]\n: 2": "is not valid YAML",
    "tensor_parallel_size: &a [*a]": "is not a size",
    "1: 2": "1 (unknown)",
    "8": "must map axes to sizes",
}


@pytest.mark.parametrize("text", BAD, ids=lambda text: text[:60])
def test_a_configuration_that_cannot_be_is_refused_with_the_reason(tmp_path, text):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(PlanError) as error:
        load_deployment(file)
    assert BAD[text] in str(error.value)
    assert "\n" not in str(error.value)


def test_aliases_that_expand_without_end_are_refused_at_once(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]" for n in range(1, 30)]
    (tmp_path / "bomb.yaml").write_text("\n".join([*lines, "tensor_parallel_size: *a29"]))
    with pytest.raises(PlanError, match="is not a size") as error:
        load_deployment(tmp_path / "bomb.yaml")
    assert len(str(error.value)) < 400


def test_all_keys_that_cannot_be_honoured_are_named_at_once():
    with pytest.raises(PlanError) as error:
        read_deployment({"speculative_config": {}, "kv_cache_config": {"dtype": "fp8"}, "foo": 1})
    assert all(key in str(error.value) for key in ("speculative_", "kv_cache_config.dtype", "foo"))


def test_a_balancer_table_is_read_from_its_file_and_then_refused_as_not_yet(tmp_path):
    table = {"num_slots": 2, "initial_global_assignments": {0: [1, 0]}, "layer_updates_per_iter": 0}
    (tmp_path / "eplb.yaml").write_text(yaml.safe_dump(table))
    with pytest.raises(PlanError, match="expert placement does not run yet"):
        read_deployment({"moe_config": {"load_balancer": str(tmp_path / "eplb.yaml")}})


# Files of mesh axes, overrides, and the way back.


def test_overrides_beat_the_file_and_say_so(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text("tensor_parallel_size: 8\nmax_batch_size: 4")
    deployment = load_deployment(file, overrides={"tensor_parallel_size": 2, "max_batch_size": 4})
    assert deployment.plan == ParallelPlan(tp=2)
    assert deployment.notes == (
        f"tensor_parallel_size=2 beats tensor_parallel_size=8 of the plan '{file}'.",
    )


def test_overrides_beat_a_preset_of_mesh_axes_too():
    deployment = load_deployment("dp4-tp2", overrides={"tensor_parallel_size": 4})
    assert deployment.plan == ParallelPlan(dp=4, tp=4)
    assert "tensor_parallel_size=4 beats tensor_parallel_size=2" in deployment.notes[0]


@pytest.mark.parametrize(
    "plan",
    [
        ParallelPlan(),
        ParallelPlan(tp=8),
        ParallelPlan(ep=8, attention_dp=True),
        ParallelPlan(dp=2, ep=2, tp=4, attention_dp="partial"),
        ParallelPlan(pp=2, tp=2, pp_partition=(3, 5), gpus_per_node=4),
        ParallelPlan(cp=2, ep=2, tp=2),
        ParallelPlan(cp=2, ep=2, tp=2, cp_type="HELIX"),
        ParallelPlan(cp=2, tp=4, cp_type="HELIX"),
    ],
    ids=str,
)
def test_a_plan_written_in_tensorrt_llms_keys_reads_back_as_itself(plan):
    assert read_deployment(to_mapping(plan)).plan == plan


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_published_configuration_written_back_reads_as_itself(name):
    keys, refused = DEPLOYMENTS[name]["keys"], DEPLOYMENTS[name]["refused"]
    first = read_deployment(keys, allow_unsupported=refused)
    again = read_deployment(to_mapping(first.plan, first.options))
    assert (again.plan, again.options) == (first.plan, first.options)


def test_an_option_for_which_there_is_no_key_is_refused():
    with pytest.raises(PlanError, match="TensorRT-LLM has no key for the option layer_loop"):
        to_mapping(ParallelPlan(), {"layer_loop": "scan"})
