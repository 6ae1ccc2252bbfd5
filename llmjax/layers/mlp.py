"""Gated feed-forward layer (Shazeer, 2020)."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from llmjax.layers.params import Declare

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}
"""Gates by name."""


class GatedMLP(nnx.Module):
    """down(activation(gate(x)) * up(x)), gate and up in one product.

    The features between are padded to divide over the ranks, with zero weights: exact, because a
    padded feature is activation(0) * 0.
    """

    def __init__(
        self, embed: int, ffn: int, *, activation: str, declare: Declare, bias: bool = False
    ):
        ffn += -ffn % declare.rules.size("ffn")
        self.rules, self.activation = declare.rules, activation
        self.gate_up = declare.param((embed, 2, ffn), (None, None, "ffn"), fan_in=embed)
        self.down = declare.param((ffn, embed), ("ffn", None), fan_in=ffn)
        self.gate_up_bias = declare.param((2, ffn), (None, "ffn"), init="zeros") if bias else None
        self.down_bias = declare.param((embed,), (None,), init="zeros") if bias else None

    def __call__(self, x: Float[Array, "tokens embed"]) -> Float[Array, "tokens embed"]:
        spec = self.rules.spec
        # Tokens that are split over the feed-forward's own axes are gathered; results go back.
        gathered = jax.sharding.reshard(x, spec("ffn_tokens", None))
        hidden = jnp.einsum(
            "te,egf->tgf", gathered, self.gate_up[...], out_sharding=spec("ffn_tokens", None, "ffn")
        )
        if self.gate_up_bias is not None:
            hidden = hidden + self.gate_up_bias[...]
        hidden = ACTIVATIONS[self.activation](hidden[:, 0]) * hidden[:, 1]
        out = jnp.einsum("tf,fe->te", hidden, self.down[...], out_sharding=spec("tokens", None))
        return out if self.down_bias is None else out + self.down_bias[...]
