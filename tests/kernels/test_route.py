"""The Hopper kernel routes tokens as XLA does, which the tests of the expert layer cover."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernel_checks import assert_lowers_for_cuda

from pallas_kernels.grouped_gemm import Router, route_sm90, route_tokens
from pallas_kernels.grouped_gemm.route import route_tokens_by_xla

DEEPSEEK_V2 = Router(top_k=6, scaling_factor=16.0, num_groups=8, top_groups=3, group_best=1)
DEEPSEEK_V3 = Router(
    top_k=8, scoring="sigmoid", normalize=True, scaling_factor=2.5, num_groups=8, top_groups=4
)  # fmt: skip
ROUTERS = {
    "Qwen3": (Router(top_k=8, normalize=True), 128),
    "Mixtral": (Router(top_k=2, normalize=True), 8),
    "Llama 4": (Router(top_k=1, scoring="sigmoid"), 16),
    "DeepSeek-V2": (DEEPSEEK_V2, 160),
    "DeepSeek-V3": (DEEPSEEK_V3, 256),
}


type Arguments = tuple[jax.Array, jax.Array | None, jax.Array]


def random_arguments(router: Router, experts: int, tokens: int, *, step: float = 0.0) -> Arguments:
    """Logits, a correction for sigmoids, and which tokens are real; multiples of a step, if any."""
    draw = np.random.default_rng(tokens)
    logits, correction = draw.normal(0, 2, (tokens, experts)), draw.normal(0, 0.3, experts)
    if step:
        logits, correction = np.round(logits / step) * step, np.round(correction / step) * step
    return (
        jnp.asarray(logits, jnp.float32),
        jnp.asarray(correction, jnp.float32) if router.scoring == "sigmoid" else None,
        jnp.asarray(draw.random(tokens) < 0.8),
    )


def assert_as_xla(out, arguments: Arguments, router: Router):
    experts, gates = route_tokens_by_xla(*arguments, router)
    np.testing.assert_array_equal(out[0], experts)
    np.testing.assert_allclose(out[1], gates, rtol=2e-6)


@pytest.mark.parametrize(("router", "experts"), ROUTERS.values(), ids=ROUTERS)
def test_hopper_kernel_routes_as_xla_and_has_no_race(router, experts):
    # A block and a token of its own, with many that are equal.
    tokens = route_sm90.block_rows(experts, router) + 1
    arguments = random_arguments(router, experts, tokens, step=0.5)
    params = plgpu.InterpretGPUParams(detect_races=True)
    out = route_sm90.route_tokens(*arguments, router, interpret=params)
    assert_as_xla(out, arguments, router)
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize("worst", [np.nan, -np.inf, np.inf])
def test_experts_of_a_token_differ_whatever_its_logits(worst):
    logits = jnp.full((1, 8), worst, jnp.float32)
    params = plgpu.InterpretGPUParams()
    chosen, _ = route_sm90.route_tokens(logits, None, None, Router(top_k=4), interpret=params)
    assert sorted(chosen[0].tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize(("router", "experts"), ROUTERS.values(), ids=ROUTERS)
def test_hopper_kernel_lowers_for_cuda(router, experts):
    arguments = random_arguments(router, experts, 33)

    def run(logits, correction, is_real):
        return route_sm90.route_tokens(logits, correction, is_real, router)

    assert_lowers_for_cuda(run, *arguments)
    # Mosaic takes integers for unsigned where a constant comes first, and the interpreter does not.
    text = jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "maxsi" in text and "maxui" not in text


@pytest.mark.parametrize(
    "experts, message",
    [(9, "needs an even number of experts, got 9"), (2050, "needs at most 64 experts a lane")],
)
def test_hopper_kernel_says_what_it_does_not_cover(experts, message):
    with pytest.raises(NotImplementedError, match=message):
        route_sm90.check_covered(jnp.ones((1, experts)), Router(top_k=1))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2047])
@pytest.mark.parametrize(("router", "experts"), ROUTERS.values(), ids=ROUTERS)
def test_on_a_gpu_the_kernel_routes_as_xla(router, experts, tokens):
    arguments = random_arguments(router, experts, tokens, step=0.5)
    assert_as_xla(route_sm90.route_tokens(*arguments, router), arguments, router)


def test_an_implementation_that_does_not_exist_is_refused():
    logits = jnp.zeros((1, 8), jnp.float32)
    with pytest.raises(ValueError, match="implementation='cuda' does not exist; use None or one"):
        route_tokens(logits, Router(top_k=2), implementation="cuda")
