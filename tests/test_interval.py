import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.special import stdtrit

from gnsmon.estimators import Estimator, NormPair
from gnsmon.estimators.interval import fieller, lag_inflation
from gnsmon.estimators.smoothing import Averages

SCRIPT = Path(__file__).parents[1] / "scripts" / "interval_coverage.py"


@pytest.fixture(scope="module")
def measure():
    spec = importlib.util.spec_from_file_location("interval_coverage", SCRIPT)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.measure


def one(s, g, v_ss, v_sg, v_gg, *, n_eff=1e9):
    mean = np.array([[s], [g]], float)
    variance = np.array([[[v_ss], [v_sg]], [[v_sg], [v_gg]]], float)
    (ratio,) = fieller(mean, variance, n_eff=n_eff)
    return ratio


Z_SQ = stdtrit(1e9 - 1, 0.975) ** 2


def inside(ratio, s, g, v_ss, v_sg, v_gg):
    return (s - ratio * g) ** 2 <= Z_SQ * (v_ss - 2 * ratio * v_sg + ratio**2 * v_gg)


@pytest.mark.parametrize(
    "numbers", [(8, 2, 0.04, 0, 0.01), (8, 2, 0.5, 0.2, 0.2), (3, 2, 0.1, -0.1, 0.2)]
)
def test_the_ends_are_where_the_set_ends(numbers):
    r = one(*numbers)
    for end, outward in ((r.low, -1), (r.high, 1)):
        assert inside(end * (1 - outward * 1e-4), *numbers)
        assert not inside(end * (1 + outward * 1e-4), *numbers)
    assert r.low < r.b_simple < r.high


def test_ok_is_the_jackknife_corrected_ratio_and_wide_the_plain_one():
    r = one(8, 2, 0.04, 0.02, 0.16)
    assert r.status == "ok"
    assert r.b_simple == pytest.approx(4 * (1 - 0.04 + 0.02 / 16))
    wide = one(8, 2, 0.04, 0.02, 0.26)
    assert (wide.status, wide.b_simple) == ("wide", 4)
    assert "25%" in wide.reason


def test_a_lower_bound_where_the_gradient_may_be_zero():
    numbers = (8, 2, 0.04, 0, 1.1)
    r = one(*numbers)
    assert (r.status, r.b_simple, r.high) == ("lower_bound", None, None)
    assert not inside(r.low * 0.9999, *numbers)
    assert all(inside(r.low * x, *numbers) for x in (1.0001, 10, 1e6))
    assert r.reason.startswith("|G|² is not distinguishable from zero")


def test_a_negative_mean_within_its_error_still_bounds_from_below():
    numbers = (8, -1, 0.04, 0, 1.1)
    r = one(*numbers)
    assert r.status == "lower_bound"
    assert not inside(r.low * 0.9999, *numbers)
    assert inside(r.low * 1.0001, *numbers)


def test_the_lower_bound_is_continuous_where_the_upper_end_goes_to_infinity():
    edge = 4 / Z_SQ
    bounded, half, at = (one(8, 2, 0.04, 0, edge * x) for x in (1 - 1e-9, 1 + 1e-9, 1))
    assert bounded.status == "wide"
    assert half.status == "lower_bound"
    assert bounded.low == pytest.approx(half.low, rel=1e-6)
    assert at.low == pytest.approx(half.low, rel=1e-6)


def test_a_low_end_below_zero_is_outside_the_ratios_there_are():
    r = one(0.1, 2, 0.04, 0, 0.01)
    assert (r.status, r.low) == ("ok", 0)
    assert r.high > r.b_simple > 0


@pytest.mark.parametrize(
    ("numbers", "status", "words"),
    [
        ((0, 0, 0, 0, 0), "undefined", "every measured gradient is zero"),
        ((0.1, 0.1, 1, 0, 1), "undefined", "neither"),
        ((5, 0, 0, 0, 0), "undefined", "neither"),
        ((8, -2, 0.04, 0, 0.01), "undefined", r"|G|² is below zero"),
        ((-8, 2, 0.04, 0, 0.01), "undefined", "the noise is below zero"),
        ((-0.1, 2, 0.04, 0, 0.01), "undefined", "b_simple is below"),
        ((0, 2, 0, 0, 0.01), "ok", None),
    ],
)
def test_statuses(numbers, status, words):
    r = one(*numbers)
    assert r.status == status
    assert (words is None) == (r.reason is None)
    assert words is None or words in r.reason
    assert (r.b_simple is None) == (status == "undefined")


def test_no_noise_at_all_is_a_noise_scale_of_zero():
    assert one(0, 2, 0, 0, 0.01) == one(0, 2, 0, 0, 0)
    assert one(0, 2, 0, 0, 0).b_simple == 0


def test_ten_effective_steps_are_needed():
    assert one(8, 2, 0.04, 0, 0.01, n_eff=10).status == "ok"
    r = one(8, 2, 0.04, 0, 0.01, n_eff=9.99)
    assert r.status == "undefined"
    assert r.reason == "9 of 10 measured steps so far"


def test_few_steps_widen_the_interval():
    few, many = one(8, 2, 0.04, 0, 0.01, n_eff=12), one(8, 2, 0.04, 0, 0.01)
    assert few.low < many.low < many.high < few.high


@pytest.mark.parametrize("scale", [2.0**-120, 2.0**100])
def test_free_of_scale(scale):
    r, t = (
        one(8, 2, 0.04, 0.01, 0.02),
        one(*np.array([8, 2]) * scale, *np.array([0.04, 0.01, 0.02]) * scale**2),
    )
    assert r == t


def test_never_nan_and_ends_in_order():
    rng = np.random.default_rng(0)
    n = 20_000
    mean = rng.standard_normal((2, n)) * 10.0 ** rng.integers(-20, 20, (2, n))
    root = rng.standard_normal((2, 2, n)) * 10.0 ** rng.integers(-3, 3, n) * abs(mean)[:, None]
    variance = np.einsum("xkg,ykg->xyg", root, root)
    seen = set()
    for r in fieller(mean, variance, n_eff=50):
        seen.add(r.status)
        numbers = [x for x in (r.low, r.b_simple, r.high) if x is not None]
        assert all(math.isfinite(x) and x >= 0 for x in numbers)
        assert numbers == sorted(numbers)
        assert (r.reason is None) == (r.status == "ok")
    assert seen == {"ok", "wide", "lower_bound", "undefined"}


def averages(mean, rho, n_eff=1e9):
    eye = np.eye(2)[..., None]
    return Averages(np.array(mean, float)[:, None], eye, rho * eye, np.full((2, 2), 1 / n_eff))


@pytest.mark.parametrize(("rho", "factor"), [(0, 1), (0.5, 3), (-0.9, 1 / 3), (0.99, 1.97 / 0.03)])
def test_inflation_of_correlated_steps(rho, factor):
    for mean in ([8, 2], [8, -2], [-8, 2]):
        np.testing.assert_allclose(lag_inflation(averages(mean, rho)), factor, rtol=1e-6)


def test_inflation_is_that_of_the_ratio_not_of_its_terms():
    s_and_g_move_together = Averages(
        np.array([[8.0], [2.0]]),
        np.array([[[17.0], [4.0]], [[4.0], [1.0]]]),
        np.array([[[16.0], [4.0]], [[4.0], [1.0]]]),
        np.full((2, 2), 1e-9),
    )
    np.testing.assert_allclose(lag_inflation(s_and_g_move_together), 1, rtol=1e-6)


def test_a_constant_series_is_certain():
    estimator = Estimator(2)
    for _ in range(30):
        estimator.update(NormPair(np.array([3.0, 0]), np.array([1.0, 0]), 0.25, 8))
    certain, unused = estimator.ratios()
    assert certain.status == "ok"
    assert certain.low == pytest.approx(certain.high)
    assert (unused.status, unused.reason) == ("undefined", "every measured gradient is zero")


def test_no_number_of_steps_divides_by_zero():
    estimator = Estimator(1, window=20)
    for n in range(12):
        estimator.update(NormPair(np.array([3.0 + n % 2]), np.array([1.0]), 0.25, 8))
        assert estimator.ratios()[0].status == ("undefined" if n < 9 else "ok")


@pytest.mark.parametrize("correlation", [0.0, 0.5])
@pytest.mark.parametrize("r", [0.5, 4, 20])
def test_coverage_of_the_default_interval(measure, r, correlation):
    cell = measure(r, correlation)
    assert 0.93 <= cell.coverage <= 0.97  # four standard errors about 0.95
    assert cell.undefined == 0


def test_without_the_inflation_correlated_steps_are_not_covered(measure, monkeypatch):
    monkeypatch.setattr("gnsmon.estimators.interval.lag_inflation", lambda averages: 1.0)
    assert measure(4, 0.5).coverage < 0.85


@pytest.mark.parametrize(("steps", "least"), [(30, 0.90), (60, 0.92)])
@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_coverage_early_in_a_run(measure, steps, least, correlation):
    assert measure(4, correlation, steps=steps).coverage > least


@pytest.mark.parametrize(("r", "correlation"), [(10, 0.0), (10, 0.5), (20, 0.0)])
def test_the_point_is_less_biased_than_the_plain_ratio(measure, r, correlation):
    cell = measure(r, correlation)
    assert cell.bounded > 0.99
    assert abs(cell.bias) < abs(cell.plain_bias)
    assert abs(cell.bias) < 0.03
