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
        self._memory = np.array([1.0, grad_memory])
        self._weight: Array = np.zeros(2)
        self._products: Array = np.zeros((2, 2))
        self._mean: Array = np.zeros((2, n_groups))
        none = np.zeros((2, 2, n_groups))
        self._now = self._lag = _CrossCovariance(np.zeros(()), self._mean, self._mean, none)
        self._last: Array | None = None

    def update(self, step: Moments, *, elapsed: float = 1.0) -> None:
        """Take in a step, `elapsed` units of the half-life after the one before."""
        assert elapsed >= 0, elapsed
        decay = self._decay if self._half_life is None else 2.0 ** (-elapsed / self._half_life)
        fade = np.asarray(decay) ** (1 / self._memory)
        x = _stack(step)
        self._weight = fade * self._weight + 1
        self._products = fade[:, None] * fade * self._products + 1
        self._mean = self._mean + (x - self._mean) / self._weight[:, None]
        self._now = self._now.fold(x, x, fade.max())
        if self._last is not None:
            self._lag = self._lag.fold(x, self._last, fade.max())
        self._last = x

    def averages(self) -> Averages | None:
        """The averages so far, None before the first step."""
        if self._last is None:
            return None
        p = self._products / (self._weight[:, None] * self._weight)
        spread = 1 - p.diagonal().min()  # E of a weighted sample variance, per step; 0 at first
        scale = 1 / spread if spread > 0 else 1.0
        return Averages(self._mean, scale * self._now.value, scale * self._lag.value, p)

    def state_dict(self) -> dict[str, Any]:
        """Weights, means and covariances as JSON-able lists, which keep the floats exactly."""
        own = (self._weight, self._products, self._mean)
        return {
            "kind": "ema",
            "own": [x.tolist() for x in own],
            "now": [x.tolist() for x in self._now],
            "lag": [x.tolist() for x in self._lag],
            "last": None if self._last is None else self._last.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from where `state_dict` was taken; the memory stays that of this object."""
        self._weight, self._products, self._mean = map(np.array, state["own"])
        self._now = _CrossCovariance(*map(np.array, state["now"]))
        self._lag = _CrossCovariance(*map(np.array, state["lag"]))
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
    """Weighted means of two series and their covariance, updated about the running means.

    West's update (1979): no difference of large sums, so float64 keeps a spread of 1e-9 the mean.
    """

    weight: Array  # []
    x: Array  # [2, n_groups]
    y: Array  # [2, n_groups]
    value: Array  # [2, 2, n_groups]

    def fold(self, x: Array, y: Array, fade: Array) -> _CrossCovariance:
        weight = fade * self.weight + 1
        share = 1 / weight
        dx, dy = x - self.x, y - self.y
        value = (1 - share) * (self.value + share * dx[:, None] * dy)
        return _CrossCovariance(weight, self.x + share * dx, self.y + share * dy, value)


def _stack(step: Moments) -> Array:
    return np.stack([step.tr_sigma, step.grad_sq_norm]).astype(np.float64)  # [2, n_groups]
