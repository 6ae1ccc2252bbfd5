"""A compiled step of a mixture of experts sends what its strategy promises, and no more."""

import pytest
from small_engine import SMALL, count_sent
from strategies import GOLDEN

from llmjax.config import EngineConfig
from llmjax.explore.layout import read_config
from llmjax.explore.steps import read_steps
from meshes import ParallelPlan

LAYERS = 3
EP, TP, BOTH = ("ep",), ("tp",), ("ep", "tp")
SENT = {
    # Tensor parallel: two sums a layer.
    (ParallelPlan(tp=4), "allreduce"): {
        ("embed", "all-reduce", TP): 1,
        ("attention", "all-reduce", TP): LAYERS,
        ("mlp", "all-reduce", TP): LAYERS,
    },
    # The second sum is a reduce-scatter and an all-gather.
    (ParallelPlan(ep=4), "allgather"): {
        ("embed", "all-reduce", EP): 1,
        ("attention", "all-reduce", EP): LAYERS,
        ("mlp", "reduce-scatter", EP): LAYERS,
        ("mlp", "all-gather", EP): LAYERS,
    },
    # Tokens go and come back; a rank had sent its part of those that all have: one all-gather.
    (ParallelPlan(ep=2, tp=2), "all_to_all"): {
        ("embed", "all-reduce", BOTH): 1,
        ("attention", "all-reduce", BOTH): LAYERS,
        ("mlp", "all-to-all", EP): 2 * LAYERS,
        ("mlp", "all-reduce", TP): LAYERS,
        ("mlp", "all-gather", EP): LAYERS,
    },
    # Attention data parallel: attention sends nothing, and experts get each token but once.
    (ParallelPlan(ep=4, attention_dp=True), "all_to_all"): {
        ("embed", "all-gather", EP): 1,
        ("embed", "reduce-scatter", EP): 1,
        ("mlp", "all-to-all", EP): 2 * LAYERS,
    },
    # Ranks that share an expert gather their tokens; nothing is gathered over ep.
    (ParallelPlan(ep=2, tp=2, attention_dp=True), "all_to_all"): {
        ("embed", "all-gather", BOTH): 1,
        ("embed", "reduce-scatter", BOTH): 1,
        ("mlp", "all-gather", TP): LAYERS,
        ("mlp", "all-to-all", EP): 2 * LAYERS,
        ("mlp", "reduce-scatter", TP): LAYERS,
    },
}


@pytest.mark.parametrize(("plan", "dispatch"), SENT, ids=str)
def test_steps_of_a_mixture_of_experts_send_what_the_strategy_promises(plan, dispatch):
    config = read_config(GOLDEN / "qwen3_moe")
    assert config.num_layers == LAYERS
    engine = EngineConfig(**SMALL, dtype="float32", moe_dispatch=dispatch)
    for step in read_steps(config, plan, engine).steps:
        assert count_sent(step.collectives) == SENT[plan, dispatch], step.name
