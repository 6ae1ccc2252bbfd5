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
# # Shard a transformer by hand
#
# A small Llama in plain JAX, written once and laid on eight devices in two ways: tensor
# parallelism, and attention data parallelism. What changes between them is a column of a table.
# Each layout is checked twice: its logits against those of one device, and the collectives of its
# compiled program against what the strategy promises. At the end llmjax gets the same model, and
# chooses the same specs.
#
# The devices are virtual: JAX splits the CPU into eight.

# %%
import os

# XLA sizes its threads from NPROC, and a collective over eight devices needs eight at once.
os.environ.setdefault("NPROC", "32")

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

from llmjax import ParallelPlan
from llmjax.config import ModelConfig
from llmjax.explore import Table, draw_shards, lay_out, read_collectives

EMBED, FFN, VOCAB, LAYERS = 64, 128, 256, 4
KV_HEADS, GROUP, HEAD_DIM = 4, 2, 16  # each key/value head serves a group of two query heads

# %% [markdown]
# ## A mesh with Explicit axes
#
# With axes of type `Explicit`, the sharding of an array is part of its type. JAX works out the
# sharding of every result while it traces, and refuses where two are possible. Nothing is left for
# the compiler to guess.

# %%
EXPLICIT = (AxisType.Explicit, AxisType.Explicit)
mesh = jax.make_mesh((2, 4), ("dp", "tp"), EXPLICIT)
jax.set_mesh(mesh)
mesh

# %% [markdown]
# ## One feed-forward layer
#
# Two products, `x @ up` and `hidden @ down`. The first weight is split by columns and the second by
# rows (Megatron-LM, Shoeybi et al., 2019). Then each device computes its own features of `hidden`,
# which no other device needs: between the two products nothing is sent.

# %%
random = np.random.default_rng(0)
x = jax.device_put(jnp.array(random.normal(size=(8, EMBED)), jnp.float32), P("dp", None))
up = jax.device_put(jnp.array(random.normal(size=(EMBED, FFN)), jnp.float32), P(None, "tp"))
down = jax.device_put(jnp.array(random.normal(size=(FFN, EMBED)), jnp.float32), P("tp", None))

hidden = jax.nn.relu(x @ up)
jax.typeof(hidden)

# %% [markdown]
# The second product sums over features that lie on different devices. Each has a part of every sum,
# and the parts must be added: in an all-reduce, if all devices of `tp` need the result, or in a
# reduce-scatter, if each needs a part. JAX cannot know, and asks:

# %%
try:
    hidden @ down
except Exception as error:
    print(f"{type(error).__name__}: {error}")
else:
    raise AssertionError("a product over a split axis has two possible results")

# %% [markdown]
# `out_sharding` is the answer. Leaving `tp` out of it asks for the all-reduce.

# %%
result = jnp.einsum("tf,fe->te", hidden, down, out_sharding=P("dp", None))
jax.typeof(result)

# %% [markdown]
# ## A transformer in logical names
#
# Now the whole model. Every axis that may be split gets a name, and no name says how:
#
# - `requests`: rows of the batch
# - `heads`: key/value heads, each with its query heads and its part of `out`, so that one split
#   serves the whole of attention
# - `ffn`: features between the two products of the feed-forward layer
# - `vocab`: entries of the vocabulary
# - `gathered_requests`: rows of the batch where `ffn` or `vocab` is split. Why they need a name of
#   their own becomes clear below.

# %%
WEIGHTS = {
    "embedding": ((VOCAB, EMBED), ("vocab", None)),
    "attention_norm": ((LAYERS, EMBED), (None, None)),
    "qkv": ((LAYERS, EMBED, KV_HEADS, GROUP + 2, HEAD_DIM), (None, None, "heads", None, None)),
    "out": ((LAYERS, KV_HEADS, GROUP, HEAD_DIM, EMBED), (None, "heads", None, None, None)),
    "mlp_norm": ((LAYERS, EMBED), (None, None)),
    "gate_up": ((LAYERS, EMBED, 2, FFN), (None, None, None, "ffn")),
    "down": ((LAYERS, FFN, EMBED), (None, "ffn", None)),
    "norm": ((EMBED,), (None,)),
}
"""Name -> shape and logical axes; weights of layers are stacked on the first axis."""
STACKED = ("attention_norm", "qkv", "out", "mlp_norm", "gate_up", "down")


def spec(rules: dict, *logical: str | None) -> P:
    """PartitionSpec of axes with these names; what the rules do not mention stays whole."""
    return P(*(rules.get(name) for name in logical))


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Divides by the root of the mean square."""
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def rotate(x: jax.Array) -> jax.Array:
    """Rotary position embedding of [requests, positions, heads, ..., HEAD_DIM]."""
    frequencies = 10000.0 ** -(jnp.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = jnp.arange(x.shape[1])[:, None] * frequencies
    angles = angles.reshape(x.shape[1], *(1,) * (x.ndim - 3), -1)
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


# %% [markdown]
# Every `out_sharding` below marks a place where layouts differ: the products with `qkv` and
# `gate_up` begin a split, those with `out` and `down` end it.


# %%
def attend(x: jax.Array, qkv: jax.Array, out: jax.Array, rules: dict) -> jax.Array:
    """Causal attention over whole prompts."""
    heads = spec(rules, "requests", None, "heads", None, None)
    qkv = jnp.einsum("bse,ekgd->bskgd", x, qkv, out_sharding=heads)
    q, k, v = rotate(qkv[..., :GROUP, :]), rotate(qkv[..., GROUP, :]), qkv[..., GROUP + 1, :]
    scores = jnp.einsum("bskgd,btkd->bkgst", q, k) * HEAD_DIM**-0.5
    past = jnp.tri(x.shape[1], dtype=bool)
    mixed = jnp.einsum("bkgst,btkd->bskgd", jax.nn.softmax(jnp.where(past, scores, -jnp.inf)), v)
    stream = spec(rules, "requests", None, None)
    return jnp.einsum("bskgd,kgde->bse", mixed, out, out_sharding=stream)


def feed_forward(x: jax.Array, gate_up: jax.Array, down: jax.Array, rules: dict) -> jax.Array:
    """down(silu(gate(x)) * up(x)), gate and up as one weight."""
    x = jax.sharding.reshard(x, spec(rules, "gathered_requests", None, None))
    split = spec(rules, "gathered_requests", None, None, "ffn")
    hidden = jnp.einsum("bse,egf->bsgf", x, gate_up, out_sharding=split)
    hidden = jax.nn.silu(hidden[:, :, 0]) * hidden[:, :, 1]
    stream = spec(rules, "requests", None, None)
    return jnp.einsum("bsf,fe->bse", hidden, down, out_sharding=stream)


def compute_logits(weights: dict, ids: jax.Array, *, rules: dict) -> jax.Array:
    """Logits [requests, positions, vocab] of prompts of one length."""
    with jax.named_scope("embed"):
        stream = spec(rules, "requests", None, None)
        x = weights["embedding"].at[ids].get(out_sharding=stream)

    def run_layer(x: jax.Array, layer: dict) -> tuple[jax.Array, None]:
        with jax.named_scope("attention"):
            normed = rms_norm(x, layer["attention_norm"])
            x = x + attend(normed, layer["qkv"], layer["out"], rules)
        with jax.named_scope("mlp"):
            normed = rms_norm(x, layer["mlp_norm"])
            return x + feed_forward(normed, layer["gate_up"], layer["down"], rules), None

    x, _ = jax.lax.scan(run_layer, x, {name: weights[name] for name in STACKED})
    with jax.named_scope("head"):
        x = rms_norm(x, weights["norm"])
        x = jax.sharding.reshard(x, spec(rules, "gathered_requests", None, None))
        split = spec(rules, "gathered_requests", None, "vocab")
        return jnp.einsum("bse,ve->bsv", x, weights["embedding"], out_sharding=split)


# %% [markdown]
# Random weights, and eight prompts of twelve tokens. On one device nothing is split: an empty table
# of rules, on a mesh whose axes have size 1. These logits are what every layout must give.

# %%
values = {
    name: np.ones(shape, np.float32)
    if name.endswith("norm")
    else random.normal(0, 0.1, shape).astype(np.float32)
    for name, (shape, _) in WEIGHTS.items()
}
prompts = random.integers(0, VOCAB, (8, 12))


def compile_and_run(rules: dict) -> tuple[np.ndarray, jax.stages.Compiled]:
    """Lays weights and prompts by the rules, and computes the logits."""
    weights = {
        name: jax.device_put(values[name], spec(rules, *logical))
        for name, (_, logical) in WEIGHTS.items()
    }
    ids = jax.device_put(prompts, spec(rules, "requests", None))
    compiled = jax.jit(partial(compute_logits, rules=rules)).lower(weights, ids).compile()
    return np.asarray(compiled(weights, ids)), compiled


with jax.set_mesh(jax.make_mesh((1, 1), ("dp", "tp"), EXPLICIT, devices=jax.devices()[:1])):
    expected, _ = compile_and_run({})
expected.shape

# %% [markdown]
# ## Tensor parallelism
#
# Requests over `dp`, and over `tp` what the weights are made of: heads, features, vocabulary. For
# the model above that is all there is to say.

# %%
TENSOR = {
    "requests": "dp",
    "gathered_requests": "dp",
    "heads": "tp",
    "ffn": "tp",
    "vocab": "tp",
}

logits, tensor_program = compile_and_run(TENSOR)
print("largest difference from one device:", np.abs(logits - expected).max())
assert np.abs(logits - expected).max() < 1e-4

# %% [markdown]
# Right logits do not prove a right layout: a program that gathers every weight gives them too. What
# is sent stands in the compiled program, and `read_collectives` counts it there, loops included.


# %%
def list_collectives(title: str, program: jax.stages.Compiled) -> Table:
    """The collectives of a compiled program; bytes are those on a device."""
    return Table(
        title=title,
        columns=("part", "collective", "over", "calls", "bytes of a call"),
        rows=tuple(
            (one.part, one.kind, ", ".join(one.axes), str(one.count), f"{one.num_bytes:,}")
            for one in read_collectives(program.as_text(), mesh.shape)
        ),
    )


list_collectives("Tensor parallelism", tensor_program)

# %% [markdown]
# Two all-reduces a layer, one where attention ends and one where the feed-forward ends, each of the
# residual stream: 4 requests of 12 tokens of 64 features in float32. The embedding takes another,
# for each token's row lies on one rank of `tp`. The head takes none, as its logits stay split.
# Nothing crosses `dp`.


# %%
def calls_of(program: jax.stages.Compiled, part: str) -> list[tuple[str, int, int]]:
    """Kind, calls and bytes of the collectives in a part of the program."""
    found = read_collectives(program.as_text(), mesh.shape)
    return [(one.kind, one.count, one.num_bytes) for one in found if one.part == part]


stream_bytes = 4 * 12 * EMBED * 4
for part in ("attention", "mlp"):
    assert calls_of(tensor_program, part) == [("all-reduce", LAYERS, stream_bytes)]
assert calls_of(tensor_program, "head") == []

# %% [markdown]
# ## Attention data parallelism
#
# Tensor parallelism can split attention as far as there are key/value heads. Beyond that, and in
# latent attention, where all heads share one cached vector, ranks store the same cache again.
# Attention data parallelism gives each rank the attention of whole requests instead: `requests` lie
# on `tp` too, and `heads` on nothing. Feed-forward and vocabulary stay split over `tp`, so there
# its ranks must see each other's requests: the row `gathered_requests` stays as it was.

# %%
ATTENTION_DP = TENSOR | {"requests": ("dp", "tp"), "heads": None}

logits, attention_dp_program = compile_and_run(ATTENTION_DP)
print("largest difference from one device:", np.abs(logits - expected).max())
assert np.abs(logits - expected).max() < 1e-4
list_collectives("Attention data parallelism", attention_dp_program)

# %% [markdown]
# Attention sends nothing. The feed-forward gathers the requests of its ranks, and hands each rank
# back the sums of its own. That return is a reduce-scatter in meaning; XLA on CPU writes it as an
# all-reduce of which each device keeps a part, which sends twice as much.

# %%
assert calls_of(attention_dp_program, "attention") == []
assert ("all-gather", LAYERS, stream_bytes) in calls_of(attention_dp_program, "mlp")

# %% [markdown]
# ## The same model in llmjax
#
# llmjax's mesh always has five axes. This notebook's two are `dp` and `tp` among them, and the
# others have size 1. Its rules are a table like the two above, with one column a placement of
# attention, and `lay_out` derives every spec from the model's configuration. Nothing is allocated.

# %%
config = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=VOCAB,
    hidden_size=EMBED,
    num_layers=LAYERS,
    num_heads=KV_HEADS * GROUP,
    num_kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    intermediate_size=FFN,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)
OURS = {
    "embedding": "embedding",
    "layers.attention_norm.scale": "attention_norm",
    "layers.attention.qkv": "qkv",
    "layers.attention.out": "out",
    "layers.mlp_norm.scale": "mlp_norm",
    "mlp.gate_up": "gate_up",
    "mlp.down": "down",
    "norm.scale": "norm",
}
"""llmjax's name of a weight -> its name here."""


def name_axes(entries: P | tuple, sizes: dict) -> str:
    """Mesh axes of each tensor axis, without those of size 1."""
    listed = [(entry,) if isinstance(entry, str) else entry or () for entry in entries]
    wide = [[axis for axis in axes if sizes[axis] > 1] for axes in listed]
    return ", ".join("*".join(axes) or "-" for axes in wide)


def compare_with_llmjax(plan: ParallelPlan, rules: dict) -> Table:
    """Both specs of every weight."""
    rows = []
    for tensor in lay_out(config, plan).weights:
        shape, logical = WEIGHTS[OURS[tensor.name]]
        assert tensor.shape == shape, tensor.name
        theirs = name_axes(tensor.mesh_axes, plan.sizes)
        ours = name_axes(spec(rules, *logical), mesh.shape)
        assert theirs == ours, tensor.name
        rows.append((tensor.name, theirs, ours))
    return Table(title=str(plan), columns=("weight", "llmjax", "by hand"), rows=tuple(rows))


compare_with_llmjax(ParallelPlan(dp=2, tp=4), TENSOR)

# %%
compare_with_llmjax(ParallelPlan(dp=2, tp=4, attention_dp=True), ATTENTION_DP)

# %% [markdown]
# The cache of keys and values, which this notebook does without, is what attention data parallelism
# is for: each rank holds other pages instead of other heads of the same pages. `draw_shards` shows
# both, and `llmjax.describe(plan, model)` prints the collectives of the compiled prefill and decode
# steps, as read here from the notebook's own program.

# %%
draw_shards(lay_out(config, ParallelPlan(dp=2, tp=4)), "kv_cache")

# %%
draw_shards(lay_out(config, ParallelPlan(dp=2, tp=4, attention_dp=True)), "kv_cache")
