"""The command line, mostly inside this process, and outside it where devices or exits matter."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from typer.testing import CliRunner

from llmjax import ConfigError
from llmjax.cli import app
from llmjax.llm import LLM

LLAMA = Path(__file__).resolve().parent / "golden" / "llama"
FRANCE = "What is the capital of France?"
PARIS = "The capital of France is Paris.\n"
COMMAND = [sys.executable, "-m", "llmjax.cli"]


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama with a tokenizer of 160 words: w0, w1, ..."""
    folder = tmp_path_factory.mktemp("cli") / "model"
    shutil.copytree(LLAMA, folder)
    words = tokenizers.Tokenizer(WordLevel({f"w{number}": number for number in range(160)}))
    words.pre_tokenizer = WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def golden() -> tuple[str, str]:
    """A prompt in words, and its 12 greedy words."""
    stored = np.load(LLAMA / "io.npz")
    ids, count = stored["greedy"][0].tolist(), stored["prompt"].shape[1]
    words = [f"w{token}" for token in ids]
    return " ".join(words[:count]), " ".join(words[count:])


def invoke(*arguments: object, **options):
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False, **options)
    assert result.exit_code == 0, result.output
    return result


def test_generate_answers_paris_and_sums_up_on_stderr():
    result = invoke("generate", FRANCE, "--temperature", 0, "--max-seq-len", 64)
    assert result.stdout == PARIS
    summary = result.stderr.strip().splitlines()[-2:]
    assert summary[0].startswith("8 tokens: the first after ") and "tokens/s" in summary[0]
    assert summary[1].startswith("one device on 1 x cpu, float32")


def test_virtual_devices_and_tp_give_the_same_answer_from_a_fresh_process():
    layout = ["--virtual-devices", "8", "--tp", "2", "--max-seq-len", "64"]
    command = [*COMMAND, "generate", FRANCE, "--temperature", "0", *layout]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == PARIS, done.stderr
    assert "tp=2 on 2 x cpu" in done.stderr


@pytest.mark.parametrize(
    "layout",
    [["--dp", "4", "--tp", "2"], ["--tp", "4", "--attention-dp"], ["--plan", "dp4-tp2"]],
    ids=" ".join,
)
def test_several_prompts_under_a_plan_are_printed_in_order(layout, spoken, golden):
    prompt, continued = golden
    other = "w5 w6 w7"
    result = invoke(
        *["generate", prompt, other, prompt, "--model", spoken, "--raw", *layout],
        *["--temperature", 0, "--max-tokens", 12, "--max-seq-len", 32],
    )
    blocks = result.stdout.split("\n\n")
    assert blocks[0] == blocks[2] == f"> {prompt}\n{continued}"
    assert blocks[1].startswith(f"> {other}\nw")
    assert "36 tokens for 3 prompts" in result.stderr


def test_raw_continues_the_text_and_a_dash_reads_standard_input(spoken, golden):
    prompt, continued = golden
    sampling = ["--temperature", 0, "--max-tokens", 12, "--max-seq-len", 32]
    result = invoke("generate", "-", "--model", spoken, "--raw", *sampling, input=f"{prompt}\n")
    assert result.stdout.split() == continued.split()


def test_a_model_made_of_experts_gives_the_same_answer(spoken, golden):
    layout = ["--tp", 2, "--ep", 2, "--upcycle", "4x2"]
    sampling = ["--temperature", 0, "--max-tokens", 12, "--max-seq-len", 32]
    result = invoke("generate", golden[0], "--model", spoken, "--raw", *layout, *sampling)
    assert result.stdout.split() == golden[1].split()


def test_experts_that_cannot_be_made_are_refused(spoken):
    with pytest.raises(ConfigError, match="upcycle='8' is not understood"):
        invoke("generate", "w1", "--model", spoken, "--upcycle", "8")


def test_sampling_flags_reach_the_model(spoken, golden, monkeypatch):
    seen = []
    stream = LLM.stream

    def watch(self, prompt, params):
        seen.append(params)
        return stream(self, prompt, params)

    monkeypatch.setattr(LLM, "stream", watch)
    flags = ["--temperature", 0.5, "--top-p", 0.8, "--top-k", 9, "--seed", 3, "--max-tokens", 4]
    flags += ["--stop", "w1 w2", "--stop", "w3", "--dtype", "bfloat16", "--max-seq-len", 32]
    result = invoke("generate", golden[0], "--model", spoken, *flags)
    [params] = seen
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (0.5, 0.8, 9, 3)
    assert params.max_tokens == 4 and list(params.stop) == ["w1 w2", "w3"]
    assert "bfloat16" in result.stderr


def test_chat_remembers_what_was_said_and_ends_at_an_empty_line(spoken, monkeypatch):
    (spoken / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }} {% endfor %}"
    )
    asked = []
    stream = LLM.stream

    def watch(self, prompt, params):
        asked.append([message["content"] for message in prompt])
        return stream(self, prompt, params)

    monkeypatch.setattr(LLM, "stream", watch)
    flags = ["--temperature", 0, "--max-tokens", 3, "--max-seq-len", 32]
    result = invoke(
        *["chat", "--model", spoken, "--system", "w9", *flags], input="w1 w2\nw3\n\nw4\n"
    )
    assert asked[0] == ["w9", "w1 w2"]
    assert asked[1][:2] == asked[0] and asked[1][3] == "w3" and len(asked) == 2
    assert asked[1][2] in result.stdout


def test_info_and_version_say_what_is_here():
    info = invoke("info").stdout
    assert "0.12" in info or "0.11" in info
    assert "8 x cpu" in info and "decode attention" in info and "reference" in info
    assert invoke("--version").stdout.startswith("llmjax 0.")


def test_what_the_user_can_mend_is_one_sentence_and_exit_code_1(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(3))
    (tmp_path / "plan.yaml").write_bytes(b"\xff\xfe")
    cases = {
        "CheckpointError: ./nowhere does not exist": ["a", "--model", "./nowhere"],
        "broken.gguf": ["a", "--model", str(tmp_path / "broken.gguf")],
        "PlanError: The plan (tp=64) needs 64 devices": ["a", "--tp", "64"],
        "is not UTF-8 text": ["a", "--plan", str(tmp_path / "plan.yaml")],
        "ConfigError: temperature=-1.0 is out of range": ["a", "--temperature", "-1"],
        "ConfigError: Standard input is not UTF-8 text (byte 1)": ["-"],
        "DistributedError: --host-id 2 does not fit": [
            "a",
            "--coordinator",
            "a:1",
            "--host-id",
            "2",
        ],
    }
    running = []
    for arguments in cases.values():
        command = [*COMMAND, "generate", *arguments]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        running.append(subprocess.Popen(command, **pipes))
    for process, sentence in zip(running, cases, strict=True):
        out, err = process.communicate(b"a\xffb")
        said = err.decode()
        assert process.returncode == 1, said
        assert sentence in said and "Traceback" not in said
        assert len(said.strip().splitlines()) == 1, said
        assert out == b""


def test_an_unknown_option_is_named():
    result = CliRunner().invoke(app, ["generate", "a", "--no-such-option"])
    assert result.exit_code == 2
    assert "--no-such-option" in result.stderr


def test_help_names_every_command():
    text = invoke("--help").stdout
    assert all(command in text for command in ("generate", "chat", "info"))
