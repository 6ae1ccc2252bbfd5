"""How many features the swizzle of a tile in shared memory spans."""

import math

WIDEST = 128
"""Bytes of the widest swizzle, which spreads rows over all banks best."""
NARROWEST = 32
"""Bytes of the narrowest: as many features as wgmma takes at a time."""


def swizzled_features(features: int, element: int = 2) -> int:
    """Returns the features of so many bytes that a swizzle spans: the most that divide a head's."""
    return math.gcd(features, WIDEST // element)
