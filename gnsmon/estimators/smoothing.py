"""Averages of the two moments over steps, with the covariances that their interval needs."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from gnsmon.estimators.values import Array, Moments


@dataclass(frozen=True)
class Averages:
    """Averaged moments and the spread of the steps behind them; axes of 2 are (S, |G|²)."""

    mean: Array  # [2, n_groups]
    covariance: Array  # [2, 2, n_groups] of one step, unbiased if steps are independent
    lag_covariance: Array  # [2, 2, n_groups] of a step with the one before it
    sum_sq_weights: Array  # [2, 2] P_xy = sum_t w^x_t w^y_t of the weights in `mean`

    @cached_property
    def n_eff(self) -> float:
        """Effective number of averaged steps, of the longer of the two memories."""
        return 1 / float(self.sum_sq_weights.diagonal().min())


class Ema:
    """Exponential averages of S and |G|², their weights normalised from the first step on.

    A step's weight fades by `decay` per measured step, or by 2^(-elapsed / half_life) in whatever
    unit the caller counts: steps, examples, tokens. |G|² is the noisier of the two and may
    remember `grad_memory` times as long; the covariances are those under the longer memory.

    Raises:
        ValueError: unless one of `decay` in [0, 1) and `half_life` > 0 is given, and
            `grad_memory` > 0.
    """

    def __init__(
        self,
        n_groups: int,
        *,
        decay: float | None = None,
        half_life: float | None = None,
        grad_memory: float = 1.0,
    ) -> None:
        if (decay is None) == (half_life is None):
            raise ValueError(f"expected one of decay and half_life, got {decay=}, {half_life=}")
        if not (0 <= (decay or 0) < 1 and (half_life is None or half_life > 0) and grad_memory > 0):
            raise ValueError(
                "expected 0 <= decay < 1, half_life > 0 and grad_memory > 0, got "
                f"{decay=}, {half_life=}, {grad_memory=}"
            )
        self._decay, self._half_life = decay, half_life
        # Sums that fade, each by its own power of `decay`: see `_sums`.
        power = 1 / np.array([1.0, grad_memory])
        powers = power, (power[:, None] + power).ravel(), power.min().repeat(2)
        self._powers, self._weights = np.concatenate(powers), np.zeros(8)
        self._mean: Array = np.zeros((2, n_groups))
        # Of the steps with themselves, and with those before them.
        none = np.zeros((2, 2, n_groups))
        self._spread = _CrossCovariance(none, none, np.zeros((2, 2, 2, n_groups)))
        self._last: Array | None = None

    def update(self, step: Moments, *, elapsed: float = 1.0) -> None:
        """Take in a step, `elapsed` units of the half-life after the one before."""
        assert elapsed >= 0, elapsed
        decay = self._decay if self._half_life is None else 2.0 ** (-elapsed / self._half_life)
        self._weights = np.float64(decay) ** self._powers * self._weights + 1
        x = _stack(step)
        weight, _, spread = self._sums
        self._mean = self._mean + (x - self._mean) / weight[:, None]
        if self._last is None:  # one step, and none before it
            spread[1] = 0.0
            pair = np.array([x, np.zeros_like(x)])
            self._spread = self._spread._replace(x=pair, y=pair)
        else:
            self._spread = self._spread.fold(x, np.array([x, self._last]), spread)
        self._last = x

    @property
    def _sums(self) -> tuple[Array, Array, Array]:
        """Of the steps' weights w_x [2], of their products P_xy [2, 2], of those in the spread [2].

        P_xy is that of `Averages.sum_sq_weights` before it is normalised.
        """
        return self._weights[:2], self._weights[2:6].reshape(2, 2), self._weights[6:]

    def averages(self) -> Averages | None:
        """The averages so far, None before the first step."""
        if self._last is None:
            return None
        weight, products, _ = self._sums
        p = products / (weight[:, None] * weight)
        spread = 1 - p.diagonal().min()  # E of a weighted sample variance, per step; 0 at first
        scale = 1 / spread if spread > 0 else 1.0
        now, lag = scale * self._spread.value
        return Averages(self._mean, now, lag, p)

    def state_dict(self) -> dict[str, Any]:
        """Weights, means and covariances as JSON-able lists, which keep the floats exactly."""
        *own, spread = self._sums
        now, lag = zip(spread, *self._spread, strict=True)
        return {
            "kind": "ema",
            "own": [x.tolist() for x in (*own, self._mean)],
            "now": [x.tolist() for x in now],
            "lag": [x.tolist() for x in lag],
            "last": None if self._last is None else self._last.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from where `state_dict` was taken; the memory stays that of this object."""
        weight, products, self._mean = map(np.array, state["own"])
        spread, *values = map(np.array, zip(state["now"], state["lag"], strict=True))
        self._weights = np.concatenate([weight, products.ravel(), spread])
        self._spread = _CrossCovariance(*values)
        self._last = None if state["last"] is None else np.array(state["last"])


class Window:
    """Plain averages of S and |G|² over the last `steps` measured steps.

    Raises:
        ValueError: if `steps` is below 1.
    """

    def __init__(self, steps: int) -> None:
        if steps < 1:
            raise ValueError(f"expected a window of at least 1 step, got {steps}")
        self._steps: deque[Array] = deque(maxlen=steps)

    def update(self, step: Moments, *, elapsed: float = 1.0) -> None:
        """Take in a step and forget the oldest one; `elapsed` plays no part."""
        self._steps.append(_stack(step))

    def averages(self) -> Averages | None:
        """The averages over the window, None before the first step."""
        if not self._steps:
            return None
        x = np.stack(self._steps)  # [n, 2, n_groups]
        n, mean = len(x), x.mean(0)
        dx = x - mean
        covariance = np.einsum("txg,tyg->xyg", dx, dx) / max(n - 1, 1)
        lag = np.einsum("txg,tyg->xyg", dx[1:], dx[:-1]) / max(n - 1, 1)
        return Averages(mean, covariance, lag, np.full((2, 2), 1 / n))

    def state_dict(self) -> dict[str, Any]:
        """The steps in the window as JSON-able lists."""
        return {"kind": "window", "steps": [x.tolist() for x in self._steps]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from where `state_dict` was taken, with the newest steps that fit."""
        self._steps = deque(map(np.array, state["steps"]), maxlen=self._steps.maxlen)


class _CrossCovariance(NamedTuple):
    """Weighted means of n pairs of series and their covariances, updated about the running means.

    West's update (1979): no difference of large sums, so float64 keeps a spread of 1e-9 the mean.
    """

    x: Array  # [n, 2, n_groups]
    y: Array  # [n, 2, n_groups]
    value: Array  # [n, 2, 2, n_groups]

    def fold(self, x: Array, y: Array, weight: Array) -> _CrossCovariance:
        """With steps x and y, one of each pair, `weight` [n] being the sum of weights with them."""
        share = (1 / weight)[:, None, None]
        dx, dy = x - self.x, y - self.y
        near, rest = share * dx, 1 - share[..., None]
        value = rest * (self.value + near[:, :, None] * dy[:, None])
        return _CrossCovariance(self.x + near, self.y + share * dy, value)


def _stack(step: Moments) -> Array:
    return np.array([step.tr_sigma, step.grad_sq_norm], dtype=np.float64)  # [2, n_groups]
