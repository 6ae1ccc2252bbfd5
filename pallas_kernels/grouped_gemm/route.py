"""Which experts a token visits: what a router's logits choose, as XLA computes it."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32


@dataclass(frozen=True, kw_only=True)
class Router:
    """How logits choose experts; a token's gate for an expert is its score."""

    top_k: int
    """Experts of a token."""
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    """Logits -> scores, over all experts if softmax."""
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

    @property
    def is_grouped(self) -> bool:
        """Whether some groups are left out."""
        return self.top_groups < self.num_groups


def route_tokens_by_xla(
    logits: Float32[Array, "tokens experts"],
    correction: Float32[Array, " experts"] | None,
    is_real: Bool[Array, " tokens"] | None,
    router: Router,
) -> tuple[Int32[Array, "tokens top_k"], Float32[Array, "tokens top_k"]]:
    """Experts of each token, in falling order of choice, and their gates."""
    scores = jax.nn.softmax(logits) if router.scoring == "softmax" else jax.nn.sigmoid(logits)
    choice = scores if correction is None else scores + correction
    if router.is_grouped:
        grouped = choice.reshape(len(choice), router.num_groups, -1)
        best = lax.top_k(grouped, router.group_best)[0].sum(-1)
        _, kept = lax.top_k(best, router.top_groups)
        allowed = jnp.zeros_like(best, bool).at[jnp.arange(len(best))[:, None], kept].set(True)
        choice = jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(choice.shape)
    _, experts = lax.top_k(choice, router.top_k)
    gates = jnp.take_along_axis(scores, experts, axis=-1)
    if router.normalize:
        # Sigmoids may all be zero.
        gates = gates / (gates.sum(-1, keepdims=True) + 1e-20)
    if is_real is not None:
        experts = jnp.where(is_real[:, None], experts, -1)
    return experts, gates * router.scaling_factor
