"""What an approximate source is to be corrected by, from occasional exact steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gnsmon.estimators.columns import Ratios
from gnsmon.estimators.values import Array

DECAY = 0.9  # weight kept at each exact step: the factors drift as training goes on
MIN_EXACT = 5  # exact steps before a ratio of noisy averages is trusted


class PartsCalibration:
    """Factors on a source's sums of squares, parameter by parameter: exact over its own.

    A factor is a ratio of averages, each step weighing the same whatever its gradient's size. It is
    judged by the exact steps that come after: how far off what it gave was, of every group.

    Args:
        n_parameters: length of the sums of squares.
        by_group: sums over parameters, [n_parameters] -> [n_groups].
    """

    def __init__(self, n_parameters: int, by_group: Callable[[Array], Array]) -> None:
        self._by_group = by_group
        self.steps = 0  # exact ones
        self._own: Array = np.zeros(n_parameters)
        self._exact: Array = np.zeros(n_parameters)
        self._judged = _Errors(len(by_group(self._own)))

    def update(self, own: Array, exact: Array) -> None:
        """Take in an exact step: both sums of squares [n_parameters], at one loss scale."""
        whole = float(exact.sum())
        if not whole > 0:
            return
        if self.steps:
            true = self._by_group(exact)
            given = self._by_group(own * self.factors)
            seen = true > 0
            off = np.divide(given, true, out=np.ones_like(true), where=seen) - 1
            self._judged.update(off, seen)
        self._own = DECAY * self._own + own / whole
        self._exact = DECAY * self._exact + exact / whole
        self.steps += 1

    @property
    def factors(self) -> Array:
        """What to multiply by, [n_parameters]; of a parameter not seen yet, the total's."""
        return self._divided(self._exact, self._own)

    @property
    def group_factors(self) -> Array:
        """What they come to on average, [n_groups]."""
        return self._divided(self._by_group(self._exact), self._by_group(self._own))

    def _divided(self, exact: Array, own: Array) -> Array:
        whole = self._own.sum()
        unseen = np.full_like(own, self._exact.sum() / whole if whole > 0 else 1.0)
        return np.divide(exact, own, out=unseen, where=own > 0)

    @property
    def spread(self) -> Array | None:
        """Root mean square of the relative errors at later exact steps, [n_groups]; NaN of none."""
        return self._judged.rms

    @property
    def standard_error(self) -> Array | None:
        """Of the averaged parts, relative, [n_groups]: the errors' mean and its own error."""
        return self._judged.of_mean

    def state_dict(self) -> dict[str, Any]:
        """All state, JSON-able."""
        sums = {"own": self._own.tolist(), "exact": self._exact.tolist()}
        return {"steps": self.steps, **sums, "judged": self._judged.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; raises ValueError on that of another model."""
        if len(state["own"]) != len(self._own):
            raise ValueError(
                f"calibration: expected {len(self._own)} parameters, got {len(state['own'])} in "
                "the saved state; attach to the same model as the saved run, or start afresh"
            )
        self.steps = int(state["steps"])
        self._own, self._exact = (np.array(state[key]) for key in ("own", "exact"))
        self._judged.load_state_dict(state["judged"])


class RatioCalibration:
    """A factor on b_simple of some parameters alone: that of all over theirs, at exact steps.

    The norm layers' noise scale follows the whole model's up to such a factor (Gray et al. 2024,
    who fit it as a slope). It is a ratio of ratios of averages, its error by the delta method.
    """

    def __init__(self) -> None:
        self.steps = 0  # exact ones
        self._weight = self._squares = 0.0
        self._sum: Array = np.zeros(4)
        self._products: Array = np.zeros((4, 4))

    def update(self, own: tuple[float, float], whole: tuple[float, float]) -> None:
        """Take in an exact step: (S, |G|²) of some parameters, and of all."""
        x = np.array([*own, *whole])
        self._weight = DECAY * self._weight + 1
        self._squares = DECAY**2 * self._squares + 1
        self._sum = DECAY * self._sum + x
        self._products = DECAY * self._products + np.outer(x, x)
        self.steps += 1

    @property
    def factor(self) -> float | None:
        """None while it cannot be told: too few exact steps, or a moment that is not positive."""
        if self.steps < MIN_EXACT or not (self._sum > 0).all():
            return None
        s, g, s_all, g_all = self._sum
        return float((s_all / g_all) / (s / g))

    @property
    def standard_error(self) -> float | None:
        """Of the factor, relative."""
        if self.factor is None:
            return None
        mean, p = self._sum / self._weight, self._squares / self._weight**2
        covariance = (self._products / self._weight - np.outer(mean, mean)) * p / (1 - p)
        slope = np.array([-1, 1, 1, -1]) / mean
        return math.sqrt(max(float(slope @ covariance @ slope), 0.0))

    def state_dict(self) -> dict[str, Any]:
        """All state, JSON-able."""
        return {
            "steps": self.steps,
            "weights": [self._weight, self._squares],
            "sum": self._sum.tolist(),
            "products": self._products.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.steps = int(state["steps"])
        self._weight, self._squares = state["weights"]
        self._sum, self._products = np.array(state["sum"]), np.array(state["products"])


def corrected(ratios: Ratios, factor: Array, standard_error: Array, *, level: float) -> Ratios:
    """The ratios times factors whose relative standard errors widen their intervals.

    The two errors are independent and add in quadrature, on the scale of logarithms, on which
    factors are symmetric.

    Args:
        ratios: of the groups.
        factor: [n_groups], 1 where there is nothing to correct.
        standard_error: [n_groups], 0 where there is none.
        level: of the interval.
    """
    # Where it is used: scipy.special takes 0.2 s to import.
    from scipy.special import ndtri  # type: ignore[import-untyped]

    known = float(ndtri((1 + level) / 2)) * standard_error
    b, low, high = ratios.b_simple, ratios.low, ratios.high
    centre = np.where(b > 0, b, np.where(low > 0, low, high))

    def end(value: Array, side: int) -> Array:
        apart = np.hypot(np.log(value / centre), known)
        found = factor * centre * np.exp(np.minimum(side * apart, 700.0))
        return np.where((value > 0) & ((known > 0) | (factor != 1)), found, value)

    with np.errstate(all="ignore"):  # of the values that do not exist
        return replace(ratios, b_simple=factor * b, low=end(low, -1), high=end(high, 1))


class _Errors:
    """Running mean and mean square of relative errors, [n_groups]; NaN of a group without any."""

    def __init__(self, n_groups: int) -> None:
        self._weight, self._squares, self._sum, self._sum_sq = np.zeros((4, n_groups))

    def update(self, errors: Array, seen: NDArray[np.bool_]) -> None:
        """Take in a step, whose groups that are not `seen` have nothing to tell."""
        keep = np.where(seen, DECAY, 1.0)
        self._weight = keep * self._weight + seen
        self._squares = keep**2 * self._squares + seen
        self._sum = keep * self._sum + np.where(seen, errors, 0.0)
        self._sum_sq = keep * self._sum_sq + np.where(seen, np.square(errors), 0.0)

    @property
    def rms(self) -> Array | None:
        return np.sqrt(self._mean(self._sum_sq)) if self._weight.any() else None

    @property
    def of_mean(self) -> Array | None:
        """A mean that differs from 0 is a drift; it counts in full."""
        if not self._weight.any():
            return None
        mean, p = self._mean(self._sum), self._mean(self._mean(self._squares))
        spread = np.maximum(self._mean(self._sum_sq) - np.square(mean), 0)
        own = np.divide(spread * p, 1 - p, out=np.zeros_like(p), where=p < 1)
        return np.asarray(np.sqrt(np.square(mean) + own))

    def _mean(self, sums: Array) -> Array:
        unknown = np.full_like(sums, np.nan)
        return np.divide(sums, self._weight, out=unknown, where=self._weight > 0)

    def state_dict(self) -> dict[str, Any]:
        return {
            "weight": self._weight.tolist(),
            "squares": self._squares.tolist(),
            "sum": self._sum.tolist(),
            "sum_sq": self._sum_sq.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._weight, self._squares = np.array(state["weight"]), np.array(state["squares"])
        self._sum, self._sum_sq = np.array(state["sum"]), np.array(state["sum_sq"])
