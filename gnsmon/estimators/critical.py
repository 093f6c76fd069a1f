"""The critical batch size, fitted to the steps that training took at several batch sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import brentq, minimize_scalar  # type: ignore[import-untyped]

from gnsmon.estimators.interval import student_quantile
from gnsmon.estimators.values import Array

LEAST = 3  # batch sizes: two fix the curve and leave nothing to tell its error from
REACH = 1e4  # how many times beyond the batch sizes the curve is still told from its limits


@dataclass(frozen=True)
class CriticalBatch:
    """Where the two costs of a batch size balance, in examples; None is an open end.

    "below" and "above": the best curve has it outside the batch sizes that were run, so that
    there is no `b_crit`, only the bound `high` or `low`. Below, `s_min` is known; above, it is not.
    """

    status: Literal["ok", "below", "above", "undefined"]
    reason: str | None
    b_crit: float | None
    low: float | None
    high: float | None
    s_min: float | None  # steps of a huge batch
    scatter: float | None  # root mean square of the logarithms of the steps about the curve

    @property
    def e_min(self) -> float | None:
        """Examples of a tiny batch, b_crit s_min."""
        if self.b_crit is None or self.s_min is None:
            return None
        return self.b_crit * self.s_min


def fit_critical_batch(
    batch_sizes: Sequence[float] | Array, steps: Sequence[float] | Array, *, level: float = 0.95
) -> CriticalBatch:
    """The curve steps = s_min (1 + b_crit / B) of McCandlish et al. 2018, 2.7, through the runs.

    Least squares of log steps, of the means over the runs of each batch size: runs of one size
    share the misfit of the curve there, so that they are one point of the error, not several. With
    n sizes and RSS(b) the least sum of squares at b, the interval is where RSS(b) is at most
    RSS(b_crit) (1 + t² / (n - 2)), t Student's quantile at n - 2 degrees of freedom.

    Args:
        batch_sizes: [runs], examples in a step, in any order, repeated for seeds.
        steps: [runs], to the target at the best learning rate; not finite for a run that did not
            reach it, which leaves its batch size out: the mean of the others would be too small.
        level: of the interval.

    Raises:
        ValueError: on lengths that differ, a batch size or number of steps that is not positive, or
            a level outside (0, 1).

    Example:
        >>> fit = fit_critical_batch([2, 8, 32, 128], [170.0, 50, 20, 12.5])
        >>> round(fit.b_crit, 6), round(fit.s_min, 6), fit.status
        (32.0, 10.0, 'ok')
    """
    if not 0 < level < 1:
        raise ValueError(f"expected 0 < level < 1, such as 0.95, got {level}")
    points = _points(batch_sizes, steps)
    if len(points.size) < LEAST:
        found = f"{len(points.size)} batch sizes of which every run reached the target"
        return _undefined(f"{found}, expected {LEAST} or more")
    b = _best(points)
    freedom = len(points.size) - 2
    least = float(points.rss(b)[0])
    most = least * (1 + student_quantile(freedom, (1 + level) / 2) ** 2 / freedom)
    low, high = _ends(points, b, most)
    smallest, largest = float(points.size.min()), float(points.size.max())
    if (low is None or b < smallest) and (high is None or b > largest):
        return _undefined("the scatter leaves open steps that stay the same and steps like 1 / B")
    scatter = float(np.sqrt(least / points.weight.sum()))
    if b < smallest:
        reason = f"the best curve has it below the smallest batch, {smallest:g}"
        high = None if high is None else max(high, smallest)
        return CriticalBatch("below", reason, None, None, high, points.s_min(b), scatter)
    if b > largest:
        reason = f"the best curve has it above the largest batch, {largest:g}"
        low = None if low is None else min(low, largest)
        return CriticalBatch("above", reason, None, low, None, None, scatter)
    open_ends = _outside(low, high, smallest, largest)
    return CriticalBatch("ok", open_ends, b, low, high, points.s_min(b), scatter)


class _Points(NamedTuple):
    """Means over the runs of each batch size."""

    size: Array  # [n]
    log_steps: Array  # [n]
    weight: Array  # [n] runs

    def rss(self, b: float | Array) -> Array:
        """Least sum of squares about the curves of b [m] or a number, over s_min: [m]."""
        return self.about(np.log1p(np.atleast_1d(b)[:, None] / self.size))

    def about(self, curve: Array) -> Array:
        """The same about the shapes `curve` [m, n]."""
        off = self.log_steps - curve
        off = off - (off @ self.weight / self.weight.sum())[:, None]
        return np.asarray(off**2 @ self.weight)

    def s_min(self, b: float) -> float:
        """That of the best curve of b."""
        off = self.log_steps - np.log1p(b / self.size)
        return float(np.exp(off @ self.weight / self.weight.sum()))


def _points(batch_sizes: Sequence[float] | Array, steps: Sequence[float] | Array) -> _Points:
    sizes, taken = np.asarray(batch_sizes, float), np.asarray(steps, float)
    if sizes.ndim != 1 or sizes.shape != taken.shape:
        raise ValueError(
            "expected one number of steps for each batch size, got shapes "
            f"{sizes.shape} and {taken.shape}"
        )
    reached = np.isfinite(taken)
    if not (np.isfinite(sizes).all() and (sizes > 0).all() and (taken[reached] > 0).all()):
        raise ValueError(f"expected positive batch sizes and steps, got {sizes} and {taken}")
    size = np.setdiff1d(sizes, sizes[~reached])
    logs = [np.log(taken[sizes == b]) for b in size]
    weight = np.array([len(x) for x in logs], float)
    return _Points(size, np.array([x.mean() for x in logs]), weight)


def _best(points: _Points) -> float:
    """The b of least squares, sought up to `REACH` times beyond the batch sizes."""
    grid = _grid(points)
    i = int(points.rss(grid).argmin())
    if i in (0, len(grid) - 1):
        return float(grid[i])
    around = np.log(grid[[i - 1, i + 1]])
    found = minimize_scalar(
        lambda x: points.rss(np.exp(x))[0], bounds=around, method="bounded", options={"xatol": 1e-9}
    )
    return float(np.exp(found.x))


def _ends(points: _Points, b: float, most: float) -> tuple[float | None, float | None]:
    """The outermost places where the sum of squares is `most`; None where the limit is below it."""
    same, inverse = points.about(np.stack([0 * points.size, -np.log(points.size)]))
    grid = np.sort(np.append(_grid(points), b))
    within = points.rss(grid) <= most
    within[np.searchsorted(grid, b)] = True
    first, last = (int(i) for i in np.flatnonzero(within)[[0, -1]])

    def above(log_b: float) -> float:
        return float(points.rss(np.exp(log_b))[0]) - most

    def crossing(i: int, j: int) -> float:
        x, y = np.log(grid[i]), np.log(grid[j])
        if above(x) * above(y) >= 0:  # equal to rounding, where every run lies on the curve
            return float(grid[j])
        return float(np.exp(brentq(above, x, y)))

    low = None if same <= most or first == 0 else crossing(first - 1, first)
    high = None if inverse <= most or last == len(grid) - 1 else crossing(last + 1, last)
    return low, high


def _grid(points: _Points) -> Array:
    return np.geomspace(points.size.min() / REACH, points.size.max() * REACH, 1000)


def _outside(low: float | None, high: float | None, smallest: float, largest: float) -> str | None:
    """What the interval leaves to the curve alone, where no batch was run."""
    ends = []
    if low is None or low < smallest:
        ends.append(f"its lower end is below the smallest batch, {smallest:g}")
    if high is None or high > largest:
        ends.append(f"its upper end is above the largest batch, {largest:g}")
    return " and ".join(ends) or None


def _undefined(reason: str) -> CriticalBatch:
    return CriticalBatch("undefined", reason, None, None, None, None, None)
