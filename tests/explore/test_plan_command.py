"""`llmjax plan`: its words reach `describe`, and what comes back is printed."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llmjax import describe
from llmjax.cli import app
from meshes import ParallelPlan

LLAMA = Path(__file__).resolve().parent.parent / "golden" / "llama"
SIZES: dict[str, Any] = {"max_batch_size": 4, "max_num_tokens": 32, "max_seq_len": 64}
TENSOR = ParallelPlan(tp=2)
FLAGS = [part for key, size in SIZES.items() for part in (f"--{key.replace('_', '-')}", size)]


def plan(*arguments: object) -> str:
    """What the command prints."""
    command = ["plan", "--model", LLAMA, *FLAGS, *arguments]
    result = CliRunner().invoke(app, list(map(str, command)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def described() -> Any:
    return describe(TENSOR, LLAMA, **SIZES)


def test_a_plan_is_printed_as_described(described):
    assert plan("--tp", 2) == f"{described}\n"


def test_two_plans_are_compared(described, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("tp: 4\nattention_dp: true\n")
    attention_dp = describe(ParallelPlan(tp=4, attention_dp=True), LLAMA, **SIZES)
    assert plan("--tp", 2, "--diff", other) == f"{described.diff(attention_dp)}\n"


def test_sizes_are_those_of_tensorrt_llm(monkeypatch):
    given = {}

    def record(plan: Any, model: str, **options: Any) -> str:
        given.update(options, plan=plan)
        return "described"

    monkeypatch.setattr("llmjax.cli.plan.describe", record)
    sizes = ["--tp", 8, "--ep", 4, "--dp", 2, "--attention-dp", "--dispatch", "allgather"]
    assert plan(*sizes, "--dtype", "bfloat16", "--allow-unsupported", "a_key") == "described\n"
    found = {key: value for key, value in given.items() if value is not None}
    assert found == SIZES | {
        "tensor_parallel_size": 8,
        "moe_expert_parallel_size": 4,
        "data_parallel_size": 2,
        "enable_attention_dp": True,
        "moe_dispatch": "allgather",
        "dtype": "bfloat16",
        "device_gib": 80,
        "allow_unsupported": ["a_key"],
    }
