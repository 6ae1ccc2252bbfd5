"""TensorRT-LLM's YAML and keyword arguments -> a plan and options of the engine, and back."""

from meshes.trtllm.deployment import Deployment, load_deployment, read_deployment
from meshes.trtllm.keys import FIELD_KEYS, KEYS, PLAN_KEYS
from meshes.trtllm.mapping import to_mapping

__all__ = [
    "FIELD_KEYS",
    "KEYS",
    "PLAN_KEYS",
    "Deployment",
    "load_deployment",
    "read_deployment",
    "to_mapping",
]
