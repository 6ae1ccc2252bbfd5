"""The same model under other tensor names gives the same weights."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmjax.models.registry import find_family
from llmjax.weights import open_checkpoint
from llmjax.weights.model import load_model
from meshes import ParallelPlan, Rules, make_mesh

GOLDEN = Path(__file__).parent.parent / "golden"
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
HALVES = {"gate_proj": 0, "up_proj": 1, "w1": 0, "w3": 1}


def load(folder):
    plan = ParallelPlan(ep=2, tp=2)
    checkpoint = open_checkpoint(folder)
    family = find_family(checkpoint.config)
    config = family.read_config(checkpoint.config)
    rules, mesh, dtype = Rules(plan), make_mesh(plan), jnp.dtype("float32")
    return load_model(checkpoint, family, config, rules, mesh, dtype=dtype, progress=False)


def assert_same_weights(folder, other):
    """Compares what two folders load as."""
    expected, loaded = load(folder), load(other)
    assert len(jax.tree.leaves(expected)) > 5
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)


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
def test_experts_load_fused_as_they_load_one_by_one(family, tmp_path):
    source = respell(family, tmp_path, fuse)
    assert_same_weights(source, tmp_path)


def test_mixtrals_experts_load_fused_under_the_names_of_hugging_faces_class(tmp_path):
    def change(tensors):
        named = fuse(tensors)
        return {name.replace("block_sparse_moe", "mlp"): named[name] for name in named}

    source = respell("mixtral", tmp_path, change)
    assert_same_weights(source, tmp_path)


def test_mixtrals_experts_load_fused_under_their_published_prefix(tmp_path):
    source = respell("mixtral", tmp_path, fuse)
    assert_same_weights(source, tmp_path)


def test_llama_4s_experts_load_one_by_one_as_they_load_fused(tmp_path):
    source = respell("llama4_text", tmp_path, separate)
    assert_same_weights(source, tmp_path)
