"""Words of TensorRT-LLM on their way into LLM: what beats what, and what the engine makes of it."""

import logging
from pathlib import Path
from typing import Any

import pytest

from llmjax import LLM, ConfigError, ParallelPlan, PlanError, SamplingParams
from llmjax.plans import resolve

LLAMA = Path(__file__).resolve().parent / "golden" / "llama"
SMALL: dict[str, Any] = dict(
    max_num_tokens=32, max_seq_len=48, kv_cache_config={"max_tokens": 64}, progress=False
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A configuration in TensorRT-LLM's keys."""
    path = tmp_path / "config.yaml"
    path.write_text("tensor_parallel_size: 2\nkv_cache_config: {tokens_per_block: 32}\n")
    return path


def test_a_file_and_the_same_keys_as_keywords_are_the_same(file):
    keywords = dict(tensor_parallel_size=2, kv_cache_config={"tokens_per_block": 32})
    assert resolve(file, {}) == resolve(None, keywords)


def test_keywords_beat_the_file_with_a_warning(file, caplog):
    plan, options = resolve(file, dict(tensor_parallel_size=4, block_size=16))
    assert (plan, options) == (ParallelPlan(tp=4), {"tokens_per_block": 16})
    assert caplog.messages == [
        f"tensor_parallel_size=4 beats tensor_parallel_size=2 of the plan '{file}'.",
        f"tokens_per_block=16 beats kv_cache_config.tokens_per_block=32 of the plan '{file}'.",
    ]


def test_notes_are_warnings(caplog):
    with caplog.at_level(logging.WARNING, logger="llmjax"):
        resolve(None, dict(trust_remote_code=True))
    assert caplog.messages == ["trust_remote_code=True: no code from a checkpoint ever runs."]


def test_a_plan_value_takes_options_beside_it_but_no_sizes():
    plan = ParallelPlan(tp=2, attention_dp=True)
    given = dict(attention_dp_config={"enable_balance": True}, moe_dispatch="allgather")
    assert resolve(plan, given) == (
        plan,
        {"attention_dp_balance": True, "moe_dispatch": "allgather"},
    )
    for sizes in ({"moe_expert_parallel_size": 2}, {"cp_config": {"cp_type": "RING"}}):
        with pytest.raises(PlanError, match=f"A plan and {next(iter(sizes))} were given"):
            resolve(plan, sizes)


@pytest.mark.parametrize(
    ("keywords", "sentence"),
    [
        (
            dict(block_size=16, tokens_per_block=16),
            "block_size and tokens_per_block are|tokens_per",
        ),
        (
            dict(block_size=16, kv_cache_config={"tokens_per_block": 16}),
            "kv_cache_config.tokens_per_block and tokens_per_block are the same option",
        ),
        (
            dict(kv_cache_config={"tokens_per_block": 0}),
            "kv_cache_config.tokens_per_block=0 is out",
        ),
        (dict(kv_cache_config={"enable_block_reuse": "yes"}), "enable_block_reuse='yes' is out of"),
        (
            dict(attention_dp_config={"timeout_iters": -1}),
            "attention_dp_config.timeout_iters=-1 is",
        ),
        (dict(stream_interval=0), "stream_interval=0 is out of range: use a whole number from 1"),
        (dict(moe_dispatch="mail"), 'moe_dispatch=.mail. is out of range: use "auto", "allreduce"'),
        (dict(moe_config={"max_num_tokens": 0}), "moe_config.max_num_tokens=0 is out of range"),
        (dict(dtype="fp8"), "dtype='fp8' is out of range"),
        (dict(tensor_paralel_size=2), "LLM.. has no option 'tensor_paralel_size'.*docs/trtllm.md"),
    ],
    ids=str,
)
def test_an_option_out_of_range_is_refused_under_the_name_that_the_user_wrote(keywords, sentence):
    with pytest.raises(ConfigError, match=sentence):
        resolve(None, keywords)


def test_a_published_key_that_cannot_be_honoured_can_be_dropped():
    with pytest.raises(PlanError, match=r"LLM\(\) asks for what cannot.*speculative decoding"):
        LLM(LLAMA, speculative_config={"decoding_type": "MTP"}, **SMALL)
    assert (
        resolve(None, {"speculative_config": {}}, allow_unsupported=["speculative_config"])[1] == {}
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(pp_partition=[7]), r"pp_partition=\[7\] deals out 7 layers, and the model has \d+"),
        (
            dict(gpus_per_node=3),
            "gpus_per_node=3, and process 0 has 8 devices: use a multiple of 8",
        ),
    ],
    ids=str,
)
def test_what_the_model_or_the_devices_forbid_is_refused_before_weights_are_read(options, sentence):
    with pytest.raises(PlanError, match=sentence):
        LLM(LLAMA, **SMALL, **options)


def test_a_published_file_sets_the_engine_that_runs(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(
        "tensor_parallel_size: 2\nenable_attention_dp: true\nmax_batch_size: 2\nmax_seq_len: 32\n"
        "max_num_tokens: 32\nkv_cache_config: {tokens_per_block: 8, max_tokens: 64}\n"
        "cuda_graph_config: {batch_sizes: [2, 1], enable_padding: true}\n"
        "disable_overlap_scheduler: true\nstream_interval: 4\nprint_iter_log: true\n"
        "attention_dp_config: {enable_balance: true, timeout_iters: 7, batching_wait_iters: 3}\n"
        "moe_config: {max_num_tokens: 16}\n"
    )
    llm = LLM(LLAMA, plan=path, progress=False)
    assert llm.plan == ParallelPlan(tp=2, attention_dp=True)
    runner = llm.engine.runner
    assert (runner.page_size, runner.max_batch_size, runner.num_pages) == (8, 2, 8)
    limits = runner.scheduler_config
    assert (limits.attention_dp_balance, runner.engine.moe_max_num_tokens) == (True, 16)
    assert limits.attention_dp_timeout_iters == 7 and limits.attention_dp_batching_wait_iters == 3
    assert sorted({bucket.decodes for bucket in runner.buckets}) == [1, 2]
    stream = llm.stream([1, 2, 3], SamplingParams(temperature=0, max_tokens=10, ignore_eos=True))
    assert [len(delta.token_ids) for delta in stream] == [1, 3, 4, 2]
    assert llm.engine.stats.overlapped_steps == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 10 and lines[0].startswith("step 1: 1 running, 0 waiting, 3 tokens so far")
