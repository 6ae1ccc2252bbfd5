"""Where groups of rows stand in an array of rows that are sorted by group.

With an alignment, a power of two, each group begins at a multiple of it. Unused rows lie between
groups then, and hold anything: on average `alignment` for each group, be it empty. So where a group
begins follows from the number of all rows before it, and sorting need not know the sizes of single
groups.
"""

from jaxtyping import Array, Int

ROOM_STEP = 32
"""What the rows of an array with unused rows are a multiple of: kernels take many at once."""


def group_begin(
    rows_before: Int[Array, "..."], group: Int[Array, "..."], alignment: int
) -> Int[Array, "..."]:
    """First row of a group, by the rows of all lower groups together."""
    if alignment == 1:
        return rows_before
    return (rows_before & -alignment) + group * alignment


def room_for(rows: int, groups: int, alignment: int) -> int:
    """Rows of an array that holds so many rows in so many groups, and behind them those of none."""
    if alignment == 1:
        return rows
    room = rows + groups * alignment
    return room + -room % ROOM_STEP


def rows_held(room: int, groups: int, alignment: int) -> int:
    """The most rows that an array with this room holds."""
    return room if alignment == 1 else room - groups * alignment
