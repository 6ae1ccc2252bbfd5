"""Grouped matrix products: each group of rows times its own matrix (the experts of a layer)."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.extend import backend
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from pallas_kernels import picks, reference
from pallas_kernels.grouped_gemm.arguments import (
    check_alignment,
    check_experts,
    check_groups,
    check_integers,
    check_operands,
    check_room,
    check_router,
    matrix_shape,
)
from pallas_kernels.grouped_gemm.configs import (
    config_for,
    go_unsorted,
    quantized_config_for,
    row_alignment_for,
)
from pallas_kernels.grouped_gemm.quantize import (
    QuantizedMatrices,
    QuantizedRows,
    check_divides,
    quantize_matrices,
    quantize_rows_by_xla,
    take_rows,
    values_of,
)
from pallas_kernels.grouped_gemm.route import Router, route_tokens_by_xla
from pallas_kernels.grouped_gemm.sort import SortedRows, sort_rows_by_xla
from pallas_kernels.grouped_gemm.tiles import has_whole_blocks
from pallas_kernels.groups import room_for, rows_held

__all__ = [
    "QuantizedMatrices",
    "QuantizedRows",
    "Router",
    "SortedRows",
    "route_tokens",
    "expert_rows",
    "grouped_gemm",
    "preferred_row_alignment",
    "quantize_matrices",
    "quantize_rows",
    "room_for",
    "sort_rows",
]

# Kernels are imported where they are chosen: Mosaic takes two seconds, which a CPU need not wait.

IMPLEMENTATIONS = ("mosaic_sm90", "reference")


def grouped_gemm(
    lhs: Float[Array, "lhs_rows k"] | QuantizedRows,
    rhs: Float[Array, "layers groups k n"] | QuantizedMatrices,
    group_sizes: Int[Array, "all_groups"],
    layer: Int[Array, ""] | int,
    *,
    row_index: Int[Array, "rows"] | None = None,
    bias: Float[Array, "layers groups n"] | None = None,
    activation: str | None = None,
    first_group: Int[Array, ""] | int = 0,
    row_alignment: int = 1,
    rows_a_group: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "rows out"]:
    """Multiplies each group's rows with that group's matrix of one layer, sums in float32.

    Group g owns the `group_sizes[g]` rows after those of the groups before it, or those from where
    `sort_rows` of the same `row_alignment` lets it begin; then there are as many rows as `room_for`
    says. `rhs` and `bias` hold the groups from `first_group` on: rows of groups that they lack, and
    rows of no group, come back unspecified, and must be masked, not multiplied by 0. The sizes are
    read on the device. Row r is `lhs[row_index[r]]` where there is an index, all of whose entries
    are in [0, lhs_rows); else it is `lhs[r]`. Quantised operands come in pairs, and give bfloat16.
    What a group has on average, `rows_a_group`, decides how the work is cut; without it, all rows
    are in use.

    The `activation`, one of `ACTIVATIONS`, is applied to the float32 sums: the first half of the n
    columns is the gate, the second half what it gates, and n / 2 columns come out.

    `implementation=None` takes the Hopper kernel where it can run, else the XLA reference, whose
    work follows the rows too (`lax.ragged_dot` on CUDA multiplies every row with every group).
    Naming one raises NotImplementedError for what it does not cover.
    """
    picks.check_implementation(implementation, IMPLEMENTATIONS)
    check_operands(lhs, rhs, activation)
    check_groups(group_sizes, first_group, rhs, bias)
    if row_index is not None:
        check_integers("row_index", row_index, "row")
    room = values_of(lhs).shape[0] if row_index is None else row_index.size
    groups = group_sizes.size
    check_room(room, groups, row_alignment)
    if not room:
        n, _ = matrix_shape(rhs)
        dtype = jnp.bfloat16 if isinstance(lhs, QuantizedRows) else lhs.dtype
        return jnp.zeros((0, n if activation is None else n // 2), dtype)
    group_sizes = jnp.asarray(group_sizes, jnp.int32)
    if rows_a_group is None:
        rows_a_group = rows_held(room, groups, row_alignment) / groups
    device = backend.get_default_device()
    options = {
        "bias": bias, "activation": activation, "first_group": first_group,
        "row_alignment": row_alignment,
    }  # fmt: skip
    if implementation != "reference":
        try:
            picks.check_hopper(device)
            kernel = choose_kernel(
                lhs, rhs, groups, activation, rows_a_group, num_sms=device.core_count
            )
        except NotImplementedError as error:
            if implementation is not None:
                raise
            picks.log_fallback("grouped_gemm", device, str(error))
        else:
            picks.log_pick("grouped_gemm", "mosaic_sm90", device)
            if row_index is not None and not has_whole_blocks(row_alignment):
                lhs, row_index = take_rows(lhs, row_index), None
            return kernel(lhs, rhs, group_sizes, layer, row_index=row_index, **options)
    if row_index is not None:
        lhs = take_rows(lhs, row_index)
    if isinstance(lhs, QuantizedRows) and isinstance(rhs, QuantizedMatrices):
        return reference.quantized_grouped_gemm(*lhs, *rhs, group_sizes, layer, **options)
    assert not isinstance(lhs, QuantizedRows) and not isinstance(rhs, QuantizedMatrices)
    return reference.grouped_gemm(lhs, rhs, group_sizes, layer, **options)


def expert_rows(
    x: Float[Array, "tokens embed"],
    experts: Int[Array, "tokens choices"],
    gate_up: Float[Array, "layers experts embed two_ffn"],
    down: Float[Array, "layers experts ffn embed"],
    layer: Int[Array, ""] | int,
    *,
    gate_up_bias: Float[Array, "layers experts two_ffn"] | None = None,
    activation: str,
) -> Float[Array, "tokens choices embed"] | None:
    """What each of a token's experts makes of it, both products in one launch, for a few tokens.

    Negative experts are none, and what stands in their place is unspecified. The columns of
    `gate_up`, its bias and the `activation` are those of `grouped_gemm`; so are the results.

    None where sorted rows and two calls of `grouped_gemm` are the better way: for more tokens or
    few experts, for shapes that the kernel does not cover, and off a Hopper GPU.
    """
    check_experts(x, gate_up, down, activation)
    device = backend.get_default_device()
    if not go_unsorted(*experts.shape, experts=gate_up.shape[1]) or not picks.is_hopper(device):
        return None
    from pallas_kernels.grouped_gemm import few_rows_sm90

    try:
        few_rows_sm90.check_covered(x, gate_up, down)
    except NotImplementedError:
        # Not slow: `grouped_gemm` says what runs instead.
        return None
    picks.log_pick("expert_rows", "few_rows_sm90", device)
    return few_rows_sm90.expert_rows(
        x, experts, gate_up, down, layer,
        gate_up_bias=gate_up_bias, activation=activation, num_sms=device.core_count,
    )  # fmt: skip


def route_tokens(
    logits: Float32[Array, "tokens experts"],
    router: Router,
    *,
    correction: Float32[Array, " experts"] | None = None,
    is_real: Bool[Array, " tokens"] | None = None,
    implementation: str | None = None,
) -> tuple[Int32[Array, "tokens top_k"], Float32[Array, "tokens top_k"]]:
    """Experts of each token, in falling order of choice, and their gates: the chosen's scores,
    divided by their sum and scaled as the router says.

    Of equal experts and of equal groups the first are chosen. The `correction` is added to the
    scores for the choice only. Tokens that are not real get expert -1.

    `implementation=None` takes the Hopper kernel, one launch, where it can run, else XLA, which is
    the reference. Naming the kernel raises NotImplementedError for what it does not cover.

    Source: Mixtral (Jiang et al., 2024); groups of DeepSeek-V2, correction of DeepSeek-V3 (2024).
    """
    picks.check_implementation(implementation, ("route_sm90", "reference"))
    check_router(router, logits.shape[1])
    logits = jnp.asarray(logits, jnp.float32)

    def run_kernel():
        from pallas_kernels.grouped_gemm import route_sm90

        return route_sm90.route_tokens(logits, correction, is_real, router)

    routed = _try_kernel("route_tokens", "route_sm90", run_kernel, implementation)
    return route_tokens_by_xla(logits, correction, is_real, router) if routed is None else routed


def preferred_row_alignment(rows_a_group: float) -> int:
    """The `row_alignment` of `sort_rows` that is fastest here for experts of two products, of which
    the first fetches its rows by `row_index`."""
    is_hopper = picks.is_hopper(backend.get_default_device())
    return row_alignment_for(rows_a_group) if is_hopper else 1


def sort_rows(
    group_of_row: Int[Array, "rows"],
    groups: int,
    *,
    row_alignment: int = 1,
    implementation: str | None = None,
) -> SortedRows:
    """Sorts rows by group; those whose group is not in [0, groups) come last.

    Each group begins at a multiple of `row_alignment`, a power of two: beyond 1, places are left
    where no row stands. They are `room_for` so many rows and groups.

    Of `implementation` the same is true as in `route_tokens`.
    """
    picks.check_implementation(implementation, ("sort_sm90", "reference"))
    check_alignment(row_alignment)
    check_integers("group_of_row", group_of_row, "row")
    group_of_row = jnp.asarray(group_of_row, jnp.int32)

    def run_kernel():
        from pallas_kernels.grouped_gemm import sort_sm90

        return sort_sm90.sort_rows(group_of_row, groups, row_alignment=row_alignment)

    ordered = _try_kernel("sort_rows", "sort_sm90", run_kernel, implementation)
    if ordered is not None:
        return ordered
    return sort_rows_by_xla(group_of_row, groups, row_alignment=row_alignment)


def quantize_rows(x: Float[Array, "rows k"]) -> QuantizedRows:
    """Rounds rows to float8, with a scale for each 128 features.

    Raises ValueError if 128 does not divide k.
    """
    check_divides("k", x.shape[1])
    device = backend.get_default_device()
    if not picks.is_hopper(device):
        return quantize_rows_by_xla(x)
    from pallas_kernels.grouped_gemm import quantize_sm90

    try:
        return quantize_sm90.quantize_rows(x)
    except NotImplementedError as error:
        picks.log_fallback("quantize_rows", device, str(error))
        return quantize_rows_by_xla(x)


def _try_kernel(
    operation: str, name: str, run_kernel: Callable[[], Any], implementation: str | None
) -> Any:
    """What a Hopper kernel returns; None if it is not wanted or, unless it is named, cannot run."""
    if implementation == "reference":
        return None
    device = backend.get_default_device()
    try:
        if implementation is None:
            picks.check_hopper(device)
        result = run_kernel()
    except NotImplementedError as error:
        if implementation is not None:
            raise
        picks.log_fallback(operation, device, str(error))
        return None
    picks.log_pick(operation, name, device)
    return result


def choose_kernel(
    lhs, rhs, groups: int, activation: str | None, rows_a_group: float, *, num_sms: int
) -> Callable[..., Array]:
    """The Hopper kernel for these operands of `grouped_gemm`, and how it cuts the work.

    Raises NotImplementedError if it covers them not.
    """
    from pallas_kernels.grouped_gemm import mosaic_sm90, quantized_sm90

    quantized = isinstance(rhs, QuantizedMatrices)
    n, k = matrix_shape(rhs)
    choose = quantized_config_for if quantized else config_for
    config = choose(
        rows=max(1, round(rows_a_group * groups)), groups=groups, k=k, n=n,
        num_sms=num_sms, gated=activation is not None,
    )  # fmt: skip
    if quantized:
        quantized_sm90.check_covered(rhs, config, activation)
    else:
        mosaic_sm90.check_covered(lhs, rhs, config, activation)
    kernel = quantized_sm90 if quantized else mosaic_sm90
    return functools.partial(kernel.grouped_gemm, config=config, num_sms=num_sms)
