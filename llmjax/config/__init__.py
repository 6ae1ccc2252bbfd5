"""Configuration of models, engine and sampling: the only validation of user input."""

from llmjax.config.checks import (
    ConfigError,
)
from llmjax.config.engine import (
    ALIASES,
    DISPATCHES,
    DTYPES,
    EngineConfig,
    LogitsProcessor,
    resolve_dtype_name,
)
from llmjax.config.model import (
    ExpertConfig,
    LatentConfig,
    LayerConfig,
    ModelConfig,
    RopeConfig,
    TemperatureTuning,
)
from llmjax.config.sampling import (
    SamplingParams,
)

__all__ = [
    "ALIASES",
    "ConfigError",
    "DISPATCHES",
    "DTYPES",
    "EngineConfig",
    "ExpertConfig",
    "LatentConfig",
    "LayerConfig",
    "LogitsProcessor",
    "ModelConfig",
    "RopeConfig",
    "SamplingParams",
    "TemperatureTuning",
    "resolve_dtype_name",
]
