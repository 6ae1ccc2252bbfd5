"""The golden models on any plan, and what Hugging Face says of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_engine import SMALL

from llmjax import LLM, SamplingParams
from llmjax.engine.batch import Bucket, pack_schedule, sampling_columns
from llmjax.engine.request import Request
from llmjax.engine.schedule import Schedule, Work
from llmjax.engine.step import StepMaker, Weights, deal_tokens, replicate, unpack
from llmjax.layers.kv_cache import Cache, empty_cache
from llmjax.models.decoder import RunOptions, cache_shapes
from llmjax.models.registry import find_family
from llmjax.parallel.context import restore
from llmjax.weights import open_checkpoint
from llmjax.weights.model import abstract_decoder, load_model
from meshes import ParallelPlan, Rules, make_mesh

GOLDEN = Path(__file__).parent.parent / "golden"
QUICK_TO_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""For programs that run once: a third less of the compiler's time, and the same collectives."""


@dataclass(frozen=True, kw_only=True)
class Golden:
    """A tiny checkpoint, and float32 results of Hugging Face transformers on it."""

    folder: Path
    input_ids: np.ndarray
    """[prompts, positions]"""
    logits: np.ndarray
    """[prompts, positions, vocab], of `input_ids`."""
    greedy: list[int]
    """A prompt and its greedy continuation."""
    prompt_length: int
    """How many of `greedy` are the prompt."""


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """`golden(family)`, the checkpoint of that name."""

    @cache
    def read(family: str) -> Golden:
        stored = np.load(GOLDEN / family / "io.npz")
        return Golden(
            folder=GOLDEN / family,
            input_ids=stored["input_ids"],
            logits=stored["logits"],
            greedy=stored["greedy"][0].tolist(),
            prompt_length=stored["prompt"].shape[1],
        )

    return read


@pytest.fixture(scope="session")
def llm_on() -> Callable[..., LLM]:
    """`llm_on(family, plan, **options)`, built once a session."""

    @cache
    def build(family: str, plan: ParallelPlan, **options: Any) -> LLM:
        return LLM(GOLDEN / family, plan=plan, progress=False, **(SMALL | options))

    return build


@pytest.fixture(scope="session")
def logits_on() -> Callable[..., Callable[[list[list[list[int]]]], np.ndarray]]:
    """`logits_on(folder, plan)(prompts of each batch rank)`."""

    plain = RunOptions()

    def build(folder: Path, plan: ParallelPlan, options: RunOptions = plain) -> Any:
        return LogitsProgram(folder, plan, options).run

    return build


class LogitsProgram:
    """One compiled step that prefills and decodes, and gives logits in the place of samples.

    Each batch rank has two prompts: their first 17 tokens go in as one, the others one by one.
    """

    prefill = 17
    rows = 2

    def __init__(self, folder: Path, plan: ParallelPlan, options: RunOptions) -> None:
        checkpoint = open_checkpoint(folder)
        family = find_family(checkpoint.config)
        config = family.read_config(checkpoint.config)
        dtype = jnp.dtype("float32")
        self.rules, self.mesh = Rules(plan), make_mesh(plan)
        # Context ranks share the tokens of a step, and a block is a page of each of them.
        context = self.rules.size("context")
        page_size = 4 if context == 1 else 2
        self.block_size = page_size * context
        self.bucket = Bucket(
            prefill_tokens=-(-2 * self.prefill // context) * context,
            decodes=-(-self.rows // context) * context,
            prefill_rows=self.rows,
            width=-(-24 // self.block_size),
        )
        self.weights = load_model(
            checkpoint, family, config, self.rules, self.mesh, dtype=dtype, progress=False
        )
        graph, abstract = nnx.split(abstract_decoder(config, self.rules, dtype))
        self.maker = StepMaker(
            graph=graph,
            abstract=abstract,
            rules=self.rules,
            vocab_size=config.vocab_size,
            soft_cap=config.logit_soft_cap,
            max_logprobs=0,
            processors=(),
            options=options,
        )
        pages = self.bucket.decodes * self.bucket.width * self.rules.size("pages")
        shapes = cache_shapes(config, self.rules, pages=pages, page_size=page_size)
        self.empty_cache = partial(empty_cache, shapes, dtype, self.rules)
        self.stages = self.rules.size("layers")
        tokens = self.bucket.tokens * self.rules.size("requests")
        self.held_shape = (self.stages, tokens, config.hidden_size)
        self.empty = jax.jit(self._empty)
        self.compute = jax.jit(self._compute, donate_argnums=1, compiler_options=QUICK_TO_COMPILE)

    def run(self, prompts: list[list[list[int]]]) -> np.ndarray:
        """Logits [ranks, prompts, positions, vocab] of each batch rank's own prompts."""
        requests = [[_request(ids) for ids in rank] for rank in prompts]
        rows, length = self.rows, len(prompts[0][0])
        prefills = slice(self.bucket.decodes, self.bucket.decodes + rows * self.prefill)
        with jax.set_mesh(self.mesh):
            logits, carry = self._pass(self.empty(), requests, range(self.prefill))
            prefilled = np.asarray(logits)[:, prefills]
            prefilled = prefilled.reshape(len(prompts), rows, self.prefill, -1)
            decoded = []
            for position in range(self.prefill, length):
                fed = range(position, position + 1)
                logits, carry = self._pass(carry, requests, fed)
                decoded.append(np.asarray(logits)[:, :rows])
        return np.concatenate([prefilled, np.stack(decoded, axis=2)], axis=2)

    def _empty(self) -> tuple[Cache, jax.Array | None]:
        spec = self.rules.spec("layers", "tokens", None)
        held = jnp.zeros(self.held_shape, out_sharding=spec) if self.stages > 1 else None
        return self.empty_cache(), held

    def _pass(self, carry: Any, requests: Any, positions: range) -> Any:
        """Lets these positions pass all pipeline stages, a tick each; the other stages idle."""
        logits = None
        idle = [[] for _ in requests]
        for stage in range(self.stages):
            stages = [requests if at == stage else idle for at in range(self.stages)]
            packed = np.stack([self._pack(each, positions) for each in stages])
            sharding = self.rules.sharding(self.mesh, None, "requests", None)
            logits, carry = self.compute(self.weights, carry, jax.device_put(packed, sharding))
        return logits, carry

    def _compute(
        self, weights: Weights, carry: tuple[Cache, jax.Array | None], packed: jax.Array
    ) -> tuple[jax.Array, tuple[Cache, jax.Array | None]]:
        cache, held = carry
        ranks = packed.shape[1]
        unused = jnp.zeros((ranks, 1), jnp.int32, out_sharding=self.rules.spec("requests", None))
        inputs = unpack(packed, unused, self.bucket, rules=self.rules)
        decoder = self.maker.decoder(weights)
        hidden, cache, held = decoder(
            inputs.ids, cache, inputs.placement, held, options=self.maker.options
        )
        hidden = restore(hidden, deal_tokens(self.bucket, self.rules), rules=self.rules)
        spec = self.rules.spec(None, "vocab")
        logits = jnp.einsum("te,ev->tv", replicate(hidden), decoder.head, out_sharding=spec)
        logits = replicate(logits)[:, : self.maker.vocab_size]
        return logits.reshape(ranks, self.bucket.tokens, -1), (cache, held)

    def _pack(self, requests: list[list[Request]], positions: range) -> np.ndarray:
        """A step in which every request feeds these positions."""
        ranks = tuple(
            tuple(self._work(request, row, positions) for row, request in enumerate(rank))
            for rank in requests
        )
        return pack_schedule(
            Schedule(index=0, ranks=ranks, admitted=(), preempted=()),
            self.bucket,
            page_size=self.block_size,
            max_batch_size=self.bucket.decodes,
            sampling_of=partial(sampling_columns, processors=0),
        )

    def _work(self, request: Request, row: int, positions: range) -> Work:
        first, count = row * self.bucket.width, -(-positions.stop // self.block_size)
        return Work(
            request=request,
            start=positions.start,
            count=len(positions),
            samples=len(positions) == 1,
            pages=tuple(range(first, first + count)),
            token_on_device=False,
        )


def _request(ids: list[int]) -> Request:
    return Request(
        id=0, prompt_ids=tuple(ids), params=SamplingParams(), max_tokens=1, stop_ids=frozenset()
    )
