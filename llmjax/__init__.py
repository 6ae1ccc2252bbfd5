"""Large language models on a `jax.sharding.Mesh`: every parallel strategy is a placement."""

from llmjax.config import ConfigError, SamplingParams
from llmjax.explore import describe
from llmjax.llm import LLM
from llmjax.outputs import CompletionOutput, Delta, Logprob, RequestOutput
from llmjax.weights import CheckpointError
from meshes import ParallelPlan, PlanError

__all__ = [
    "LLM",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "Delta",
    "Logprob",
    "ParallelPlan",
    "PlanError",
    "RequestOutput",
    "SamplingParams",
    "describe",
]
