"""Grouped matrix products: each group of rows times its own matrix (the experts of a layer)."""

import functools
import logging
from typing import Any

from jax.extend import backend
from jaxtyping import Array, Float, Int

from pallas_kernels import reference
from pallas_kernels.activation import ACTIVATIONS
from pallas_kernels.grouped_gemm import mosaic_sm90
from pallas_kernels.grouped_gemm.configs import config_for
from pallas_kernels.grouped_gemm.sort import SortedRows, sort_rows

__all__ = ["SortedRows", "grouped_gemm", "sort_rows"]

IMPLEMENTATIONS = ("mosaic_sm90", "reference")


def grouped_gemm(
    lhs: Float[Array, "rows k"],
    rhs: Float[Array, "layers groups k n"],
    group_sizes: Int[Array, "all_groups"],
    layer: Int[Array, ""] | int,
    *,
    bias: Float[Array, "layers groups n"] | None = None,
    activation: str | None = None,
    first_group: Int[Array, ""] | int = 0,
    implementation: str | None = None,
) -> Float[Array, "rows out"]:
    """Multiplies each group's rows with that group's matrix of one layer, sums in float32.

    Group g owns the `group_sizes[g]` rows after those of the groups before it. `rhs` and `bias`
    hold the groups from `first_group` on: rows of groups that they lack, and rows past the last
    group, come back unspecified, and must be masked, not multiplied by 0. The sizes are read on the
    device.

    The `activation`, one of `ACTIVATIONS`, is applied to the float32 sums: the first half of the n
    columns is the gate, the second half what it gates, and n / 2 columns come out.

    `implementation=None` takes the Hopper kernel where it can run, else the XLA reference, whose
    work follows the rows too (`lax.ragged_dot` on CUDA multiplies every row with every group).
    Naming one raises NotImplementedError for what it does not cover.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"implementation={implementation!r} does not exist; use None or one of "
            f"{', '.join(IMPLEMENTATIONS)}"
        )
    if activation not in (None, *ACTIVATIONS):
        raise ValueError(
            f"activation={activation!r} does not exist; use None or one of {', '.join(ACTIVATIONS)}"
        )
    if activation is not None and rhs.shape[3] % 2:
        raise ValueError(
            f"activation={activation!r} needs as many columns of gate as of up, so an even number "
            f"in all; rhs has {rhs.shape[3]}"
        )
    device = backend.get_default_device()
    operands = (lhs, rhs, group_sizes, layer)
    options = {"bias": bias, "activation": activation, "first_group": first_group}
    if implementation != "reference":
        try:
            if not _is_hopper(device):
                raise NotImplementedError(f"needs a Hopper GPU, got {device.device_kind}")
            config = config_for(
                rows=lhs.shape[0],
                groups=group_sizes.shape[0],
                k=rhs.shape[2],
                n=rhs.shape[3],
                num_sms=device.core_count,
                gated=activation is not None,
            )
            mosaic_sm90.check_covered(lhs, rhs, config, activation)
        except NotImplementedError as error:
            if implementation is not None:
                raise
            _log_pick("reference", str(error))
        else:
            _log_pick("mosaic_sm90", f"on {device.device_kind}")
            return mosaic_sm90.grouped_gemm(
                *operands, **options, config=config, num_sms=device.core_count
            )
    return reference.grouped_gemm(*operands, **options)


def _is_hopper(device: Any) -> bool:
    return device.platform == "gpu" and device.compute_capability.startswith("9.")


@functools.cache
def _log_pick(implementation: str, reason: str) -> None:
    logging.getLogger(__name__).info("grouped_gemm runs as %s: %s", implementation, reason)
