"""A checkpoint's weights, or random ones, as the nested dictionaries that a step takes."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from llmjax.config import ModelConfig
from llmjax.models.decoder import Decoder, head_slots
from llmjax.models.family import Family
from llmjax.models.wrappers import NO_TEXT
from llmjax.weights.interface import Checkpoint
from llmjax.weights.load import AbstractParam, load_weights
from meshes import Rules

Weights = dict[str, Any]
"""Weights by the names of the modules that hold them."""


def load_model(
    checkpoint: Checkpoint,
    family: Family,
    config: ModelConfig,
    rules: Rules,
    mesh: Mesh,
    *,
    dtype: jnp.dtype,
    progress: bool,
) -> Weights:
    """Streams a checkpoint onto the mesh.

    Raises:
        CheckpointError: tensors are missing, extra or of another shape, before anything is read.
    """
    params = {
        path: AbstractParam(
            shape=param.shape,
            dtype=param.dtype,
            spec=param.out_sharding,
            layers=param.get_metadata("layers"),
            by_expert=param.get_metadata("logical_axes")[:2] == ("layers", "experts"),
        )
        for path, param in declared_params(config, rules, dtype).items()
    }
    beyond = "(?:" + "|".join(str(config.num_layers + extra) for extra in range(8)) + ")"
    ignored = [pattern.replace("{beyond}", beyond) for pattern in (*family.ignored, *NO_TEXT)]
    if config.tie_word_embeddings:
        # Some files hold the embedding a second time under the head's name.
        ignored.append(r"lm_head\.weight")
    loaded = load_weights(
        params,
        family.sources(config, head_slots(config, rules), checkpoint.tensors),
        checkpoint,
        mesh,
        ignored=ignored,
        progress=progress,
    )
    return nest(loaded)


def random_model(
    config: ModelConfig, rules: Rules, mesh: Mesh, *, dtype: jnp.dtype, seed: int
) -> Weights:
    """Random weights, drawn on the devices that hold them."""

    def build() -> Weights:
        decoder = Decoder(config, rules, dtype=dtype, rngs=nnx.Rngs(seed))
        return nnx.to_pure_dict(nnx.state(decoder, nnx.Param))

    params = declared_params(config, rules, dtype)
    shardings = {
        path: jax.sharding.NamedSharding(mesh, param.out_sharding) for path, param in params.items()
    }
    with jax.set_mesh(mesh):
        return jax.jit(build, out_shardings=nest(shardings))()


def abstract_decoder(config: ModelConfig, rules: Rules, dtype: jnp.dtype) -> Decoder:
    """The decoder with shapes and specs in the place of weights; nothing is allocated."""

    def build() -> Decoder:
        return Decoder(config, rules, dtype=dtype, rngs=nnx.Rngs(0))

    return nnx.eval_shape(build)


def declared_params(config: ModelConfig, rules: Rules, dtype: jnp.dtype) -> dict[str, nnx.Param]:
    """Every weight that the model declares, by its dotted path."""
    state = nnx.state(abstract_decoder(config, rules, dtype), nnx.Param)
    return {".".join(map(str, path)): param for path, param in nnx.to_flat_state(state)}


def nest(flat: Mapping[str, Any]) -> Weights:
    """Dotted paths -> nested dictionaries."""
    nested: Weights = {}
    for path, value in flat.items():
        *parents, name = path.split(".")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = value
    return nested
