"""Every dispatch, on every placement of tokens and experts, gives what a plain loop gives."""

import re
from collections import Counter
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from llmjax.parallel.expert_dispatch import dispatch_experts
from meshes import ParallelPlan, Rules, make_mesh
from pallas_kernels import grouped_gemm

EMBED, FFN, EXPERTS, TOP_K = 16, 8, 9, 4
METHODS = ("allreduce", "allgather", "all_to_all")
PLACEMENTS = (False, True, "partial")
SIZES = ({"ep": 8}, {"ep": 4, "tp": 2}, {"dp": 2, "ep": 2, "tp": 2}, {"dp": 2, "tp": 4})
PLANS = [ParallelPlan(**sizes, attention_dp=dp) for sizes in SIZES for dp in PLACEMENTS]
MIXED = ParallelPlan(dp=2, ep=2, tp=2)


class Layer:
    """Two layers of experts, of which the first must not be read, in slots that ep divides."""

    def __init__(self, plan: ParallelPlan, dtype: Any = jnp.float32) -> None:
        self.plan, self.rules, self.mesh = plan, Rules(plan), make_mesh(plan)
        ranks = self.rules.size("experts")
        rng, slots = np.random.default_rng(0), -(-EXPERTS // ranks) * ranks
        self.slots_a_rank = slots // ranks
        # Reading the other layer, or a slot that holds no expert, shows as NaN.
        self.up = np.full((2, slots, EMBED, FFN), np.nan, np.float32)
        self.bias = np.full((2, slots, FFN), np.nan, np.float32)
        self.down = np.full((2, slots, FFN, EMBED), np.nan, np.float32)
        for weight in (self.up, self.bias, self.down):
            weight[1, :EXPERTS] = rng.normal(size=weight[1, :EXPERTS].shape) * 0.3
        self.dtype = dtype

    @property
    def specs(self) -> dict[str, PartitionSpec]:
        """Specs of the weights inside a stage."""
        spec = self.rules.spec
        return {
            "up": spec(None, "experts", None, "expert_ffn"),
            "bias": spec(None, "experts", "expert_ffn"),
            "down": spec(None, "experts", "expert_ffn", None),
        }

    def arguments(self, x: np.ndarray, slots: np.ndarray, gates: np.ndarray) -> tuple:
        """What the dispatch takes, on the mesh."""
        tokens = self.rules.sharding(self.mesh, "tokens", None)
        weights = {"up": self.up, "bias": self.bias, "down": self.down}
        params = {
            name: jax.device_put(
                jnp.asarray(weight, self.dtype), jax.NamedSharding(self.mesh, self.specs[name])
            )
            for name, weight in weights.items()
        }
        placed = [
            jax.device_put(jnp.asarray(array, dtype), tokens)
            for array, dtype in ((x, self.dtype), (slots, jnp.int32), (gates, jnp.float32))
        ]
        return *placed, params, jnp.int32(1)

    def expected(
        self, x: np.ndarray, slots: np.ndarray, gates: np.ndarray, *, scale_inputs: bool = False
    ) -> np.ndarray:
        """A loop over tokens and their slots."""
        out = np.zeros_like(x)
        for index in range(len(x)):
            for slot, gate in zip(slots[index], gates[index], strict=True):
                if slot >= 0:
                    before, after = (gate, 1) if scale_inputs else (1, gate)
                    hidden = x[index] * before @ self.up[1, slot] + self.bias[1, slot]
                    out[index] += np.maximum(hidden, 0) @ self.down[1, slot] * after
        return out


def compute(rows, group_sizes, slot_of_row, params, layer):
    """Two products; padding comes back as NaN."""
    hidden = grouped_gemm(rows, params["up"], group_sizes, layer)
    hidden = jax.nn.relu(hidden + params["bias"][layer, slot_of_row])
    out = grouped_gemm(hidden, params["down"], group_sizes, layer)
    real = jnp.arange(rows.shape[0]) < group_sizes.sum()
    return jnp.where(real[:, None], out, jnp.nan)


layer_on = cache(Layer)


@cache
def compiled(plan: ParallelPlan, method: str, **options: Any):
    """The jitted dispatch on a plan."""
    layer = layer_on(plan)

    def run(x, slots, gates, params, index):
        return dispatch_experts(
            x,
            slots,
            gates,
            params,
            layer.specs,
            index,
            compute,
            method=method,
            rules=layer.rules,
            **options,
        )

    return jax.jit(run)


def routing(kind: str, tokens: int, slots_a_rank: int, top_k: int = TOP_K) -> tuple:
    """Tokens, slots and gates of one kind of routing."""
    rng = np.random.default_rng(len(kind))
    x = rng.normal(size=(tokens, EMBED)).astype(np.float32)
    gates = rng.uniform(0.1, 1, size=(tokens, top_k)).astype(np.float32)
    slots = np.array([rng.permutation(EXPERTS)[:top_k] for _ in range(tokens)])
    if kind == "one expert":
        slots = np.where(np.arange(top_k) == 0, 5, -1) * np.ones((tokens, 1), np.int64)
    elif kind == "one rank":
        held = np.arange(top_k) + slots_a_rank
        last = min(2 * slots_a_rank, EXPERTS)
        slots = np.where(held < last, held, -1) * np.ones((tokens, 1), np.int64)
    elif kind == "not the first rank":
        slots = np.where(slots < slots_a_rank, -1, slots)
    elif kind == "some tokens unused":
        slots[::3] = -1
        gates[::3] = np.nan
    return x, slots, gates


KINDS = ("random", "one expert", "one rank", "not the first rank", "some tokens unused")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_every_dispatch_equals_the_loop_for_every_routing(plan, method):
    layer = layer_on(plan)
    for kind in KINDS:
        inputs = routing(kind, 16, layer.slots_a_rank)
        with jax.set_mesh(layer.mesh):
            out = compiled(plan, method)(*layer.arguments(*inputs))
        np.testing.assert_allclose(out, layer.expected(*inputs), atol=1e-5, err_msg=kind)
