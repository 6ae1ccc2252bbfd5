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
# # A pipeline without bubbles
#
# With pipeline parallelism each *stage* holds a part of the layers, and tokens pass the stages one
# after the other. While a stage works, the others would wait: those gaps are the *bubbles*. In
# llmjax one call of the compiled step is a *tick*: every stage runs its own micro-batch, all at
# the same time, and hands the activations on to the next. With as many micro-batches in flight as
# there are stages, nobody waits.
#
# This notebook runs a small model on several plans and draws what each stage did in each tick. The
# numbers of tokens are counted by the stages themselves, on the devices; the devices are virtual:
# JAX splits the CPU into eight.

# %%
import os

# XLA sizes its threads from NPROC, and a collective over eight devices needs eight at once.
os.environ.setdefault("NPROC", "32")

from pathlib import Path

import jax
import numpy as np

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

from llmjax import LLM, ParallelPlan, SamplingParams
from llmjax.explore import Table, compare_occupancy, draw_mesh, draw_timeline, record_ticks
from llmjax.models.layer_stack import stack_layers

# %% [markdown]
# ## The stages
#
# The model is a Llama of three layers with random weights. `pp=3` gives each stage one layer;
# `pp=2` gives the first stage two and the second one. `pp_partition=(1, 2)` would turn that round.

# %%
folder = Path("../tests/golden/llama")
even, uneven = ParallelPlan(pp=3, tp=2), ParallelPlan(pp=2)
small = dict(
    max_batch_size=6,
    max_num_tokens=32,
    max_seq_len=64,
    kv_cache_max_tokens=512,
    compiler_options={"xla_backend_optimization_level": 0},
    dtype="float32",
    progress=False,
)


def build(plan: ParallelPlan, batch: int, chunks: tuple[int, ...]) -> LLM:
    """An engine with one decode bucket and a few prefill buckets, so that little is compiled."""
    return LLM(folder, plan=plan, batch_buckets=(batch,), token_buckets=chunks, **small)


llms = {even: build(even, 2, (8, 32)), uneven: build(uneven, 3, (32,))}
draw_mesh(even)

# %%
programs = {plan: stack_layers(llm.config, llm.rules) for plan, llm in llms.items()}
Table(
    title="Layers of each stage",
    columns=("plan", "stage 0", "stage 1", "stage 2"),
    rows=tuple(
        (
            str(plan),
            *(", ".join(str(layer) for layer in stage if layer >= 0) for stage in program.layers),
            *[""] * (3 - plan.pp),
        )
        for plan, program in programs.items()
    ),
)

# %% [markdown]
# ## One request
#
# A token cannot be computed before the one in front of it is known, and that one is known when it
# has left the last stage. So a single request keeps one stage busy and the others wait, whatever
# the schedule: these bubbles are inherent. Only its prompt can do better, because its tokens are
# all known: it enters in chunks, one right behind the other.

# %%
random = np.random.default_rng(0)


def draw_prompt(length: int) -> list[int]:
    """Random token ids."""
    return random.integers(3, 160, length).tolist()


def serve(plan: ParallelPlan, prompts: list[list[int]], new: int) -> list:
    """The ticks in which an engine serves these prompts, all submitted at once."""
    greedy = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    with record_ticks(llms[plan].engine) as ticks:
        llms[plan].generate(prompts, greedy)
    return ticks


alone = serve(even, [draw_prompt(24)], 5)
draw_timeline(alone, title="One request on three stages: micro-batch and tokens in each cell")

# %% [markdown]
# Read a row for what a stage did, and a diagonal for the way of a micro-batch. The prompt of 24
# tokens is cut into three chunks of 8, and for one tick all three stages are busy. Then come the
# generated tokens, three ticks each.
#
# ## Six requests
#
# Now there is enough for all. The scheduler lets a third of the running requests decode in each
# tick, so three micro-batches of two are always on their way.

# %%
many = serve(even, [draw_prompt(int(length)) for length in random.integers(4, 24, 6)], 12)
draw_timeline(many[:12], title="Six requests on three stages: the first ticks")

# %% [markdown]
# Micro-batches are numbered since the engine was built. In the first ticks the pipeline fills, and
# the prompts come in. From then on there is no gap, and no padding: two tokens at each stage, and
# room for two.

# %%
steady = many[10:-6]
assert all(tick.tokens == (2, 2, 2) and tick.room == 2 for tick in steady)
draw_timeline(many[-12:], title="The last ticks", first=len(many) - 12)

# %% [markdown]
# ## Decode and prefill together
#
# Five requests with a prompt of one token decode from the start; behind them comes a prompt of 21.
# Its chunks share ticks with the decodes. All stages of a tick run in the same bucket, the one that
# the longest prefill in the pipeline needs: a stage without a chunk computes padding in its place.
# That is why the scheduler cuts a prompt into a chunk for each stage and sends them in consecutive
# ticks. Whole, it would have taken three ticks with room for 34.

# %%
mixed = serve(even, [*(draw_prompt(1) for _ in range(5)), draw_prompt(21)], 8)
assert max(tick.room for tick in mixed) == 10
draw_timeline(mixed[:12], title="Five requests that decode, and a prompt")

# %% [markdown]
# ## Uneven stages
#
# Two stages share three layers. The timeline has no gaps either: both stages run the same program,
# of two layers, and the second stage skips one of them by throwing its result away. What is lost
# does not show as a bubble but inside a tick: of four layers computed, three count. So choose
# partitions whose stages differ as little as they can.

# %%
uneven_ticks = serve(uneven, [draw_prompt(5) for _ in range(6)], 12)
places = [layer for stage in programs[uneven].layers for layer in stage]
print(f"{sum(layer >= 0 for layer in places)} of {len(places)} layers computed in a tick count")
draw_timeline(uneven_ticks[6:16], title="Six requests on two stages of 2 and 1 layers", first=6)

# %%
assert all(tick.tokens == (3, 3) and tick.room == 3 for tick in uneven_ticks[6:-4])

# %% [markdown]
# ## How busy the stages were
#
# Occupancy is the tokens that a stage counted over those that its buckets had room for. One
# request cannot fill the stages. Six do, but for the ticks in which the pipeline fills and drains,
# and for what pads the prompts: short runs, like these, consist of little else.

# %%
compare_occupancy(
    {
        "one request": alone,
        "six requests": many,
        "six requests, steady": steady,
        "decode and prefill": mixed,
        "uneven, six requests": uneven_ticks,
    }
)
