"""Where the values of a parameter lie in a checkpoint."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Shaped


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """One checkpoint tensor and the region of one parameter that it fills.

    Rows of the tensor are read (`rows`), reshaped (`split`), cut (`part`), their axes are reordered
    (`transpose`), one axis is picked apart (`slots`), and the result is written at `region`. Axes
    are those of the parameter without its layers axis. Where the result is shorter than the region,
    zeros follow.
    """

    name: str
    """Tensor name in Hugging Face's spelling; "{layer}" stands for the layer's index."""
    shape: tuple[int, ...]
    """Shape that the checkpoint's tensor must have."""
    rows: slice | None = None
    """Part of the tensor's first axis that is read, such as one of its experts; None reads all."""
    split: tuple[int, ...] | None = None
    """Shape to view the rows in, such as (heads, head_dim, embed); None keeps their own."""
    part: tuple[int, slice] | None = None
    """(axis of the split tensor, indices that are taken); None takes all."""
    transpose: tuple[int, ...] | None = None
    """Order of the split axes in the parameter; None keeps the order."""
    slots: tuple[int, np.ndarray] | None = None
    """(axis, indices): the axis is replaced by those of `indices`, whose entries say which source
    index each slot takes; -1 gives zeros."""
    region: tuple[slice, ...] | None = None
    """Part of the parameter that is filled; None is all of it."""
    optional: bool = False
    """A checkpoint may lack the tensor; its region then stays zero."""

    def __post_init__(self):
        split, read = self.split_shape, self.read_shape
        if math.prod(split) != math.prod(read):
            raise ValueError(
                f"source {self.name}: split={split} has {math.prod(split)} elements, "
                f"what is read of shape {read} has {math.prod(read)}; they must be equal."
            )
        if self.transpose is not None and sorted(self.transpose) != list(range(len(split))):
            raise ValueError(
                f"source {self.name}: transpose={self.transpose} is not an order of the "
                f"{len(split)} axes of {split}."
            )

    @property
    def read_shape(self) -> tuple[int, ...]:
        """Shape of the rows that are read."""
        if self.rows is None:
            return self.shape
        return (len(range(*self.rows.indices(self.shape[0]))), *self.shape[1:])

    @property
    def split_shape(self) -> tuple[int, ...]:
        """Shape that the rows are viewed in."""
        return self.read_shape if self.split is None else self.split

    @property
    def filled_shape(self) -> tuple[int, ...]:
        """Shape after splitting, transposing and slotting, before any padding."""
        shape = self._transposed_shape
        if self.slots is None:
            return shape
        axis, indices = self.slots
        return (*shape[:axis], *indices.shape, *shape[axis + 1 :])

    @property
    def _transposed_shape(self) -> tuple[int, ...]:
        split = list(self.split_shape)
        if self.part is not None:
            axis, taken = self.part
            split[axis] = len(range(*taken.indices(split[axis])))
        return tuple(split if self.transpose is None else (split[axis] for axis in self.transpose))


def read_region(
    source: Source, rows: Shaped[np.ndarray, "..."], index: tuple[slice, ...]
) -> Shaped[np.ndarray, "..."]:
    """Read the part of a source's region that `index` names, counted from the region's start.

    `rows` are those that the source reads. Only the elements asked for are touched, so a
    memory-mapped tensor is read in part. The result is a view where no element is picked by slot or
    padded.
    """
    spans = [
        (part.start or 0, size if part.stop is None else part.stop)
        for part, size in zip(index, source.filled_shape, strict=True)
    ]
    inside = tuple(
        slice(min(start, size), min(stop, size))
        for (start, stop), size in zip(spans, source.filled_shape, strict=True)
    )

    view = rows.reshape(source.split_shape)
    if source.part is not None:
        axis, taken = source.part
        view = view[(slice(None),) * axis + (taken,)]
    if source.transpose is not None:
        view = view.transpose(source.transpose)
    values = view[inside] if source.slots is None else _take_slots(view, source.slots, inside)

    wanted = tuple(stop - start for start, stop in spans)
    if values.shape == wanted:
        return values
    padded = np.zeros(wanted, values.dtype)
    padded[tuple(slice(size) for size in values.shape)] = values
    return padded


def _take_slots(
    view: Shaped[np.ndarray, "..."], slots: tuple[int, np.ndarray], index: tuple[slice, ...]
) -> Shaped[np.ndarray, "..."]:
    axis, indices = slots
    after = axis + indices.ndim
    wanted = indices[index[axis:after]]
    narrowed = view[(*index[:axis], slice(None), *index[after:])]
    # Index 0 stands in for the empty slots, which are cleared afterwards.
    values = np.take(narrowed, np.maximum(wanted, 0), axis=axis)
    values[(slice(None),) * axis + (wanted < 0,)] = 0
    return values
