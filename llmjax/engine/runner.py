"""Runs steps on the devices: owns the weights, the state and the compiled programs."""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float32

from llmjax.config import EngineConfig, ModelConfig, SamplingParams
from llmjax.distributed import place
from llmjax.engine.batch import Bucket, pack_schedule
from llmjax.engine.compile import choose_buckets, compile_steps, pick_bucket
from llmjax.engine.kv_pool import choose_num_pages, count_pages, device_bytes
from llmjax.engine.request import Request
from llmjax.engine.sampler_slots import SamplerSlots
from llmjax.engine.schedule import Schedule, SchedulerConfig, Work
from llmjax.engine.step import EngineState, StepMaker, StepOutput
from llmjax.layers.kv_cache import empty_cache
from llmjax.layers.moe import DispatchOptions
from llmjax.models.decoder import RunOptions, cache_shapes, padded_vocab
from llmjax.weights.model import Weights, abstract_decoder
from meshes import Rules

logger = logging.getLogger(__name__)

FEWEST_GPU_ROWS = 2
"""Rows of the smallest decode step: XLA without Triton multiplies one row element by element."""


@dataclass(frozen=True, kw_only=True)
class Dispatched:
    """A step whose results are on their way to the host."""

    stages: tuple[Schedule | None, ...]
    """What each pipeline stage computes, the first stage first; None where that is nothing."""
    bucket: Bucket
    started: Future[StepOutput]

    @property
    def schedule(self) -> Schedule | None:
        """What leaves the last pipeline stage in this tick."""
        return self.stages[-1]

    @property
    def rows(self) -> Sequence[tuple[list[Work], list[Work]]]:
        """The decode works and the prefill works of each batch rank that leave."""
        return self.schedule.rows if self.schedule else ()

    @property
    def output(self) -> StepOutput:
        """The step's results, once it is started; raises what kept it from starting."""
        return self.started.result()


class Runner:
    """One engine's devices.

    Built in this order: abstract weights, buckets; then, by `prepare`, the size of the KV pool, the
    state, the compiled steps. Nothing is compiled afterwards.
    """

    def __init__(
        self,
        config: ModelConfig,
        rules: Rules,
        mesh: Mesh,
        weights: Weights,
        engine: EngineConfig,
    ):
        """Allocates nothing: with abstract weights a runner can lower its steps, and no more."""
        self.config, self.rules, self.mesh, self.engine = config, rules, mesh, engine
        self.weights = weights
        self.on_cpu = on_cpu = mesh.devices.flat[0].platform == "cpu"
        self.dtype = jax.tree.leaves(weights)[0].dtype
        self.page_size = engine.tokens_per_block or (16 if on_cpu else 64)
        self.max_batch_size = engine.max_batch_size or (8 if on_cpu else 256)
        # Triton's products read a stack's layer through a copy, cuBLAS reads it in place: a third
        # of the bytes in a scan over layers.
        defaults = {} if on_cpu else {"xla_gpu_enable_triton_gemm": False}
        self.compiler_options = {**defaults, **engine.compiler_options}
        self.maker = self._make_maker()
        tokens = engine.max_num_tokens or (512 if on_cpu else 8192)
        self.max_num_tokens = max(tokens, self.max_batch_size)
        if engine.max_num_tokens and tokens < self.max_batch_size:
            logger.warning(
                "max_num_tokens=%d is raised to max_batch_size=%d, so that every running request "
                "can take a step: use a smaller max_batch_size for smaller steps.",
                tokens,
                self.max_batch_size,
            )
        self.prefill_rows = min(self.max_batch_size, 4 if on_cpu else 16)
        context = config.max_position_embeddings
        self.max_seq_len = min(engine.max_seq_len or context, context)
        self.buckets = self._choose_buckets(self.max_seq_len)
        self._packed_sharding = rules.sharding(mesh, None, "requests", None)
        self._slots = SamplerSlots(
            rules, mesh, per_rank=self.max_batch_size, processors=list(engine.logits_processors)
        )
        self._starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="llmjax-steps")

    def prepare(self) -> None:
        """Allocates the KV pool and compiles every step.

        Raises:
            ConfigError: the pool would be smaller than what was asked for.
        """
        self.num_pages = choose_num_pages(
            self.engine,
            longest=self.max_seq_len,
            block_size=self.block_size,
            fit_pages=self._fit_pages,
        )
        # The pool may hold less than the context; what it holds is what can be promised.
        self.max_seq_len = min(self.max_seq_len, self.num_pages * self.block_size)
        with self._tracing():
            make_state = jax.jit(partial(self._empty_state, self.num_pages))
            self.state: EngineState = make_state()
            self._steps = self._compile()
            self._slots.compile(self.state.sampler)

    @property
    def block_size(self) -> int:
        """Positions of a block: a page on each context rank. The scheduler deals in blocks."""
        return self.page_size * self.rules.size("context")

    @property
    def num_ranks(self) -> int:
        """Batch ranks."""
        return self.rules.size("requests")

    @property
    def scheduler_config(self) -> SchedulerConfig:
        """The limits that the scheduler must keep."""
        return SchedulerConfig(
            num_ranks=self.num_ranks,
            max_batch_size=self.max_batch_size,
            max_num_tokens=self.max_num_tokens,
            max_prefill_requests=self.prefill_rows,
            page_size=self.block_size,
            num_pages=self.num_pages,
            max_seq_len=self.max_seq_len,
            num_stages=self.num_stages,
            prefill_sizes=tuple(
                bucket.prefill_tokens for bucket in self.buckets if bucket.prefill_tokens
            ),
            enable_block_reuse=self.engine.enable_block_reuse,
            enable_chunked_prefill=self.engine.enable_chunked_prefill,
            attention_dp_balance=self.engine.attention_dp_balance,
            attention_dp_timeout_iters=self.engine.attention_dp_timeout_iters,
            attention_dp_batching_wait_iters=self.engine.attention_dp_batching_wait_iters,
        )

    @property
    def num_stages(self) -> int:
        """Pipeline stages: micro-batches that a step holds."""
        return self.rules.size("layers")

    def dispatch(self, stages: Sequence[Schedule | None]) -> Dispatched:
        """Packs a step and hands it to the thread that starts steps; waits for nothing.

        `stages` are what each pipeline stage computes, the one that enters first; they share a
        bucket.

        On a GPU starting a step takes about as long as the step: a program waits at each of its
        branches until the device has computed the condition, and launches its kernels one by one.
        None of this holds Python's lock, so the host can do its own work meanwhile.
        """
        rows = [row for schedule in stages if schedule for row in schedule.rows]
        decodes = max(len(decodes) for decodes, _ in rows)
        prefill = max(sum(work.count for work in prefills) for _, prefills in rows)
        bucket = pick_bucket(self.buckets, decodes=decodes, prefill_tokens=prefill)
        packed = np.stack([self._pack(schedule, bucket) for schedule in stages])
        # A compiled step lays a NumPy array on its devices for a tenth of what device_put costs.
        one_process = jax.process_count() == 1
        placed = packed if one_process else place(packed, self._packed_sharding)
        admitted = stages[0].admitted if stages[0] else ()
        started = self._starter.submit(self._start, bucket, placed, admitted)
        return Dispatched(stages=tuple(stages), bucket=bucket, started=started)

    def _pack(self, schedule: Schedule | None, bucket: Bucket) -> np.ndarray:
        nothing = Schedule(index=-1, ranks=((),) * self.num_ranks, admitted=(), preempted=())
        return pack_schedule(
            schedule or nothing,
            bucket,
            page_size=self.block_size,
            max_batch_size=self.max_batch_size,
            sampling_of=self._slots.columns,
        )

    def _start(
        self, bucket: Bucket, packed: np.ndarray | jax.Array, admitted: Sequence[Request]
    ) -> StepOutput:
        """Starts a step and the copy of its tokens to the host; one thread starts all in turn."""
        for request in admitted:
            # Its tokens and its slot stay as they are until the step is read.
            if request.params.needs_state:
                sampler = self._slots.fill(self.state.sampler, request)
                self.state = replace(self.state, sampler=sampler)
        output, self.state = self._steps[bucket](self.weights, self.state, packed)
        output.sampled.tokens.copy_to_host_async()
        if output.stage_tokens is not None:
            output.stage_tokens.copy_to_host_async()
        return output

    def lower(self, bucket: Bucket) -> Any:
        """The step of a bucket before it is compiled, over a state of one page a batch rank."""
        with self._tracing():
            return self._lower(bucket, jax.eval_shape(partial(self._empty_state, 1)))

    def compiled_text(self, bucket: Bucket) -> str:
        """The compiled program of a bucket, as XLA prints it."""
        return self._steps[bucket].as_text()

    def forget(self, request: Request) -> None:
        """Drops what is kept of a request on the host."""
        self._slots.forget(request)

    def logits(self, ids: Sequence[int]) -> Float32[np.ndarray, "tokens vocab"]:
        """Logits at every position of one prompt, computed beside the engine's own cache.

        For looking inside and for tests: a program is compiled for each length.
        """
        # Ids of the engine's requests begin at 0, and columns are kept by id.
        request = Request(
            id=-1,
            prompt_ids=tuple(ids),
            params=SamplingParams(),
            max_tokens=1,
            stop_ids=frozenset(),
        )
        pages = -(-len(ids) // self.block_size)
        work = Work(
            request=request,
            start=0,
            count=len(ids),
            samples=False,
            pages=tuple(range(pages)),
            token_on_device=False,
        )
        # The first batch rank computes the prompt; the others idle.
        ranks = ((work,), *((),) * (self.num_ranks - 1))
        context = self.rules.size("context")
        padded = len(ids) + -len(ids) % context
        bucket = Bucket(prefill_tokens=padded, decodes=context, prefill_rows=1, width=pages)
        schedule = Schedule(index=0, ranks=ranks, admitted=(), preempted=())
        packed = np.stack([self._pack(schedule, bucket)] * self.num_stages)
        self._slots.forget(request)
        empty_state = partial(self._empty_state, pages, bucket.tokens)
        with self._tracing():
            compute = jax.jit(self.maker.make_logits(bucket, empty_state))
            logits = compute(self.weights, place(packed, self._packed_sharding))
        return np.asarray(logits)[: len(ids)]

    def _make_maker(self) -> StepMaker:
        graph, state = nnx.split(abstract_decoder(self.config, self.rules, self.dtype))
        return StepMaker(
            graph=graph,
            abstract=state,
            rules=self.rules,
            vocab_size=self.config.vocab_size,
            soft_cap=self.config.logit_soft_cap,
            max_logprobs=min(self.engine.max_logprobs, self.config.vocab_size),
            processors=tuple(self.engine.logits_processors.values()),
            options=RunOptions(
                layer_loop=self.engine.layer_loop or "scan",
                dispatch=DispatchOptions(
                    method=self.engine.moe_dispatch,
                    max_num_tokens=self.engine.moe_max_num_tokens,
                ),
            ),
        )

    @contextmanager
    def _tracing(self) -> Iterator[None]:
        """The mesh, and for float32 products that are float32 also on a GPU."""
        precision = "highest" if self.dtype == jnp.float32 else None
        with jax.set_mesh(self.mesh), jax.default_matmul_precision(precision):
            yield

    def _choose_buckets(self, longest: int) -> tuple[Bucket, ...]:
        return choose_buckets(
            max_batch_size=self.max_batch_size,
            max_num_tokens=self.max_num_tokens,
            prefill_rows=self.prefill_rows,
            width=-(-longest // self.block_size),
            context_ranks=self.rules.size("context"),
            config=self.engine,
            num_stages=self.num_stages,
            fewest_rows=1 if self.on_cpu else FEWEST_GPU_ROWS,
        )

    def _empty_state(self, num_pages: int, tokens: int | None = None) -> EngineState:
        """Zeros; `tokens` is how many a step of a batch rank has at most."""
        rules = self.rules
        pages = num_pages * rules.size("pages")
        shapes = cache_shapes(self.config, rules, pages=pages, page_size=self.page_size)
        return EngineState(
            cache=empty_cache(shapes, self.dtype, rules),
            last_tokens=jnp.zeros(
                (self.num_ranks, self.max_batch_size),
                jnp.int32,
                out_sharding=rules.spec("requests", None),
            ),
            held=self._empty_stages(tokens or max(bucket.tokens for bucket in self.buckets)),
            sampler=self._slots.empty(padded_vocab(self.config, rules)),
        )

    def _empty_stages(self, tokens: int) -> jax.Array | None:
        if self.num_stages == 1:
            return None
        shape = (self.num_stages, tokens * self.rules.size("requests"), self.config.hidden_size)
        spec = self.rules.spec("layers", "tokens", None)
        return jnp.zeros(shape, self.dtype, out_sharding=spec)

    def _fit_pages(self, min_pages: int) -> int:
        with self._tracing():
            page = jax.eval_shape(partial(self._empty_state, 1)).cache
        return count_pages(
            self.mesh,
            page_bytes=device_bytes(page),
            weight_bytes=device_bytes(self.weights),
            measure_temporaries=self._measure_temporaries,
            fraction=self.engine.free_gpu_memory_fraction,
            min_pages=min_pages,
            num_ranks=self.num_ranks,
        )

    def _measure_temporaries(self) -> int:
        """Bytes beside weights and state that the largest step needs; the pool does not matter."""
        with self._tracing():
            state = jax.eval_shape(partial(self._empty_state, 1))
            probe = self._lower(max(self.buckets), state)
            memory = probe.compile(self.compiler_options or None).memory_analysis()
        sampler = device_bytes(state.sampler)
        return memory.temp_size_in_bytes + memory.output_size_in_bytes + sampler

    def _lower(self, bucket: Bucket, state: EngineState) -> Any:
        shape = (self.num_stages, self.num_ranks, bucket.num_numbers)
        packed = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self._packed_sharding)
        step = jax.jit(self.maker.make(bucket), donate_argnums=1)
        return step.lower(self.weights, state, packed)

    def _compile(self) -> dict[Bucket, Any]:
        lowered = {bucket: self._lower(bucket, self.state) for bucket in self.buckets}
        return compile_steps(
            lowered, compiler_options=self.compiler_options, side_by_side=not self.on_cpu
        )
