"""Declares weights: a shape, logical axes and an initialiser, said once for everything."""

from dataclasses import dataclass
from typing import Literal

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
    num_layers: int | None = None
    """Layers stacked in a leading axis; None for weights that exist once."""

    def param(
        self,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        *,
        init: Literal["normal", "ones", "zeros"] = "normal",
        fan_in: int = 1,
    ) -> nnx.Param:
        """A weight of one layer; the stack's axis is added here.

        "normal" draws with variance 1 / fan_in: random models then keep the scale of activations.
        """
        if self.num_layers is not None:
            shape, axes = (self.num_layers, *shape), ("layers", *axes)
        if init == "normal":
            draw = jax.random.normal(self.rngs.params(), shape, jnp.float32) * fan_in**-0.5
            value = draw.astype(self.dtype)
        else:
            value = jnp.full(shape, 1 if init == "ones" else 0, self.dtype)
        # The spec rides on the weight; placing it is the loader's work, not the constructor's.
        return nnx.Param(
            value,
            out_sharding=self.rules.spec(*axes),
            eager_sharding=False,
            stacked=self.num_layers is not None,
            logical_axes=axes,
        )
