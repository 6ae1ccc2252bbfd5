"""Shape of a decoder, in this project's words; each family fills it from `config.json`."""

from dataclasses import dataclass
from typing import Literal

from llmjax.config.checks import ConfigError


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding; frequencies are computed in `llmjax/layers/rope.py`."""

    theta: float = 10000.0
    """Base of the geometric series of wavelengths."""
    kind: str = "default"
    """Scaling rule: default, linear, dynamic, llama3, yarn or longrope."""
    factor: float = 1.0
    """How many times longer than the original context."""
    original_max_position_embeddings: int | None = None
    """Context length before scaling."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths longer than original / low_freq_factor are divided by `factor`."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths shorter than original / high_freq_factor stay."""
    beta_fast: float = 32.0
    """yarn: rotations above which a frequency stays."""
    beta_slow: float = 1.0
    """yarn: rotations below which a frequency is divided by `factor`."""
    attention_factor: float | None = None
    """yarn and longrope: factor on cosine and sine; None derives it."""
    mscale: float | None = None
    """yarn of DeepSeek: numerator of the attention factor."""
    mscale_all_dim: float | None = None
    """yarn of DeepSeek: denominator of the attention factor."""
    truncate: bool = True
    """yarn: round the bounds of the ramp to whole frequencies."""
    short_factor: tuple[float, ...] = ()
    """longrope: divisors of each frequency within the original context."""
    long_factor: tuple[float, ...] = ()
    """longrope: divisors of each frequency beyond it."""
    partial_rotary_factor: float = 1.0
    """Share of the head's features that is rotated."""


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """In what a decoder layer may differ from its neighbours."""

    window: int = 0
    """Tokens that a sliding window sees; 0 is full attention."""
    chunk: int = 0
    """Tokens of the chunks inside which attention stays; 0 is full attention."""
    rope: Literal["global", "local", "none"] = "global"
    """Which rotary embedding turns queries and keys."""
    ffn: Literal["dense", "experts"] = "dense"
    """Kind of the feed-forward part."""


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, 2024): what is cached is one vector a token."""

    q_rank: int | None
    """Features that queries are computed from; None: the residual stream itself."""
    kv_rank: int
    """Features of the latent that keys and values are computed from."""
    nope_dim: int
    """Features of a head's query and key without position."""
    rope_dim: int
    """Features with position; the key's are shared by all heads."""
    value_dim: int
    """Features of a head's value."""

    @property
    def cached_dim(self) -> int:
        """Numbers cached for each token and layer."""
        return self.kv_rank + self.rope_dim


@dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """A mixture of experts and its router.

    A token's gate for an expert is its score, over all experts if `scoring` is softmax. The `top_k`
    experts are those of the highest score plus correction bias, within the `top_groups` best of
    `num_groups` groups.
    """

    num_experts: int
    """Routed experts."""
    top_k: int
    """Experts of a token."""
    ffn: int
    """Features inside one expert."""
    shared_ffn: int = 0
    """Features of the expert that every token passes; 0: there is none."""
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    """Router logits -> scores."""
    normalize: bool = False
    """Divide a token's gates by their sum."""
    scaling_factor: float = 1.0
    """Multiplies the gates."""
    num_groups: int = 1
    """Equal groups that neighbouring experts form."""
    top_groups: int = 1
    """Groups that a token's experts may lie in."""
    group_best: int = 2
    """A group is as good as the sum of its best so many experts."""
    correction_bias: bool = False
    """A learned number for each expert is added to its score, for the choice only."""
    router_bias: bool = False
    """Bias on the router logits."""
    bias: bool = False
    """Biases in the experts' products."""
    scale_inputs: bool = False
    """Gates multiply what goes into the experts, not what comes out."""
    activation: Literal["silu", "clamped_swiglu"] = "silu"
    """Gate inside the experts."""


@dataclass(frozen=True, kw_only=True)
class TemperatureTuning:
    """Queries of layers without rope grow with the logarithm of their position (Llama 4)."""

    floor_scale: float
    """Positions between two values of the factor."""
    scale: float
    """Factor on the logarithm."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a decoder, in this project's words; each family fills it from `config.json`."""

    architecture: str
    """Name under which Hugging Face knows it, such as LlamaForCausalLM."""
    vocab_size: int
    """Rows of the embedding."""
    hidden_size: int
    """Features of the residual stream."""
    num_layers: int
    """Decoder layers."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key/value heads."""
    head_dim: int
    """Features of a head."""
    intermediate_size: int
    """Features of the dense feed-forward layer."""
    max_position_embeddings: int
    """Longest context, in tokens."""
    layers: tuple[LayerConfig, ...] = ()
    """In what each layer differs; empty: in nothing."""
    norm_eps: float = 1e-6
    """Added to the mean square in RMS norms."""
    norm_offset: float = 0.0
    """Added to the learned scale of RMS norms."""
    post_norms: bool = False
    """Attention and feed-forward are normed again before they are added to the residual stream."""
    rope: RopeConfig = RopeConfig()
    """Rotary embedding."""
    local_rope: RopeConfig | None = None
    """Rotary embedding of layers that say "local"."""
    rope_interleaved: bool = False
    """Rope turns neighbouring features (0, 1), (2, 3); otherwise (0, half), (1, half + 1)."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections."""
    output_bias: bool = False
    """Bias on the attention's output projection."""
    mlp_bias: bool = False
    """Biases in the dense feed-forward layer."""
    qk_norm: bool = False
    """RMS norm with a learned scale over each query and key head, before rope."""
    qk_unit_norm: bool = False
    """RMS norm without a scale over each query and key head, after rope, in layers with rope."""
    temperature_tuning: TemperatureTuning | None = None
    """Growth of queries with their position, in layers without rope."""
    attention_scale: float | None = None
    """Factor on attention scores; None: head_dim ** -0.5."""
    attention_soft_cap: float | None = None
    """Attention scores s become cap * tanh(s / cap)."""
    sinks: bool = False
    """A learned score of each head joins the softmax and takes weight, but has no value."""
    latent: LatentConfig | None = None
    """Multi-head latent attention in the place of grouped-query attention."""
    experts: ExpertConfig | None = None
    """Mixture of experts of the layers that say "experts"."""
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    """Gate of the dense feed-forward layer."""
    embedding_scale: float = 1.0
    """Multiplies the embedding, but not the head that shares its weights."""
    logit_soft_cap: float | None = None
    """Logits l become cap * tanh(l / cap)."""
    tie_word_embeddings: bool = False
    """The head is the embedding, transposed."""
    dtype: str = "float32"
    """Type in which the checkpoint is stored."""

    def __post_init__(self) -> None:
        for key in (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
        ):
            if not isinstance(getattr(self, key), int) or getattr(self, key) < 1:
                raise ConfigError(
                    f"config.json gives {key}={getattr(self, key)!r}: "
                    "it must be a whole number from 1 up."
                )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"config.json gives num_attention_heads={self.num_heads}, which "
                f"num_key_value_heads={self.num_kv_heads} does not divide: each key/value head "
                "serves the same number of query heads."
            )
        if not self.layers:
            object.__setattr__(self, "layers", (LayerConfig(),) * self.num_layers)
        if len(self.layers) != self.num_layers:
            raise ConfigError(
                f"config.json describes {len(self.layers)} layers one by one, and "
                f"num_hidden_layers is {self.num_layers}: the two must be equal."
            )
