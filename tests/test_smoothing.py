import json

import numpy as np
import pytest

from gnsmon.estimators import Estimator, Moments, NormPair
from gnsmon.estimators.smoothing import Ema, Window


def steps(n, groups=3, seed=0):
    x = np.random.default_rng(seed).standard_normal((n, 2, groups)) + [[5.0], [2.0]]
    return [Moments(grad_sq_norm=g, tr_sigma=s) for s, g in x]


def run(smoothing, series, elapsed=None):
    for i, step in enumerate(series):
        smoothing.update(step, elapsed=1.0 if elapsed is None else elapsed[i])
    return smoothing.averages()


def by_hand(series, weights):
    """Averages from explicit weights: [n] or one row for S and one for |G|², the slower last."""
    w = np.broadcast_to(weights, (2, len(series)))
    w = w / w.sum(1, keepdims=True)
    x = np.stack([[m.tr_sigma, m.grad_sq_norm] for m in series])
    mean = np.einsum("xt,txg->xg", w, x)
    slow = w[1]
    dx = x - np.einsum("t,txg->xg", slow, x)
    covariance = np.einsum("t,txg,tyg->xyg", slow, dx, dx) / (1 - (slow**2).sum())
    pairs = slow[1:] / slow[1:].sum()
    new, old = x[1:], x[:-1]
    new, old = (y - np.einsum("t,txg->xg", pairs, y) for y in (new, old))
    lag = np.einsum("t,txg,tyg->xyg", pairs, new, old) / (1 - (slow**2).sum())
    return mean, covariance, lag, w @ w.T


def assert_averages(got, expected, rtol=1e-12):
    fields = (got.mean, got.covariance, got.lag_covariance, got.sum_sq_weights)
    for x, y in zip(fields, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-13)


def test_decay_weighs_steps_geometrically():
    series = steps(40)
    assert_averages(run(Ema(3, decay=0.9), series), by_hand(series, 0.9 ** np.arange(40)[::-1]))


def test_half_life_counts_what_elapsed():
    series, elapsed = steps(40), np.random.default_rng(1).integers(1, 2000, 40)
    age = elapsed.sum() - np.cumsum(elapsed)
    got = run(Ema(3, half_life=5000), series, elapsed)
    assert_averages(got, by_hand(series, 2.0 ** (-age / 5000)))


def test_decay_is_the_half_life_of_one_step_each():
    series = steps(30)
    one = run(Ema(3, decay=0.5 ** (1 / 7)), series)
    two = run(Ema(3, half_life=7), series)
    np.testing.assert_allclose(one.covariance, two.covariance, rtol=1e-12)


def test_grad_sq_norm_may_have_the_longer_memory():
    series = steps(60)
    age = np.arange(60)[::-1]
    weights = np.stack([0.8**age, 0.8 ** (age / 4)])
    got = run(Ema(3, decay=0.8, grad_memory=4.0), series)
    assert_averages(got, by_hand(series, weights))
    assert got.n_eff == pytest.approx(1 / got.sum_sq_weights[1, 1])


def test_sum_of_squared_weights_follows_its_recursion():
    ema, d, p = Ema(1, decay=0.9), 0.9, 1.0
    for t, step in enumerate(steps(50, groups=1), start=1):
        ema.update(step)
        rho = d * (1 - d ** (t - 1)) / (1 - d**t)
        p = rho**2 * p + (1 - rho) ** 2
        assert ema.averages().sum_sq_weights[0, 0] == pytest.approx(p, rel=1e-12)
    many = run(Ema(1, decay=0.9), steps(500, groups=1))
    assert many.n_eff == pytest.approx((1 + 0.9) / (1 - 0.9))


def test_first_step_is_itself():
    (step,) = steps(1)
    for smoothing in (Ema(3, decay=0.99), Window(5)):
        assert smoothing.averages() is None
        got = run(smoothing, [step])
        np.testing.assert_array_equal(got.mean, [step.tr_sigma, step.grad_sq_norm])
        assert got.n_eff == 1
        assert not got.covariance.any()


def test_window_is_the_plain_mean_of_the_last_steps():
    series = steps(30)
    got = run(Window(12), series)
    x = np.stack([[m.tr_sigma, m.grad_sq_norm] for m in series])[-12:]
    np.testing.assert_allclose(got.mean, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(got.covariance[..., 0], np.cov(x[..., 0].T), rtol=1e-12)
    assert got.n_eff == pytest.approx(12)


def test_a_tiny_spread_survives_a_long_run():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((20_000, 2, 1))
    small = [Moments(*(1e6 + 1e-3 * x)) for x in noise]
    plain = [Moments(*x) for x in noise]
    got, expected = (run(Ema(1, decay=0.99), series) for series in (small, plain))
    np.testing.assert_allclose(got.covariance / 1e-6, expected.covariance, rtol=1e-4)
    np.testing.assert_allclose(got.lag_covariance / 1e-6, expected.lag_covariance, rtol=1e-3)


def pairs(n, groups=3):
    rng = np.random.default_rng(2)
    for _ in range(n):
        yield NormPair(rng.chisquare(9, groups), rng.chisquare(90, groups) / 40, 1 / 16, 16)


@pytest.mark.parametrize(
    "memory", [{}, {"half_life": 900.0, "unit": "tokens", "grad_memory": 2.0}, {"window": 15}]
)
def test_state_survives_json_exactly(memory):
    whole, first = Estimator(3, **memory), Estimator(3, **memory)
    for i, p in enumerate(pairs(40)):
        whole.update(p, elapsed=20.0)
        if i == 20:
            state = json.loads(json.dumps(first.state_dict()))
            first = Estimator(3, **memory)
            first.load_state_dict(state)
        first.update(p, elapsed=20.0)
    assert list(first.ratios()) == list(whole.ratios())
    assert first.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Estimator(4), "number of groups: expected 3, got 4"),
        (Estimator(3, half_life=9, unit="tokens"), "unit: expected 'steps', got 'tokens'"),
        (Estimator(3, window=20), "kind of memory: expected 'ema', got 'window'"),
    ],
)
def test_a_foreign_state_is_refused(other, words):
    with pytest.raises(ValueError, match=words):
        Estimator(3).load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    "memory",
    [
        {"decay": 1.0},
        {"decay": -0.1},
        {"half_life": 0.0},
        {"decay": 0.9, "half_life": 3.0},
        {"decay": 0.9, "window": 3},
        {"window": 0},
        {"grad_memory": 0.0},
    ],
)
def test_memories_that_do_not_exist_are_refused(memory):
    with pytest.raises(ValueError, match="expected|window="):
        Estimator(3, **memory)


def test_a_step_that_cannot_be_used_leaves_no_trace():
    estimator = Estimator(3)
    for p in pairs(12):
        estimator.update(p)
    before = estimator.state_dict()
    ones = np.ones(3)
    for bad in (
        NormPair(ones, ones, 1.0, 4),
        NormPair(ones, np.array([1, np.nan, 1]), 0.5, 4),
        NormPair(ones[:2], ones[:2], 0.5, 4),
    ):
        with pytest.raises(ValueError, match="no estimate|expected norms of 3 groups"):
            estimator.update(bad)
    assert estimator.state_dict() == before


def test_averages_are_asked_for_too_early():
    estimator = Estimator(2)
    assert estimator.n_eff == 0
    assert [x.status for x in estimator.ratios()] == ["undefined"] * 2
    with pytest.raises(ValueError, match="call update"):
        _ = estimator.tr_sigma
