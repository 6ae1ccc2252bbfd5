"""Copies of the warpgroup that loads, on Hopper."""

from collections.abc import Callable

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax

WARPS = 4
"""Warps of a warpgroup."""


def issue_copies(copies: list[Callable[[], None]], *, by_warps: bool) -> None:
    """Issues copies, each by a warp of its own where that is asked for.

    A warpgroup meets for each of its copies, which takes longer than the copy of a small page.
    The interpreter knows no warps.
    """
    if not by_warps or len(copies) == 1:
        for copy in copies:
            copy()
        return

    @pl.core_map(plgpu.WarpMesh(axis_name="warp"))
    def _() -> None:
        warp = lax.axis_index("warp")
        for own in range(WARPS):

            @pl.when(warp == own)
            def _(own: int = own) -> None:
                for copy in copies[own::WARPS]:
                    copy()
