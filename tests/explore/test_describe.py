"""Descriptions against engines that run, and against arithmetic."""

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import pytest

from llmjax import LLM, ConfigError, ParallelPlan, PlanError, describe
from llmjax.config import EngineConfig, ModelConfig
from llmjax.explore import Description, lay_out, read_collectives
from llmjax.explore.layout import read_config
from llmjax.explore.steps import Programs, Step, rebuild

LLAMA = Path(__file__).resolve().parent.parent / "golden" / "llama"
"""3 layers, 4 query and 2 key/value heads of 16, 64 in the stream, 96 in the MLP, 160 tokens."""
MIXTRAL = LLAMA.parent / "mixtral"
TENSOR = ParallelPlan(tp=2)
ATTENTION_DP = ParallelPlan(tp=4, attention_dp=True)
SMALL: dict[str, Any] = {"max_batch_size": 4, "max_num_tokens": 32, "max_seq_len": 64}
"""The same in all tests of descriptions, so that each program is compiled once."""


@pytest.fixture(scope="module")
def described() -> dict[ParallelPlan, Description]:
    return {plan: describe(plan, LLAMA, **SMALL) for plan in (TENSOR, ATTENTION_DP)}


@pytest.fixture(scope="module")
def narrow() -> Description:
    """Attention data parallelism in bfloat16."""
    return describe(ATTENTION_DP, LLAMA, **SMALL, dtype="bfloat16")


def count_calls(step: Step) -> Counter[tuple[str, str]]:
    """Calls of each part and kind, outside branches."""
    calls: Counter[tuple[str, str]] = Counter()
    for one in step.collectives:
        if one.when == "always":
            calls[one.part, one.kind] += one.count
    return calls


def test_a_description_lists_what_the_steps_of_an_engine_send(described):
    plan = ATTENTION_DP
    pool = {"batch_buckets": (4,), "kv_cache_max_tokens": 256}
    runner = LLM(LLAMA, plan=plan, progress=False, **SMALL, **pool).engine.runner
    decode = max(bucket for bucket in runner.buckets if not bucket.prefill_tokens)
    for step, bucket in zip(described[plan].steps, (decode, max(runner.buckets)), strict=True):
        assert (step.rows, step.tokens) == (bucket.rows, bucket.tokens)
        assert step.collectives == read_collectives(runner.compiled_text(bucket), plan.sizes)


def test_tensor_parallelism_sums_twice_a_layer_and_attention_dp_not_in_attention(described):
    for step in described[TENSOR].steps:
        calls = count_calls(step)
        assert calls["attention", "all-reduce"] == calls["mlp", "all-reduce"] == 3
        assert calls["embed", "all-reduce"] == 1 and calls.total() == 7
        # 2 bytes would be 16 bits: this model is in float32.
        sent = {one.num_bytes for one in step.collectives if one.part in ("attention", "mlp")}
        assert sent == {step.tokens * 64 * 4}
    for step in described[ATTENTION_DP].steps:
        calls = count_calls(step)
        assert calls["mlp", "all-gather"] == calls["mlp", "all-reduce"] == 3
        assert "attention" not in {part for part, _ in calls}


def test_a_token_of_kv_cache_takes_its_layers_heads_and_features(described):
    whole = 2 * 3 * 2 * 16 * 4
    split, kept = described[TENSOR], described[ATTENTION_DP]
    assert (split.kv_token_bytes, split.kv_token_device_bytes) == (whole, whole / 2)
    assert (kept.kv_token_bytes, kept.kv_token_device_bytes) == (whole, whole)
    # On 8 ranks each of the 2 heads is stored 4 times.
    repeated = replace(split, layout=lay_out(LLAMA, ParallelPlan(tp=8), dtype="float32"))
    assert (repeated.kv_token_bytes, repeated.kv_token_device_bytes) == (4 * whole, whole / 2)
    # One of four context ranks has it.
    dealt = replace(split, layout=lay_out(LLAMA, ParallelPlan(cp=4), dtype="float32"))
    assert (dealt.kv_token_bytes, dealt.kv_token_device_bytes) == (whole, whole / 4)


def test_in_bfloat16_the_model_sends_half_the_bytes(described, narrow):
    wide = described[ATTENTION_DP]
    for step, halved in zip(wide.steps, narrow.steps, strict=True):
        sizes = [one.total_bytes for one in step.collectives if one.part == "mlp"]
        halves = [one.total_bytes for one in halved.collectives if one.part == "mlp"]
        assert halves and sum(halves) * 2 == sum(sizes)


def test_a_description_prints_every_weight_and_every_collective(described):
    text = str(described[TENSOR])
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == f"{LLAMA} in float32 on tp=2, 2 devices".split()
    assert ["KV", "cache,", "a", "token", "768", "B", "384", "B"] in lines
    row = "mlp.down layers, ffn, - 3 x 96 x 64 -, tp, - 72.0 KiB 36.0 KiB"
    assert row.split() in lines
    assert "attention all-reduce tp 2 3 1.0 KiB 3.0 KiB".split() in lines
    assert "compiled for cpu" in text
    html = described[TENSOR]._repr_html_()
    assert html.count("<table>") == 4 and "mlp.down" in html


def test_the_dispatch_of_experts_is_described_as_it_is_compiled():
    plan = ParallelPlan(ep=2, attention_dp=True)
    found = describe(plan, MIXTRAL, **SMALL, moe_dispatch="all_to_all", device_gib=0.003)
    calls = count_calls(found.steps[0])
    assert calls["mlp", "all-to-all"] > 0 and calls["mlp", "all-gather"] == 0
    # Decode steps of 1 and 4 requests, and the prefill step of 32 tokens beside 4 decodes.
    assert [one.tokens for one in found.traffic] == [1, 4, 36]
    assert {one.method for one in found.traffic} == {"all_to_all"}
    buffers = [one.buffer_bytes for one in found.traffic]
    assert buffers == sorted(buffers) and buffers[0] > 0
    # A tenth of what the weights leave is for buffers: it holds a part of the largest step.
    assert 0 < found.traffic[-1].largest_round < 36
    text = [line.split() for line in str(found).splitlines()]
    assert ["36", "all_to_all", "1"] in [line[:3] for line in text]


def test_a_pipeline_in_bfloat16_with_one_request_a_rank_is_described():
    sizes = {"max_batch_size": 2, "batch_buckets": (2,), "token_buckets": (32,)}
    found = describe(
        ParallelPlan(pp=2, cp=2), LLAMA, **(SMALL | sizes), dtype="bfloat16", device_gib=1e-6
    )
    handed = [one for one in found.steps[0].collectives if one.kind == "collective-permute"]
    assert [(one.axes, one.num_bytes) for one in handed] == [(("pp",), 1 * 64 * 2)]
    lines = [line.split() for line in str(found).splitlines()]
    assert ["0", "0", "to", "1", "2", "0"] in lines and ["1", "2", "to", "2", "1", "1"] in lines


def test_a_difference_holds_the_rows_that_differ_and_no_others(described):
    one, other = described[TENSOR], described[ATTENTION_DP]
    assert str(one.diff(one)).endswith("no difference")
    report = one.diff(other)
    assert report.title == "tp=2 and tp=4,attention_dp"
    rows = {row[0]: row[1:] for table in report.tables for row in table.rows}
    assert rows["KV cache, a token"] == ("768 B, 384 B", "768 B, 768 B")
    assert rows["attention, all-reduce over tp"][1] == "-"
    assert rows["mlp, all-gather over tp"][0] == "-"
    assert "mlp.down" in rows and "norm.scale" not in rows


def test_two_types_on_one_plan_are_told_apart_by_name(described, narrow):
    title = described[ATTENTION_DP].diff(narrow).title
    assert title == f"{LLAMA} in float32 and {LLAMA} in bfloat16"


def test_too_few_devices_here_give_the_same_steps_from_another_process(described, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    apart = describe(TENSOR, LLAMA, **SMALL)
    assert apart == described[TENSOR]
    # What is refused there is refused here, in the same words.
    with pytest.raises(ConfigError, match="batch_buckets ends at 2, below max_batch_size=4"):
        describe(TENSOR, LLAMA, **SMALL, batch_buckets=(2,))
    with pytest.raises(ConfigError, match="functions cannot be sent there"):
        describe(TENSOR, LLAMA, **SMALL, logits_processors={"same": abs})


def test_a_model_that_no_machine_here_could_hold_is_described():
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=128256,
        hidden_size=16384,
        num_layers=126,
        num_heads=128,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=53248,
        max_position_embeddings=1024,
        dtype="bfloat16",
    )
    found = describe(ParallelPlan(tp=8), config)
    assert found.model == "LlamaForCausalLM" and found.layout.num_bytes > 800e9
    assert count_calls(found.steps[0])["mlp", "all-reduce"] == 126
    assert found.kv_token_bytes == 2 * 126 * 8 * 128 * 2


def test_a_plan_may_be_given_in_all_the_words_that_llm_takes(described):
    assert describe(None, LLAMA, **SMALL, tensor_parallel_size=2) == described[TENSOR]
    with pytest.raises(PlanError, match="neither a YAML file nor a preset"):
        describe("tp3", LLAMA)


def test_what_goes_to_another_process_and_back_arrives_as_it_was(described):
    engine = EngineConfig(batch_buckets=(1, 8), compiler_options={"some_option": True})
    plan = ParallelPlan(pp=2, pp_partition=(1, 2))
    programs = Programs(steps=described[TENSOR].steps, token_counts=(1, 8))
    for value in (read_config(LLAMA), engine, plan, programs):
        assert rebuild(type(value), json.loads(json.dumps(asdict(value)))) == value


def test_a_plan_of_one_device_sends_nothing_and_says_so(described):
    alone = lay_out(LLAMA, ParallelPlan(), dtype="float32")
    steps = tuple(replace(step, collectives=()) for step in described[TENSOR].steps)
    text = str(replace(described[TENSOR], layout=alone, steps=steps))
    assert "on one device, 1 device\n" in text and text.count("it sends nothing") == 2
