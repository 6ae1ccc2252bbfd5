"""What no implementation of these operations takes, refused in a sentence before anything runs."""

from typing import Any

import jax.numpy as jnp

from pallas_kernels.activation import ACTIVATIONS
from pallas_kernels.grouped_gemm.quantize import QuantizedMatrices, QuantizedRows, values_of
from pallas_kernels.grouped_gemm.route import Router


def check_activation(activation: str | None) -> None:
    """Raises ValueError if there is none of that name."""
    if activation not in (None, *ACTIVATIONS):
        raise ValueError(
            f"activation={activation!r} does not exist; use None or one of {', '.join(ACTIVATIONS)}"
        )


def check_alignment(row_alignment: int) -> None:
    """Raises ValueError for what groups cannot begin at a multiple of."""
    if row_alignment < 1 or row_alignment & (row_alignment - 1):
        raise ValueError(
            f"row_alignment={row_alignment} is no power of two; use what "
            "preferred_row_alignment says"
        )


def check_room(room: int, groups: int, row_alignment: int) -> None:
    """Raises ValueError if aligned groups of no rows would not fit."""
    check_alignment(row_alignment)
    if row_alignment > 1 and room < groups * row_alignment:
        raise ValueError(
            f"row_alignment={row_alignment} of {groups} groups takes {groups * row_alignment} rows "
            f"more than the groups have, got {room} in all; `room_for` says how many are needed"
        )


def check_operands(lhs: Any, rhs: Any, activation: str | None) -> None:
    """Raises ValueError for operands of `grouped_gemm` that do not fit each other."""
    quantized = isinstance(rhs, QuantizedMatrices)
    if quantized != isinstance(lhs, QuantizedRows):
        raise ValueError(
            "QuantizedMatrices are multiplied with QuantizedRows, which quantize_rows makes, and "
            f"arrays with arrays; got {type(lhs).__name__} and {type(rhs).__name__}"
        )
    if values_of(rhs).ndim != 4:
        raise ValueError(
            f"rhs holds matrices [layers, groups, k, n], got the shape {values_of(rhs).shape}; "
            "give one layer as rhs[None]"
        )
    n, k = matrix_shape(rhs)
    lhs_k = values_of(lhs).shape[1]
    if lhs_k != k:
        raise ValueError(
            f"lhs has rows of {lhs_k} features and rhs matrices of {k}; they must agree"
        )
    check_activation(activation)
    if activation is not None and n % 2:
        raise ValueError(
            f"activation={activation!r} needs as many columns of gate as of up, so an even number "
            f"in all; rhs has {n}"
        )


def check_groups(group_sizes: Any, first_group: Any, rhs: Any, bias: Any) -> None:
    """Raises ValueError for groups that are none, or not those of `rhs` and `bias`."""
    check_integers("group_sizes", group_sizes, "group")
    layers, groups = values_of(rhs).shape[:2]
    count = group_sizes.size
    if not groups or groups > count:
        raise ValueError(
            f"rhs holds the matrices of {groups} groups and group_sizes the sizes of {count}; rhs "
            "needs at least one, and no more than there are sizes"
        )
    if isinstance(first_group, int) and not 0 <= first_group <= count - groups:
        raise ValueError(
            f"first_group={first_group} with the matrices of {groups} groups reaches outside of "
            f"the {count} groups that have sizes; use 0 to {count - groups}"
        )
    n, _ = matrix_shape(rhs)
    if bias is not None and bias.shape != (layers, groups, n):
        raise ValueError(
            f"bias needs the shape [layers, groups, n] = {(layers, groups, n)}, got {bias.shape}"
        )


def check_integers(name: str, numbers: Any, each: str) -> None:
    """Raises ValueError unless there is one integer for each of something."""
    if numbers.ndim != 1 or not jnp.issubdtype(numbers.dtype, jnp.integer):
        raise ValueError(
            f"{name} holds one integer for each {each}, got {numbers.dtype} of shape "
            f"{numbers.shape}"
        )


def check_experts(x: Any, gate_up: Any, down: Any, activation: str) -> None:
    """Raises ValueError for matrices of experts that do not fit each other."""
    check_activation(activation)
    layers, experts, embed, two_ffn = gate_up.shape
    needed = (layers, experts, two_ffn // 2, embed)
    if two_ffn % 2 or down.shape != needed or x.shape[1] != embed:
        raise ValueError(
            f"x [tokens, embed], gate_up [layers, experts, embed, 2 ffn] and down [layers, "
            f"experts, ffn, embed] must agree, got {x.shape}, {gate_up.shape} and {down.shape}"
        )


def check_router(router: Router, experts: int) -> None:
    """Raises ValueError for a router that cannot choose among so many experts."""
    size = experts // max(router.num_groups, 1)
    if router.num_groups < 1 or experts % router.num_groups:
        raise ValueError(
            f"num_groups={router.num_groups} does not divide {experts} experts; use a divisor"
        )
    if router.is_grouped and not 1 <= router.top_groups:
        raise ValueError(f"top_groups={router.top_groups} leaves no expert; use 1 or more")
    if router.is_grouped and not 1 <= router.group_best <= size:
        raise ValueError(
            f"group_best={router.group_best} of groups of {size} experts; use 1 to {size}"
        )
    allowed = size * min(router.top_groups, router.num_groups)
    if not 1 <= router.top_k <= allowed:
        raise ValueError(
            f"top_k={router.top_k} experts of a token, where {allowed} may be chosen; use 1 to "
            f"{allowed}"
        )


def matrix_shape(rhs: Any) -> tuple[int, int]:
    """Columns n and depth k of each matrix."""
    if isinstance(rhs, QuantizedMatrices):
        n, k = rhs.values.shape[2:]
    else:
        k, n = rhs.shape[2:]
    return n, k
