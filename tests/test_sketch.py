"""The sketch against every probe there is: unbiased, with the variance that it reports."""

from itertools import product

import pytest
import torch

from gnsmon.norms.forms import Dense, Joined, Outer, Rows
from gnsmon.norms.sketch import DRAWS, Sketch

B, T, M, N = 3, 5, 4, 6


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def forms():
    index = torch.randint(M, (B, T), generator=torch.Generator().manual_seed(1))
    outer = Outer(normal(B, T, M), normal(B, T, N, seed=1))
    grouped = Outer(normal(B, 2, T, M // 2, seed=2), normal(B, 2, T, N, seed=3), (M, 2, 3))
    rows = Rows(index, normal(B, T, N, seed=4), (M, N))
    return {
        "outer": outer,
        "grouped": grouped,
        "tied": Joined((outer, rows)),
        "reused": Joined((outer, Outer(normal(B, 2, M, seed=5), normal(B, 2, N, seed=6)))),
        "with dense": Joined((outer, Dense(normal(B, M, N, seed=7)))),
    }


def sketch_of(form, **options):
    made = Sketch(
        form.shape,
        torch.float64,
        torch.device("cpu"),
        generator=torch.Generator().manual_seed(0),
        **options,
    )
    made.passes = 0  # these forms are too small for it to pay
    return made


def every_probe(sketch, form, refine):
    """The sketch's answers for all 2^N sign vectors, one shared by all examples."""
    for signs in product((-1.0, 1.0), repeat=N):
        sketch.probes.copy_(torch.tensor(signs, dtype=torch.float64)[None, :, None])
        yield sketch.sq_norms(form, refine=refine)


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("name", forms())
def test_the_mean_over_all_probes_is_exact(name, refine):
    form = forms()[name]
    found = torch.stack([q for q, _ in every_probe(sketch_of(form, subspace=2), form, refine)])
    torch.testing.assert_close(found.mean(0), form.sq_norms(), rtol=1e-12, atol=0)
    assert found.std(0).min() > 1e-3  # one probe alone is not


def test_the_variance_is_that_of_all_probes_but_for_the_diagonal():
    """Of two examples that share a probe, and so err together."""
    left = torch.zeros(DRAWS + 1, T, M, dtype=torch.float64)
    left[[0, DRAWS]] = normal(2, T, M)
    form = Outer(left, normal(DRAWS + 1, T, N, seed=1))
    sketch = sketch_of(form, subspace=1, seed=1)
    found = list(every_probe(sketch, form, refine=False))
    true = torch.stack([q.sum() for q, _ in found]).var(unbiased=False)
    reported = torch.stack([v for _, v in found]).mean()
    rest = torch.eye(N, dtype=torch.float64) - sketch.subspace @ sketch.subspace.mT
    matrices = form.dense() @ rest
    curvature = (matrices.mT @ matrices).sum(0)
    torch.testing.assert_close(reported, 2 * curvature.square().sum())
    torch.testing.assert_close(true, reported - 2 * curvature.diagonal().square().sum())


def test_probes_average():
    form = forms()["outer"]
    sketch = sketch_of(form, subspace=1, probes=64)
    found = []
    for _ in range(400):
        sketch.draw()
        estimates, variance = sketch.sq_norms(form, refine=False)
        found.append((estimates.sum(), variance))
    sums, variances = (torch.stack(values) for values in zip(*found, strict=True))
    exact = form.sq_norms().sum()
    assert abs(sums.mean() - exact) < 4 * sums.std() / 20
    assert sums.var() < 1.2 * variances.mean()
    assert sums.var() > 0.2 * variances.mean()


def test_examples_have_probes_of_their_own():
    form = Outer(normal(1, T, M).expand(2, -1, -1), normal(1, T, N, seed=1).expand(2, -1, -1))
    sketch = sketch_of(form, subspace=1, seed=1)
    sketch.draw()
    a, b = sketch.sq_norms(form)[0]
    assert a != b
    many = Outer(normal(1, T, M).expand(2 * DRAWS, -1, -1), normal(2 * DRAWS, T, N))
    assert len(sketch.sq_norms(many)[0]) == 2 * DRAWS


@pytest.mark.parametrize("name", forms())
def test_a_subspace_of_all_directions_leaves_nothing_to_chance(name):
    form = forms()[name]
    sketch = sketch_of(form, subspace=N)
    sketch.subspace = torch.linalg.qr(normal(N, N))[0]
    sketch.columns = N
    estimates, variance = sketch.sq_norms(form)
    torch.testing.assert_close(estimates, form.sq_norms(), rtol=1e-12, atol=0)
    assert variance < 1e-20


def test_tracking_finds_the_directions_of_a_gradient():
    form = forms()["outer"]
    sketch = sketch_of(form, subspace=2)
    gradient = normal(M, 2) @ normal(2, N, seed=1)
    sketch.track(1e-30 * gradient)  # whatever its scale
    projected = gradient @ sketch.subspace @ sketch.subspace.mT
    torch.testing.assert_close(projected, gradient)
    sketch.track(torch.zeros(M, N, dtype=torch.float64))
    identity = sketch.subspace.mT @ sketch.subspace
    torch.testing.assert_close(identity, torch.eye(2, dtype=torch.float64))


def test_a_gradient_that_is_not_finite_leaves_the_subspace_alone():
    sketch = sketch_of(forms()["outer"], subspace=2)
    before = sketch.subspace.clone()
    for value in (float("nan"), float("inf")):
        sketch.track(torch.full((M, N), value, dtype=torch.float64))
        assert torch.equal(sketch.subspace, before)


def test_it_is_exact_where_that_is_cheaper():
    small, single = forms()["outer"], Outer(normal(B, 1, 400), normal(B, 1, 400))
    long = Outer(normal(B, 1000, 400), normal(B, 1000, 400, seed=1))
    for form, pays in ((small, False), (single, False), (forms()["tied"], False), (long, True)):
        sketch = sketch_of(form)
        sketch.passes = 26
        assert sketch.pays(form) is pays
        if not pays:
            estimates, variance = sketch.sq_norms(form)
            assert torch.equal(estimates, form.sq_norms())
            assert variance == 0


def test_training_randomness_is_untouched():
    sketch = sketch_of(forms()["outer"])
    before = torch.get_rng_state()
    sketch.draw()
    sketch.sq_norms(forms()["outer"])
    assert torch.equal(torch.get_rng_state(), before)


def test_what_needs_no_sketch_is_not_tracked():
    sketch = sketch_of(forms()["outer"])
    before = sketch.subspace.clone()
    sketch.passes = 10**6
    sketch.sq_norms(forms()["outer"])
    sketch.track(normal(M, N))
    assert torch.equal(sketch.subspace, before)
    sketch.passes = 0
    sketch.sq_norms(forms()["outer"])
    sketch.track(normal(M, N))
    assert not torch.equal(sketch.subspace, before)
