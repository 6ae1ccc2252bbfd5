"""Where groups of rows stand in an array of rows that are sorted by group.

With an alignment, a power of two, each group begins at a multiple of it. Unused rows lie between
groups then, and hold anything. Where a group begins follows from the rows before it alone, without
the sizes of single groups, which costs an empty group as many rows as its end may cost another.
"""

from jax import lax
from jaxtyping import Array, Int

ROOM_STEP = 32
"""What the rows of an array with unused rows are a multiple of: kernels take many at once."""


def group_begin(
    rows_before: Int[Array, "..."], group: Int[Array, "..."], alignment: int
) -> Int[Array, "..."]:
    """First row of a group, which rows of so many lower groups come before.

    Each lower group leaves less than `alignment` rows unused, or `alignment` if it is empty; so
    does each lower row, which is less where there are fewer rows than groups.
    """
    if alignment == 1:
        return rows_before
    return lax.min(rows_before * alignment, (rows_before & -alignment) + group * alignment)


def room_for(rows: int, groups: int, alignment: int) -> int:
    """Rows of an array that holds so many in groups, those of no group after them."""
    if alignment == 1:
        return rows
    room = alignment * min(rows, -(-rows // alignment) + groups)
    return room + -room % ROOM_STEP


def rows_held(room: int, groups: int, alignment: int) -> int:
    """About the most rows that an array with this room holds."""
    return max(room // alignment, room - (alignment if alignment > 1 else 0) * groups)
