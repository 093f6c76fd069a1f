"""The noisy quadratic: its closed forms, and the whole chain from collector to advice on it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.optim import SGD

import gnsmon
from gnsmon.demo.quadratic import (
    Modes,
    NoisyQuadratic,
    after,
    critical_batch,
    expected_losses,
    fewest_steps,
    mean_loss,
    steps_to,
)
from gnsmon.norms.oracles import per_example_gradients


def make(d=8, signs=1, seed=0):
    torch.manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d).double())[0]
    h = basis * (signs * torch.logspace(-1, 1, d).double()) @ basis.mT
    root = torch.randn(d, d).double()
    return NoisyQuadratic(h, root @ root.mT, torch.randn(d).double()), h, root @ root.mT


def test_loss_and_gradients_are_those_of_its_definition():
    signs = torch.tensor([1, -1] * 4)
    model, h, _ = make(signs=signs)
    examples = model.sample(5, torch.Generator().manual_seed(1))
    theta = model.theta.weight.detach()[0]
    expected = theta @ h @ theta / 2 + examples @ theta
    torch.testing.assert_close(model(examples), expected, rtol=1e-10, atol=1e-12)
    for i, grads in enumerate(per_example_gradients(model, mean_loss, examples)):
        gradient = h @ theta + examples[i]
        torch.testing.assert_close(grads["theta.weight"][0], gradient, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model.gradient, h @ theta, rtol=1e-10, atol=1e-12)


def test_closed_forms_are_those_of_the_matrices():
    model, h, sigma = make(signs=torch.tensor([-1] + [1] * 7))
    g = h @ model.theta.weight.detach()[0]
    torch.testing.assert_close(model.hessian, h)
    torch.testing.assert_close(model.covariance, sigma)
    assert model.b_simple == pytest.approx(float(sigma.trace() / (g @ g)))
    assert model.b_noise == pytest.approx(float((h @ sigma).trace() / (g @ h @ g)))


def test_modes_have_the_noise_scales_of_the_quadratic():
    model, _, _ = make()
    modes, theta = model.modes(), model.theta.weight.detach()[0]
    assert modes.b_simple == pytest.approx(model.b_simple)
    assert modes.b_noise == pytest.approx(model.b_noise)
    assert modes.loss == pytest.approx(float(theta @ model.hessian @ theta / 2))


def test_examples_have_that_covariance():
    model, _, sigma = make()
    examples = model.sample(40_000, torch.Generator().manual_seed(0))
    error = (sigma.diagonal() @ sigma.diagonal() / 40_000) ** 0.5
    assert float((torch.cov(examples.mT) - sigma).norm()) < 4 * float(error) * 8**0.5
    assert float(examples.mean(0).square().sum()) < 4 * model.tr_sigma / 40_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_singular_covariance_is_one(dtype):
    torch.manual_seed(0)
    v = torch.randn(6, 2, dtype=dtype)
    problem = NoisyQuadratic(torch.ones(6, dtype=dtype), v @ v.mT, torch.ones(6, dtype=dtype))
    assert problem.tr_sigma == pytest.approx(float(v.square().sum()), rel=1e-5)


def test_what_is_no_quadratic_is_refused():
    two = torch.ones(2)
    with pytest.raises(ValueError, match=r"hessian: expected \[2\] or \[2, 2\]"):
        NoisyQuadratic(torch.ones(3), two, two)
    with pytest.raises(ValueError, match="covariance: expected a symmetric matrix"):
        NoisyQuadratic(two, torch.tensor([[1.0, 2], [0, 1]]), two)
    with pytest.raises(ValueError, match="no negative eigenvalue, got -1"):
        NoisyQuadratic(two, -two, two)
    with pytest.raises(ValueError, match="expected positive eigenvalues"):
        NoisyQuadratic(torch.tensor([1.0, -1]), two, two).modes()


def test_b_noise_is_the_batch_that_halves_the_best_single_step():
    """By max / (1 + B_noise / B), at the rate best / (1 + B_noise / B): McCandlish 2.6, 2.7."""
    model, _, _ = make()
    modes = model.modes()
    best = model.grad_sq_norm / model.g_h_g
    most = model.grad_sq_norm * best / 2
    for batch in (model.b_noise / 5, model.b_noise, 5 * model.b_noise):
        share = 1 / (1 + model.b_noise / batch)

        def one_step(lr, batch=batch):
            return expected_losses(modes, batch=batch, lr=lr, steps=np.ones(1))[0]

        assert modes.loss - one_step(share * best) == pytest.approx(share * most, rel=1e-9)
        others = one_step(0.99 * share * best), one_step(1.01 * share * best)
        assert one_step(share * best) < min(others)


def test_expected_losses_are_those_of_sgd():
    model, _, _ = make(d=4)
    modes, start = model.modes(), model.theta.weight.detach().clone()
    lr, batch, steps, runs = 0.05, 4, 12, 300
    generator = torch.Generator().manual_seed(0)
    losses = np.empty((runs, steps + 1))
    optimizer = SGD(model.parameters(), lr=lr)
    for run in range(runs):
        model.theta.weight.data.copy_(start)
        for step in range(steps + 1):
            losses[run, step] = float(model(torch.zeros(1, 4).double()).detach())
            optimizer.zero_grad()
            mean_loss(model, model.sample(batch, generator)).backward()
            optimizer.step()
    expected = expected_losses(modes, batch=batch, lr=lr, steps=np.arange(steps + 1))
    assert expected[0] == pytest.approx(losses[0, 0])
    errors = losses[:, 1:].std(0, ddof=1) / np.sqrt(runs)
    assert (np.abs(losses[:, 1:].mean(0) - expected[1:]) < 4 * errors).all()
    assert errors.max() < 0.1 * expected.min()


ROUND = Modes(np.full(5, 2.0), np.arange(1.0, 6), np.array([9.0, 4, 1, 0, 1]))  # H = 2 I
SPECTRUM = Modes(np.geomspace(0.05, 1, 12), np.full(12, 0.3), np.full(12, 1.0))


def test_steps_to_a_target_of_one_curvature_are_the_logarithm():
    lr, batch, target = 0.1, 16, 1.0
    a, floor = (1 - 0.2) ** 2, 0.1 * 15 / (16 * 2 * (2 - 0.2))
    expected = np.log((target - floor) / (15 - floor)) / np.log(a)
    assert steps_to(ROUND, target, batch=batch, lr=lr) == pytest.approx(expected, rel=1e-9)
    assert steps_to(ROUND, floor * 0.99, batch=batch, lr=lr) == np.inf
    assert steps_to(ROUND, target, batch=np.inf, lr=0.5) == 1


def test_fewest_steps_are_no_more_than_at_any_rate():
    steps, lr = fewest_steps(SPECTRUM, 0.1, batch=20)
    tried = [steps_to(SPECTRUM, 0.1, batch=20, lr=r) for r in np.linspace(0.01, 1.99, 300)]
    assert steps <= min(tried) * (1 + 1e-6)
    assert steps == pytest.approx(min(tried), rel=1e-2)
    assert steps_to(SPECTRUM, 0.1, batch=20, lr=lr) == steps


def test_the_least_examples_of_one_curvature_are_those_of_the_closed_form():
    """E_min = S / (4 h² m) min over x of log((rho - x) / (1 - x)) / x, and S_min one step."""
    target = 1.0  # of m = |theta|² = 1, from 15
    x = np.linspace(0.3, 0.999, 200_000)
    expected = 15 / (4 * 4 * 1) * (np.log((15 - x) / (1 - x)) / x).min()
    got = critical_batch(ROUND, target)
    assert got.examples == pytest.approx(expected, rel=1e-5)
    assert got.steps == 1
    tiny = 1e-3
    assert fewest_steps(ROUND, target, batch=tiny)[0] * tiny == pytest.approx(expected, rel=1e-3)


SPECTRA = {  # curvature, noise, target; B_crit, and b_simple and B_noise where a run at it ends
    "even noise": (SPECTRUM, 0.1, (40.3, 64.4, 35.2)),
    "two decades": (
        Modes(np.geomspace(0.01, 1, 12), np.full(12, 0.3), np.ones(12)),
        0.02,
        (229.0, 461.4, 153.5),
    ),
    "noise as curvature": (
        Modes(np.geomspace(0.1, 1, 12), np.geomspace(0.1, 1, 12), np.ones(12)),
        0.05,
        (95.4, 104.5, 85.5),
    ),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_steps_against_the_batch_are_nearly_a_hyperbola(name):
    """Its ends are exact; in between it is an upper bound, by a quarter at most."""
    modes, target, _ = SPECTRA[name]
    got = critical_batch(modes, target)
    assert fewest_steps(modes, target, batch=1e9)[0] == pytest.approx(got.steps, rel=1e-3)
    for batch in got.batch * np.array([0.1, 0.3, 1, 3, 10]):
        share = fewest_steps(modes, target, batch=batch)[0] / got.steps / (1 + got.batch / batch)
        assert 0.75 < share <= 1


@pytest.mark.parametrize("name", SPECTRA)
def test_the_critical_batch_is_next_to_the_noise_scale_at_the_end(name):
    """The table in docs/mathematics.md."""
    modes, target, expected = SPECTRA[name]
    batch = critical_batch(modes, target).batch
    steps, lr = fewest_steps(modes, target, batch=batch)
    end = after(modes, batch=batch, lr=lr, steps=steps)
    assert end.loss == pytest.approx(target, rel=1e-6)
    assert (batch, end.b_simple, end.b_noise) == pytest.approx(expected, rel=2e-3)
    assert modes.b_noise < end.b_noise / 10  # that of the start says nothing


def test_a_target_out_of_reach_is_refused():
    for target in (0.0, 15.0):
        with pytest.raises(ValueError, match="target: expected a loss above"):
            fewest_steps(ROUND, target, batch=1)
        with pytest.raises(ValueError, match="target: expected a loss above"):
            critical_batch(ROUND, target)


# The chain


def of_scale(b_simple, d=24):
    """Isotropic noise of b_simple examples in d directions."""
    torch.manual_seed(0)
    theta = torch.randn(d).double()
    h = torch.linspace(0.5, 2, d).double()
    noise = torch.full((d,), b_simple * float((h * theta).square().sum()) / d).double()
    return NoisyQuadratic(h, noise, theta)


def watched(model, tmp_path, *, batch, steps, generator, microbatches=1, **settings):
    """Measured steps that do not move theta, so that the truth stays what it is."""
    optimizer = SGD(model.parameters(), lr=0.0)
    settings = {"every": 1, "engine": "hooks", "groups": "total", "window": steps, **settings}
    with gnsmon.attach(model, optimizer, strict=True, run_dir=tmp_path, **settings) as gns:
        for _ in range(steps):
            optimizer.zero_grad()
            for part in model.sample(batch, generator).chunk(microbatches):
                (mean_loss(model, part) / microbatches).backward()
            optimizer.step()
        return gns, dict(gns.readings), gns.advice()


def test_the_interval_of_a_reading_covers_b_simple(tmp_path):
    """Both sources in one pass; 200 windows of 20 steps that share none, binomial error 1.5 %."""
    model, methods, found = of_scale(6.0), ["pepgns", "microbatch"], []
    watched(
        model,
        tmp_path,
        batch=8,
        steps=4000,
        generator=torch.Generator().manual_seed(0),
        microbatches=2,
        method=methods,
        window=20,
        sinks=[found.append],
    )
    for method in methods:
        of = [r for r in found if r.method == method and r.step % 20 == 19]
        assert len(of) == 200
        assert {r.n_eff for r in of} == {20}
        assert all(r.low is not None for r in of)
        covered = sum(r.low <= model.b_simple <= (r.high or np.inf) for r in of)
        assert abs(covered / 200 - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 200)
        for name in ("tr_sigma", "grad_sq_norm"):
            values = np.array([getattr(r, name) for r in of])
            error = values.std(ddof=1) / np.sqrt(200)
            assert abs(values.mean() - getattr(model, name)) < 4 * error
            assert error < 0.05 * values.mean()


@pytest.mark.parametrize(
    ("b_simple", "batch", "microbatches", "steps", "advised"),
    [(64, 8, 1, 600, 64), (4.5, 64, 16, 100, 4), (20, 16, 1, 300, 16)],
)
def test_the_advised_batch_is_the_power_of_two_at_b_simple(
    tmp_path, b_simple, batch, microbatches, steps, advised
):
    model = of_scale(float(b_simple))
    generator = torch.Generator().manual_seed(0)
    _, readings, advice = watched(
        model,
        tmp_path,
        batch=batch,
        steps=steps,
        generator=generator,
        microbatches=microbatches,
    )
    assert readings["pepgns"].status == "ok"
    assert advice.b_simple == pytest.approx(model.b_simple, rel=0.25)
    assert advice.batch_size == advised
    assert advice.present == batch
