"""Folders of safetensors: what is read from them, and what is said when they are damaged."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from llmjax.weights.checkpoint import open_checkpoint
from llmjax.weights.interface import CheckpointError

ARRAYS = {
    "embed": np.arange(24, dtype=np.float32).reshape(4, 6),
    "half": np.arange(5).astype(jnp.bfloat16),
    "ids": np.arange(3),
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file(ARRAYS, tmp_path / "model.safetensors")
    return tmp_path


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(folder)
    return str(raised.value)


def test_a_folder_gives_its_config_and_tensors(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.generation_config == {"eos_token_id": 2}
    assert set(checkpoint.tensors) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert checkpoint.tensors[name].shape == array.shape
        assert checkpoint.tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(checkpoint.read(name), array)


def test_tensors_are_views_of_the_mapped_file(folder):
    assert isinstance(open_checkpoint(folder).read("embed"), np.memmap)


def test_shards_are_read_through_their_index(folder):
    (folder / "model.safetensors").unlink()
    save_file({"embed": ARRAYS["embed"]}, folder / "a.safetensors")
    save_file({"half": ARRAYS["half"]}, folder / "b.safetensors")
    index = {"weight_map": {"embed": "a.safetensors", "half": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(folder)
    np.testing.assert_array_equal(checkpoint.read("half"), ARRAYS["half"])

    (folder / "b.safetensors").unlink()
    assert "names 2 files, of which 1 are missing: b.safetensors" in refusal(folder)


def test_an_index_may_not_leave_the_folder(folder):
    index = {"weight_map": {"embed": "../a.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "../a.safetensors, which is not a file of the same folder" in refusal(folder)


def test_a_tensor_held_by_two_files_is_named(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({"ids": ARRAYS["ids"]}, folder / "b.safetensors")
    assert "holds ids twice, in a.safetensors and in b.safetensors" in refusal(folder)


def test_pickle_weights_are_refused_unread(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04never loaded")
    assert "has only pickle weights (pytorch_model.bin)" in refusal(folder)


def test_a_gguf_file_inside_a_folder_is_pointed_out(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.gguf").write_bytes(b"GGUF")
    assert f"give the file {folder / 'model.gguf'} itself" in refusal(folder)


def test_an_empty_folder_and_one_without_config_say_what_is_needed(folder, tmp_path_factory):
    assert "has nothing in it; a model folder needs" in refusal(tmp_path_factory.mktemp("empty"))
    (folder / "config.json").unlink()
    assert "has no config.json; a model folder needs" in refusal(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": "\xff"}', "config.json is not UTF-8 text (byte 7)"),
        (b'{"a": }', "config.json is not JSON (line 1, column 7"),
        (b"[1]", "config.json holds a JSON list, not an object"),
    ],
)
def test_a_config_that_cannot_be_read_is_explained(folder, content, message):
    (folder / "config.json").write_bytes(content)
    assert message in refusal(folder)


def header_of(entries) -> bytes:
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "its header needs 8 bytes and the file has 0"),
        (b"\xff" * 40, "its header needs 18446744073709551623 bytes and the file has 40"),
        ((4).to_bytes(8, "little") + b"{{{{", "its header is not JSON"),
        (header_of([]), "its header is not an object"),
        (header_of({"w": {"dtype": "F32"}}), "entry of w is incomplete"),
        (header_of({"w": ENTRY}) + b"1234", "tensor w ends at byte 77 and the file has 73"),
        (header_of({"w": ENTRY | {"shape": [3]}}) + b"12345678", "needs 3 x 4 bytes"),
        (header_of({"w": ENTRY | {"shape": [-1, -2]}}) + b"12345678", "of shape (-1, -2)"),
        (header_of({"w": ENTRY | {"dtype": "F4"}}) + b"12345678", "tensor w has dtype F4"),
    ],
)
def test_a_damaged_safetensors_file_is_named_with_its_damage(folder, content, message):
    (folder / "model.safetensors").write_bytes(content)
    assert message in refusal(folder)
    assert "model.safetensors" in refusal(folder)
