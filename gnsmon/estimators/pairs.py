"""Unbiased statistics of pairs of independent parts, with their errors by leaving one part out.

All of them need two numbers a part and quadratic form only: `own` [..., n], <u_j, u_j>, and
`with_sum` [..., n], <u_j, sum_k u_k>. The sums of both are q = sum_j <u_j, u_j> and
A = <sum u_j, sum u_j>, and what is left of these without part i follows from them as well.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gnsmon.estimators.interval import WIDE, student_quantile
from gnsmon.estimators.values import Array


class Deleted(NamedTuple):
    """What leaving out one part at a time says of k statistics."""

    bias: Array  # [k], of order 1/n
    covariance: Array  # [k, k]


class Interval(NamedTuple):
    """A ratio s / g of either sign; `low` and `high` are None where it has no bounded interval."""

    low: float | None
    high: float | None
    wide: bool  # the relative error of g is 0.25 or more


def form_moments(own: Array, with_sum: Array, weights: Array, examples: int) -> Array:
    """[2, ...]: unbiased tr(H Sigma), per example, and G'HG, for any fixed symmetric H.

    Of parts u_j = w_j m_j in the form <a, b> = a'Hb, with V = Var(sum u_j): E A = G'HG + tr(H V)
    and E q = p G'HG + tr(H V), which is McCandlish et al. 2018, A.1, with H in the place of the
    identity; so H has to be independent of the parts' noise. Nothing is clamped.

    Args:
        own: [..., n].
        with_sum: [..., n].
        weights: w [n], which add up to 1.
        examples: in all parts together.

    Example:
        >>> u = np.array([[1.0, 0.0], [0.0, 3.0]])  # two parts of two numbers
        >>> form_moments((u**2).sum(1), u @ u.sum(0), np.array([0.5, 0.5]), 4)
        array([40.,  0.])
    """
    return _moments(with_sum.sum(-1), own.sum(-1), (weights**2).sum(), examples)


def form_moments_without_each(
    own: Array, with_sum: Array, weights: Array, examples: int
) -> Array:  # [2, ..., n]
    """`form_moments` of the parts without part i, its weights divided by 1 - w_i, for each i."""
    a, q = _without_each(own, with_sum)
    left = 1 - weights
    p = ((weights**2).sum() - weights**2) / left**2
    return _moments(a / left**2, q / left**2, p, examples * left)


def agreement(own: Array, with_sum: Array) -> Array:
    """[...]: |E f|² / E |f|² of n independent vectors f_j, an estimate from all their pairs.

    mean over i != j of <f_i, f_j>, which is unbiased for |E f|², by the mean of |f_j|². It may be
    negative; NaN where all f are zero.

    Example:
        >>> f = np.array([[1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
        >>> round(float(agreement((f**2).sum(1), f @ f.sum(0))), 4)
        0.3333
    """
    return _agreement(with_sum.sum(-1), own.sum(-1), own.shape[-1])


def agreement_without_each(own: Array, with_sum: Array) -> Array:  # [..., n]
    """`agreement` of the vectors without vector i, for each i."""
    return _agreement(*_without_each(own, with_sum), own.shape[-1] - 1)


def delete_one(whole: Array, without: Array, weights: Array) -> Deleted:
    """Delete-1 jackknife of k statistics of n independent parts that weigh w (Tukey 1958).

    Part i left out moves them by d_i / (1 - w_i); bias = sum d_i, covariance =
    sum (d_i - w_i bias)(d_i - w_i bias)' / (1 - sum w²). For statistics of pairs, as here, it is
    right to first order, and too large otherwise (Efron and Stein 1981, "The jackknife estimate of
    variance"): at most twice the variance, where the parts' mean is nothing beside their noise.

    Args:
        whole: [k], the statistics of all parts.
        without: [k, n], those without part i.
        weights: [n], which add up to 1.
    """
    d = (1 - weights) * (without - whole[:, None])
    bias = d.sum(1)
    d = d - weights * bias[:, None]
    return Deleted(bias, d @ d.T / (1 - (weights**2).sum()))


def ratio_interval_of_either_sign(
    s: float, g: float, covariance: Array, *, freedom: float, level: float
) -> Interval:
    """Fieller's (1954) interval for s / g, without the limits at 0 that a noise scale's has.

    Bounded where g differs from zero at that level: a = g² - z² v_gg > 0.

    Args:
        s: the numerator.
        g: the denominator.
        covariance: [2, 2], of (s, g).
        freedom: degrees of freedom of Student's quantile z.
        level: of the interval.
    """
    (v_ss, v_sg), (_, v_gg) = covariance
    z_sq = student_quantile(freedom, (1 + level) / 2) ** 2
    a, b, c = g * g - z_sq * v_gg, s * g - z_sq * v_sg, s * s - z_sq * v_ss
    wide = bool(v_gg >= (WIDE * g) ** 2)
    if not a > 0:
        return Interval(None, None, wide)
    root = max(b * b - a * c, 0.0) ** 0.5  # below zero by rounding alone
    return Interval(float((b - root) / a), float((b + root) / a), wide)


def _moments(a: Array, q: Array, p: Array, examples: Array | int) -> Array:
    return np.stack([examples * (q - p * a) / (1 - p), (a - q) / (1 - p)])


def _agreement(a: Array, q: Array, n: int) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: Array = (a - q) / ((n - 1) * q)
    return ratio


def _without_each(own: Array, with_sum: Array) -> tuple[Array, Array]:
    """A and q without part i, [..., n]."""
    a = with_sum.sum(-1, keepdims=True) - 2 * with_sum + own
    return a, own.sum(-1, keepdims=True) - own
