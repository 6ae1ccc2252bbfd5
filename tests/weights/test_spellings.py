"""The same model under other tensor names gives the same weights."""

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmjax.config import ConfigError
from llmjax.models.registry import find_family
from llmjax.weights import open_checkpoint

GOLDEN = Path(__file__).parent.parent / "golden"
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
HALVES = {"gate_proj": 0, "up_proj": 1, "w1": 0, "w3": 1}


def read_config(folder):
    config = open_checkpoint(folder, needs_weights=False).config
    return find_family(config).read_config(config)


def fuse(tensors):
    """Experts as Hugging Face's classes hold them: a tensor for gate and up, one for down."""
    fused, experts = {}, {}
    for name, tensor in tensors.items():
        found = EXPERT.fullmatch(name)
        if found is None:
            fused[name] = tensor
        else:
            experts.setdefault(found[1], {})[int(found[2]), found[3]] = tensor
    for prefix, parts in experts.items():
        count = 1 + max(index for index, _ in parts)
        gate, up, down = (
            np.stack([parts[index, name] for index in range(count)])
            for name in sorted({name for _, name in parts}, key=lambda n: HALVES.get(n, 2))
        )
        fused[f"{prefix}.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        fused[f"{prefix}.down_proj"] = down
    return fused


def separate(tensors):
    """Llama 4's fused experts one by one."""
    apart = {}
    for name, tensor in tensors.items():
        prefix, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for index, expert in enumerate(tensor):
                gate, up = np.split(expert.T, 2)
                apart[f"{prefix}.{index}.gate_proj.weight"] = np.ascontiguousarray(gate)
                apart[f"{prefix}.{index}.up_proj.weight"] = np.ascontiguousarray(up)
        elif prefix.endswith("experts") and last == "down_proj":
            for index, expert in enumerate(tensor):
                apart[f"{prefix}.{index}.down_proj.weight"] = np.ascontiguousarray(expert.T)
        else:
            apart[name] = tensor
    return apart


def respell(family, folder, change):
    """Writes a golden checkpoint anew, with `change` applied to its tensors."""
    source = GOLDEN / family
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    changed = change(tensors)
    assert changed.keys() != tensors.keys()
    save_file(changed, folder / "model.safetensors")
    return source


@pytest.mark.parametrize("family", ["qwen3_moe_odd", "deepseek_v2", "deepseek_v3", "glm4_moe"])
def test_experts_load_fused_as_they_load_one_by_one(family, tmp_path, assert_same_weights):
    source = respell(family, tmp_path, fuse)
    assert_same_weights(source, tmp_path)


def test_mixtrals_experts_load_fused_under_the_names_of_hugging_faces_class(
    tmp_path, assert_same_weights
):
    def change(tensors):
        named = fuse(tensors)
        return {name.replace("block_sparse_moe", "mlp"): named[name] for name in named}

    source = respell("mixtral", tmp_path, change)
    assert_same_weights(source, tmp_path)


def test_mixtrals_experts_load_fused_under_their_published_prefix(tmp_path, assert_same_weights):
    source = respell("mixtral", tmp_path, fuse)
    assert_same_weights(source, tmp_path)


def test_llama_4s_experts_load_one_by_one_as_they_load_fused(tmp_path, assert_same_weights):
    source = respell("llama4_text", tmp_path, separate)
    assert_same_weights(source, tmp_path)


WRAPPERS = {
    "Llama4ForConditionalGeneration": ("llama4_text", "llama4_text", "vision_model.layernorm_pre"),
    "Gemma3ForConditionalGeneration": ("gemma3_text", "gemma3_text", "vision_tower.encoder"),
    "Mistral3ForConditionalGeneration": ("mistral_window", "mistral", "vision_tower.patch_conv"),
    "KimiVLForConditionalGeneration": ("deepseek_v3", "deepseek_v3", "vision_tower.patch_embed"),
    "LlavaForConditionalGeneration": ("llama", "llama", "multi_modal_projector.linear_1"),
    "Qwen3VLForConditionalGeneration": ("qwen3", "qwen3_vl_text", "visual.blocks"),
}
"""Multimodal architecture -> golden text model, its type inside, a tensor of another part."""


def name_as_before_2025(name):
    return "language_model." + name


def name_as_since_2025(name):
    head, _, rest = name.partition("model.")
    return name if head else "model.language_model." + rest


def wrap(architecture, folder, rename, **outer):
    """Writes a golden text model as part of a multimodal one; returns the golden folder."""
    golden, kind, other = WRAPPERS[architecture]
    source = GOLDEN / golden
    text = json.loads((source / "config.json").read_text())
    del text["architectures"]
    text["model_type"] = kind
    config = {"architectures": [architecture], "text_config": text, "vision_config": {}, **outer}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    prefix = "model." if rename is name_as_since_2025 else ""
    wrapped = {rename(name): tensor for name, tensor in tensors.items()}
    wrapped[f"{prefix}{other}.weight"] = np.ones((3, 4), np.float32)
    save_file(wrapped, folder / "model.safetensors")
    return source


@pytest.mark.parametrize("architecture", WRAPPERS)
@pytest.mark.parametrize("rename", [name_as_before_2025, name_as_since_2025])
def test_a_multimodal_model_loads_as_its_text_model(
    architecture, rename, tmp_path, caplog, assert_same_weights
):
    source = wrap(architecture, tmp_path, rename)
    assert read_config(tmp_path) == read_config(source)
    with caplog.at_level(logging.INFO, logger="llmjax"):
        assert_same_weights(source, tmp_path)
    assert "1 tensors of the checkpoint are not used: " in caplog.text
    assert WRAPPERS[architecture][2] in caplog.text


def test_a_multimodal_model_decides_ties_types_and_ends_for_its_text_model(tmp_path):
    outer = {"tie_word_embeddings": True, "dtype": "bfloat16", "eos_token_id": [7, 8]}
    wrap("LlavaForConditionalGeneration", tmp_path, name_as_since_2025, **outer)
    config = read_config(tmp_path)
    assert config.tie_word_embeddings and config.dtype == "bfloat16"
    assert open_checkpoint(tmp_path).config["eos_token_id"] == [7, 8]


def test_the_text_model_of_gemma_3_may_leave_out_what_hugging_faces_class_has(tmp_path):
    published = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    config = read_config(tmp_path)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
    assert config.tie_word_embeddings and config.dtype == "bfloat16"
    assert (config.rope.kind, config.rope.factor, config.rope.theta) == ("linear", 8.0, 1e6)


def test_a_multimodal_model_of_an_unknown_text_model_is_refused_by_both_names(tmp_path):
    config = {
        "architectures": ["NewForConditionalGeneration"],
        "text_config": {"model_type": "new"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ConfigError, match="NewForConditionalGeneration with a text model of .* new"
    ):
        find_family(open_checkpoint(tmp_path, needs_weights=False).config)


def test_a_head_that_is_stored_though_it_is_the_embedding_is_dropped(tmp_path, assert_same_weights):
    source = respell("gemma3_text", tmp_path, store_the_head_too)
    assert_same_weights(source, tmp_path)


def store_the_head_too(tensors):
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
