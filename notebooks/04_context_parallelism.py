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
# # Context parallelism: a ring, and Helix
#
# A sequence that is too long for one device is split: each *context rank* holds a part of its
# tokens and a part of its keys and values. Attention is the one layer in which tokens meet, so it
# is the only one that has to do anything about it, and it does two different things. In prefill,
# keys go round a ring and every rank's queries wait for them. In decode, queries go to where the
# keys lie, and what the ranks find is merged. This notebook takes both apart with the functions
# that the engine runs.
#
# The devices are virtual: JAX splits the CPU into eight, of which four are used here.

# %%
import os

# XLA sizes its threads from NPROC, and a collective over several devices needs as many at once.
os.environ.setdefault("NPROC", "32")

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

from llmjax import LLM, ParallelPlan, SamplingParams
from llmjax.explore import Table, compare_rules, read_collectives
from llmjax.parallel.collectives import axis_index, island
from llmjax.parallel.context import Attended, PageDeal, deal, merge, merge_ranks, pass_on
from meshes import Rules, make_mesh
from pallas_kernels import Places, block_attention, paged_attention, store_rows

RANKS, TOKENS, HEADS, DIM, PAGE = 4, 32, 2, 8, 4
plan = ParallelPlan(cp=RANKS)
rules, mesh = Rules(plan), make_mesh(plan)
AXES = rules.axes("context")

# %% [markdown]
# ## Who computes which tokens
#
# Under the causal mask the token at position p looks at p + 1 keys, so late tokens are more work.
# Cut into four runs, the last rank has six times the work of the first. Dealt like cards, 0 1 2
# 3 0 1 2 3, the last rank still has a little more than the others in every round. Dealt to and
# fro, 0 1 2 3 3 2 1 0, two rounds together are even. That is `deal`.

# %%
deals = {
    "runs": np.arange(TOKENS).reshape(RANKS, -1),
    "stripes": np.arange(TOKENS).reshape(-1, RANKS).T,
    "zigzag": deal(TOKENS, RANKS),
}


def draw_deal(name: str) -> Table:
    """The rank of each token, tokens from left to right."""
    rank_of = np.empty(TOKENS, int)
    for rank, tokens in enumerate(deals[name]):
        rank_of[tokens] = rank
    return Table(
        title=f"{name}: rank of each token",
        columns=tuple(map(str, range(TOKENS))),
        rows=(tuple(map(str, rank_of)),),
        shades=(tuple(map(int, rank_of)),),
    )


draw_deal("zigzag")


# %%
def draw_work() -> Table:
    """Pairs of a query and a key that it sees, for each rank."""
    rows = []
    for name, held in deals.items():
        work = (held + 1).sum(1)
        spread = f"{work.max() / work.mean() - 1:.0%}"
        rows.append((name, *map(str, work), spread))
    return Table(
        title=f"Unmasked work on {TOKENS} tokens",
        columns=("deal", *(f"rank {rank}" for rank in range(RANKS)), "most above mean"),
        rows=tuple(rows),
    )


draw_work()

# %%
zigzag_work = (deals["zigzag"] + 1).sum(1)
assert zigzag_work.max() == zigzag_work.min()

# %% [markdown]
# The deal is over the tokens of a step, whatever requests they belong to: a step of one long and
# three short prompts is dealt like any other, and no prompt can be too short for the ring.
#
# ## The ring
#
# Each rank keeps its queries. Its keys and values go to the next rank, and those of the rank
# before come in; after three hops every query has met every key. `pass_on` is one hop. Here it
# carries the positions of the keys in place of the keys, so that we can see who holds what.


# %%
def watch_ring() -> np.ndarray:
    """Positions of the keys at [rank, hop]."""

    def body(block: jax.Array) -> jax.Array:
        held = [block]
        for _ in range(RANKS - 1):
            held.append(pass_on(held[-1], AXES))
        return jnp.stack(held)[None]

    spec = rules.spec("context")
    positions = jax.device_put(deals["zigzag"].reshape(-1), rules.sharding(mesh, "context"))
    return np.asarray(jax.jit(island(body, in_specs=spec, out_specs=spec))(positions))


with jax.set_mesh(mesh):
    held_at = watch_ring()


def draw_hops() -> Table:
    """For each rank and hop: whose keys are there, and how much of the block is visible."""
    rows, shades = [], []
    for rank, hops in enumerate(held_at):
        queries = deals["zigzag"][rank]
        sources = [next(r for r in range(RANKS) if keys[0] in deals["zigzag"][r]) for keys in hops]
        pairs = [int((keys <= queries[:, None]).sum()) for keys in hops]
        rows.append(
            (
                f"rank {rank}",
                *(
                    f"keys of rank {source}: {pairs} of {queries.size**2}"
                    for source, pairs in zip(sources, pairs, strict=True)
                ),
            )
        )
        shades.append((None, *sources))
    return Table(
        title="Whose keys are where, and the pairs that the mask leaves of each block",
        columns=("", *(f"hop {hop}" for hop in range(RANKS))),
        rows=tuple(rows),
        shades=tuple(shades),
    )


draw_hops()

# %% [markdown]
# Nobody waits for anybody: at each hop all blocks are about as full. With runs in place of the
# zigzag, six of the sixteen blocks would be empty and six full, and since all ranks move on
# together, each hop would take as long as its fullest block.
#
# A softmax over all keys is needed, and a rank sees a block of them at a time. So each block gives
# two things: its result `out`, as if there were no other keys, and the logarithm `lse` of the sum
# of its exponentials. Two parts are put together with weights `exp(lse)`; that is `merge`.

# %%
random = np.random.default_rng(0)
q, k, v = random.normal(size=(3, TOKENS, HEADS, DIM)).astype(np.float32)
SCALE = DIM**-0.5


def attend_at_once(queries: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Attention in NumPy, on one device: query i sees the keys up to position last[i]."""
    scores = np.einsum("qhd,khd->qhk", queries, k) * SCALE
    scores = np.where(np.arange(TOKENS) > last[:, None, None], -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("qhk,khd->qhd", weights / weights.sum(-1, keepdims=True), v)


def ring_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """What the engine's ring does, for one prompt and nothing cached before."""
    rank, parts, zigzag = axis_index(AXES), [], jnp.asarray(deals["zigzag"])

    def places(owner: jax.Array) -> Places:
        return Places(jnp.zeros(TOKENS // RANKS, jnp.int32), zigzag[owner])

    block = jnp.concatenate([k, v], axis=-1)
    for hop in range(RANKS):
        source = (rank - hop) % RANKS
        # Sent on before it is used, so that it travels meanwhile.
        following = pass_on(block, AXES) if hop < RANKS - 1 else block
        keys, values = jnp.split(block, 2, axis=-1)
        parts.append(
            Attended(*block_attention(q, keys, values, places(rank), places(source), scale=SCALE))
        )
        block = following
    return merge(jnp.stack([p.out for p in parts]), jnp.stack([p.lse for p in parts])).out


def compile_on_ranks(body: Callable, arrays: tuple[np.ndarray, ...]) -> tuple:
    """A program in which each rank runs the body on its part of every array, and its inputs."""
    spec = rules.spec("context")
    placed = tuple(jax.device_put(x, rules.sharding(mesh, "context")) for x in arrays)
    program = jax.jit(island(body, in_specs=spec, out_specs=spec)).lower(*placed).compile()
    return program, placed


order = deals["zigzag"].reshape(-1)
with jax.set_mesh(mesh):
    ring, parts = compile_on_ranks(ring_attention, (q[order], k[order], v[order]))
    found = np.asarray(ring(*parts))

expected = attend_at_once(q, np.arange(TOKENS))
assert np.abs(found - expected[order]).max() < 1e-5
found.shape


# %%
def list_collectives(program: jax.stages.Compiled) -> str:
    """Collectives of a compiled program, such as "3 collective-permute over cp"."""
    return ", ".join(
        f"{one.count} {one.kind} over {'*'.join(one.axes)}"
        for one in read_collectives(program.as_text(), plan.sizes)
    )


assert list_collectives(ring) == "3 collective-permute over cp"
list_collectives(ring)

# %% [markdown]
# One permute less than there are ranks, and no rank has held more than two ranks' keys at a time.
#
# ## Where keys stay
#
# As the blocks pass, each rank stores what it owns in its part of the paged cache. Page p of a
# sequence lies on rank p mod 4, so the cache grows evenly while a sequence grows, and the owner of
# a key does not depend on the step in which it was computed. `PageDeal` is that rule.

# %%
pages = PageDeal(PAGE, RANKS)
OWN_PAGES = TOKENS // PAGE // RANKS


def draw_pages() -> Table:
    """Which positions each rank stores, and in which of its own pages."""
    rows, shades = [], []
    for rank in range(RANKS):
        slots = np.asarray(pages.own(jnp.arange(TOKENS), rank))
        own_pages = [
            np.flatnonzero(slots // PAGE == page) for page in range(TOKENS // PAGE // RANKS)
        ]
        rows.append((f"rank {rank}", *(f"{own[0]} to {own[-1]}" for own in own_pages)))
        shades.append((None, *(rank for _ in own_pages)))
    return Table(
        title=f"Positions in the pages of {PAGE} that each rank has",
        columns=("", *(f"its page {page}" for page in range(OWN_PAGES))),
        rows=tuple(rows),
        shades=tuple(shades),
    )


draw_pages()

# %% [markdown]
# ## Decode: pages over ranks, one merge
#
# A decode step has one query a request. A ring would send the whole cache round for it. Instead
# every rank gets all queries, reads its own pages, and has a part of the answer. Below, four
# requests with the same 32 keys stand at different positions. What each rank finds for the third
# request, and the weight of it in the whole:

# %%
last = np.array([5, 12, 21, 31])
queries = q[last]


def read_own_pages(queries: jax.Array, k_page: jax.Array, v_page: jax.Array) -> Attended:
    """This rank's part of attention: all queries, and the keys in its pages."""
    rank, seen = axis_index(AXES), jnp.asarray(last)
    table = jnp.broadcast_to(jnp.arange(k_page.shape[1]), (len(last), k_page.shape[1]))
    return Attended(
        *paged_attention(
            queries,
            k_page,
            v_page,
            jnp.int32(0),
            table,
            jnp.arange(len(last) + 1),
            pages.count(seen + 1, rank),
            scale=SCALE,
            max_query_length=1,
            last_position=seen,
            page_stride=RANKS,
            first_page=rank,
        )
    )


def store_own_keys(rows: np.ndarray, rank: int) -> jax.Array:
    """A rank's pages [layers, pages, page, heads, dim], with its part of the rows in them."""
    empty = jnp.zeros((1, OWN_PAGES, PAGE, HEADS, DIM))
    slots = pages.own(jnp.arange(TOKENS), rank)
    (stored,) = store_rows([empty], 0, [jnp.asarray(rows)], slots)
    return stored


cached = [
    np.concatenate([store_own_keys(rows, rank)[None] for rank in range(RANKS)]) for rows in (k, v)
]


def find_parts(k_page: jax.Array, v_page: jax.Array) -> Attended:
    """What every rank finds, before anything is merged."""
    return jax.tree.map(
        lambda x: x[None], read_own_pages(jnp.asarray(queries), k_page[0], v_page[0])
    )


with jax.set_mesh(mesh):
    program, arrays = compile_on_ranks(find_parts, tuple(cached))
    outs, lses = (np.asarray(x) for x in program(*arrays))


def draw_parts(request: int, head: int) -> Table:
    """Each rank's part of one request's attention, and its weight in the sum."""
    own = lses[:, request, head]
    weights = np.exp(own - np.logaddexp.reduce(own))
    counts = [int(pages.count(jnp.int32(last[request] + 1), rank)) for rank in range(RANKS)]
    return Table(
        title=f"The request at position {last[request]}, head {head}",
        columns=("", "keys here", "lse", "weight", "out, first two features"),
        rows=tuple(
            (
                f"rank {rank}",
                str(counts[rank]),
                f"{own[rank]:.3f}",
                f"{weights[rank]:.1%}",
                ", ".join(f"{x:+.3f}" for x in outs[rank, request, head, :2]),
            )
            for rank in range(RANKS)
        ),
    )


draw_parts(2, 0)

# %%
draw_parts(0, 0)

# %% [markdown]
# The request at position 5 has keys on two ranks only; the others give an `lse` of minus infinity,
# and so no weight. `merge` adds up by these weights, and that is attention to all keys.

# %%
right = attend_at_once(queries, last)
merged = merge(jnp.asarray(outs), jnp.asarray(lses)).out
assert np.abs(np.asarray(merged) - right).max() < 1e-5

# %% [markdown]
# The engine does not merge everything everywhere. `merge_ranks` deals the requests out to the
# ranks: with one all-to-all each rank gets all parts of its own requests, and merges those. That
# is the one collective that the results need, and its size does not depend on how long the
# sequences are.


# %%
def decode(k_page: jax.Array, v_page: jax.Array) -> jax.Array:
    """Each rank's own requests, finished."""
    return merge_ranks(read_own_pages(jnp.asarray(queries), k_page[0], v_page[0]), AXES).out


with jax.set_mesh(mesh):
    program, arrays = compile_on_ranks(decode, tuple(cached))
    finished = np.asarray(program(*arrays))

assert np.abs(finished - right[deal(len(last), RANKS).reshape(-1)]).max() < 1e-5
assert list_collectives(program) == "1 all-to-all over cp"
list_collectives(program)

# %% [markdown]
# ## What Helix adds
#
# Context ranks share the keys, but each would hold all weights, and read them for a quarter of the
# tokens. TensorRT-LLM's Helix lets the same ranks be tensor ranks in the layers where tokens do
# not meet. Here that is a change of the table of rules: feed-forward features, experts and
# vocabulary lie on `cp` too.

# %%
compare_rules((ParallelPlan(cp=2, tp=2), ParallelPlan(cp=2, tp=2, cp_type="HELIX")))

# %% [markdown]
# ## The same tokens
#
# A Llama of three layers with random weights, as Hugging Face transformers saved it, with what
# transformers generated in float32. The prompt goes round the ring, each generated token is merged
# from pages on all ranks.

# %%
folder = Path("../tests/golden/llama")
stored = np.load(folder / "io.npz")
prompt = stored["prompt"][0].tolist()
continuation = stored["greedy"][0, len(prompt) :].tolist()
small = dict(
    max_batch_size=4,
    batch_buckets=(4,),
    max_num_tokens=16,
    token_buckets=(16,),
    max_seq_len=32,
    kv_cache_max_tokens=64,
    tokens_per_block=4,
    # The programs run for milliseconds: fast code is not worth the time that compiling it takes.
    compiler_options={"xla_backend_optimization_level": 0},
    progress=False,
)
greedy = SamplingParams(temperature=0, max_tokens=len(continuation), ignore_eos=True)

for kind in ("RING", "HELIX"):
    context = ParallelPlan(cp=RANKS, cp_type=kind)
    llm = LLM(folder, plan=context, dtype="float32", **small)
    ids = llm.generate([prompt], greedy)[0].outputs[0].token_ids
    print(f"{str(context):28} {ids}")
    assert list(ids) == continuation
