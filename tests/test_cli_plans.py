"""Flags of the command line that lay out the model; the model itself is never loaded."""

from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from llmjax import ConfigError, ParallelPlan, PlanError
from llmjax.cli import app, session

PUBLISHED = "tensor_parallel_size: 8\nmoe_expert_parallel_size: 8\nmax_batch_size: 64\n"


@pytest.fixture
def asked(monkeypatch) -> dict[str, Any]:
    """What LLM is called with; it then ends the command."""
    seen: dict[str, Any] = {}

    def stop(model: str, **keywords: Any) -> None:
        seen.update(keywords)
        raise typer.Exit()

    monkeypatch.setattr(session, "LLM", stop)
    return seen


def call(*arguments: object, command: str = "generate") -> None:
    texts = ["hello"] if command == "generate" else []
    words = [command, *texts, *map(str, arguments)]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize(
    ("flags", "plan"),
    [
        ("--tp 8", ParallelPlan(tp=8)),
        ("--tp 8 --ep 2", ParallelPlan(ep=2, tp=4)),
        ("--tp 8 --moe-tp 2", ParallelPlan(ep=4, tp=2)),
        ("--tp 8 --ep 4 --moe-tp 2", ParallelPlan(ep=4, tp=2)),
        ("--tp 2 --dp 2 --attention-dp", ParallelPlan(dp=2, tp=2, attention_dp=True)),
        ("--pp 2 --cp 2", ParallelPlan(pp=2, cp=2)),
        ("--cp 2 --cp-type helix", ParallelPlan(cp=2, cp_type="HELIX")),
        ("--pp 2 --pp-partition 20,10", ParallelPlan(pp=2, pp_partition=(20, 10))),
    ],
)
def test_flags_are_sizes_in_tensorrt_llms_words(asked, command, flags, plan):
    call(*flags.split(), command=command)
    assert asked["plan"] == plan


def test_the_dispatch_and_the_limits_reach_the_engine(asked):
    call("--dispatch", "all_to_all", "--dtype", "bfloat16", "--max-seq-len", 64)
    assert asked["moe_dispatch"] == "all_to_all"
    assert (asked["dtype"], asked["max_seq_len"], asked["max_batch_size"]) == ("bfloat16", 64, 1)


@pytest.mark.parametrize("flag", ["--plan", "--config"])
def test_a_file_is_read_and_its_batch_size_stays(asked, tmp_path, flag):
    (tmp_path / "config.yaml").write_text(PUBLISHED)
    call(flag, tmp_path / "config.yaml")
    assert (asked["plan"], asked["max_batch_size"]) == (ParallelPlan(ep=8), 64)


def test_a_flag_beats_the_file_and_says_so(asked, tmp_path, caplog):
    (tmp_path / "config.yaml").write_text(PUBLISHED)
    call("--config", tmp_path / "config.yaml", "--tp", 16, "--max-seq-len", 64)
    assert asked["plan"] == ParallelPlan(ep=8, tp=2)
    [sentence] = caplog.messages
    assert sentence.startswith("tensor_parallel_size=16 beats tensor_parallel_size=8 of the plan ")


def test_refused_keys_are_dropped_one_by_one_with_a_warning(asked, tmp_path, caplog):
    file = tmp_path / "config.yaml"
    file.write_text(PUBLISHED + "speculative_config: {}\nnum_postprocess_workers: 4\n")
    with pytest.raises(PlanError, match="num_postprocess_workers=4") as error:
        call("--config", file, "--allow-unsupported", "speculative_config")
    assert "speculative_config (" not in str(error.value)
    drop = [
        f"--allow-unsupported={key}" for key in ("speculative_config", "num_postprocess_workers")
    ]
    caplog.clear()
    call("--config", file, *drop)
    assert asked["plan"] == ParallelPlan(ep=8)
    assert [message.partition("=")[0] for message in caplog.messages] == [
        "speculative_config",
        "num_postprocess_workers",
    ]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--tp 8 --ep 3", "moe_expert_parallel_size=3 does not divide tensor_parallel_size=8"),
        ("--tp 8 --ep 4 --moe-tp 4", r"got 4 \* 4 = 16. With moe_expert_parallel_size=4, use"),
        ("--tp 0", "tensor_parallel_size=0 is not a size"),
        ("--allow-unsupported tp", "--allow-unsupported tp: no such key is given"),
        ("--config nowhere.yaml", "'nowhere.yaml' is neither a YAML file nor a preset"),
        ("--dispatch mail", "moe_dispatch='mail' is out of range"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(asked, flags, sentence):
    with pytest.raises((PlanError, ConfigError), match=sentence):
        call(*flags.split())
    assert not asked


def test_the_help_of_both_commands_lists_the_same_layouts():
    runner = CliRunner(env={"COLUMNS": "200"})
    for command in ("generate", "chat"):
        text = runner.invoke(app, [command, "--help"]).output
        flags = ("--tp", "--ep", "--moe-tp", "--cp", "--pp", "--dp", "--config", "--dispatch")
        assert all(flag in text for flag in (*flags, "--allow-unsupported", "--attention-dp"))
