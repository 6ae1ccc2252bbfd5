"""The KV pages of one batch rank: who holds them, and which prefixes they can serve again."""

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Sequence

# The parent of a sequence's first page.
ROOT_DIGEST = bytes(32)


def hash_page(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Name a full page by its tokens and, through `parent`, by all tokens before them."""
    # sha256 and a fixed byte order: every process of a run must find the same pages.
    return hashlib.sha256(parent + struct.pack(f"<{len(token_ids)}i", *token_ids)).digest()


class BlockManager:
    """Hand out, share and take back the pages of one batch rank.

    A page is held by one or more requests, or cached (full, hashed and held by nobody: it can be
    matched, or reused when no free page is left, least recently used first), or free.
    """

    def __init__(self, *, num_pages: int, page_size: int, enable_block_reuse: bool = True):
        self.num_pages = num_pages
        self.page_size = page_size
        self.enable_block_reuse = enable_block_reuse
        self.queries = 0
        """Requests that looked for a prefix and got their pages."""
        self.prefix_hit_tokens = 0
        """Tokens that these requests need not compute."""
        self._free = list(reversed(range(num_pages)))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._holders = [0] * num_pages
        self._digest_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Pages that can be handed out: free or cached."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def pages_for(self, num_tokens: int) -> int:
        """Count the pages that hold `num_tokens` positions."""
        return -(-num_tokens // self.page_size)

    def num_holders(self, page: int) -> int:
        return self._holders[page]

    def match(self, token_ids: Sequence[int]) -> list[int]:
        """Find the pages of the longest known prefix, leaving at least one token to compute."""
        pages: list[int] = []
        if not self.enable_block_reuse:
            return pages
        digest = ROOT_DIGEST
        for end in range(self.page_size, len(token_ids), self.page_size):
            digest = hash_page(digest, token_ids[end - self.page_size : end])
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def admit(
        self, token_ids: Sequence[int], *, matched: Sequence[int], spare: int
    ) -> list[int] | None:
        """Take the matched pages and new ones for the rest of the tokens.

        Returns None, with nothing taken, unless `spare` pages stay available afterwards.
        """
        num_new = self.pages_for(len(token_ids)) - len(matched)
        num_revived = sum(page in self._cached for page in matched)
        if num_new + num_revived + spare > self.num_available:
            return None
        for page in matched:
            self._hold(page)
        self.queries += 1
        self.prefix_hit_tokens += len(matched) * self.page_size
        return [*matched, *(self._take() for _ in range(num_new))]

    def extend(self, pages: list[int], num_tokens: int) -> bool:
        """Grow `pages` in place to hold `num_tokens` positions; False if none can be had."""
        if num_tokens <= len(pages) * self.page_size:
            return True
        num_new = self.pages_for(num_tokens) - len(pages)
        if num_new > self.num_available:
            return False
        pages.extend(self._take() for _ in range(num_new))
        return True

    def commit(self, token_ids: Sequence[int], pages: Sequence[int], num_computed: int) -> None:
        """Make the full pages among the first `num_computed` positions available to `match`."""
        if not self.enable_block_reuse:
            return
        num_full = num_computed // self.page_size
        first = num_full
        while first > 0 and pages[first - 1] not in self._digest_of:
            first -= 1
        digest = self._digest_of[pages[first - 1]] if first else ROOT_DIGEST
        for index in range(first, num_full):
            start = index * self.page_size
            digest = hash_page(digest, token_ids[start : start + self.page_size])
            self._digest_of[pages[index]] = digest
            # The first page with this content stays the one that is matched.
            self._page_of.setdefault(digest, pages[index])

    def release(self, pages: Sequence[int]) -> None:
        """Give up one hold on each page.

        Raises RuntimeError for a page that nobody holds.
        """
        # Last page first: the end of a sequence is reused before the prefix it depends on.
        for page in reversed(pages):
            if self._holders[page] == 0:
                raise RuntimeError(
                    f"page {page} is released but nobody holds it: it was released twice, or it "
                    f"never came from this rank's {self.num_pages} pages"
                )
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._retain_or_free(page)

    def _retain_or_free(self, page: int) -> None:
        digest = self._digest_of.get(page)
        if digest is not None and self._page_of.setdefault(digest, page) == page:
            self._cached[page] = None
        else:
            self._digest_of.pop(page, None)
            self._free.append(page)

    def _hold(self, page: int) -> None:
        if page not in self._digest_of:
            raise RuntimeError(f"page {page} is shared but it is not a hashed page of this rank")
        self._cached.pop(page, None)
        self._holders[page] += 1

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            del self._page_of[self._digest_of.pop(page)]
        self._holders[page] = 1
        return page
