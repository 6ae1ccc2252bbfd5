"""What users pass by mistake is refused in a sentence, and nothing at all gives nothing."""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import Router
from pallas_kernels.grouped_gemm import quantize_sm90, route_sm90, sort_sm90

# Where types are checked, as in these tests, that would come first.
grouped_gemm = inspect.unwrap(pallas_kernels.grouped_gemm)
expert_rows = inspect.unwrap(pallas_kernels.expert_rows)
paged_attention = inspect.unwrap(pallas_kernels.paged_attention)
route_tokens = inspect.unwrap(pallas_kernels.route_tokens)
sort_rows = inspect.unwrap(pallas_kernels.sort_rows)
store_rows = inspect.unwrap(pallas_kernels.store_rows)

LHS = jnp.ones((8, 128), jnp.bfloat16)
RHS = jnp.ones((2, 2, 128, 256), jnp.bfloat16)
SIZES = jnp.array([3, 5], jnp.int32)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rhs": RHS[0]}, r"give one layer as rhs\[None\]"),
        ({"rhs": RHS[:, :0]}, "needs at least one"),
        ({"rhs": RHS, "sizes": SIZES[:1]}, "matrices of 2 groups and group_sizes the sizes of 1"),
        ({"first_group": 1}, "first_group=1 with the matrices of 2 groups reaches outside"),
        ({"first_group": -1}, "use 0 to 0"),
        ({"bias": jnp.ones((2, 256))}, r"bias needs the shape \[layers, groups, n\]"),
        ({"sizes": jnp.array([3.0, 5.0])}, "group_sizes holds one integer for each group"),
    ],
)
def test_groups_that_do_not_fit_are_refused(changes, message):
    options = {"rhs": RHS, "sizes": SIZES} | changes
    with pytest.raises(ValueError, match=message):
        grouped_gemm(LHS, options.pop("rhs"), options.pop("sizes"), 0, **options)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_sizes_and_groups_may_be_short_integers(dtype):
    out = grouped_gemm(LHS, RHS, np.array([3, 5], dtype), 1)
    np.testing.assert_array_equal(out, grouped_gemm(LHS, RHS, SIZES, 1))
    groups = np.arange(255, -1, -1) % 200
    order, want = (sort_rows(groups.astype(t), 256) for t in (np.uint8, np.int32))
    np.testing.assert_array_equal(order.row, want.row)


def test_no_rows_give_no_rows():
    no_sizes = jnp.zeros(2, jnp.int32)
    assert grouped_gemm(LHS[:0], RHS, no_sizes, 0).shape == (0, 256)
    assert grouped_gemm(LHS[:0], RHS, no_sizes, 0, activation="silu").shape == (0, 128)
    rows = pallas_kernels.quantize_rows(LHS[:0])
    matrices = pallas_kernels.quantize_matrices(RHS)
    out = grouped_gemm(rows, matrices, no_sizes, 0)
    assert out.shape == (0, 256) and out.dtype == jnp.bfloat16
    assert sort_rows(jnp.zeros(0, jnp.int32), 3).sizes.tolist() == [0, 0, 0]
    experts, gates = route_tokens(jnp.zeros((0, 8)), Router(top_k=2))
    assert experts.shape == gates.shape == (0, 2)
    nobody = jnp.zeros((0, 2), jnp.int32)
    assert expert_rows(LHS[:0], nobody, RHS, RHS[:, :, :, :128], 0, activation="silu") is None


def test_kernels_leave_nothing_at_all_to_xla():
    with pytest.raises(NotImplementedError, match="needs rows and groups"):
        sort_sm90.check_covered(jnp.zeros(0, jnp.int32), 3)
    with pytest.raises(NotImplementedError, match="at least one token"):
        route_sm90.check_covered(jnp.zeros((0, 8)), Router(top_k=2))
    with pytest.raises(NotImplementedError, match="needs a multiple of"):
        quantize_sm90.check_covered(LHS[:0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top_k": 9}, "where 8 may be chosen; use 1 to 8"),
        ({"top_k": 0}, "use 1 to 8"),
        ({"top_k": 2, "num_groups": 3, "top_groups": 2}, "num_groups=3 does not divide 8 experts"),
        ({"top_k": 3, "num_groups": 4}, "where 2 may be chosen"),
        ({"top_k": 2, "num_groups": 4, "group_best": 3}, "group_best=3 of groups of 2 experts"),
        ({"top_k": 2, "num_groups": 4, "top_groups": 0}, "top_groups=0 leaves no expert"),
    ],
)
def test_a_router_that_cannot_choose_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        route_tokens(jnp.zeros((4, 8)), Router(**options))


def test_logits_may_be_bfloat16():
    logits = jnp.arange(32, dtype=jnp.bfloat16).reshape(4, 8) % 5
    experts, gates = route_tokens(logits, Router(top_k=2))
    want = route_tokens(logits.astype(jnp.float32), Router(top_k=2))
    np.testing.assert_array_equal(experts, want[0])
    assert gates.dtype == jnp.float32


@pytest.mark.parametrize(
    "down, activation, message",
    [
        (RHS, "silu", "must agree"),
        (RHS[:, :, :, :128], "gelu", "use None or one of silu"),
    ],
)
def test_experts_that_do_not_fit_are_refused(down, activation, message):
    with pytest.raises(ValueError, match=message):
        expert_rows(LHS, jnp.zeros((8, 2), jnp.int32), RHS, down, 0, activation=activation)


def attend(tokens=2, heads=4, rows=1, **changes):
    pages = jnp.ones((1, 4, 16, 2, 64))
    operands = {
        "q": jnp.ones((tokens, heads, 64)), "k_pages": pages, "v_pages": pages, "layer": 0,
        "page_table": jnp.zeros((rows, 2), jnp.int32),
        "query_start": jnp.array([0] + [tokens] * rows, jnp.int32),
        "lengths": jnp.full(rows, 20, jnp.int32), "scale": 0.1, "max_query_length": 2,
    }  # fmt: skip
    return paged_attention(**operands | changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"heads": 5}, "5 query heads do not share 2 key/value heads evenly"),
        ({"heads": 1}, "1 query heads do not share"),
        ({"q": jnp.ones((2, 4, 32))}, "queries have 32 features a head and keys 64"),
        ({"v_pages": jnp.ones((1, 3, 16, 2, 64))}, "keys and values lie in pages of the same"),
        ({"v_pages": None, "value_dim": 65}, "value_dim=65 of keys of 64 features; use 1 to 64"),
        ({"sinks": jnp.ones(2)}, "one score for each of 4 heads"),
        ({"query_start": jnp.array([0], jnp.int32)}, "so page_table needs as many and query_start"),
        ({"max_query_length": 0}, "rows have at least one query"),
        ({"soft_cap": 0.0}, "use a positive one, or None"),
    ],
)
def test_attention_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        attend(**changes)


@pytest.mark.parametrize("tokens, rows", [(0, 0), (0, 2), (2, 0)])
def test_attention_without_queries_or_rows_is_empty(tokens, rows):
    out, lse = attend(tokens=tokens, rows=rows)
    np.testing.assert_array_equal(out, np.zeros((tokens, 4, 64)))
    np.testing.assert_array_equal(lse, np.full((tokens, 4), -np.inf))


@pytest.mark.parametrize("name", ["window", "chunk"])
def test_a_window_or_a_chunk_below_zero_is_none(name):
    np.testing.assert_array_equal(attend(**{name: -1})[1], attend()[1])


def test_stored_rows_are_as_many_as_slots():
    pool, slots = jnp.zeros((1, 4, 16, 2, 64)), jnp.array([0, 1, 2], jnp.int32)
    with pytest.raises(ValueError, match="3 slots of 1 pools take rows of the shapes"):
        store_rows([pool], 0, [jnp.ones((1, 2, 64))], slots)
    assert store_rows([], 0, [], slots) == ()
