"""Checkpoints of any format, and the way from them onto a mesh."""

from llmjax.weights.checkpoint import EMBEDDED_MODEL, open_checkpoint
from llmjax.weights.interface import Checkpoint, CheckpointError, TensorInfo
from llmjax.weights.load import AbstractParam, load_weights
from llmjax.weights.upcycled import upcycle

__all__ = [
    "EMBEDDED_MODEL",
    "AbstractParam",
    "Checkpoint",
    "CheckpointError",
    "TensorInfo",
    "load_weights",
    "open_checkpoint",
    "upcycle",
]
