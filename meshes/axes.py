"""The five mesh axes, and the logical axes that models speak."""

MESH_AXES = ("pp", "dp", "cp", "ep", "tp")
"""Outer to inner: pipeline stages, data replicas, context ranks, expert ranks, tensor ranks."""

LOGICAL_AXES = {
    "layers": "the stacked layers of a model",
    "requests": "rows of the batch: one row a running request",
    "tokens": "tokens of a step, those of one batch rank beside each other",
    "context": "parts that the tokens and the keys of one sequence are split into",
    "pages": "pages of the KV cache",
    "heads": "query head slots",
    "kv_heads": "key/value head slots",
    "head_dim": "features of one head",
    "embed": "features of the residual stream",
    "ffn": "features of a dense feed-forward layer",
    "ffn_tokens": "tokens as a dense feed-forward layer sees them: gathered over its own axes",
    "vocab": "vocabulary entries, padded to divide",
    "sampler_requests": "rows of the batch as the sampler sees them: gathered over vocab's axes",
    "experts": "expert slots",
    "expert_ffn": "features inside one expert",
}
"""Every name that a tensor's axis may carry, with its meaning."""
