import pytest

from llmjax.engine.block_manager import BlockManager


def manager(num_pages: int = 6, *, reuse: bool = True) -> BlockManager:
    return BlockManager(num_pages=num_pages, page_size=2, enable_block_reuse=reuse)


def admit(blocks: BlockManager, tokens: list[int]) -> list[int]:
    pages = blocks.admit(tokens, matched=blocks.match(tokens), spare=0)
    assert pages is not None
    return pages


def compute(blocks: BlockManager, tokens: list[int]) -> list[int]:
    pages = admit(blocks, tokens)
    blocks.commit(tokens, pages, len(tokens))
    return pages


@pytest.mark.parametrize(
    ("tokens", "num_matched"),
    [
        ([1, 2, 3, 4, 5], 2),
        ([1, 2, 3, 4], 1),  # one token is left to compute
        ([1, 2, 3, 4, 9, 9, 9], 2),
        ([1, 2, 9, 4, 5], 1),
        ([9, 2, 3, 4, 5], 0),
        ([3, 4, 5], 0),  # the same page after other tokens is another page
        ([1], 0),
    ],
)
def test_match_finds_the_longest_prefix_of_full_pages(tokens, num_matched):
    blocks = manager()
    pages = compute(blocks, [1, 2, 3, 4, 5])
    assert blocks.match(tokens) == pages[:num_matched]


def test_pages_are_matched_only_once_their_last_position_is_computed():
    blocks = manager()
    tokens = [1, 2, 3, 4, 5]
    pages = admit(blocks, tokens)
    for num_computed, num_matched in [(1, 0), (2, 1), (3, 1), (4, 2)]:
        blocks.commit(tokens, pages, num_computed)
        assert blocks.match(tokens) == pages[:num_matched]


def test_a_shared_page_stays_until_its_last_holder_releases_it():
    blocks = manager()
    first = compute(blocks, [1, 2, 3])
    second = admit(blocks, [1, 2, 4])
    assert second[0] == first[0]
    assert second[1] != first[1]
    assert blocks.num_available == 3
    blocks.release(first)
    assert blocks.num_holders(second[0]) == 1
    assert blocks.num_available == 4
    blocks.release(second)
    assert blocks.num_available == 6


def test_a_released_page_can_be_matched_until_it_is_handed_out_again():
    blocks = manager(num_pages=2)
    pages = compute(blocks, [1, 2, 3])
    blocks.release(pages)
    assert blocks.num_cached == 1
    assert blocks.match([1, 2, 3]) == pages[:1]
    admit(blocks, [7, 8, 9])
    assert blocks.match([1, 2, 3]) == []


def test_free_pages_go_first_then_the_least_recently_used_then_the_end_of_a_prefix():
    blocks = manager(num_pages=5)
    old = compute(blocks, [1, 1, 2, 2])
    new = compute(blocks, [3, 3, 4, 4])
    blocks.release(old)
    blocks.release(new)
    pages: list[int] = []
    assert blocks.extend(pages, 10)
    assert pages[1:] == [old[1], old[0], new[1], new[0]]


def test_using_a_cached_prefix_makes_it_the_most_recently_used():
    blocks = manager(num_pages=3)
    first = compute(blocks, [1, 1])
    second = compute(blocks, [2, 2])
    blocks.release(first)
    blocks.release(second)
    blocks.release(admit(blocks, [1, 1, 5]))
    compute(blocks, [7, 7, 8, 8])
    assert blocks.match([1, 1, 5]) == first
    assert blocks.match([2, 2, 5]) == []


def test_of_two_pages_with_equal_tokens_the_first_is_matched():
    blocks = manager()
    first, second = admit(blocks, [1, 2, 3]), admit(blocks, [1, 2, 3])
    blocks.commit([1, 2, 3], first, 3)
    blocks.commit([1, 2, 3], second, 3)
    assert blocks.match([1, 2, 3]) == first[:1]
    blocks.release(second)
    assert blocks.num_cached == 0
    assert blocks.match([1, 2, 3]) == first[:1]


def test_the_copy_of_a_page_takes_its_place_when_the_first_is_gone():
    blocks = manager(num_pages=4)
    first, second = admit(blocks, [1, 2]), admit(blocks, [1, 2])
    blocks.commit([1, 2], first, 2)
    blocks.commit([1, 2], second, 2)
    blocks.release(first)
    filler = admit(blocks, [7, 7, 8, 8, 9, 9])
    assert blocks.match([1, 2, 3]) == []
    blocks.release(second)
    assert blocks.match([1, 2, 3]) == second
    blocks.release(filler)


def test_pages_behind_a_copied_page_are_matched_through_the_first():
    blocks = manager()
    first, second = admit(blocks, [1, 2]), admit(blocks, [1, 2, 3, 4])
    blocks.commit([1, 2], first, 2)
    blocks.commit([1, 2, 3, 4], second, 2)
    blocks.commit([1, 2, 3, 4], second, 4)
    assert blocks.match([1, 2, 3, 4, 5]) == [first[0], second[1]]


def test_admission_takes_nothing_when_the_pages_or_the_spare_ones_are_missing():
    blocks = manager(num_pages=3)
    blocks.release(compute(blocks, [1, 2, 3, 4]))
    # The matched page is itself one of the three available, so only two are left for the rest.
    matched = blocks.match([1, 2, 5, 6, 7, 8, 9])
    assert len(matched) == 1
    assert blocks.admit([1, 2, 5, 6, 7, 8, 9], matched=matched, spare=0) is None
    assert blocks.admit([1, 2, 5, 6, 7, 8], matched=matched, spare=1) is None
    assert blocks.num_available == 3
    assert blocks.admit([1, 2, 5, 6, 7, 8], matched=matched, spare=0) is not None
    assert blocks.num_available == 0


def test_extend_takes_pages_only_when_a_position_needs_them():
    blocks = manager(num_pages=2)
    pages = admit(blocks, [1])
    assert blocks.extend(pages, 2)
    assert len(pages) == 1
    assert blocks.extend(pages, 3)
    assert len(pages) == 2
    assert not blocks.extend(pages, 5)
    assert len(pages) == 2


def test_hits_are_counted_when_pages_are_taken_not_when_they_are_looked_up():
    blocks = manager()
    compute(blocks, [1, 2, 3, 4, 5])
    blocks.match([1, 2, 3, 4, 5])
    assert (blocks.queries, blocks.prefix_hit_tokens) == (1, 0)
    admit(blocks, [1, 2, 3, 4, 5])
    assert (blocks.queries, blocks.prefix_hit_tokens) == (2, 4)


def test_nothing_is_matched_or_cached_without_block_reuse():
    blocks = manager(reuse=False)
    pages = compute(blocks, [1, 2, 3, 4, 5])
    assert blocks.match([1, 2, 3, 4, 5]) == []
    blocks.release(pages)
    assert blocks.num_cached == 0
    assert blocks.num_available == 6


def test_releasing_a_page_twice_is_an_error():
    blocks = manager()
    pages = admit(blocks, [1, 2, 3])
    blocks.release(pages)
    with pytest.raises(RuntimeError, match="page 1 is released but nobody holds it"):
        blocks.release(pages)


def test_sharing_a_page_that_holds_no_known_prefix_is_an_error():
    blocks = manager()
    pages = admit(blocks, [1, 2, 3])
    with pytest.raises(RuntimeError, match="page 0 is shared but"):
        blocks.admit([1, 2, 3], matched=pages[:1], spare=0)
