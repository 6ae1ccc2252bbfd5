"""Shape buckets, and their steps compiled ahead of time."""

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import jax
import platformdirs

from llmjax.config import ConfigError, EngineConfig
from llmjax.engine.batch import Bucket

logger = logging.getLogger(__name__)

SMALLEST_PREFILL = 32
"""Prefill tokens of the smallest bucket; fewer are padded."""
BUCKET_RATIO = 4
"""Neighbouring buckets differ by this factor."""


def choose_buckets(
    *,
    max_batch_size: int,
    max_num_tokens: int,
    prefill_rows: int,
    width: int,
    config: EngineConfig,
    num_stages: int = 1,
    context_ranks: int = 1,
    fewest_rows: int = 1,
) -> tuple[Bucket, ...]:
    """Decode buckets of several batch sizes, and prefill buckets that hold any batch size.

    Each stage of a pipeline has its share of the batch, so no step decodes more than that; and a
    prefill bucket holds a share of the longest step. Sizes are rounded up to multiples of the
    context ranks, which share a bucket's tokens, and each of these gets `fewest_rows` at least.

    Raises:
        ConfigError: buckets that were asked for do not cover the largest batch or step.
    """
    batch_share, token_share = (-(-n // num_stages) for n in (max_batch_size, max_num_tokens))
    batches = config.batch_buckets or _geometric(1, batch_share)
    prefills = config.token_buckets or _add(
        _geometric(SMALLEST_PREFILL, token_share), max_num_tokens
    )
    share = f" over {num_stages} stages" if num_stages > 1 else ""
    for key, sizes, needed, limit in (
        ("batch_buckets", batches, batch_share, f"max_batch_size{share}"),
        ("token_buckets", prefills, max_num_tokens, "max_num_tokens"),
    ):
        if sizes[-1] < needed:
            raise ConfigError(
                f"{key} ends at {sizes[-1]}, below {limit}={needed}: add a bucket of {needed}."
            )
    fewest = fewest_rows * context_ranks
    batches = tuple(sorted({max(min(batch, batch_share), fewest) for batch in batches}))
    batches, prefills = (_round_up(sizes, context_ranks) for sizes in (batches, prefills))
    decodes = [
        Bucket(prefill_tokens=0, decodes=batch, prefill_rows=0, width=width) for batch in batches
    ]
    mixed = [
        Bucket(prefill_tokens=tokens, decodes=batches[-1], prefill_rows=prefill_rows, width=width)
        for tokens in prefills
    ]
    return (*decodes, *mixed)


def pick_bucket(buckets: Sequence[Bucket], *, decodes: int, prefill_tokens: int) -> Bucket:
    """The smallest bucket that holds a step, given the largest numbers of any batch rank."""
    fitting = [
        bucket
        for bucket in buckets
        if bucket.decodes >= decodes and bucket.prefill_tokens >= prefill_tokens
    ]
    return min(fitting)


def compile_steps(
    lowered: Mapping[Bucket, Any], *, compiler_options: Mapping[str, Any], side_by_side: bool
) -> dict[Bucket, Any]:
    """Compiles all buckets, on a GPU `side_by_side`: XLA does not hold Python's lock.

    XLA's compiler for CPUs uses all cores for one, and has aborted while several programs were read
    from JAX's cache at once.
    """
    started = time.perf_counter()
    options = dict(compiler_options) or None

    def compile_one(program: Any) -> Any:
        return program.compile(compiler_options=options)

    with ThreadPoolExecutor(max_workers=4 if side_by_side else 1) as pool:
        compiled = dict(zip(lowered, pool.map(compile_one, lowered.values()), strict=True))
    logger.info("compiled %d steps in %.1f s", len(compiled), time.perf_counter() - started)
    return compiled


class CompileWatch:
    """Counts programs that are compiled while it is open; a warmed-up engine compiles none."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Self:
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.count += 1
            logger.warning("a program was compiled in %.1f s after warm-up", duration_secs)


def enable_compile_cache(setting: bool | str) -> Path | None:
    """Keeps compiled programs on disk: in the user's cache folder, or in the one that is named."""
    if setting is False:
        return None
    if setting is True:
        # A folder that the user chose for all of JAX stays.
        if configured := jax.config.jax_compilation_cache_dir:
            return Path(configured)
        setting = str(Path(platformdirs.user_cache_dir("llmjax")) / "xla")
    jax.config.update("jax_compilation_cache_dir", setting)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return Path(setting)


def _round_up(sizes: Sequence[int], divisor: int) -> tuple[int, ...]:
    return tuple(sorted({size + -size % divisor for size in sizes}))


def _geometric(first: int, last: int) -> tuple[int, ...]:
    sizes = [last]
    while sizes[0] > first:
        sizes.insert(0, max(first, -(-sizes[0] // BUCKET_RATIO)))
    return tuple(sizes)


def _add(sizes: tuple[int, ...], largest: int) -> tuple[int, ...]:
    return sizes if sizes[-1] == largest else (*sizes, largest)
