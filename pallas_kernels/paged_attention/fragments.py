"""What a warpgroup holds of 64 rows, in memory: 16 bytes a thread at a time.

wgmma leaves two neighbours of a row with each thread. A store of such pairs touches eight rows at
once and fills a part of a sector in each, which takes four times as long as the bytes need.
"""

from typing import Any

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
from jaxlib.mlir.dialects import arith
from jaxtyping import Array

from pallas_kernels.inlined import i32, inline, number
from pallas_kernels.paged_attention.rows import in_rows, store
from pallas_kernels.registers import store_registers

RUN = 32
"""Features of which four threads can have a run of eight each."""


def store_flat(ref: Any, value: Array, *, inlined: bool) -> None:
    """Stores float32 [64, features] for `load_flat`, eight features after eight.

    Within these the order is that of registers, or where nothing is inlined, as the interpreter
    wants it, one feature after the other.
    """
    store_registers(ref, _flatten(in_rows(value)) if inlined else value.T.reshape(-1))


def load_flat(ref: Any, features: int, *, inlined: bool) -> Array:
    """Loads [64, features] from where `store_flat` stored them, maybe among more."""
    size = ref.shape[0]
    if not inlined:
        return ref[...].reshape(features, size // features).T
    flat = plgpu.load(ref, layout=plgpu.Layout.WG_STRIDED((size,), vec_size=4), optimized=False)
    return _unflatten(flat, features)


def store_runs(ref: Any, value: Array, *, inlined: bool) -> None:
    """Stores [64, features] of two bytes each, rows as they are."""
    if inlined and value.shape[1] % RUN == 0:
        store_registers(ref, _gather_runs(in_rows(value)))
    else:
        store(ref, value)


def _flatten(value: Array) -> Array:
    size = value.size
    layout = plgpu.Layout.WG_STRIDED((size,), vec_size=4)

    @inline(
        plgpu.Layout.WGMMA,
        returns=plgpu.ShapeDtypeStruct((size,), value.dtype, layout=layout),
    )
    def rename(array: Any) -> Any:
        parameterized: Any = layout
        # Threads hold two neighbours in each of two rows of eight features.
        fours = [mgpu.utils.vector_concat(list(rows)) for rows in array.registers.reshape(-1, 2)]
        return _fragmented(fours, parameterized.to_mgpu(), (size,))

    return rename(value)


def _unflatten(flat: Array, features: int) -> Array:
    shape = (flat.size // features, features)

    @inline(
        plgpu.Layout.WG_STRIDED(flat.shape, vec_size=4),
        returns=plgpu.ShapeDtypeStruct(shape, flat.dtype, layout=plgpu.Layout.WGMMA),
    )
    def rename(array: Any) -> Any:
        layout = plgpu.Layout.WGMMA.to_mgpu()
        pairs = [
            mgpu.utils.vector_slice(four, slice(first, first + 2))
            for four in array.registers.flat
            for first in (0, 2)
        ]
        return _fragmented(pairs, layout, shape)

    return rename(flat)


def _gather_runs(value: Array) -> Array:
    """Returns an array of which each thread holds eight neighbours, where wgmma has two."""
    shape, layout = value.shape, plgpu.Layout.WGMMA_UPCAST_4X

    @inline(plgpu.Layout.WGMMA, returns=plgpu.ShapeDtypeStruct(shape, value.dtype, layout=layout))
    def exchange(array: Any) -> Any:
        pair = array.registers.flat[0].type
        registers = array.registers.reshape(-1, 4, 2)
        runs = []
        for block, row in np.ndindex(len(registers), 2):
            words = [mgpu.utils.bitcast(word, i32()) for word in registers[block, :, row]]
            words = _exchange(_exchange(words, 1), 2)
            runs.append(mgpu.utils.vector_concat([mgpu.utils.bitcast(w, pair) for w in words]))
        return _fragmented(runs, layout.to_mgpu(), shape)

    return exchange(value)


def _exchange(words: list[Any], distance: int) -> list[Any]:
    """One of two steps that transpose four words of four threads: these are so far apart."""
    thread = arith.andi(mgpu.utils.thread_idx(), number(distance))
    is_later = arith.cmpi(arith.CmpIPredicate.ne, thread, number(0))
    words = list(words)
    for low in (0, 3 - distance):
        high = low + distance
        sent = arith.select(is_later, words[low], words[high])
        received = mgpu.utils.shfl_bfly(sent, distance)
        words[low] = arith.select(is_later, received, words[low])
        words[high] = arith.select(is_later, words[high], received)
    return words


def _fragmented(values: list[Any], layout: Any, shape: tuple[int, ...]) -> Any:
    """Returns the array of this shape that these registers hold in a layout."""
    registers = np.empty(len(values), dtype=object)
    registers[:] = values
    return mgpu.FragmentedArray(
        _registers=registers.reshape(layout.registers_shape(shape)),
        _layout=layout,
        _is_signed=None,
    )
