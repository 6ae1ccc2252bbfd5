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
# # One mesh, five axes
#
# llmjax lays every model on one `jax.sharding.Mesh` with five axes: `pp`, `dp`, `cp`, `ep`, `tp`,
# outer to inner. All five are always there; an axis that a plan does not use has size 1. A model
# names the axes of its tensors in its own words (`heads`, `ffn`, `vocab`), and a table of rules
# says which mesh axes each word lies on. That table is the whole difference between one parallel
# strategy and another.
#
# This notebook lays SmolLM2-135M-Instruct on eight devices in several ways, and then generates the
# same text with two of them. The devices are virtual: JAX splits the CPU into eight.

# %%
import os

# XLA sizes its threads from NPROC, and a collective over eight devices needs eight at once.
os.environ.setdefault("NPROC", "32")

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

from llmjax import LLM, ParallelPlan, SamplingParams
from llmjax.explore import (
    compare_bytes,
    compare_rules,
    compare_specs,
    draw_mesh,
    draw_shards,
    lay_out,
    list_tensors,
)

# %% [markdown]
# ## Plans
#
# A plan is the sizes of the axes, and the place of attention. Devices are numbered with the
# innermost axis counting fastest, because neighbours talk most: on a machine of eight GPUs `tp`
# stays inside it, and `dp` crosses machines.

# %%
one = ParallelPlan()
tensor = ParallelPlan(tp=8)
replicas = ParallelPlan(dp=2, tp=4)
attention_dp = ParallelPlan(tp=8, attention_dp=True)
partial_dp = ParallelPlan(ep=2, tp=4, attention_dp="partial")
plans = [one, tensor, replicas, attention_dp, partial_dp]

draw_mesh(replicas)

# %% [markdown]
# ## Rules
#
# One column a plan. Tensor parallelism splits heads, feed-forward features and vocabulary. Data
# parallelism splits what belongs to requests: tokens, and pages of the KV cache. Attention data
# parallelism moves the attention of whole requests onto the ranks that held heads before; the
# feed-forward layers stay split, so their tokens are gathered first (`ffn_tokens`) and the results
# scattered back.
#
# The last two rows wait for mixtures of experts, which `ep` is named after. A dense model splits
# its feed-forward over `ep` and `tp` together.

# %%
compare_rules(plans)

# %% [markdown]
# ## Weights
#
# Each weight is declared once, with logical axes. Shape, sharding, loading and this table derive
# from that declaration, and nothing is allocated to print it. Layers are stacked on the leading
# axis of every `layers.` weight, which lies on `pp`.

# %%
layouts = [lay_out("smollm2-135m-instruct", plan, cache_tokens=4096) for plan in plans]
list_tensors(layouts[2])

# %%
compare_specs(layouts)

# %% [markdown]
# ## Nine heads on eight ranks
#
# SmolLM2 has 9 query heads and 3 key/value heads, and neither divides by 2, 4 or 8. So attention
# stores *slots*: a key/value head with the query heads that read it. `layers.attention.qkv` is
# `[layers, embed, slots, queries + 2, head_dim]`, the 2 being the key and the value. One device has
# 3 slots of 3 queries. On four ranks a fourth slot stays empty. On eight, each key/value head is
# stored twice, for two of its three queries and for the third, and two slots stay empty. An empty
# slot has zero weights on both sides of attention, so the result is exact; it costs memory and
# arithmetic, which the column "added" states.

# %%
draw_shards(layouts[1], "layers.attention.qkv")

# %%
draw_shards(layouts[2], "layers.attention.qkv")

# %% [markdown]
# The KV cache is split over the same slots, and its pages over batch ranks. Under `dp=2,tp=4` each
# device holds half of the pages of one slot. Full attention data parallelism does not split heads:
# a rank holds all heads of its own requests, so nothing is padded and nothing is stored twice.

# %%
draw_shards(layouts[2], "kv_cache")

# %%
draw_shards(layouts[3], "kv_cache")

# %% [markdown]
# ## Bytes on a device
#
# In bfloat16, with a cache of 4096 tokens in all. Full attention data parallelism holds all
# attention weights on every device, and in return the smallest cache. That is a good trade for a
# model with few key/value heads and many long requests.

# %%
compare_bytes(layouts)

# %% [markdown]
# ## The same text
#
# Now the weights are loaded, each device getting its own slices, and one greedy prompt runs in
# float32: on one device, and on eight under the plan that mixes the most, with requests over `ep`,
# heads over `tp` and the feed-forward over both. The options keep the compiled programs few and
# small: one for prefill, one for decode. Try the other plans; each compiles its own two.

# %%
small = dict(
    max_batch_size=1,
    max_num_tokens=8,
    token_buckets=(8,),
    max_seq_len=16,
    kv_cache_max_tokens=16,
    dtype="float32",
    progress=False,
)
greedy = SamplingParams(temperature=0, max_tokens=8)


def complete(plan: ParallelPlan) -> str:
    """Continues a prompt on a plan, and shows where its query, key and value weight lies."""
    llm = LLM("smollm2-135m-instruct", plan=plan, **small)
    weight = llm.engine.runner.weights["layers"]["attention"]["qkv"]
    text = llm.generate("One, two, three,", greedy)[0].outputs[0].text
    print(f"{str(plan):30} {weight.addressable_shards[0].data.shape}  {text}")
    return text


texts = [complete(plan) for plan in (one, partial_dp)]
assert len(set(texts)) == 1
