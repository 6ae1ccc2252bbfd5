"""Two processes on loopback: one program, one text, and a clear end when one of them dies."""

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from llmjax import LLM, SamplingParams
from llmjax.distributed import DistributedError, initialize
from llmjax.distributed.lifeline import gather, join

TESTS = Path(__file__).resolve().parent
SECONDS_TO_START = 240
"""Generous: machines are shared, and two processes import JAX and compile."""
SECONDS_TO_NOTICE = 60


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


class Pair:
    """Two processes that run the same command, but for their number."""

    def __init__(self, folder: Path, command: Callable[[int, str], list[Any]]):
        self.folder = folder
        address = f"127.0.0.1:{free_port()}"
        self.processes = [self._start(number, command(number, address)) for number in (0, 1)]

    def _start(self, number: int, command: list[Any]) -> subprocess.Popen:
        with self._file(number, "out").open("w") as out, self._file(number, "err").open("w") as err:
            return subprocess.Popen(
                [sys.executable, *map(str, command)], stdin=subprocess.PIPE, stdout=out, stderr=err
            )

    def _file(self, number: int, name: str) -> Path:
        return self.folder / f"{number}.{name}"

    def read(self, number: int, name: str) -> str:
        return self._file(number, name).read_text()

    def wait(self, number: int, seconds: float) -> int:
        return self.processes[number].wait(timeout=seconds)

    def wait_for_report(self, number: int) -> None:
        """Waits until a process has written its report."""
        deadline = time.monotonic() + SECONDS_TO_START
        while not self._file(number, "json").exists():
            assert self.processes[number].poll() is None, self.read(number, "err")
            assert time.monotonic() < deadline, self.read(number, "err")
            time.sleep(0.1)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


def peer_command(folder: Path, task: str, number: int, address: str) -> list[Any]:
    """Runs tests/processes/peer.py with a task."""
    return [TESTS / "processes" / "peer.py", address, number, task, folder / f"{number}.json"]


@pytest.fixture
def start_pair(tmp_path):
    """Starts processes with a task, and ends them after the test."""
    pairs = []

    def start(task: str) -> Pair:
        pairs.append(Pair(tmp_path, partial(peer_command, tmp_path, task)))
        return pairs[-1]

    yield start
    for pair in pairs:
        pair.end()


@pytest.fixture(scope="module")
def agreed(tmp_path_factory) -> tuple[Pair, list[dict[str, Any]]]:
    """Two processes that ran one plan after another, and what each of them saw."""
    folder = tmp_path_factory.mktemp("agree")
    pair = Pair(folder, partial(peer_command, folder, "agree"))
    try:
        for number in (0, 1):
            assert pair.wait(number, SECONDS_TO_START) == 0, pair.read(number, "err")
    finally:
        pair.end()
    return pair, [json.loads(pair.read(number, "json")) for number in (0, 1)]


@cache
def generate_here(family: str) -> list[list[int]]:
    """Greedy tokens of one device of this process."""
    folder = TESTS / "golden" / family
    stored = np.load(folder / "io.npz")
    prompts = [*stored["prompt"].tolist(), *stored["input_ids"].tolist()]
    llm = LLM(
        folder,
        max_seq_len=64,
        max_batch_size=4,
        batch_buckets=(4,),
        max_num_tokens=32,
        kv_cache_max_tokens=256,
        progress=False,
    )
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    tokens = [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params)]
    assert tokens[0] == stored["greedy"][0, stored["prompt"].shape[1] :].tolist()
    return tokens


@pytest.mark.parametrize(
    ("axis", "family"),
    [("tp", "llama"), ("dp", "llama"), ("pp", "llama"), ("ep", "qwen3_moe"), ("cp", "llama")],
)
def test_an_axis_across_two_processes_gives_the_tokens_of_one(axis, family, agreed):
    expected = generate_here(family)
    for of_process in agreed[1]:
        seen = of_process["plans"][axis]
        assert axis in seen["across"]
        assert seen["tokens"] == expected
        assert seen["streamed"] == expected[0]
        assert seen["sharded"] > 5
        assert seen["whole here"] == 0, "a process holds a whole array"


def test_process_0_shares_what_it_knows_and_alone_shows_progress(agreed):
    pair, seen = agreed
    for of_process in seen:
        assert of_process["broadcast"] == {"from": 0, "text": "é" * 300_000}
        assert "max_seq_len: process 0 has 128, process 1 has 256" in of_process["disagreement"]
    assert "generating" in pair.read(0, "err")
    assert "generating" not in pair.read(1, "err")


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("task", ["load", "generate"])
def test_killing_a_process_ends_the_other_with_a_sentence(task, killed, start_pair):
    pair = start_pair(task)
    for number in (0, 1):
        pair.wait_for_report(number)
    pair.processes[killed].kill()
    code = pair.wait(1 - killed, SECONDS_TO_NOTICE)
    said = pair.read(1 - killed, "err")
    assert code not in (None, 0), said
    sentence = f"Process {1 - killed} of 2 ends, because process {killed} ended early"
    assert sentence in said, said


def test_the_command_line_continues_on_two_processes_and_only_the_first_prints(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(TESTS / "golden" / "llama", model)
    words = tokenizers.Tokenizer(WordLevel({f"w{number}": number for number in range(160)}))
    words.pre_tokenizer = WhitespaceSplit()
    words.save(str(model / "tokenizer.json"))
    golden = np.load(model / "io.npz")
    ids = golden["greedy"][0].tolist()
    count = golden["prompt"].shape[1]

    def command(number: int, address: str) -> list[Any]:
        layout = ["--virtual-devices", 2, "--dp", 2, "--tp", 2]
        run = ["--coordinator", address, "--num-hosts", 2, "--host-id", number]
        sampling = ["--temperature", 0, "--max-tokens", 12, "--max-seq-len", 64]
        prompt = " ".join(f"w{token}" for token in ids[:count])
        generate = ["-m", "llmjax.cli", "generate", prompt, "--model", model]
        return [*generate, *layout, *run, *sampling]

    pair = Pair(tmp_path, command)
    try:
        for number in (0, 1):
            assert pair.wait(number, SECONDS_TO_START) == 0, pair.read(number, "err")
    finally:
        pair.end()
    continued = " ".join(f"w{token}" for token in ids[count:])
    assert pair.read(0, "out").strip() == continued
    assert pair.read(1, "out") == ""
    assert "tokens/s" in pair.read(0, "err")
    assert "tokens/s" not in pair.read(1, "err")


def test_process_0_names_the_processes_that_did_not_come():
    with pytest.raises(DistributedError, match=r"Of 3 processes \[1, 2\] did not come to port"):
        gather(free_port(), 3, {}, time.monotonic() + 0.2)


def test_a_taken_port_is_refused_before_anything_starts():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(DistributedError, match=f"cannot listen on port {port}"):
            initialize(f"127.0.0.1:{port}", 2, 0)


def test_a_process_that_finds_no_process_0_says_so():
    with pytest.raises(DistributedError, match="Process 0 did not answer at 127.0.0.1"):
        join("127.0.0.1", free_port(), 1, 2, time.monotonic() + 0.2)


@pytest.mark.parametrize(
    ("hellos", "sentence"),
    [([(1, 3), (1, 3)], "--host-id 1 came twice"), ([(1, 2)], "with --num-hosts 3, process 1")],
)
def test_processes_that_do_not_fit_are_refused_on_both_sides(hellos, sentence):
    port, deadline = free_port(), time.monotonic() + 20
    refused = []

    def come(number: int, count: int) -> None:
        try:
            join("127.0.0.1", port, number, count, deadline)
        except DistributedError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=come, args=hello) for hello in hellos]
    for thread in threads:
        thread.start()
    with pytest.raises(DistributedError, match=sentence):
        gather(port, 3, {}, deadline)
    for thread in threads:
        thread.join()
    assert len(refused) == len(hellos)
    assert all(sentence in text for text in refused)


@pytest.mark.parametrize("address", ["localhost", "localhost:", "localhost:x", ":1", "a:70000"])
def test_an_address_without_host_or_port_is_refused(address):
    with pytest.raises(DistributedError, match="is no address: give process 0's host"):
        initialize(address, 2, 1)


def test_a_number_outside_the_run_is_refused():
    with pytest.raises(
        DistributedError, match="--host-id 2 does not fit --num-hosts 2: use 0 to 1"
    ):
        initialize("127.0.0.1:1234", 2, 2)
