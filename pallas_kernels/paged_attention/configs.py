"""How the Hopper kernels are laid out, chosen by shape.

Measured on an H200 by `python -m benchmarks.kernels --tune`, with `--op paged_attention` for
decode, `--op mla` and `--op prefill`.
"""

from pallas_kernels.paged_attention.decode_shape import REDUCED, DecodeConfig, padded_values
from pallas_kernels.paged_attention.mla_shape import MlaConfig
from pallas_kernels.paged_attention.prefill_shape import PrefillConfig

SHARED_BYTES = 220 * 1024
"""Shared memory of a block for tiles and operands; the rest is for barriers and reductions."""
MERGED = 8
"""Parts of a row that are merged at once: more make a longer program, which starts later."""
PREFILL_SHARED_BYTES = 224 * 1024
"""The same for prefill, which reduces in registers alone."""
TILE_BYTES = 64 * 1024
"""Bytes of the keys and values of a tile: large enough to hide what a tile costs besides."""


def decode_config(
    *, heads: int, kv_heads: int, d: int, dv: int, num_sms: int, stored: int = 2
) -> DecodeConfig:
    """The configuration of a decode step with so many heads, with pages of `stored` bytes each."""
    columns = -(-heads // kv_heads // 8) * 8
    dv = padded_values(dv)
    # What widens float8 needs registers beside those of a tile's scores.
    kv_block = 256 if stored == 2 else 128
    # Wide groups keep scores and sums of many heads in registers.
    while kv_block > 64 and (2 * kv_block * (d + dv) > TILE_BYTES or kv_block * columns > 4096):
        kv_block //= 2
    # What widens float8 takes longer than what it saves of copying: two warpgroups share it.
    computers = 2 if stored == 1 else 1
    operands = 2 * columns * (2 * d + computers * (dv + kv_block))
    if computers == 2:
        operands += 4 * (columns * dv + 2 * REDUCED)
    stages = min((SHARED_BYTES - operands) // (stored * kv_block * (d + dv)), 8)
    return DecodeConfig(
        blocks=num_sms,
        kv_block=kv_block,
        stages=stages - stages % computers,
        computers=computers,
        merge_registers=min(128, MERGED * columns * dv // 128),
    )


def prefill_config(*, d: int, dv: int, num_sms: int, stored: int = 2) -> PrefillConfig:
    """The configuration of a prefill step with such heads, with pages of `stored` bytes each."""
    kv_block = 128 if max(d, dv) <= 128 else 64
    free = PREFILL_SHARED_BYTES - 2 * 128 * (d + 128)
    if stored == 1:
        free -= kv_block * (d + dv)
    stages = free // (2 * kv_block * (d + dv))
    return PrefillConfig(blocks=num_sms, kv_block=kv_block, stages=min(stages, 4))


def mla_config(*, num_sms: int) -> MlaConfig:
    """The configuration of a decode step of latent attention."""
    return MlaConfig(blocks=num_sms)
