"""Figures 4 and 5: what breaks the published approximations, in simulation and in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gnsmon.estimators.values import Array
from gnsmon.figures.page import Page, Rows, number
from gnsmon.norms.contractions import outer_sq_norms, sogns_sq_norms

FEATURES, OUTPUTS, POSITIONS = 64, 64, 64
GRADIENTS = (0.0, 0.1, 0.5)  # correlation of output gradients over positions
LENGTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SHIFTS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
SHARED = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
SPREAD = 0.7  # standard deviation of the log of an example's activation scale, first panel
VARIANTS = {
    "4": "Naive approximation (sigma = 1) against exact norms, simulated",
    "5": "Relaxed approximation (SOGNS) against exact norms, simulated",
}


@dataclass(frozen=True)
class Setting:
    """How activations and output gradients of a layer are drawn.

    x_ti = scale (shift + sqrt(a) z_i + sqrt(1 - a) e_ti) and dy_tk = sqrt(c) u_k + sqrt(1 - c) v_tk
    with independent standard normals, a = `activations` and c = `gradients`.
    """

    positions: int = POSITIONS
    shift: float = 0.0  # mean of the activations
    activations: float = 0.0  # their correlation over positions, about the mean
    gradients: float = 0.0  # correlation of output gradients over positions


def expected_ratio(of: Setting, *, unit_variance: bool) -> float:
    """E eta^2 / E n^2 in closed form.

    Of the activations' second moment m = 1 + shift^2 the share h = (shift^2 + a)/m is common to all
    positions. With s = sum_t dy_t and C = E |s|^2 / E sum_t |dy_t|^2 = 1 + c (T - 1),

        E n^2 = I m (h E |s|^2 + (1 - h) E |s|^2 / C)        E eta^2 = I m E |s|^2

    so the ratio is C / (h C + 1 - h), and that over m for sigma = 1. It is one where h = 1 (one
    vector at all positions, which is what the derivation's dropped delta amounts to) or C = 1
    (output gradients that do not add up); at most it is the lesser of C and 1/h.
    """
    moment = 1 + of.shift**2
    common = (of.shift**2 + of.activations) / moment
    add_up = 1 + of.gradients * (of.positions - 1)
    ratio = add_up / (common * add_up + 1 - common)
    return ratio / moment if unit_variance else ratio


def layer(
    of: Setting, examples: int, generator: torch.Generator, *, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output gradients [B, 1, T, K] and activations [B, 1, T, I], in float64.

    `scale` [B] multiplies each example's activations.
    """

    def normal(positions: int, width: int) -> Tensor:
        size = examples, 1, positions, width
        return torch.randn(size, generator=generator, dtype=torch.float64)

    def correlated(width: int, rho: float) -> Tensor:
        return rho**0.5 * normal(1, width) + (1 - rho) ** 0.5 * normal(of.positions, width)

    dy, x = correlated(OUTPUTS, of.gradients), of.shift + correlated(FEATURES, of.activations)
    return dy, x if scale is None else scale[:, None, None, None] * x


@dataclass(frozen=True)
class Point:
    """Ratio of means eta^2 / n^2 over the examples."""

    setting: Setting
    ratio: float
    error: float  # standard error of `ratio`
    theory: float


@dataclass(frozen=True)
class Numbers:
    """What one figure is made of."""

    unit_variance: bool
    exact: Array  # [examples] of the first panel: nothing violated but the scale
    approximate: Array  # [examples]
    along_length: list[Point]
    along_shift: list[Point]
    along_shared: list[Point]


def measure(*, unit_variance: bool, examples: int = 256, seed: int = 0) -> Numbers:
    """Simulate all settings; `examples` in each."""
    generator = torch.Generator().manual_seed(seed)
    scale = (SPREAD * torch.randn(examples, generator=generator, dtype=torch.float64)).exp()
    factors = layer(Setting(), examples, generator, scale=scale)
    exact, approximate = _norms(*factors, unit_variance)

    def points(settings: Sequence[Setting]) -> list[Point]:
        return [_point(s, examples, unit_variance, generator) for s in settings]

    return Numbers(
        unit_variance,
        exact.numpy(),
        approximate.numpy(),
        points([Setting(positions=t, gradients=c) for c in GRADIENTS for t in LENGTHS]),
        points([Setting(shift=m, gradients=c) for c in GRADIENTS for m in SHIFTS]),
        points([Setting(activations=a, gradients=c) for c in GRADIENTS for a in SHARED]),
    )


def _norms(dy: Tensor, x: Tensor, unit_variance: bool) -> tuple[Tensor, Tensor]:
    exact = outer_sq_norms(dy, x, path="direct")
    return exact, sogns_sq_norms(dy, x, unit_variance=unit_variance)


def _point(
    setting: Setting, examples: int, unit_variance: bool, generator: torch.Generator
) -> Point:
    exact, approximate = _norms(*layer(setting, examples, generator), unit_variance)
    ratio = approximate.mean() / exact.mean()
    error = (approximate - ratio * exact).std() / exact.mean() / examples**0.5
    theory = expected_ratio(setting, unit_variance=unit_variance)
    return Point(setting, float(ratio), float(error), theory)


def page(numbers: Numbers) -> Page:
    """Figure 4 for sigma = 1, figure 5 otherwise."""
    name = "4" if numbers.unit_variance else "5"
    log_ratio = torch.tensor(numbers.approximate / numbers.exact).log()
    low, middle, high = log_ratio.quantile(log_ratio.new_tensor([0.05, 0.5, 0.95])).exp().tolist()
    text = (
        f"A linear layer, {FEATURES} inputs and {OUTPUTS} outputs, simulated: activations with a "
        "mean and a part common to all positions, output gradients with one of their own. Lines "
        "are the closed form of expected over expected norm, points the simulation.",
        "Top left: independent activations and output gradients, the scale of an example's "
        f"activations lognormal ({SPREAD:g}): of single examples the approximation is "
        f"{middle:.2f} times the exact norm in the median, {low:.2f} to {high:.2f} in nine of ten.",
        "What decides is whether output gradients add up over the positions while activations do "
        "not: with C = |sum dy|² / sum |dy|² (in expectation) and h the share of the activations' "
        "second moment that is common to all positions, the ratio is C / (h C + 1 - h)"
        + (", over the second moment itself." if numbers.unit_variance else ".")
        + " Where that is one, this is as right as figure 5." * numbers.unit_variance
        + " Independent zero-mean activations are the worst case, not the safe one: the "
        "derivation drops a Kronecker delta over positions, which is right only for one vector at "
        "all positions (h = 1). A mean of the activations, or their correlation over positions, "
        "brings the ratio back" + (" before that division." if numbers.unit_variance else "."),
    )
    return Page(name, VARIANTS[name], text, _rows(numbers), partial(plot, numbers))


def _rows(numbers: Numbers) -> Rows:
    head = (
        "T",
        "correlation of dy",
        "mean of x",
        "correlation of x",
        "eta² / n²",
        "±",
        "closed form",
    )
    rows = [head]
    for p in [*numbers.along_length, *numbers.along_shift, *numbers.along_shared]:
        s = p.setting
        drawn = str(s.positions), f"{s.gradients:g}", f"{s.shift:g}", f"{s.activations:g}"
        rows.append((*drawn, *map(number, (p.ratio, p.error, p.theory))))
    return rows


def plot(numbers: Numbers, path: Path) -> None:
    """Draw the four panels."""
    from gnsmon.figures.drawing import (
        APPROXIMATE,
        EXACT,
        FAINT,
        THIRD,
        canvas,
        plain_numbers,
        truth_line,
    )

    title = VARIANTS["4" if numbers.unit_variance else "5"]
    colours = dict(zip(GRADIENTS, (EXACT, THIRD, APPROXIMATE), strict=True))
    with canvas(path, title, rows=2, columns=2, size=(9.6, 7.6)) as (cloud, *others):
        cloud.plot(numbers.exact, numbers.approximate, ".", color=EXACT, alpha=0.6, ms=5)
        ends = [f(numbers.exact.tolist()) for f in (min, max)]
        cloud.plot(ends, ends, color=FAINT, lw=1, ls=(0, (4, 3)), label="equal")
        cloud.set(xscale="log", yscale="log", title=f"an example's scale varies, T = {POSITIONS}")
        cloud.set(xlabel="exact squared norm n²", ylabel="approximation eta²")
        cloud.legend(loc="upper left")
        plain, mean, shared = (
            f"activations {how}"
            for how in (
                "independent, of mean 0",
                f"with a mean, T = {POSITIONS}",
                f"correlated over positions, T = {POSITIONS}",
            )
        )
        for axes, points, key, label, about in (
            (
                others[0],
                numbers.along_length,
                "positions",
                "positions T",
                plain,
            ),
            (others[1], numbers.along_shift, "shift", "mean of x / standard deviation", mean),
            (
                others[2],
                numbers.along_shared,
                "activations",
                "correlation of x",
                shared,
            ),
        ):
            for c, colour in colours.items():
                own = [p for p in points if p.setting.gradients == c]
                _line(axes, own, key, colour, f"correlation of dy {c:g}")
            truth_line(axes)
            axes.set(xlabel=label, ylabel="eta² / n²", yscale="log", title=about)
            plain_numbers(axes.yaxis, subs=(1, 2, 5))
        others[0].set_xscale("log")
        plain_numbers(others[0].xaxis, base=2)
        others[0].legend(loc="upper left")


def _line(axes: Any, points: list[Point], key: str, colour: str, label: str) -> None:
    x = [getattr(p.setting, key) for p in points]
    axes.plot(x, [p.theory for p in points], color=colour, lw=1.6, label=label)
    twice = [2 * p.error for p in points]
    axes.errorbar(x, [p.ratio for p in points], twice, fmt="o", ms=4, color=colour, lw=1)
