"""What every form guarantees, whatever rule it came from."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from gnsmon.norms import contractions
from gnsmon.norms.contractions import (
    outer_rows_inner,
    outer_sq_norms,
    row_sq_norms,
    sogns_big_sq_norm,
    sogns_sq_norms,
)
from gnsmon.norms.forms import Dense, Form, Joined, Outer, Rows

B, V, D = 4, 6, 5
EXACT = {"rtol": 1e-10, "atol": 1e-14}


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def outer(positions: int = 3, batch: int = B) -> Outer:
    return Outer(normal(batch, positions, V), normal(batch, positions, D))


def grouped(groups: int = 2, batch: int = B) -> Outer:
    return Outer(normal(batch, groups, 3, V // groups), normal(batch, groups, 3, D), (V, D))


def rows(positions: int = 8, batch: int = B) -> Rows:
    return Rows(torch.randint(V, (batch, positions)), normal(batch, positions, D), (V, D))


def dense(batch: int = B) -> Dense:
    return Dense(normal(batch, V, D))


FORMS = {
    "outer": outer,
    "outer, one position": lambda batch=B: outer(1, batch),
    "outer, many positions": lambda batch=B: outer(30, batch),
    "outer, groups": grouped,
    "outer, depthwise": lambda batch=B: grouped(V, batch),
    "rows": rows,
    "rows, one position": lambda batch=B: rows(1, batch),
    "dense": dense,
    "dense, a vector": lambda batch=B: Dense(normal(batch, V)),
    "dense, a number": lambda batch=B: Dense(normal(batch)),
    **{
        f"{a.__name__} + {b.__name__}": lambda batch=B, a=a, b=b: a(batch=batch) + b(batch=batch)
        for a, b in product((outer, grouped, rows, dense), repeat=2)
    },
    "all": lambda batch=B: rows(2, batch) + outer(2, batch) + dense(batch) + rows(5, batch),
    "all, twice": lambda batch=B: (outer(2, batch) + rows(2, batch)) + (rows(3, batch) + grouped()),
}
each = pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)


def sq_norms(gradients: Tensor) -> Tensor:
    return gradients.reshape(len(gradients), -1).square().sum(1)


def by_hand(form: Form) -> Tensor:
    """[B, *shape] from loops over the definition."""
    if isinstance(form, Joined):
        return sum(by_hand(part) for part in form.parts)
    if isinstance(form, Dense):
        return form.grad
    gradients = []
    for b in range(B):
        grad = torch.zeros(form.shape, dtype=torch.float64)
        if isinstance(form, Rows):
            for index, value in zip(form.index[b], form.value[b], strict=True):
                grad[index] += value
        else:
            left, right = form.grouped()
            _, groups, positions, m = left.shape
            for g, t in product(range(groups), range(positions)):
                grad[g * m : g * m + m] += torch.outer(left[b, g, t], right[b, g, t])
        gradients.append(grad)
    return torch.stack(gradients)


@each
def test_norms_and_sums_are_those_of_the_definition(make):
    form = make()
    want = by_hand(form)
    weights = normal(B)
    rows_of = want.reshape(B, *(form.shape[:1] or (1,)), -1)
    direction = normal(rows_of.shape[-1])
    torch.testing.assert_close(form.dense(), want, **EXACT)
    torch.testing.assert_close(form.sq_norms(), sq_norms(want), **EXACT)
    torch.testing.assert_close(form.sum(), want.sum(0), **EXACT)
    torch.testing.assert_close(form.sum(weights), torch.tensordot(weights, want, 1), **EXACT)
    torch.testing.assert_close(form.sum_along(direction), rows_of.sum(0) @ direction, **EXACT)
    assert form.shape == want.shape[1:]


@each
def test_regrouping(make):
    form = make()
    halves = by_hand(form).unflatten(0, (2, 2)).sum(1)
    torch.testing.assert_close(form.regroup(2).dense(), halves, **EXACT)
    torch.testing.assert_close(form.regroup(2).sq_norms(), sq_norms(halves), **EXACT)
    torch.testing.assert_close(form.regroup(1).sum(), form.sum(), **EXACT)
    torch.testing.assert_close(form.regroup(B).sq_norms(), form.sq_norms(), **EXACT)
    with pytest.raises(ValueError, match="4 rows cannot be shared out equally among 3"):
        form.regroup(3)


@each
@pytest.mark.parametrize("size", [1, 100, 400, 1600])
def test_chunks_change_nothing(make, size, monkeypatch):
    form = make()
    whole = form.sq_norms()
    monkeypatch.setattr(contractions, "CHUNK_BYTES", size)
    torch.testing.assert_close(form.sq_norms(), whole, **EXACT)


def test_no_examples_have_a_sum_of_zero():
    for groups in (1, 2):
        factors = normal(0, groups, 5, 3), normal(0, groups, 5, 4)
        total, norms = contractions.outer_sum_and_sq_norms(*factors)
        assert torch.equal(total, torch.zeros(groups, 3, 4, dtype=total.dtype))
        assert norms.shape == (0,)


@pytest.mark.parametrize("wide", [0, 1])
def test_norms_of_long_rows_keep_their_digits(wide):
    """A float32 norm of so many numbers would be off by 1e-6 and more (CPU, torch 2.13)."""
    sides = [2, 2**18]
    factors = [torch.randn(2, 2, sides[i ^ wide]) for i in (0, 1)]
    _, norms = contractions.outer_sum_and_sq_norms(*factors)
    exact = Outer(*(t.double() for t in factors)).sq_norms()
    torch.testing.assert_close(norms.double(), exact, rtol=3e-7, atol=0)


def test_an_axis_of_one_group_is_dropped():
    left, right = normal(B, 3, 6), normal(B, 3, 5)
    for factors in (
        (left[:, None], right),
        (left, right[:, None]),
        (left[:, None], right[:, None]),
    ):
        form = Outer(*factors)
        assert form.left.shape == left.shape and form.right.shape == right.shape
        assert torch.equal(form.sum(), Outer(left, right).sum())


def test_chunks_stay_within_their_bound(monkeypatch):
    left, right = normal(4, 1, 10, 64), normal(4, 1, 10, 32)
    sizes = []
    squares = contractions.squares
    monkeypatch.setattr(contractions, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(
        contractions, "squares", lambda t, dim: sizes.append(t.nbytes) or squares(t, dim)
    )
    outer_sq_norms(left, right, path="direct")
    assert max(sizes) <= 4096 // 2
    assert sum(sizes) == 4 * 64 * 32 * 8


def test_the_cheaper_contraction_is_taken(monkeypatch):
    formed = []
    monkeypatch.setattr(contractions, "squares", lambda t, dim: formed.append(t) or t.sum(dim))
    for positions in (23, 24):  # m n / (m + n) = 24
        Outer(normal(1, 1, positions, 40), normal(1, 1, positions, 60)).sq_norms()
    assert [list(t.shape[-2:]) for t in formed] == [[40, 60]]


@pytest.mark.parametrize("positions", [1, 2, 5, 40])
def test_the_two_contractions_agree(positions):
    left, right = normal(B, 3, positions, 7), normal(B, 3, positions, 4)
    direct = outer_sq_norms(left, right, path="direct")
    torch.testing.assert_close(outer_sq_norms(left, right, path="gram"), direct, **EXACT)
    torch.testing.assert_close(Outer(left, right).sq_norms(), direct, **EXACT)


@pytest.mark.parametrize("positions", [3, 200])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_squared_in_float32(positions, dtype):
    left, right = (
        (300 * normal(B, 1, positions, 40)).to(dtype),
        normal(B, 1, positions, 50).to(dtype),
    )
    want = Outer(left.double(), right.double()).sq_norms()
    got = Outer(left, right).sq_norms()  # beyond the range of float16
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=0)
    form = Rows(torch.randint(3, (B, positions)), right[:, 0], (3, 50))
    want = row_sq_norms(form.index, form.value.double())
    torch.testing.assert_close(form.sq_norms().double(), want, rtol=1e-5, atol=0)


def test_factors_of_two_dtypes_are_promoted():
    left, right = normal(B, 3, 4), normal(B, 3, 5).float()
    torch.testing.assert_close(
        Outer(left, right).sq_norms(), Outer(left, right.double()).sq_norms()
    )


def test_a_tied_head_forms_no_gradient(monkeypatch):
    form = outer() + rows() + outer()
    want = sq_norms(form.dense())
    for kind in (Outer, Rows):
        monkeypatch.setattr(kind, "dense", lambda form: pytest.fail("formed the gradient"))
    torch.testing.assert_close(form.sq_norms(), want, **EXACT)


def test_rows_meet_outers():
    left, right, index, value = normal(B, 3, V), normal(B, 3, D), rows().index, normal(B, 8, D)
    want = (Outer(left, right).dense() * Rows(index, value, (V, D)).dense()).sum((1, 2))
    torch.testing.assert_close(outer_rows_inner(left, right, index, value), want, **EXACT)


@each
def test_sogns_approximates_outers_alone(make):
    form = make()
    parts = form.parts if isinstance(form, Joined) else (form,)
    want = sum(
        sogns_sq_norms(part.left, part.right) if isinstance(part, Outer) else part.sq_norms()
        for part in parts
    )
    torch.testing.assert_close(form.sogns_sq_norms(), want, **EXACT)


def test_sogns_is_the_published_formula():
    x, dy = normal(B, 7, 5), normal(B, 7, 3)
    sigma = x.square().mean((1, 2)).sqrt()
    summed = dy.sum(1)
    form = Outer(dy, x)
    naive = 5 * summed.square().sum(1)
    torch.testing.assert_close(form.sogns_sq_norms(), sigma**2 * naive, **EXACT)
    torch.testing.assert_close(form.sogns_sq_norms(unit_variance=True), naive, **EXACT)
    omega = 5**0.5 * sigma[:, None] * summed
    torch.testing.assert_close(
        sogns_big_sq_norm(form.left, form.right), omega.sum(0).square().sum(), **EXACT
    )
    transposed = Outer(x, dy, inputs="left")
    torch.testing.assert_close(transposed.sogns_sq_norms(), sigma**2 * naive, **EXACT)
    torch.testing.assert_close(transposed.regroup(B).sogns_sq_norms(), sigma**2 * naive, **EXACT)


def test_sogns_is_unbiased_where_its_assumption_holds():
    """One normal vector in all positions: what dropping the Kronecker delta amounts to."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 1, 6, generator=generator).expand(-1, 5, -1)
    form = Outer(torch.randn(1, 5, 3, generator=generator).expand(4000, -1, -1), x)
    torch.testing.assert_close(form.sogns_sq_norms().mean(), form.sq_norms().mean())


def test_a_compiled_graph_is_whole():
    def norms(left, right, index, value, grad):
        outer, rows = Outer(left, right), Rows(index, value, (V, D))
        forms = outer, rows, Dense(grad), outer + rows, outer + outer + Dense(grad) + rows
        return [
            method(form)
            for form in (*forms, *(form.regroup(2) for form in forms))
            for method in (
                lambda form: form.sq_norms(),
                lambda form: form.sogns_sq_norms(),
                lambda form: form.sum(),
                lambda form: form.sum_along(form.sum()[0]),
            )
        ]

    args = normal(B, 3, V), normal(B, 3, D), torch.randint(V, (B, 8)), normal(B, 8, D), dense().grad
    compiled = torch.compile(norms, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*args), norms(*args), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("make", [outer, grouped, rows, dense])
@pytest.mark.parametrize("other", [outer, grouped, rows, dense])
def test_one_example_does_not_spread_over_a_batch(make, other):
    with pytest.raises(RuntimeError, match="size|Size"):
        (make() + other(batch=1)).sq_norms()


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"got \[4, 3, 6\] and \[4, 2, 5\]"):
        Outer(normal(4, 3, 6), normal(4, 2, 5))
    with pytest.raises(ValueError, match=r"got \[4, 6\] and \[4, 5\]"):
        Outer(normal(4, 6), normal(4, 5))
    with pytest.raises(ValueError, match=r"gradient \[6, 5\].*shape \[5, 6\]"):
        Outer(normal(4, 3, 6), normal(4, 3, 5), (5, 6))
    with pytest.raises(ValueError, match=r"value \[B, T, 5\].*got \[4, 8\] and \[4, 8, 4\]"):
        Rows(torch.zeros(4, 8), normal(4, 8, 4), (6, 5))
    with pytest.raises(ValueError, match=r"Outer \[6, 5\] and Dense \[5, 6\]"):
        outer() + Dense(normal(4, 5, 6))
