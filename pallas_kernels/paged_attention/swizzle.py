"""How many features the swizzle of a tile in shared memory spans."""

import math

WIDEST = 64
"""Elements of 2 bytes in the widest swizzle, which spreads rows over all banks best."""
NARROWEST = 16
"""Those in the narrowest: wgmma takes as many features at a time."""


def swizzled_features(features: int) -> int:
    """Returns the features that a swizzle spans, 64, 32 or 16: the most that divide a head's."""
    return math.gcd(features, WIDEST)
