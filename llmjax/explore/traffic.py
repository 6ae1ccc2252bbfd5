"""How steps send tokens to their experts, worked out from shapes."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp

from llmjax.config import EngineConfig, ModelConfig
from llmjax.layers.moe import choose_method, expert_load
from llmjax.parallel.dispatch_cost import buffer_bytes, largest_max_num_tokens, sent_bytes
from meshes import Rules


@dataclass(frozen=True, kw_only=True)
class ExpertTraffic:
    """The expert dispatch of one layer, in steps of one size; bytes are those of a device."""

    tokens: int
    """Tokens of a batch rank."""
    method: str
    """allreduce, allgather or all_to_all."""
    rounds: int
    """Rounds in which the tokens go."""
    sent_bytes: int
    """Bytes sent."""
    buffer_bytes: int
    """Bytes of buffers under the worst routing."""
    largest_round: int
    """The largest `moe_max_num_tokens` whose buffers fit; 0 where none does."""


def list_traffic(
    config: ModelConfig,
    rules: Rules,
    engine: EngineConfig,
    *,
    token_counts: Sequence[int],
    budget: int,
) -> tuple[ExpertTraffic, ...]:
    """The dispatch of steps of several sizes; none for a model without experts.

    Args:
        token_counts: tokens of a batch rank in each step.
        budget: bytes that the buffers may take on a device.
    """
    if config.experts is None:
        return ()
    experts, traffic = config.experts, []
    for tokens in token_counts:
        load = expert_load(
            experts,
            rules,
            tokens=-(-tokens // rules.size("context")),
            embed=config.hidden_size,
            itemsize=jnp.dtype(engine.dtype).itemsize,
            max_num_tokens=engine.moe_max_num_tokens,
        )
        method = choose_method(engine.moe_dispatch, load, rules)
        traffic.append(
            ExpertTraffic(
                tokens=tokens,
                method=method,
                rounds=load.rounds,
                sent_bytes=sent_bytes(method, load, rules=rules),
                buffer_bytes=buffer_bytes(method, load, rules=rules),
                largest_round=largest_max_num_tokens(method, load, budget, rules=rules),
            )
        )
    return tuple(traffic)
