"""GGUF files: the embedded model against the gguf library, small written files, and damage."""

import struct

import gguf
import numpy as np
import pytest

from llmjax.weights.checkpoint import EMBEDDED_MODEL, open_checkpoint
from llmjax.weights.gguf_file import read_gguf
from llmjax.weights.interface import CheckpointError

HEADS, KV_HEADS, HEAD_DIM, EMBED = 4, 2, 8, 32


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def pair_rows(values, heads):
    """Reorder rows as llama.cpp's converter does for the llama architecture."""
    halves = values.reshape(heads, 2, -1, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


@pytest.fixture
def write(tmp_path):
    """Write a tiny model; keywords replace metadata (None drops a key), `tensors` add to it."""

    def write(architecture="llama", tensors=(), **metadata):
        path = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        values = {
            "block_count": 1,
            "context_length": 64,
            "embedding_length": EMBED,
            "feed_forward_length": 48,
            "attention.head_count": HEADS,
            "attention.head_count_kv": KV_HEADS,
            "attention.layer_norm_rms_epsilon": 1e-5,
        }
        for key, value in (values | metadata).items():
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            if value is not None:
                add[type(value)](f"{architecture}.{key}", value)
        writer.add_eos_token_id(7)
        writer.add_eot_token_id(5)
        writer.add_array("tokenizer.ggml.tokens", ["a", "b", "ż"])
        everything = {"token_embd.weight": random(10, EMBED), **dict(tensors)}
        for name, array in everything.items():
            if isinstance(array, tuple):
                writer.add_tensor(name, array[0], raw_dtype=array[1])
            else:
                writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def refusal(path) -> str:
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(path)
    return str(raised.value)


def test_the_embedded_model_reads_as_the_gguf_library_reads_it():
    checkpoint = open_checkpoint(EMBEDDED_MODEL)
    file = read_gguf(checkpoint.path)
    peer = gguf.GGUFReader(checkpoint.path)
    fields = {key: field for key, field in peer.fields.items() if not key.startswith("GGUF.")}
    assert set(file.metadata) == set(fields)
    for key, field in fields.items():
        assert file.metadata[key] == field.contents()
    assert len(file.tensors) == len(peer.tensors)
    for tensor in peer.tensors:
        ours = file.tensors[tensor.name]
        assert ours.shape == tuple(reversed(tensor.shape.tolist()))
        assert (ours.kind, ours.offset) == (tensor.tensor_type, tensor.data_offset)
        assert ours.num_bytes == tensor.n_bytes
    down = next(tensor for tensor in peer.tensors if tensor.name == "blk.29.ffn_down.weight")
    expected = gguf.dequantize(down.data, down.tensor_type)
    np.testing.assert_array_equal(checkpoint.read("model.layers.29.mlp.down_proj.weight"), expected)


def test_the_embedded_model_has_the_config_that_hugging_face_derives():
    checkpoint = open_checkpoint(EMBEDDED_MODEL)
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 9.999999747378752e-06,
        "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": [2],
    }
    assert {key: checkpoint.config[key] for key in expected} == expected
    assert checkpoint.generation_config["eos_token_id"] == [2]
    assert len(checkpoint.tensors) == 272


def test_query_and_key_rows_of_llama_get_hugging_faces_order_and_those_of_qwen_keep_theirs(write):
    q, k = random(HEADS * HEAD_DIM, EMBED), random(KV_HEADS * HEAD_DIM, EMBED, seed=1)
    bias = random(HEADS * HEAD_DIM, seed=2)
    stored = {
        "blk.0.attn_q.weight": pair_rows(q, HEADS),
        "blk.0.attn_k.weight": pair_rows(k, KV_HEADS),
        "blk.0.attn_q.bias": pair_rows(bias, HEADS),
    }
    prefix = "model.layers.0.self_attn."
    checkpoint = open_checkpoint(write("llama", stored))
    np.testing.assert_array_equal(checkpoint.read(prefix + "q_proj.weight"), q)
    np.testing.assert_array_equal(checkpoint.read(prefix + "k_proj.weight"), k)
    np.testing.assert_array_equal(checkpoint.read(prefix + "q_proj.bias"), bias)
    checkpoint = open_checkpoint(write("qwen2", stored))
    assert checkpoint.config["architectures"] == ["Qwen2ForCausalLM"]
    np.testing.assert_array_equal(
        checkpoint.read(prefix + "q_proj.weight"), stored["blk.0.attn_q.weight"]
    )


def test_plain_dtypes_stay_and_quantised_ones_become_float32(write):
    values = random(4, EMBED)
    kinds = {
        "f16": gguf.GGMLQuantizationType.F16,
        "bf16": gguf.GGMLQuantizationType.BF16,
        "q8": gguf.GGMLQuantizationType.Q8_0,
    }
    tensors = {
        name: (values.astype(np.float16) if name == "f16" else gguf.quantize(values, kind), kind)
        for name, kind in kinds.items()
    }
    checkpoint = open_checkpoint(write(tensors=tensors))
    dtypes = {name: checkpoint.tensors[name].dtype.name for name in kinds}
    assert dtypes == {"f16": "float16", "bf16": "bfloat16", "q8": "float32"}
    for name in kinds:
        read = checkpoint.read(name)
        assert read.dtype.name == dtypes[name]
        np.testing.assert_allclose(read.astype(np.float32), values, atol=0.03)


def test_every_end_token_of_the_file_is_an_end(write):
    assert open_checkpoint(write()).generation_config["eos_token_id"] == [7, 5]


def test_head_dimension_and_rope_scaling_come_from_the_metadata(write):
    path = write(
        "qwen3",
        **{
            "attention.key_length": 16,
            "attention.value_length": 16,
            "rope.freq_base": 5e5,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 16,
        },
    )
    config = open_checkpoint(path).config
    assert config["head_dim"] == 16
    assert config["rope_parameters"] == {
        "rope_type": "yarn",
        "rope_theta": 5e5,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    }


def test_rope_frequency_divisors_become_configuration(write):
    divisors = np.array([1.0, 1.0, 2.5, 8.0], np.float32)
    checkpoint = open_checkpoint(write(tensors={"rope_freqs.weight": divisors}))
    rope = checkpoint.config["rope_parameters"]
    assert rope["short_factor"] == rope["long_factor"] == divisors.tolist()
    assert (rope["rope_type"], rope["attention_factor"]) == ("longrope", 1.0)
    assert "rope_freqs.weight" not in checkpoint.tensors


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"architecture": "mamba"}, "architecture mamba; GGUF files of llama, qwen2, qwen3"),
        ({"expert_count": 8}, "llama.expert_count is 8; mixture-of-experts"),
        ({"rope.scaling.type": "longrope"}, "rope scaling longrope is not read from GGUF"),
        ({"attention.value_length": 4}, "llama.attention.value_length is 4 but the heads have 8"),
        ({"context_length": None}, "llama.context_length is missing"),
        ({"block_count": "many"}, "llama.block_count is 'many', which cannot be used"),
    ],
)
def test_what_a_file_asks_for_and_cannot_have_is_named(write, metadata, message):
    assert message in refusal(write(**metadata))


def test_a_type_that_cannot_be_dequantised_is_named(write):
    packed = (np.zeros((1, 292), np.uint8), gguf.GGMLQuantizationType.Q8_K)
    message = refusal(write(tensors={"output.weight": packed}))
    assert "tensor output.weight has type Q8_K, which cannot be dequantised" in message


def test_a_truncated_file_names_where_it_ends(write):
    path = write()
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert f"ends at byte {len(content)} and the file has {len(content) - 1}" in refusal(path)
    for length in (0, 10, 30, 100, 250):
        path.write_bytes(content[:length])
        assert "is truncated or corrupt" in refusal(path)


def test_sizes_are_checked_before_anything_is_allocated(write):
    path = write()
    content = path.read_bytes()
    huge = struct.pack("<Q", 1 << 60)
    end = content.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens")
    places = {"tensors": 8, "entries": 16, "first key": 24, "array": end + 8}
    for place in places.values():
        path.write_bytes(content[:place] + huge + content[place + 8 :])
        assert "is truncated or corrupt" in refusal(path)


def test_another_file_or_version_is_not_gguf(write):
    path = write()
    content = path.read_bytes()
    path.write_bytes(b"PK\x03\x04" + content[4:])
    assert "is not a GGUF file: it starts with b'PK\\x03\\x04'" in refusal(path)
    path.write_bytes(content[:4] + struct.pack(">I", 3) + content[8:])
    assert "is GGUF version 50331648 or big-endian" in refusal(path)
