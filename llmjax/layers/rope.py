"""Rotary position embedding (Su et al., 2021) and the rules that stretch it to longer contexts."""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llmjax.config import ConfigError, ModelConfig, RopeConfig

RopeTables = tuple[Float[Array, "tokens half"], Float[Array, "tokens half"]]
"""Cosine and sine of each token's angles."""

RopeVariants = tuple[Float[Array, "*variants tokens half"], Float[Array, "*variants tokens half"]]
"""The same, with an axis of `ROPES` in front where a model's layers choose between them."""

ROPES = ("global", "local", "none")
"""Variants between which a model's layers may choose."""


class Rope:
    """Frequencies of one model, computed once on the host.

    Raises:
        ConfigError: a scaling rule that is not implemented, with those that are.
    """

    def __init__(self, config: RopeConfig, *, head_dim: int):
        rotated = int(head_dim * config.partial_rotary_factor)
        base = 1.0 / config.theta ** (np.arange(0, rotated, 2, dtype=np.float64) / rotated)
        if config.kind not in SCALINGS:
            raise ConfigError(
                f"config.json asks for rope_type={config.kind!r}, which is not implemented: "
                f"known are {', '.join(SCALINGS)}."
            )
        frequencies, self.factor = SCALINGS[config.kind](base, config)
        # A tuple, because a module's static fields must be hashable.
        self.frequencies = tuple(frequencies.astype(np.float32).tolist())

    def tables(self, positions: Int[Array, "tokens"]) -> RopeTables:
        """Cosine and sine for tokens at these positions."""
        angles = positions.astype(jnp.float32)[:, None] * jnp.array(self.frequencies, jnp.float32)
        return jnp.cos(angles) * self.factor, jnp.sin(angles) * self.factor


def rope_tables(
    config: ModelConfig, rotated_dim: int, positions: Int[Array, "tokens"]
) -> RopeVariants:
    """Tables of every variant that layers of the model use; one alone has no axis of variants."""
    turned = Rope(config.rope, head_dim=rotated_dim).tables(positions)
    if all(layer.rope == "global" for layer in config.layers):
        return turned
    local = turned
    if config.local_rope is not None:
        local = Rope(config.local_rope, head_dim=rotated_dim).tables(positions)
    still = jnp.ones_like(turned[0]), jnp.zeros_like(turned[1])
    cos, sin = (jnp.stack(tables) for tables in zip(turned, local, still, strict=True))
    return cos, sin


def select_rope(tables: RopeVariants, index: Int[Array, ""] | None) -> RopeTables:
    """The tables of one layer."""
    return tables if index is None else (tables[0][index], tables[1][index])


def apply_rope(
    x: Float[Array, "tokens *heads head_dim"], tables: RopeTables, *, interleaved: bool = False
) -> Float[Array, "tokens *heads head_dim"]:
    """Rotates pairs (i, i + half) of the leading features; what the tables leave out stays.

    `interleaved` rotates pairs (2i, 2i + 1) instead, and leaves them in the order of the others:
    products of queries and keys stay the same, as long as both are turned so.
    """
    half = tables[0].shape[-1]
    inner = (1,) * (x.ndim - 2)
    cos, sin = (table.reshape(-1, *inner, half) for table in tables)
    wide = x.astype(jnp.float32)
    turned, rest = wide[..., : 2 * half], wide[..., 2 * half :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    rotated = (first * cos - second * sin, second * cos + first * sin, rest)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def _default(base: np.ndarray, config: RopeConfig) -> tuple[np.ndarray, float]:
    return base, 1.0


def _linear(base: np.ndarray, config: RopeConfig) -> tuple[np.ndarray, float]:
    """Positions divided by the factor (Chen et al., 2023)."""
    return base / config.factor, 1.0


def _llama3(base: np.ndarray, config: RopeConfig) -> tuple[np.ndarray, float]:
    """Llama 3.1: long wavelengths divided, short ones kept, a ramp between."""
    wavelength = 2 * np.pi / base
    original = _original_length(config)
    # Where both bounds are one, a step is left of the ramp.
    width = (config.high_freq_factor - config.low_freq_factor) or 1e-9
    ramp = np.clip((original / wavelength - config.low_freq_factor) / width, 0.0, 1.0)
    return (1 - ramp) * base / config.factor + ramp * base, 1.0


def _yarn(base: np.ndarray, config: RopeConfig) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al., 2023), with DeepSeek's mscale."""
    rotated, original = 2 * len(base), _original_length(config)

    def dimension(rotations: float) -> float:
        return (rotated * math.log(original / (rotations * 2 * math.pi))) / (
            2 * math.log(config.theta)
        )

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    # Equal bounds would divide by zero.
    ramp = (np.arange(len(base)) - low) / ((high - low) or 0.001)
    kept = 1 - np.clip(ramp, 0.0, 1.0)
    frequencies = base / config.factor * (1 - kept) + base * kept
    if config.attention_factor is not None:
        return frequencies, config.attention_factor
    if config.mscale and config.mscale_all_dim:
        ratio = yarn_scale(config.factor, config.mscale) / yarn_scale(
            config.factor, config.mscale_all_dim
        )
        return frequencies, ratio
    return frequencies, yarn_scale(config.factor, 1.0)


def _longrope(base: np.ndarray, config: RopeConfig) -> tuple[np.ndarray, float]:
    """LongRoPE (Ding et al., 2024): each frequency has a divisor, one set for each length.

    A model that was stretched uses its long set for every request, as vLLM does: a cache cannot
    change its frequencies while a request grows.
    """
    divisors = np.array(config.long_factor if config.factor > 1 else config.short_factor)
    if divisors.shape != base.shape:
        raise ConfigError(
            f"config.json gives {divisors.size} rope factors for {base.size} frequencies: "
            "short_factor and long_factor need one for each."
        )
    if config.attention_factor is not None:
        return base / divisors, config.attention_factor
    growth = math.log(config.factor) if config.factor > 1 else 0.0
    return base / divisors, math.sqrt(1 + growth / math.log(_original_length(config)))


def yarn_scale(factor: float, mscale: float) -> float:
    """YaRN's growth of attention logits with the context's growth."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _original_length(config: RopeConfig) -> int:
    if not config.original_max_position_embeddings:
        raise ConfigError(
            f"config.json gives rope_type={config.kind!r} without "
            "original_max_position_embeddings: add the context length before scaling."
        )
    return config.original_max_position_embeddings


SCALINGS: dict[str, Callable[[np.ndarray, RopeConfig], tuple[np.ndarray, float]]] = {
    "default": _default,
    # Dynamic NTK changes the base beyond the model's context, which requests never exceed.
    "dynamic": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
"""Scaling rule -> frequencies and the factor on cosine and sine."""
