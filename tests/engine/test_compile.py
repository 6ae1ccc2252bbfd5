from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from llmjax.config import ConfigError, EngineConfig
from llmjax.engine.batch import Bucket
from llmjax.engine.compile import choose_buckets, pick_bucket
from llmjax.engine.kv_pool import count_pages

GIB = 2**30
MIB = 2**20


@dataclass(frozen=True)
class FakeDevice:
    """A device with nothing but memory."""

    platform: str
    bytes_limit: int = 0

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": self.bytes_limit}


@dataclass
class Probe:
    """Stands in for compiling the largest step."""

    temporaries: int
    calls: list[None] = field(default_factory=list)

    def __call__(self) -> int:
        self.calls.append(None)
        return self.temporaries


def count(device: FakeDevice, **changes: Any) -> int:
    mesh: Any = SimpleNamespace(local_devices=[device])
    arguments: dict[str, Any] = {
        "page_bytes": MIB,
        "weight_bytes": 16 * GIB,
        "measure_temporaries": Probe(4 * GIB),
        "fraction": 1.0,
        "min_pages": 1,
        "num_ranks": 1,
    }
    return count_pages(mesh, **(arguments | changes))


def buckets(**changes: Any) -> tuple[Bucket, ...]:
    config = EngineConfig(
        batch_buckets=changes.pop("batch_buckets", ()),
        token_buckets=changes.pop("token_buckets", ()),
    )
    sizes: dict[str, Any] = {
        "max_batch_size": 8,
        "max_num_tokens": 512,
        "prefill_rows": 4,
        "width": 16,
    }
    return choose_buckets(**(sizes | changes), config=config)


def test_a_gpu_gives_the_memory_that_weights_and_temporaries_leave():
    assert count(FakeDevice("gpu", 64 * GIB)) == 44 * 1024


def test_a_gpu_gives_only_the_fraction_that_was_asked_for():
    assert count(FakeDevice("gpu", 64 * GIB), fraction=0.5) == 22 * 1024


@pytest.mark.parametrize("lost", [1, MIB, GIB - 1])
def test_the_pool_is_rounded_down_to_a_64th_of_the_device(lost):
    # A grain is 1 GiB here: whatever part of one is lost, the whole grain goes.
    assert count(FakeDevice("gpu", 64 * GIB), weight_bytes=16 * GIB + lost) == 43 * 1024


def test_a_page_is_counted_only_if_all_of_it_fits():
    assert count(FakeDevice("gpu", 64 * GIB), page_bytes=30 * GIB) == 1


def test_a_gpu_without_room_for_a_page_is_refused_with_what_took_the_memory():
    with pytest.raises(ConfigError) as error:
        count(FakeDevice("gpu", 20 * GIB))
    assert str(error.value) == (
        "No memory is left for the KV cache: of 20.0 GiB the weights take 16.0 and a step's "
        "temporaries 4.0. Use more devices, a smaller dtype or a smaller max_num_tokens."
    )


def test_a_gpu_that_weights_overfill_is_refused():
    with pytest.raises(ConfigError, match="of 8.0 GiB the weights take 16.0"):
        count(FakeDevice("gpu", 8 * GIB))


@pytest.mark.parametrize(("num_ranks", "pages"), [(1, 1024), (2, 512), (8, 128)])
def test_on_cpu_the_batch_ranks_share_a_gibibyte(num_ranks, pages):
    probe = Probe(0)
    found = count(FakeDevice("cpu"), num_ranks=num_ranks, measure_temporaries=probe)
    assert found == pages
    assert not probe.calls, "the largest step is compiled for nothing"


def test_on_cpu_each_rank_holds_a_request_of_full_length():
    assert count(FakeDevice("cpu"), num_ranks=8, min_pages=500) == 500


def test_decode_buckets_grow_by_four_and_prefill_buckets_hold_every_batch():
    found = buckets()
    decode, prefill = found[:3], found[3:]
    assert [(bucket.decodes, bucket.prefill_tokens) for bucket in decode] == [
        (1, 0),
        (2, 0),
        (8, 0),
    ]
    assert [(bucket.decodes, bucket.prefill_tokens) for bucket in prefill] == [
        (8, 32),
        (8, 128),
        (8, 512),
    ]
    assert {bucket.prefill_rows for bucket in decode} == {0}
    assert {bucket.prefill_rows for bucket in prefill} == {4}
    assert {bucket.width for bucket in found} == {16}


def test_buckets_that_were_asked_for_are_the_buckets():
    found = buckets(batch_buckets=(3, 8), token_buckets=(100, 600))
    assert [bucket.decodes for bucket in found] == [3, 8, 8, 8]
    assert [bucket.prefill_tokens for bucket in found] == [0, 0, 100, 600]


@pytest.mark.parametrize(("ranks", "decodes"), [(1, [2, 8]), (4, [8])])
def test_each_context_rank_gets_the_fewest_rows_at_least(ranks, decodes):
    found = buckets(fewest_rows=2, context_ranks=ranks)
    assert [bucket.decodes for bucket in found if not bucket.prefill_tokens] == decodes
    alone = buckets(fewest_rows=2, max_batch_size=1)
    assert {bucket.decodes for bucket in alone} == {2}


def test_a_budget_below_the_smallest_prefill_bucket_is_the_only_prefill_bucket():
    assert [bucket.prefill_tokens for bucket in buckets(max_num_tokens=20)][-1:] == [20]
    assert len(buckets(max_num_tokens=20, max_batch_size=1)) == 2


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"batch_buckets": (1, 4)},
            "batch_buckets ends at 4, below max_batch_size=8: add a bucket of 8.",
        ),
        (
            {"token_buckets": (64, 256)},
            "token_buckets ends at 256, below max_num_tokens=512: add a bucket of 512.",
        ),
    ],
)
def test_buckets_that_do_not_cover_the_largest_step_are_refused(asked, message):
    with pytest.raises(ConfigError) as error:
        buckets(**asked)
    assert str(error.value) == message


def test_the_picked_bucket_is_the_smallest_that_holds_the_step():
    found = buckets()
    for decodes in range(9):
        for prefill in (0, 1, 31, 32, 33, 128, 129, 512):
            picked = pick_bucket(found, decodes=decodes, prefill_tokens=prefill)
            fitting = [
                bucket.tokens
                for bucket in found
                if bucket.decodes >= decodes and bucket.prefill_tokens >= prefill
            ]
            assert picked.decodes >= decodes
            assert picked.prefill_tokens >= prefill
            assert picked.tokens == min(fitting)
