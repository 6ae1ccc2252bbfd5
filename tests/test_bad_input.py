"""What cannot be honoured is refused with a sentence that says what to do."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmjax import LLM, CheckpointError, ConfigError, ParallelPlan, PlanError, SamplingParams
from llmjax.tokenizer import ChatTemplateError

LLAMA = Path(__file__).resolve().parent / "golden" / "llama"
SMALL: dict[str, Any] = dict(
    max_batch_size=2,
    batch_buckets=(2,),
    max_num_tokens=32,
    max_seq_len=48,
    kv_cache_max_tokens=64,
    max_logprobs=3,
    progress=False,
)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """A tiny model with a tokenizer of letters."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("bad") / "model"
    shutil.copytree(LLAMA, folder)
    letters = {chr(97 + number): number for number in range(26)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters | {"?": 26}, "?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    return LLM(folder, **SMALL)


# Models.


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "missing.gguf", Path("nowhere")])
def test_an_unknown_model_is_refused_with_what_can_be_given(name):
    with pytest.raises(CheckpointError, match='does not exist; give a model folder.*"owner/name"'):
        LLM(name)


def test_a_folder_with_only_pickled_weights_is_refused(tmp_path):
    shutil.copy(LLAMA / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="pytorch_model.bin.*safetensors"):
        LLM(tmp_path, **SMALL)


def test_a_truncated_weights_file_is_refused(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(LLAMA, folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        LLM(folder, **SMALL)


def test_a_file_that_only_ends_in_gguf_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUX" + bytes(100))
    with pytest.raises(CheckpointError, match="model.gguf"):
        LLM(tmp_path / "model.gguf", **SMALL)


def test_an_unknown_architecture_is_refused_with_those_that_run(tmp_path):
    config = json.loads((LLAMA / "config.json").read_text())
    unknown = config | {"model_type": "abacus", "architectures": ["AbacusForCausalLM"]}
    shutil.copy(LLAMA / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(unknown))
    with pytest.raises(ConfigError, match="(?i)abacus.*llama"):
        LLM(tmp_path, **SMALL)


# Plans and options.


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        (dict(tensor_parallel_size=16), "needs 16 devices, and 8 cpu devices are here"),
        (dict(plan=ParallelPlan(dp=3, tp=4)), "needs 12 devices.*at most 8"),
        (dict(plan="nowhere.yaml"), "neither a YAML file nor a preset"),
        (dict(plan=ParallelPlan(tp=2), tensor_parallel_size=2), "A plan and .* were given"),
        (dict(data_parallel_size=0), "=0 is not a size: use a whole number from 1 up"),
        (dict(plan=ParallelPlan(pp=31)), "more pipeline stages than the model has layers"),
    ],
    ids=str,
)
def test_a_plan_that_does_not_fit_is_refused(plan, sentence):
    with pytest.raises(PlanError, match=sentence):
        LLM(LLAMA, **SMALL, **plan)


def test_a_plan_file_that_is_no_utf_8_is_refused(tmp_path):
    (tmp_path / "plan.yaml").write_bytes(b"tp: 2 # \xff\xfe")
    with pytest.raises(PlanError, match="plan.yaml.*is not UTF-8 text"):
        LLM(LLAMA, plan=tmp_path / "plan.yaml")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(max_batch=3), "has no option 'max_batch'.*max_batch_size"),
        (dict(pp=2), "has no option 'pp'. Did you mean pipeline_parallel_size?"),
        (dict(max_batch_size=0), "max_batch_size=0 is out of range"),
        (dict(max_num_seqs=2, max_batch_size=2), "are the same option"),
        (dict(dtype="int8"), "dtype='int8' is out of range: use float32"),
        (dict(load_format="pickle"), "load_format='pickle' is unknown"),
    ],
    ids=str,
)
def test_an_option_that_does_not_exist_or_fit_is_refused_by_name(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        LLM(LLAMA, **options)


# Prompts and sampling.


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("", "A prompt is empty"),
        ([[]], "A prompt is empty"),
        (["a", ""], "A prompt is empty"),
        ([3] * 48, "has 48 tokens and max_seq_len=48.*at most 47 prompt tokens"),
        ("a" * 100, "has 100 tokens and max_seq_len=48"),
        ([3, 160], "token id 160: this model's ids are 0 to 159"),
        ([3, -1], "token id -1: this model's ids are 0 to 159"),
        ([3, 1.5], "A prompt holds 1.5: give text, a list of token ids"),
        ([[3, "a"]], "A prompt holds 'a': give text"),
        ({"role": "user", "content": "a"}, "is no prompt: give text"),
        (None, "None is no prompt: give text"),
        ([None], "None is no prompt: give text"),
        ("a\udcffb", "not valid text at character 1"),
    ],
    ids=ascii,
)
def test_a_prompt_that_cannot_run_is_refused_and_leaves_nothing_behind(llm, prompt, sentence):
    with pytest.raises(ConfigError, match=sentence):
        llm.generate(prompt, SamplingParams(max_tokens=2))
    assert not llm.engine.has_work and not llm._live
    assert llm.engine.scheduler.blocks[0].num_available == 4


def test_one_refused_prompt_refuses_all_and_leaves_nothing_behind(llm):
    with pytest.raises(ConfigError, match="token id 160"):
        llm.generate([[1], [2], [160]], SamplingParams(max_tokens=2))
    assert not llm.engine.has_work and not llm._live


def test_messages_for_a_model_without_a_chat_template_are_refused(llm):
    with pytest.raises(ChatTemplateError, match="has no chat template"):
        llm.chat([{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (dict(temperature=-0.1), "temperature=-0.1 is out of range: use a number from 0 up"),
        (dict(temperature=float("nan")), "temperature=nan is out of range"),
        (dict(top_p=-0.5), "top_p=-0.5 is out of range: use a number above 0 and at most 1"),
        (dict(top_k=-2), "top_k=-2 is out of range"),
        (dict(min_p=-0.1), "min_p=-0.1 is out of range"),
        (dict(repetition_penalty=-1), "repetition_penalty=-1 is out of range"),
        (dict(max_tokens=-1), "max_tokens=-1 is out of range"),
        (dict(min_tokens=-1), "min_tokens=-1 is out of range"),
        (dict(n=-1), "n=-1 is out of range"),
        (dict(seed=-1), "seed=-1 is out of range"),
        (dict(logprobs=-1), "logprobs=-1 is out of range"),
        (dict(stop=""), "stop=.* is out of range: use texts that are not empty"),
        (dict(max_tokens=2, min_tokens=3), "min_tokens=3 is above max_tokens=2"),
    ],
    ids=str,
)
def test_sampling_values_out_of_range_are_refused(values, sentence):
    with pytest.raises(ConfigError, match=sentence):
        SamplingParams(**values)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (dict(logprobs=4), "logprobs=4 is above max_logprobs=3"),
        (dict(prompt_logprobs=4), "prompt_logprobs=4 is above max_logprobs=3"),
        (dict(logit_bias={160: 1.0}), "logit_bias holds the token id 160"),
        (dict(stop_token_ids=[999]), "stop_token_ids holds the token id 999"),
        (dict(logits_processors=["absent"]), "No logits processor is called 'absent'"),
    ],
    ids=str,
)
def test_what_this_engine_was_not_built_for_is_refused(llm, values, sentence):
    with pytest.raises(ConfigError, match=sentence):
        llm.generate([[1, 2]], SamplingParams(**values))


def test_sampling_params_must_be_one_or_as_many_as_prompts(llm):
    with pytest.raises(ConfigError, match="2 SamplingParams came with 3 prompts"):
        llm.generate([[1], [2], [3]], [SamplingParams()] * 2)


def test_after_all_refusals_the_model_still_answers(llm):
    stored = np.load(LLAMA / "io.npz")
    ids, count = stored["greedy"][0].tolist(), stored["prompt"].shape[1]
    [output] = llm.generate([ids[:count]], SamplingParams(temperature=0, max_tokens=5))
    assert list(output.outputs[0].token_ids) == ids[count : count + 5]
