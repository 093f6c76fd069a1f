"""Fieller's interval for the ratio of two averaged moments, widened for correlated steps."""

from __future__ import annotations

import numpy as np

from gnsmon.estimators import columns
from gnsmon.estimators.columns import Ratios
from gnsmon.estimators.smoothing import Averages
from gnsmon.estimators.values import Array

MIN_STEPS = 10  # effective steps below which the spread itself is unknown
BELOW = (
    "is below zero by more than its error: "
    "the norms of the parts are not those of this gradient's parts"
)
WIDE = 0.25  # relative standard error of the mean |G|² from which a ratio counts as wide


def ratio_interval(averages: Averages, *, level: float = 0.95) -> Ratios:
    """S / |G|² of every group with its interval at `level`, for steps that may be correlated."""
    of_means = averages.sum_sq_weights[..., None] * averages.covariance
    if averages.n_eff >= MIN_STEPS:  # fewer have no interval, and 4 of them no lag_inflation
        of_means = of_means * lag_inflation(averages)
    return fieller(averages.mean, of_means, n_eff=averages.n_eff, level=level)


def lag_inflation(averages: Averages) -> Array:
    """Factor [n_groups] on variances of means, (1 + rho) / (1 - rho), right for AR(1) noise.

    rho is the lag-1 correlation of s_t - R g_t at the ratio R itself, less its own bias of
    -(1 + 4 rho) / n_eff (Marriott and Pope 1954), clipped to [-0.5, 0.97]: at 1 the factor
    diverges, and a strong negative correlation is more often luck. 0 where nothing varies.
    """
    # z_t = |G|² s_t - S g_t is that series without the division. The ratio nearest to a mean below
    # zero is 0 or infinity, which leaves one of the two series alone.
    s, g = np.maximum(averages.mean, 0)
    ss, sg, gg = s * s, s * g, g * g
    now, lag = (
        gg * c[0, 0] - sg * (c[0, 1] + c[1, 0]) + ss * c[1, 1]
        for c in (averages.covariance, averages.lag_covariance)
    )
    n = averages.n_eff
    rho = (np.divide(lag, now, out=np.full_like(now, -1 / n), where=now > 0) + 1 / n) / (1 - 4 / n)
    rho = np.minimum(np.maximum(rho, -0.5), 0.97)
    inflation: Array = (1 + rho) / (1 - rho)
    return inflation


def fieller(mean: Array, variance: Array, *, n_eff: float, level: float = 0.95) -> Ratios:
    """Ratio of two means with Fieller's (1954) confidence set, for each group.

    The set {R : (s - R g)² <= z² (v_ss - 2 R v_sg + R² v_gg)} holds the ratios that the data do
    not reject. With a = g² - z² v_gg, b = s g - z² v_sg, c = s² - z² v_ss it lies between the
    roots of a R² - 2 b R + c if a > 0; else it has no upper end. What counts is its part in
    [0, inf), where ratios are: a low end of 0 says that the data do not exclude a noiseless
    gradient. No moment is clamped.

    The point is r less its jackknife bias, r (1 - v_gg / g² + v_sg / (s g)), where the status is
    ok. Where it is wide the point is r: there readings exist only because |G|² came out large,
    which biases r down already (at b_simple = 20 batches, lag-1 correlation 0.5: r -5 %, corrected
    -18 %, mixed -6 %; at 20 batches, independent: +5 %, -1 %, +2 %).

    Args:
        mean: [2, n_groups], of S and of |G|².
        variance: [2, 2, n_groups], of those means.
        n_eff: effective number of steps behind them.
        level: of the interval; z is Student's quantile at n_eff - 1 degrees of freedom.
    """
    if n_eff < MIN_STEPS:
        reason = f"{int(n_eff)} of {MIN_STEPS} measured steps so far"
        return Ratios.undefined(mean.shape[1], reason)
    z_sq = student_quantile(n_eff - 1, (1 + level) / 2) ** 2
    with np.errstate(all="ignore"):  # every case is computed for every group, one of them is taken
        return _fieller(mean, variance, z_sq)


def student_quantile(freedom: float, p: float) -> float:
    """Quantile of Student's distribution."""
    # Where it is used: scipy.special takes 0.2 s to import, a fifth of what torch takes.
    from scipy.special import stdtrit  # type: ignore[import-untyped]

    return float(stdtrit(freedom, p))


# What a group may come to, in the order in which a later one overrides those before it: its status,
# and the reason with a place for its number.
OF_CASE: tuple[tuple[int, str | None], ...] = (
    (columns.OK, None),
    (columns.WIDE, "|G|² is known to {:.0%} only; a longer average narrows the interval"),
    (columns.UNDEFINED, "the noise is not distinguishable from zero; b_simple is below {:.3g}"),
    (columns.UNDEFINED, f"the noise {BELOW}"),
    (columns.UNDEFINED, f"|G|² {BELOW}"),
    (columns.LOWER_BOUND, "|G|² is not distinguishable from zero yet; b_simple is above {:.3g}"),
    (columns.UNDEFINED, "neither |G|² nor the noise is distinguishable from zero yet"),
    (columns.UNDEFINED, "every measured gradient is zero"),
)
STATUS = np.array([status for status, _ in OF_CASE], dtype=np.intp)
REASONS = tuple(reason for _, reason in OF_CASE)
FINE, HARDLY, NOISELESS, NEGATIVE_NOISE, NEGATIVE_GRAD, BOUND, NEITHER, ZERO = range(len(OF_CASE))


def _fieller(mean: Array, variance: Array, z_sq: float) -> Ratios:
    (s, g), ((_, v_sg), (_, v_gg)) = mean, variance
    (c, b), (_, a) = mean[:, None] * mean - z_sq * variance
    root = np.sqrt(np.maximum(b * b - a * c, 0.0))  # below zero by rounding alone where it is used
    far = b + np.copysign(root, b)
    one, other = far / a, np.where(far == 0, 0.0, c / far)
    low, high = np.maximum(np.minimum(one, other), 0.0), np.maximum(one, other)
    ratio, error = s / g, np.sqrt(v_gg) / g
    corrected = ratio * (1 - np.square(error)) + v_sg / (g * g)
    corrected = np.where((low <= corrected) & (corrected <= high), corrected, ratio)
    hardly = error >= WIDE
    case = np.where(hardly, HARDLY, FINE)
    about, b_simple = np.where(hardly, error, np.nan), np.where(hardly, ratio, corrected)
    # Of most groups that is all.
    if not (np.minimum(np.minimum(s, g), np.minimum(a, high)) > 0).all():
        # The positive root, in the form that does not cancel.
        bound = np.where(b > 0, c / (b + root), np.where(a < 0, (b - root) / a, 0.0))
        case[s < 0] = NOISELESS
        case[high < 0] = NEGATIVE_NOISE
        case[g < 0] = NEGATIVE_GRAD
        open_above = a <= 0
        case[open_above] = BOUND
        case[open_above & ((c <= 0) | (bound <= 0))] = NEITHER
        case[(s == 0) & (g == 0)] = ZERO
        bounded, is_bound = case <= NOISELESS, case == BOUND
        about = np.where(case == HARDLY, error, np.where(is_bound, bound, np.nan))
        about = np.where(case == NOISELESS, high, about)
        b_simple = np.where(case <= HARDLY, b_simple, np.nan)
        low = np.where(is_bound, bound, np.where(bounded, low, np.nan))
        high = np.where(bounded, high, np.nan)
    return Ratios(STATUS[case], case, REASONS, about, b_simple, low, high)
