"""Calibration by exact steps: right where the law holds, and honest about its own error."""

import json
import math

import numpy as np
import pytest

from gnsmon.estimators.calibration import PartsCalibration, RatioCalibration, corrected
from gnsmon.estimators.columns import STATUSES, Ratios
from gnsmon.estimators.values import Ratio


def by_group(values):
    return np.array([values.sum(), values[0], values[1] + values[2]])


def corrected_one(ratio, factor, error):
    numbers = [np.array([x], float) for x in (None, ratio.b_simple, ratio.low, ratio.high)]
    code = np.array([STATUSES.index(ratio.status)])
    columns = Ratios(code, np.array([0]), (ratio.reason,), *numbers)
    (found,) = corrected(columns, np.array([factor]), np.array([error]), level=0.95)
    return found


def noisy(rng, exact, factors, noise):
    return exact / factors * np.exp(noise * rng.standard_normal(3))


def calibrated(steps, noise=0.05, drift=0.0, seed=0):
    rng = np.random.default_rng(seed)
    calibration = PartsCalibration(3, by_group)
    factors = np.array([2.0, 0.5, 0.9])
    for step in range(steps):
        exact = rng.uniform(0.5, 2, 3) * 10.0 ** rng.uniform(-8, 8)
        calibration.update(noisy(rng, exact, factors * (1 + drift) ** step, noise), exact)
    return calibration, factors


def test_factors_are_the_ratio_of_averages():
    calibration, factors = calibrated(1, noise=0.0)
    np.testing.assert_allclose(calibration.factors, factors)
    assert calibration.spread is None
    assert calibration.standard_error is None


def test_later_exact_steps_judge_the_factors():
    calibration, factors = calibrated(60)
    np.testing.assert_allclose(calibration.factors, factors, rtol=0.05)
    total, first, _ = calibration.spread
    assert 0.04 < first < 0.08  # one parameter: its own 5 %, and that of its factor
    assert total < first
    # Of 19 effective steps: the mean strays by 0.23 of the spread, and its own error is as large.
    assert (calibration.standard_error < 0.7 * calibration.spread).all()


def test_the_error_of_the_factor_covers_it():
    inside = 0
    for seed in range(300):
        calibration, factors = calibrated(40, seed=seed)
        error = calibration.factors[0] / factors[0] - 1
        inside += abs(error) < 1.96 * calibration.standard_error[1]
    assert 0.90 < inside / 300 < 0.995


def test_a_drift_counts_in_full():
    calibration, _ = calibrated(60, noise=0.0, drift=0.02)
    assert calibration.standard_error[1] > 0.1  # ten steps' memory behind by 2 % each


def test_a_group_is_judged_only_by_steps_in_which_it_has_a_gradient():
    found = []
    for pause in (1, 3):  # exact steps without it after each with it
        rng, calibration = np.random.default_rng(0), PartsCalibration(3, by_group)
        for step in range(60 * (pause + 1)):
            exact = rng.uniform(0.5, 2, 3) if step % (pause + 1) == 0 else np.array([1.0, 0, 0])
            own = noisy(rng, exact, np.ones(3), 0.2) if step % (pause + 1) == 0 else exact
            calibration.update(own, exact)
        found.append((calibration.spread[2], calibration.standard_error[2]))
    for spread, error in found:
        assert 0.1 < spread < 0.25
        assert 0.15 < error / spread < 1
    never = PartsCalibration(3, by_group)
    for _ in range(3):
        never.update(np.array([1.0, 0, 0]), np.array([1.0, 0, 0]))
    assert np.isnan(never.spread[2])
    assert np.isnan(never.standard_error[2])


def test_a_parameter_not_seen_takes_the_total_factor():
    calibration = PartsCalibration(3, by_group)
    calibration.update(np.array([1.0, 1.0, 0.0]), np.array([2.0, 4.0, 0.0]))
    np.testing.assert_allclose(calibration.factors, [2, 4, 3])
    calibration.update(np.zeros(3), np.zeros(3))  # nothing to learn from
    assert calibration.steps == 1


def moments(rng, n, noise):
    """(S, |G|²) of some parameters and of all, whose noise is partly the same."""
    common = rng.standard_normal((n, 2))
    own = 1 + noise * (common + rng.standard_normal((n, 2)))
    whole = 1 + noise * (common + rng.standard_normal((n, 2)))
    return own * [0.02, 0.01], whole * [20.0, 4.0]


def test_the_factor_of_a_ratio_and_its_error():
    inside, widths = 0, []
    for seed in range(400):
        calibration = RatioCalibration()
        for own, whole in zip(*moments(np.random.default_rng(seed), 60, 0.2), strict=True):
            calibration.update(tuple(own), tuple(whole))
        widths.append(calibration.standard_error)
        inside += abs(math.log(calibration.factor / 2.5)) < 1.96 * calibration.standard_error
    assert 0.90 < inside / 400 < 0.98
    assert 0.02 < np.mean(widths) < 0.2


def test_no_factor_before_it_can_be_told():
    calibration = RatioCalibration()
    for _ in range(4):
        calibration.update((1.0, 1.0), (2.0, 1.0))
    assert calibration.factor is None
    calibration.update((1.0, 1.0), (2.0, 1.0))
    assert calibration.factor == pytest.approx(2)
    calibration.update((1.0, -100.0), (2.0, 1.0))
    assert calibration.factor is None
    assert calibration.standard_error is None


@pytest.mark.parametrize("make", [lambda: PartsCalibration(3, by_group), RatioCalibration])
def test_state_goes_through_json(make):
    rng, one, other = np.random.default_rng(0), make(), make()
    for _ in range(7):
        args = rng.uniform(1, 2, (2, 3 if isinstance(one, PartsCalibration) else 2))
        one.update(*args)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.state_dict() == one.state_dict()
    one.update(*args)
    other.update(*args)
    assert other.state_dict() == one.state_dict()


def test_the_state_of_another_model_is_refused():
    state = calibrated(3)[0].state_dict()
    other = PartsCalibration(4, lambda values: values[:2])
    with pytest.raises(ValueError, match="expected 4 parameters, got 3 in the saved state"):
        other.load_state_dict(state)
    assert other.steps == 0


def test_errors_add_in_quadrature_on_the_scale_of_logarithms():
    ratio = Ratio("ok", None, 10.0, 8.0, 12.5)
    same = corrected_one(ratio, 1.0, 0.0)
    assert (same.low, same.high) == pytest.approx((8, 12.5))
    assert corrected_one(ratio, 2.0, 0.0).b_simple == 20
    wider = corrected_one(ratio, 1.0, 0.1)
    expected = math.hypot(math.log(1.25), 1.959964 * 0.1)
    assert math.log(wider.high / 10) == pytest.approx(expected)
    assert math.log(10 / wider.low) == pytest.approx(expected)


@pytest.mark.parametrize(
    "ratio",
    [
        Ratio("undefined", "too few", None, None, None),
        Ratio("lower_bound", "not yet", None, 5.0, None),
        Ratio("wide", "hardly", 10.0, 0.0, 50.0),
        Ratio("undefined", "no noise", None, 0.0, 3.0),
    ],
)
def test_what_is_not_known_stays_unknown(ratio):
    found = corrected_one(ratio, 3.0, 0.2)
    assert found.status == ratio.status
    for name in ("b_simple", "low", "high"):
        before, after = getattr(ratio, name), getattr(found, name)
        assert (before is None) == (after is None)
        assert before is None or math.isfinite(after)
    if ratio.low:
        assert found.low < 3 * ratio.low
    if ratio.high:
        assert found.high > 3 * ratio.high
    extreme = corrected_one(ratio, 3.0, 1e9)
    assert extreme.high is None or math.isfinite(extreme.high)
