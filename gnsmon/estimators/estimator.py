"""From the norm pairs of measured steps to b_simple with its interval, for every group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gnsmon.estimators.columns import Ratios
from gnsmon.estimators.interval import ratio_interval
from gnsmon.estimators.moments import moments
from gnsmon.estimators.smoothing import Averages, Ema, Window
from gnsmon.estimators.values import Array, Moments, NormPair


class Estimator:
    """Averages moments over steps and divides last; holds all the state there is.

    Memory is one of `decay` (per measured step, 0.99 unless another is named), `half_life` (in
    `unit`, a word of the caller's such as "tokens"; `elapsed` counts it) and `window` (steps).
    `grad_memory` is how many times as long |G|² is remembered as S.

    Raises:
        ValueError: on more than one memory, or one out of range.
    """

    def __init__(
        self,
        n_groups: int,
        *,
        decay: float | None = None,
        half_life: float | None = None,
        window: int | None = None,
        grad_memory: float = 1.0,
        unit: str = "steps",
        level: float = 0.95,
    ) -> None:
        if decay is None and half_life is None and window is None:
            decay = 0.99
        self._n_groups, self._unit, self._level = n_groups, unit, level
        self._smoothing: Ema | Window
        self._averages: Averages | None = None  # of the smoothing, once asked for
        if window is None:
            self._smoothing = Ema(
                n_groups, decay=decay, half_life=half_life, grad_memory=grad_memory
            )
        elif decay is None and half_life is None and grad_memory == 1.0:
            self._smoothing = Window(window)
        else:
            raise ValueError("window= weighs its steps alike; drop decay, half_life, grad_memory")

    def update(self, pair: NormPair, *, elapsed: float = 1.0) -> Moments:
        """The step's own moments, after taking them in.

        Raises:
            ValueError: where `moments` does, or on another number of groups; nothing is taken in.
        """
        step = moments(pair)
        if step.grad_sq_norm.shape != (self._n_groups,):
            raise ValueError(
                f"expected norms of {self._n_groups} groups, got shape {step.grad_sq_norm.shape}"
            )
        self._smoothing.update(step, elapsed=elapsed)
        self._averages = None
        return step

    def ratios(self) -> Ratios:
        """b_simple of every group, with interval, status and reason."""
        if (averages := self._so_far()) is None:
            return Ratios.undefined(self._n_groups, "no step measured yet")
        return ratio_interval(averages, level=self._level)

    @property
    def averages(self) -> Averages:
        """Smoothed moments with their covariances; raises ValueError before the first step."""
        if (averages := self._so_far()) is None:
            raise ValueError("no step measured yet: call update(pair) first")
        return averages

    @property
    def tr_sigma(self) -> Array:
        """Smoothed S per example, [n_groups]; raises ValueError before the first step."""
        return np.asarray(self.averages.mean[0])

    @property
    def grad_sq_norm(self) -> Array:
        """Smoothed |G|², [n_groups]; raises ValueError before the first step."""
        return np.asarray(self.averages.mean[1])

    @property
    def n_eff(self) -> float:
        """Effective number of averaged steps, 0 before the first."""
        averages = self._so_far()
        return 0.0 if averages is None else averages.n_eff

    def _so_far(self) -> Averages | None:
        if self._averages is None:
            self._averages = self._smoothing.averages()
        return self._averages

    def state_dict(self) -> dict[str, Any]:
        """All state, JSON-able; JSON gives back the same floats."""
        return {
            "n_groups": self._n_groups,
            "unit": self._unit,
            "smoothing": self._smoothing.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from where `state_dict` was taken; memory and level stay this object's.

        Raises:
            ValueError: if the state is of other groups, another unit or another kind of memory.
        """
        own = self.state_dict()
        for what, expected, got in (
            ("number of groups", own["n_groups"], state["n_groups"]),
            ("unit", own["unit"], state["unit"]),
            ("kind of memory", own["smoothing"]["kind"], state["smoothing"]["kind"]),
        ):
            if expected != got:
                raise ValueError(
                    f"{what}: expected {expected!r}, got {got!r} in the state; construct the "
                    "estimator as the saved one was, or start it afresh"
                )
        self._smoothing.load_state_dict(state["smoothing"])
        self._averages = None
