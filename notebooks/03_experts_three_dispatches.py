# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Experts, three dispatches
#
# In a mixture of experts a router sends each token to a few of many feed-forward networks. With
# expert parallelism the experts lie on different devices, so tokens must reach them and results
# must come back. llmjax has three ways to do that, `allreduce`, `allgather` and `all_to_all`,
# which give the same result and send different things. This notebook routes tokens through one
# layer of experts on three plans, counts where they go, and reads what each way sends out of the
# compiled program. At the end a small Qwen3-MoE generates the same tokens on two of the plans.
#
# The devices are virtual: JAX splits the CPU into eight.

# %%
import os

# XLA sizes its threads from NPROC, and a collective over eight devices needs eight at once.
os.environ.setdefault("NPROC", "32")

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

from llmjax import LLM, ParallelPlan, SamplingParams
from llmjax.config import ExpertConfig
from llmjax.explore import Table, compare_rules, draw_mesh, read_collectives
from llmjax.layers.moe import choose_experts
from llmjax.parallel.dispatch_cost import ExpertLoad, buffer_bytes, choose_dispatch, sent_bytes
from llmjax.parallel.expert_dispatch import dispatch_experts
from meshes import Rules, make_mesh
from pallas_kernels import grouped_gemm

# The programs run for milliseconds: fast code is not worth the time that compiling it takes.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0}
TOKENS, EMBED, FFN, EXPERTS, TOP_K = 64, 64, 32, 8, 2
METHODS = ("allreduce", "allgather", "all_to_all")

# %% [markdown]
# ## The router
#
# A product gives each token a score for each expert. The best two get it, and their softmax
# scores, divided by their sum, are the *gates* with which their results are added.
#
# An untrained router spreads tokens about evenly. A trained one does not, and one that fails may
# send everything to the same place. All three are tried below.

# %%
random = np.random.default_rng(0)
x = random.normal(size=(TOKENS, EMBED)).astype(np.float32)
router = random.normal(size=(EMBED, EXPERTS)).astype(np.float32) * EMBED**-0.5
config = ExpertConfig(num_experts=EXPERTS, top_k=TOP_K, ffn=FFN, normalize=True)


def route(favour: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Experts [tokens, top_k] and gates, with a number added to the score of each expert."""
    experts, gates = choose_experts(jnp.array(x @ router + favour), None, config)
    return np.asarray(experts), np.asarray(gates)


routings = {
    "even": route(np.zeros(EXPERTS, np.float32)),
    "skewed": route(-np.log(np.arange(1, EXPERTS + 1, dtype=np.float32))),
    "two experts": route(np.where(np.arange(EXPERTS) < 2, 0, -100).astype(np.float32)),
}


def count_pairs(experts: np.ndarray, ranks: int) -> np.ndarray:
    """(token, expert) pairs whose expert is on each rank; neighbouring experts share a rank."""
    return np.bincount(experts.ravel() // (EXPERTS // ranks), minlength=ranks)


def draw_load(ranks: int) -> Table:
    """Pairs on each expert rank, as bars of which each sign is three pairs."""
    counts = {name: count_pairs(experts, ranks) for name, (experts, _) in routings.items()}
    return Table(
        title=f"Pairs of a token and an expert on each of {ranks} ranks",
        columns=("rank", *counts),
        rows=tuple(
            (str(rank), *(f"{own[rank]:3} {'#' * (own[rank] // 3)}" for own in counts.values()))
            for rank in range(ranks)
        ),
    )


draw_load(8)

# %% [markdown]
# The step takes as long as the fullest rank. With two experts a rank the same skew is milder, and
# two busy experts that are neighbours meet on one rank.

# %%
draw_load(4)

# %% [markdown]
# ## What must come out
#
# A loop over tokens and their experts, each a gated feed-forward layer.

# %%
gate_up = random.normal(size=(1, EXPERTS, EMBED, 2, FFN)).astype(np.float32) * EMBED**-0.5
down = random.normal(size=(1, EXPERTS, FFN, EMBED)).astype(np.float32) * FFN**-0.5


def loop_over_tokens(experts: np.ndarray, gates: np.ndarray) -> np.ndarray:
    """The sum over each token's experts of gate times what the expert makes of it."""
    out = np.zeros_like(x)
    for token in range(TOKENS):
        for expert, gate in zip(experts[token], gates[token], strict=True):
            raw_gate, up = np.einsum("e,egf->gf", x[token], gate_up[0, expert])
            hidden = raw_gate / (1 + np.exp(-raw_gate)) * up
            out[token] += gate * (hidden @ down[0, expert])
    return out


expected = {name: loop_over_tokens(*routing) for name, routing in routings.items()}

# %% [markdown]
# ## Three plans
#
# `experts` lie on `ep`, and the features inside an expert on `tp`. With `ep=8` each device holds
# one expert. With `ep=4,tp=2` two devices share two experts, each with half of their features:
# the sums of both must be added, which every dispatch does as well. The third plan has the same
# mesh, but attention data parallelism: tokens are split over `ep` and `tp`, where they were
# replicated before.

# %%
plans = (
    ParallelPlan(ep=8),
    ParallelPlan(ep=4, tp=2),
    ParallelPlan(ep=4, tp=2, attention_dp=True),
)
draw_mesh(plans[1])

# %%
compare_rules(plans)

# %% [markdown]
# ## The three dispatches
#
# `dispatch_experts` brings tokens to experts and results back, and calls a function on each
# device in between. That function gets rows of tokens sorted by expert, and how many rows belong
# to each: two grouped products, whose groups have any size. `x @ weight[expert]` for each expert,
# but in one kernel.


# %%
def run_experts(
    x: jax.Array,
    token_of_row: jax.Array,
    group_sizes: jax.Array,
    expert_of_row: jax.Array,
    weights: dict,
    layer: int,
) -> jax.Array:
    """What a device's experts make of their rows, each one of the tokens."""
    layers, experts, embed, _, ffn = weights["gate_up"].shape
    fused = weights["gate_up"].reshape(layers, experts, embed, 2 * ffn)
    options = {"row_index": token_of_row, "activation": "silu"}
    hidden = grouped_gemm(x, fused, group_sizes, layer, **options)
    return grouped_gemm(hidden, weights["down"], group_sizes, layer)


def lay_weights(rules: Rules) -> tuple[dict, dict]:
    """The experts' weights on the current mesh, and their specs."""
    specs = {
        "gate_up": rules.spec(None, "experts", None, None, "expert_ffn"),
        "down": rules.spec(None, "experts", "expert_ffn", None),
    }
    values = {"gate_up": gate_up, "down": down}
    return {name: jax.device_put(values[name], specs[name]) for name in specs}, specs


def lay_tokens(rules: Rules, routing: str) -> tuple[jax.Array, ...]:
    """Tokens, experts and gates on the current mesh."""
    return tuple(
        jax.device_put(part, rules.spec("tokens", None)) for part in (x, *routings[routing])
    )


@cache
def compile_dispatch(plan: ParallelPlan, method: str) -> jax.stages.Compiled:
    """One program for all routings: which token goes where is data, not shape."""
    rules = Rules(plan)
    weights, specs = lay_weights(rules)

    def run(x: jax.Array, experts: jax.Array, gates: jax.Array, weights: dict) -> jax.Array:
        layer = jnp.int32(0)
        return dispatch_experts(
            x, experts, gates, weights, specs, layer, run_experts, method=method, rules=rules
        )

    lowered = jax.jit(run).lower(*lay_tokens(rules, "even"), weights)
    return lowered.compile(COMPILER_OPTIONS)


def largest_error(plan: ParallelPlan, method: str) -> float:
    """The largest difference from the loop, over all routings."""
    errors = []
    with jax.set_mesh(make_mesh(plan)):
        weights, _ = lay_weights(Rules(plan))
        for routing, right in expected.items():
            out = compile_dispatch(plan, method)(*lay_tokens(Rules(plan), routing), weights)
            errors.append(np.abs(np.asarray(out) - right).max())
    return float(max(errors))


errors = {(plan, method): largest_error(plan, method) for plan in plans for method in METHODS}
assert max(errors.values()) < 1e-5

# %% [markdown]
# Nine times the result of the loop, for each of the three routings: no dispatch drops a token,
# however many meet on a rank. There is no capacity factor to choose.
#
# Now what each program sends, as XLA compiled it, beside what `sent_bytes` and `buffer_bytes`
# work out from shapes alone.


# %%
def list_collectives(plan: ParallelPlan, method: str) -> str:
    """Collectives of the compiled program, such as "all-reduce over ep"."""
    program = compile_dispatch(plan, method).as_text()
    return ", ".join(
        f"{f'{one.count} ' if one.count > 1 else ''}{one.kind} over {'*'.join(one.axes)}"
        for one in read_collectives(program, plan.sizes)
    )


def load_on(plan: ParallelPlan) -> ExpertLoad:
    """This notebook's layer, as the cost model sees it."""
    tokens = TOKENS // Rules(plan).size("tokens")
    return ExpertLoad(
        tokens=tokens, embed=EMBED, ffn=FFN, num_slots=EXPERTS, top_k=TOP_K, itemsize=4
    )


def compare_dispatches() -> Table:
    """What every dispatch sends on every plan; bytes are those of a device."""
    rows = []
    for plan, method in errors:
        load, rules = load_on(plan), Rules(plan)
        sent, buffers = (count(method, load, rules=rules) for count in (sent_bytes, buffer_bytes))
        rows.append(
            (str(plan), method, list_collectives(plan, method), f"{sent:,}", f"{buffers:,}")
        )
    return Table(
        title="One layer of experts, 64 tokens",
        columns=("plan", "dispatch", "collectives", "bytes sent", "bytes of buffers"),
        rows=tuple(rows),
    )


compare_dispatches()

# %%
assert list_collectives(plans[0], "allreduce") == "all-reduce over ep"
assert "all-gather over ep" not in list_collectives(plans[2], "all_to_all")

# %% [markdown]
# - **Tokens replicated** (the first two plans). Every rank has all tokens already, computes those
#   of its own experts, and one all-reduce adds up. `allgather` cuts the all-reduce into its two
#   halves, which send the same. With `all_to_all` each rank takes charge of its part of the
#   tokens, sends them to their experts, and gathers the results of the others.
# - **Tokens split** (attention data parallelism). `allreduce` and `allgather` are the same here:
#   gather all tokens, compute, and scatter the sums to their owners. `all_to_all` sends a token
#   only to the ranks that hold one of its experts. With `tp=2` the two ranks that share experts
#   see the same tokens, so they gather between each other first and scatter at the end.
#
# The blocks of `all_to_all` are as large as the worst routing needs, and sent whole. That is why
# it saves no bytes here. `exchange="ragged"` sends only the rows that exist, through
# `lax.ragged_all_to_all`, which XLA has on CUDA and not on CPU. Buffers are sized for the worst
# routing in any case: the price of dropping nothing.
#
# ## Which one, and how large
#
# The cost model needs no devices, so a layer of DeepSeek-V3 on 32 ranks costs nothing to look at:
# 256 experts of which a token takes 8, in bfloat16, with attention data parallelism.
# `choose_dispatch` takes what sends the fewest bytes, each collective counted as some more for its
# latency. llmjax asks it for each size of step, with padded blocks, and `moe_dispatch` overrules
# it.

# %%
wide = Rules(ParallelPlan(ep=32, attention_dp=True))


def deepseek_load(tokens: int, exchange: str = "padded", limit: int | None = None) -> ExpertLoad:
    """A layer of DeepSeek-V3, in rounds of at most `limit` tokens."""
    shape = dict(embed=7168, ffn=2048, num_slots=256, top_k=8)
    return ExpertLoad(tokens=tokens, exchange=exchange, max_num_tokens=limit, **shape)


def compare_bytes_sent(tokens: int) -> tuple[str, ...]:
    """MiB that a device sends by each dispatch, and which is chosen."""
    padded, ragged = (deepseek_load(tokens, exchange) for exchange in ("padded", "ragged"))
    ways = (("allgather", padded), ("all_to_all", padded), ("all_to_all", ragged))
    sent = [sent_bytes(method, load, rules=wide) / 2**20 for method, load in ways]
    chosen = [choose_dispatch(load, rules=wide) for load in (padded, ragged)]
    return (str(tokens), *(f"{size:.2f}" for size in sent), *chosen)


Table(
    title=f"DeepSeek-V3 on {wide.plan}: MiB that a device sends for one layer",
    columns=(
        *("tokens of a rank", "allreduce, allgather", "all_to_all", "all_to_all, ragged"),
        *("chosen", "chosen, ragged"),
    ),
    rows=tuple(compare_bytes_sent(tokens) for tokens in (1, 4, 16, 64, 256, 1024, 8192)),
)

# %% [markdown]
# Gathering sends every token to 31 other ranks, and so do padded blocks; rows go to at most 8. For
# a single token the bytes hardly count, and fewer collectives win.
#
# A long prefill needs large buffers, because in the worst case every token of every rank comes
# here. `moe_max_num_tokens` sends tokens in rounds, and a round's buffers are used again by the
# next.


# %%
def measure_rounds(limit: int | None) -> tuple[str, ...]:
    """Rounds, buffers and bytes sent of 8192 tokens a rank."""
    load = deepseek_load(8192, limit=limit)
    buffers = buffer_bytes("allgather", load, rules=wide) / 2**30
    sent = sent_bytes("allgather", load, rules=wide) / 2**30
    return str(limit), str(load.rounds), f"{buffers:.1f}", f"{sent:.1f}"


Table(
    title="8192 tokens of a rank, by allgather",
    columns=("moe_max_num_tokens", "rounds", "GiB of buffers", "GiB sent"),
    rows=tuple(measure_rounds(limit) for limit in (None, 4096, 1024, 256)),
)

# %% [markdown]
# ## The same tokens
#
# A Qwen3-MoE of three layers with random weights, as Hugging Face transformers saved it: 64
# features, 8 experts of 32, two of them for each token. Beside it lies what transformers
# generated in float32. llmjax gives the same on each plan, with the dispatch that has to do the
# most there.

# %%
folder = Path("../tests/golden/qwen3_moe")
stored = np.load(folder / "io.npz")
prompt = stored["prompt"][0].tolist()
continuation = stored["greedy"][0, len(prompt) :].tolist()
small = dict(
    max_batch_size=1,
    max_num_tokens=16,
    token_buckets=(16,),
    max_seq_len=32,
    kv_cache_max_tokens=32,
    compiler_options=COMPILER_OPTIONS,
    progress=False,
)
greedy = SamplingParams(temperature=0, max_tokens=len(continuation), ignore_eos=True)

for plan, method in ((plans[0], "allreduce"), (plans[2], "all_to_all")):
    llm = LLM(folder, plan=plan, moe_dispatch=method, dtype="float32", **small)
    ids = llm.generate([prompt], greedy)[0].outputs[0].token_ids
    print(f"{str(plan):24} {method:12} {ids}")
    assert list(ids) == continuation
