"""The picture of a problem: steps against batch size, examples against steps, both noise scales."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from critical.findings import Finding
from critical.problems import Problem
from gnsmon.plots import MAIN, OTHERS, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (MAIN, *OTHERS)


def draw(problem: Problem, found: list[Finding], path: Path) -> None:
    """Write the picture; ImportError without matplotlib."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(14.5, 4.6), dpi=120, layout="constrained")
        steps, frontier, noise = figure.subplots(1, 3)
        for finding, colour in zip(found, COLOURS, strict=False):
            _steps(steps, frontier, finding, colour, problem.batch_sizes)
        _compare(noise, found)
        steps.set(xlabel="batch size (examples)", ylabel="steps to the held-out loss")
        frontier.set(xlabel="steps", ylabel="examples")
        noise.set(xlabel="held-out loss (training goes to the right)", ylabel="examples")
        drawn = [axes for axes in (steps, frontier, noise) if np.isfinite(axes.dataLim.minpos[1])]
        for axes in drawn:  # nothing has no logarithm
            axes.set_yscale("log")
        noise.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        noise.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
        for axes in (steps, frontier):
            if axes in drawn:
                axes.set_xscale("log", base=2 if axes is steps else 10)
            axes.legend()
        steps.set_xticks(problem.batch_sizes, [str(size) for size in problem.batch_sizes])
        steps.set_title(f"{problem.name}: steps, best learning rate")
        frontier.set_title("the same as examples against steps")
        noise.set_title("measured critical batch and noise scale")
        figure.savefig(path)


def _steps(
    steps: Axes, frontier: Axes, finding: Finding, colour: str, sizes: tuple[int, ...]
) -> None:
    points = [(b, taken) for b, (_, runs) in finding.steps.items() for taken in runs]
    size, taken = np.array([p for p in points if math.isfinite(p[1])]).reshape(-1, 2).T
    fit, label = finding.fit, f"loss {finding.target:g}"
    label += f", b_crit {fit.status if fit.b_crit is None else format(fit.b_crit, '.3g')}"
    steps.plot(size, taken, "o", ms=4, color=colour, alpha=0.7, label=label)
    frontier.plot(taken, taken * size, "o", ms=4, color=colour, alpha=0.7, label=label)
    if fit.b_crit is None or fit.s_min is None:
        return
    b = np.geomspace(min(sizes), max(sizes), 200)
    curve = fit.s_min * (1 + fit.b_crit / b)
    steps.plot(b, curve, color=colour, lw=1.3)
    frontier.plot(curve, curve * b, color=colour, lw=1.3)
    steps.axvline(fit.b_crit, color=colour, lw=0.8, ls=":")


def _compare(axes: Axes, found: list[Finding]) -> None:
    measured = [(f.target, f.fit.b_crit, f.fit.low, f.fit.high) for f in found]
    noise = [(f.target, *f.noise.own) for f in found if f.noise is not None]
    in_metric = [(f.target, *f.noise.in_metric) for f in found if f.noise is not None]
    for rows, colour, marker, label in (
        (measured, COLOURS[0], "o", "b_crit, from the grid of runs"),
        (noise, COLOURS[1], "s", "b_simple, mean along the best run"),
        (in_metric, COLOURS[2], "D", "the same in the optimizer's metric"),
    ):
        known = [(x, y, low or y, high or y) for x, y, low, high in rows if y is not None]
        if known:
            x, y, low, high = np.array(known).T
            axes.errorbar(
                x,
                y,
                np.maximum([y - low, high - y], 0),
                fmt=f"{marker}-",
                color=colour,
                capsize=3,
                label=label,
            )
    for x, y, low, high in measured:
        if y is None and (bound := low or high):
            axes.plot(x, bound, "^" if low else "v", color=COLOURS[0], ms=9)
    axes.invert_xaxis()
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
