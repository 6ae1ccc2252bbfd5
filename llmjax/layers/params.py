"""Declares weights: a shape, logical axes and an initialiser, said once for everything."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from meshes import Rules


@dataclass(frozen=True, kw_only=True)
class Declare:
    """What all weights of one part of a model share.

    The abstract tree, shardings, random weights and loading all derive from what `param` declares.
    """

    rules: Rules
    """Turns logical axes into PartitionSpecs."""
    dtype: jnp.dtype
    """Type of the weights."""
    rngs: nnx.Rngs
    """Source of random weights."""
    layers: tuple[int, ...] | None = None
    """The model's layer in each row of the stack, -1 for a row that stays empty; None for weights
    that exist once."""

    def param(
        self,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        *,
        init: Literal["normal", "ones", "zeros"] = "normal",
        fan_in: int = 1,
        dtype: Any = None,
    ) -> nnx.Param:
        """A weight of one layer; the stack's axis is added here.

        "normal" draws with variance 1 / fan_in: random models then keep the scale of activations.
        `dtype` is that of all weights unless this one needs its own.
        """
        dtype = dtype or self.dtype
        if self.layers is not None:
            shape, axes = (len(self.layers), *shape), ("layers", *axes)
        if init == "normal":
            draw = jax.random.normal(self.rngs.params(), shape, jnp.float32) * fan_in**-0.5
            value = draw.astype(dtype)
        else:
            value = jnp.full(shape, 1 if init == "ones" else 0, dtype)
        # The spec rides on the weight; placing it is the loader's work, not the constructor's.
        return nnx.Param(
            value,
            out_sharding=self.rules.spec(*axes),
            eager_sharding=False,
            layers=self.layers,
            logical_axes=axes,
        )
