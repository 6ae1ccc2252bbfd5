import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernel_checks import assert_lowers_for_cuda

import pallas_kernels
from pallas_kernels.activation import ACTIVATIONS
from pallas_kernels.grouped_gemm import few_rows_sm90

LAYER = 1


def operands(seed: int, experts: list[list[int]], *, embed=256, ffn=128, count=4, biased=False):
    rng = np.random.default_rng(seed)

    def draw(*shape, scale=1.0):
        return jnp.asarray(scale * rng.normal(size=shape), jnp.bfloat16)

    bias = draw(2, count, 2 * ffn) if biased else None
    return (
        draw(len(experts), embed),
        jnp.asarray(experts, jnp.int32),
        draw(2, count, embed, 2 * ffn, scale=embed**-0.5),
        draw(2, count, ffn, embed, scale=ffn**-0.5),
        bias,
    )


def exact(x, experts, gate_up, down, bias, activation):
    """Row by row in float64, NaN where there is no expert."""
    x, gate_up, down = (np.asarray(array, np.float64) for array in (x, gate_up, down))
    out = np.full((*experts.shape, x.shape[1]), np.nan)
    for token, chosen in enumerate(np.asarray(experts)):
        for choice, expert in enumerate(chosen):
            if expert >= 0:
                sums = x[token] @ gate_up[LAYER, expert]
                if bias is not None:
                    sums += np.asarray(bias, np.float64)[LAYER, expert]
                gate, up = map(jnp.asarray, np.split(sums, 2))
                hidden = ACTIVATIONS[activation](gate, up).astype(jnp.bfloat16)
                out[token, choice] = np.asarray(hidden, np.float64) @ down[LAYER, expert]
    return out


def assert_close(out, want):
    held = ~np.isnan(want)
    np.testing.assert_allclose(np.asarray(out, np.float64)[held], want[held], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("experts", [[[1]], [[1, 3], [-1, 0], [2, 1]]], ids=["one row", "several"])
def test_kernel_agrees_with_float64_and_has_no_race(experts, activation, biased):
    case = operands(0, experts, biased=biased)
    out = few_rows_sm90.expert_rows(
        *case[:4],
        LAYER,
        gate_up_bias=case[4],
        activation=activation,
        # The interpreter runs blocks in turn and knows no signals between them.
        num_sms=1,
        synchronize=False,
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    assert_close(out, exact(*case, activation))
    assert not gpu_callbacks.get_races().races_found


def test_kernel_is_not_taken_off_a_hopper_gpu():
    x, experts, gate_up, down, _ = operands(1, [[0]])
    assert pallas_kernels.expert_rows(x, experts, gate_up, down, LAYER, activation="silu") is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"embed": 192}, "multiple of 128"),
        ({"ffn": 192}, "multiple of 128"),
        ({"embed": 16384}, "at most 8192"),
    ],
)
def test_uncovered_shapes_are_refused_by_name(changed, message):
    x, _, gate_up, down, _ = operands(2, [[0]], **changed)
    with pytest.raises(NotImplementedError, match=message):
        few_rows_sm90.check_covered(x, gate_up, down)


def shipped(tokens=2, choices=8, count=128, embed=2048, ffn=768):
    def abstract(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    return (
        abstract(tokens, embed),
        abstract(tokens, choices, dtype=jnp.int32),
        abstract(48, count, embed, 2 * ffn),
        abstract(48, count, ffn, embed),
        abstract(dtype=jnp.int32),
    )


def test_kernel_lowers_for_cuda():
    run = functools.partial(few_rows_sm90.expert_rows, activation="silu", num_sms=132)
    assert_lowers_for_cuda(run, *shipped())


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("sizes", [(2048, 768), (4096, 1024)], ids=str)
def test_kernel_agrees_with_two_products_on_the_gpu(tokens, sizes):
    embed, ffn = sizes
    rng = np.random.default_rng(3)
    chosen = np.stack([rng.permutation(16)[:8] for _ in range(tokens)])
    chosen[0, 3] = -1
    *arrays, bias = operands(4, chosen.tolist(), embed=embed, ffn=ffn, count=16, biased=True)
    x, experts, gate_up, down = arrays
    num_sms = jax.devices()[0].core_count
    run = functools.partial(few_rows_sm90.expert_rows, activation="silu", num_sms=num_sms)
    out = jax.jit(run)(x, experts, gate_up, down, jnp.int32(LAYER), gate_up_bias=bias)
    flat = experts.reshape(-1)
    order = jnp.argsort(jnp.where(flat < 0, 16, flat))
    group_sizes = jnp.bincount(jnp.where(flat < 0, 16, flat), length=16).astype(jnp.int32)
    rows = jnp.repeat(x, 8, axis=0)[order]
    multiply = functools.partial(pallas_kernels.grouped_gemm, implementation="reference")
    hidden = multiply(rows, gate_up, group_sizes, LAYER, bias=bias, activation="silu")
    want = jnp.zeros((flat.size, embed)).at[order].set(multiply(hidden, down, group_sizes, LAYER))
    held = np.asarray(flat >= 0)
    np.testing.assert_allclose(
        np.asarray(out, np.float32).reshape(-1, embed)[held], want[held], rtol=0.02, atol=0.03
    )
