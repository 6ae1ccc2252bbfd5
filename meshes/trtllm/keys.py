"""Every key of TensorRT-LLM's YAML that is known here, and what becomes of it.

The names and meanings are those of TensorRT-LLM's `LlmArgs`; `docs/trtllm.md` shows this table.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Honoured:
    """A key that sets something."""

    target: str
    """The plan's word (`PLAN_WORDS`) or the option of the engine that it sets."""
    meaning: str
    """What it does here."""


@dataclass(frozen=True)
class Fixed:
    """A key of which only those values are accepted that describe what happens anyway."""

    values: tuple[Any, ...]
    reason: str
    """Why no other value works."""


@dataclass(frozen=True)
class Noted:
    """A key whose values are accepted with a note, for they name parts that do not exist here."""

    values: tuple[Any, ...]
    note: str


@dataclass(frozen=True)
class Refused:
    """A key that no value of can be honoured."""

    reason: str


type Fate = Honoured | Fixed | Noted | Refused

SECTIONS = (
    "attention_dp_config",
    "cp_config",
    "cuda_graph_config",
    "kv_cache_config",
    "moe_config",
)
"""Keys that hold a mapping of further keys."""

_SIZES: dict[str, Fate] = {
    "tensor_parallel_size": Honoured("tensor_parallel_size", "`ep * tp` of the mesh"),
    "moe_expert_parallel_size": Honoured("moe_expert_parallel_size", "`ep`: experts over ranks"),
    "moe_tensor_parallel_size": Honoured("moe_tensor_parallel_size", "`tp`: inside each expert"),
    "moe_cluster_parallel_size": Fixed((1,), "expert clusters do not exist here"),
    "pipeline_parallel_size": Honoured("pipeline_parallel_size", "`pp`: stages of layers"),
    "pp_partition": Honoured("pp_partition", "layers of each stage: as many numbers as stages"),
    "context_parallel_size": Honoured("context_parallel_size", "`cp`"),
    "cp_config.cp_type": Honoured("cp_type", "RING or HELIX; where it is left out, RING"),
    "data_parallel_size": Honoured("data_parallel_size", "`dp`: not a word of TensorRT-LLM's"),
    "gpus_per_node": Honoured("gpus_per_node", "checked against the devices of each process"),
    "enable_attention_dp": Honoured(
        "enable_attention_dp", "requests, not heads, over the tp ranks; `partial`: over `ep` only"
    ),
    "attention_dp_config.enable_balance": Honoured(
        "attention_dp_balance", "hold prefills back until all ranks have one"
    ),
    "attention_dp_config.timeout_iters": Honoured(
        "attention_dp_timeout_iters", "steps after which a rank is no longer waited for"
    ),
    "attention_dp_config.batching_wait_iters": Honoured(
        "attention_dp_batching_wait_iters", "further steps in which prefills gather"
    ),
}

_ENGINE: dict[str, Fate] = {
    "max_batch_size": Honoured("max_batch_size", "running requests of a batch rank"),
    "max_num_tokens": Honoured("max_num_tokens", "tokens of a step and batch rank"),
    "max_seq_len": Honoured("max_seq_len", "prompt and generated tokens of a request"),
    "dtype": Honoured("dtype", "type of weights, activations and cache"),
    "enable_chunked_prefill": Honoured("enable_chunked_prefill", "prompts over several steps"),
    "disable_overlap_scheduler": Honoured(
        "disable_overlap_scheduler", "read a step's tokens before the next one is dispatched"
    ),
    "stream_interval": Honoured("stream_interval", "tokens that a stream brings at a time"),
    "print_iter_log": Honoured("print_iter_log", "a line on stderr for each step"),
    "kv_cache_free_gpu_memory_fraction": Honoured(
        "free_gpu_memory_fraction", "share of the free memory that the KV cache takes"
    ),
    "kv_cache_config.free_gpu_memory_fraction": Honoured(
        "free_gpu_memory_fraction", "share of the free memory that the KV cache takes"
    ),
    "kv_cache_config.tokens_per_block": Honoured("tokens_per_block", "tokens of a page"),
    "kv_cache_config.enable_block_reuse": Honoured("enable_block_reuse", "share equal prefixes"),
    "kv_cache_config.max_tokens": Honoured(
        "kv_cache_max_tokens", "tokens that the cache of a batch rank holds"
    ),
    "kv_cache_config.dtype": Honoured("kv_cache_dtype", "`auto`, or what `dtype` says; no other"),
    "cuda_graph_config.batch_sizes": Honoured(
        "graph_batch_sizes", "batch sizes for which steps are compiled, and `max_batch_size`"
    ),
    "cuda_graph_config.max_batch_size": Honoured(
        "graph_max_batch_size", "the largest of these sizes, which grow by factors of 4"
    ),
    "moe_config.max_num_tokens": Honoured(
        "moe_max_num_tokens", "tokens that the experts of a rank take at once"
    ),
}

_FIXED: dict[str, Fate] = {
    "cuda_graph_config.enable_padding": Fixed(
        (True,), "batches are always padded to a compiled size"
    ),
    "moe_config.disable_finalize_fusion": Fixed((False,), "it chooses between kernels of CUTLASS"),
    "moe_config.use_low_precision_moe_combine": Fixed(
        (False,), "expert outputs are combined in the activations' type"
    ),
    "kv_cache_config.use_kv_cache_manager_v2": Fixed(
        ("auto", False), "it chooses between two programs of TensorRT-LLM"
    ),
    "kv_cache_config.mamba_ssm_cache_dtype": Fixed(("auto",), "no model with Mamba layers runs"),
    "kv_cache_config.mamba_ssm_stochastic_rounding": Fixed(
        (False,), "no model with Mamba layers runs"
    ),
    "kv_cache_config.enable_partial_reuse": Fixed((False,), "whole pages are reused, never parts"),
    "kv_cache_config.copy_on_partial_reuse": Fixed((False,), "whole pages are reused, never parts"),
    "kv_cache_config.host_cache_size": Fixed((0,), "the cache stays on the device"),
    "enable_layerwise_nvtx_marker": Fixed((True,), "profiles always show the names of layers"),
    "disable_mm_encoder": Fixed((True,), "only text is read"),
    "num_postprocess_workers": Fixed((0,), "text is made in the process that steps the engine"),
    "max_beam_width": Fixed((1,), "beam search does not exist here"),
    "allreduce_strategy": Fixed(("AUTO",), "XLA chooses how to reduce"),
    "enable_min_latency": Fixed((False,), "there is one way through the model"),
    "sampler_type": Fixed(("auto",), "there is one sampler, on the device"),
    "skip_tokenizer_init": Fixed((False,), "a model without a tokenizer takes token ids anyway"),
}

_NOTED: dict[str, Fate] = {
    "trust_remote_code": Noted((True, False), "no code from a checkpoint ever runs"),
    "enable_lm_head_tp_in_adp": Noted(
        (True, False), "the vocabulary is split over the tp ranks whatever it says"
    ),
    "backend": Noted(("pytorch",), "JAX runs the model in its place"),
    "moe_config.backend": Noted(
        (
            *("AUTO", "CUTLASS", "CUTEDSL", "WIDEEP", "TRTLLM", "DEEPGEMM", "DENSEGEMM"),
            *("VANILLA", "TRITON", "MARLIN", "MEGAMOE_DEEPGEMM"),
        ),
        "pallas_kernels.grouped_gemm picks the kernel in its place, and moe_dispatch how tokens "
        "reach the experts",
    ),
}

_NOT_YET = {
    "moe_config.load_balancer": "expert placement does not run yet (the table itself is checked)",
    "speculative_config": "speculative decoding does not run yet",
    "cache_transceiver_config": "prefill and decode on separate engines do not run yet",
    "guided_decoding_backend": "guided decoding does not run yet",
    "lora_config": "LoRA adapters do not run yet",
    "enable_lora": "LoRA adapters do not run yet",
    "peft_cache_config": "LoRA adapters do not run yet",
    "quant_config": "quantised execution does not run yet",
    "quantization": "quantised execution does not run yet",
    "kv_cache_config.secondary_offload_min_priority": "the cache stays on the device",
    "kv_cache_config.event_buffer_max_size": "the cache publishes no events yet",
    "kv_cache_config.max_attention_window": "windows come from the model's configuration",
    "kv_cache_config.sink_token_length": "sinks come from the model's configuration",
    "kv_cache_config.mamba_ssm_philox_rounds": "no model with Mamba layers runs",
    "kv_cache_config.avg_seq_len": "use max_tokens or free_gpu_memory_fraction",
    "kv_cache_config.max_gpu_total_bytes": "use max_tokens or free_gpu_memory_fraction",
    "scheduler_config": "the scheduler has one policy: first come, first served, with preemption",
    "batch_wait_timeout_ms": "a schedule reads no clock, so that all processes compute the same",
    "batch_wait_timeout_iters": "use attention_dp_config.timeout_iters",
    "sparse_attention_config": "sparse attention does not run yet",
    "nvfp4_gemm_config": "quantised execution does not run yet",
    "torch_compile_config": "XLA compiles every step",
    "enable_autotuner": "kernels have fixed block sizes for each class of shapes",
    "env_overrides": "they are variables of TensorRT-LLM's own kernels",
    "max_input_len": "use max_seq_len, which counts generated tokens too",
    "max_prompt_adapter_token": "prompt adapters do not exist here",
    "moe_backend": "use moe_config.backend",
    "kv_cache_dtype": "use kv_cache_config.dtype",
    "use_cuda_graph": "use cuda_graph_config",
    "cuda_graph_batch_sizes": "use cuda_graph_config.batch_sizes",
    "cuda_graph_max_batch_size": "use cuda_graph_config.max_batch_size",
    "cuda_graph_padding_enabled": "batches are always padded to a compiled size",
    "model": "give the model to LLM() or to --model",
    "tokenizer": "the tokenizer is the model's own",
    "load_format": "give it to LLM()",
    "return_perf_metrics": "no metrics of requests are kept yet",
    "enable_iter_perf_stats": "use print_iter_log",
    "enable_iter_req_stats": "use print_iter_log",
    "cp_config.tokens_per_block": "use kv_cache_config.tokens_per_block",
    "cp_config.use_nccl_for_alltoall": "XLA chooses how to communicate",
    "cp_config.fifo_version": "XLA chooses how to communicate",
    "cp_config.block_size": "STAR attention does not exist here: use cp_type RING",
    "cp_config.cp_anchor_size": "STAR attention does not exist here: use cp_type RING",
    "attention_dp_config.enable_kv_cache_aware_routing": (
        "new requests go to the rank that holds the fewest tokens"
    ),
    "attention_dp_config.kv_cache_routing_conversation_affinity": (
        "new requests go to the rank that holds the fewest tokens"
    ),
}

KEYS: dict[str, Fate] = {
    **_SIZES,
    **_ENGINE,
    **_FIXED,
    **_NOTED,
    **{key: Refused(reason) for key, reason in _NOT_YET.items()},
}
"""Key, with the section it stands in -> its fate."""

PLAN_WORDS = (
    "tensor_parallel_size",
    "moe_expert_parallel_size",
    "moe_tensor_parallel_size",
    "pipeline_parallel_size",
    "pp_partition",
    "context_parallel_size",
    "cp_type",
    "data_parallel_size",
    "gpus_per_node",
    "enable_attention_dp",
)
"""Targets that make up the plan; all others are options of the engine."""

PLAN_KEYS = frozenset(
    key.partition(".")[0]
    for key, fate in KEYS.items()
    if isinstance(fate, Honoured) and fate.target in PLAN_WORDS
)
"""Keys that set a part of the plan."""

FIELD_KEYS = {
    "tp": "tensor_parallel_size",
    "ep": "moe_expert_parallel_size",
    "dp": "data_parallel_size",
    "cp": "context_parallel_size",
    "pp": "pipeline_parallel_size",
    "attention_dp": "enable_attention_dp",
    "cp_type": 'cp_config={"cp_type": ...}',
}
"""Fields of a `ParallelPlan` -> the keys that say about the same."""
