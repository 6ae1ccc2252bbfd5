"""Quantised checkpoints read as what their numbers stand for."""

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmjax.models.registry import find_family
from llmjax.weights import CheckpointError, open_checkpoint

GOLDEN = Path(__file__).parent.parent / "golden"
FP8, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
BLOCK = (16, 24)
"""Divides neither the heights nor the widths of the tiny models."""
FP8_SETTINGS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": BLOCK}
MXFP4_SETTINGS = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def write(folder, family, tensors, settings=None, **changes):
    """Writes a folder with the configuration of a golden model."""
    folder.mkdir()
    config = json.loads((GOLDEN / family / "config.json").read_text()) | changes
    if settings is not None:
        config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def quantize_fp8(matrix, rng):
    """Random scales, and values that are in range with them."""
    blocks = [math.ceil(size / own) for size, own in zip(matrix.shape, BLOCK, strict=True)]
    scales = rng.uniform(0.5, 2, blocks)
    return matrix.astype(FP8), scales.astype(np.float32)


def dequantize_fp8(values, scales):
    plain = np.empty(values.shape, BF16)
    for (row, column), value in np.ndenumerate(values):
        scale = scales[row // BLOCK[0], column // BLOCK[1]]
        plain[row, column] = BF16(np.float32(value) * scale)
    return plain


@pytest.fixture(scope="module")
def fp8_model():
    """DeepSeek-V3 with its projections in float8, and the same with what they stand for."""
    rng, stored, plain = np.random.default_rng(0), {}, {}
    for name, tensor in load_file(GOLDEN / "deepseek_v3" / "model.safetensors").items():
        if name.endswith("_proj.weight") or "kv_a_proj" in name:
            values, scales = quantize_fp8(tensor, rng)
            stored |= {name: values, name + "_scale_inv": scales}
            plain[name] = dequantize_fp8(values, scales)
        else:
            stored[name] = plain[name] = tensor
    return stored, plain


def test_float8_weights_are_their_values_times_the_scales_of_their_blocks(
    fp8_model, tmp_path, assert_same_weights
):
    stored, plain = fp8_model
    quantized = write(tmp_path / "fp8", "deepseek_v3", stored, FP8_SETTINGS)
    assert_same_weights(write(tmp_path / "plain", "deepseek_v3", plain), quantized)


def test_fused_experts_in_float8_are_read_expert_by_expert(tmp_path):
    rng = np.random.default_rng(1)
    pairs = [quantize_fp8(rng.standard_normal((40, 50)), rng) for _ in range(3)]
    values, scales = (np.stack(parts) for parts in zip(*pairs, strict=True))
    tensors = {"experts.down_proj": values, "experts.down_proj_scale_inv": scales}
    checkpoint = open_checkpoint(write(tmp_path / "fp8", "llama", tensors, FP8_SETTINGS))
    assert checkpoint.tensors.keys() == {"experts.down_proj"}
    for index, pair in enumerate(pairs):
        read = checkpoint.read("experts.down_proj", slice(index, index + 1))
        np.testing.assert_array_equal(read, dequantize_fp8(*pair)[None])


def test_rows_of_a_float8_matrix_have_the_scales_of_their_place(tmp_path):
    values, scales = quantize_fp8(np.ones((40, 30)), np.random.default_rng(2))
    tensors = {"a.weight": values, "a.weight_scale_inv": scales}
    checkpoint = open_checkpoint(write(tmp_path / "fp8", "llama", tensors, FP8_SETTINGS))
    read = checkpoint.read("a.weight", slice(20, 36))
    np.testing.assert_array_equal(read, dequantize_fp8(values, scales)[20:36])


def random_mxfp4(experts, outputs, inputs, rng):
    blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8)
    return blocks, rng.integers(120, 132, blocks.shape[:-1], np.uint8)


def dequantize_mxfp4(blocks, scales):
    """[experts, inputs, outputs], as gpt-oss holds them in bfloat16."""
    experts, outputs, groups, half = blocks.shape
    plain = np.empty((experts, groups * half * 2, outputs), BF16)
    for (expert, output, group, place), byte in np.ndenumerate(blocks):
        scale = float(scales[expert, output, group].view(ml_dtypes.float8_e8m0fnu))
        first = 2 * (group * half + place)
        for offset, bits in enumerate((byte & 15, byte >> 4)):
            value = float(np.uint8(bits).view(ml_dtypes.float4_e2m1fn))
            plain[expert, first + offset, output] = BF16(value * scale)
    return plain


def test_experts_in_mxfp4_are_their_values_times_the_powers_of_two_of_their_groups(
    tmp_path, assert_same_weights
):
    stored, rng = load_file(GOLDEN / "gpt_oss" / "model.safetensors"), np.random.default_rng(3)
    ffn = 64  # the golden model's width is no multiple of 32
    for name in [name for name in stored if name.endswith("gate_up_proj_bias")]:
        stored[name] = np.ones((8, 2 * ffn), np.float32)
    plain = dict(stored)
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        outputs, inputs = (2 * ffn, 64) if "gate_up" in name else (64, ffn)
        blocks, scales = random_mxfp4(8, outputs, inputs, rng)
        del stored[name]
        stored |= {name + "_blocks": blocks, name + "_scales": scales}
        plain[name] = dequantize_mxfp4(blocks, scales)
    widths = {"intermediate_size": ffn}
    quantized = write(tmp_path / "mxfp4", "gpt_oss", stored, MXFP4_SETTINGS, **widths)
    assert_same_weights(write(tmp_path / "plain", "gpt_oss", plain, **widths), quantized)


def refusal(folder):
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(folder)
    return str(raised.value)


METHODS = {
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq"},
    "bitsandbytes": {"quant_method": "bitsandbytes"},
    "compressed-tensors": {"quant_method": "compressed-tensors"},
    "fp8 without weight_block_size": {"quant_method": "fp8", "activation_scheme": "static"},
}


@pytest.mark.parametrize("method", METHODS)
def test_another_quantisation_is_refused_by_its_name(method, tmp_path):
    message = refusal(write(tmp_path / "q", "llama", {"w": np.ones(2)}, METHODS[method]))
    assert f"is quantised by {method}, which is not read: fp8 with a scale for each" in message


def test_the_configuration_of_any_quantised_model_can_be_read(tmp_path):
    folder = write(tmp_path / "q", "llama", {"w": np.ones(2)}, METHODS["gptq"])
    assert open_checkpoint(folder, needs_weights=False).config["model_type"] == "llama"


@pytest.mark.parametrize(("settings", "dtype"), [(MXFP4_SETTINGS, "bfloat16"), (None, "float32")])
def test_a_quantised_model_that_names_no_type_runs_in_bfloat16(settings, dtype, tmp_path):
    folder = write(tmp_path / "q", "gpt_oss", {"w": np.ones(2)}, settings, dtype=None)
    config = open_checkpoint(folder).config
    assert find_family(config).read_config(config).dtype == dtype


def test_float8_without_its_scales_is_refused(tmp_path):
    values, scales = quantize_fp8(np.ones((40, 30)), np.random.default_rng(4))
    alone = write(tmp_path / "a", "llama", {"a.weight": values}, FP8_SETTINGS)
    assert "needs a.weight_scale_inv of shape (3, 2), which is missing" in refusal(alone)
    tensors = {"a.weight": values, "a.weight_scale_inv": scales[:2]}
    other = write(tmp_path / "b", "llama", tensors, FP8_SETTINGS)
    assert "of shape (3, 2), which has shape (2, 2)" in refusal(other)


def test_mxfp4_without_its_scales_is_refused(tmp_path):
    blocks, scales = random_mxfp4(2, 3, 32, np.random.default_rng(5))
    tensors = {"a_blocks": blocks, "a_scales": scales[:1]}
    folder = write(tmp_path / "a", "gpt_oss", tensors, MXFP4_SETTINGS)
    assert "a_scales of shape (2, 3, 1), which has shape (1, 3, 1)" in refusal(folder)
