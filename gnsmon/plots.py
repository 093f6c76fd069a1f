"""Pictures of a run: the noise scale with its interval, against the batch size and the loss."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from gnsmon.estimators.values import Array
from gnsmon.sinks.jsonl import Log
from gnsmon.sinks.wording import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from gnsmon.advice import Advice

MAIN, BATCH, LOSS, INK, FAINT = "#1f5fa8", "#3d3d3d", "#5b7f3b", "#222222", "#5a5a5a"
OTHERS = ("#c2571a", "#7a4fa3", "#1a8a7a", "#b03060")
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.edgecolor": "#b5b5b5",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e9e9e9",
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.labelcolor": INK,
}
MOST = 2000  # points drawn per line; more than the picture has columns


def plot_run(
    log: Log, path: str | Path, *, loss: Sequence[tuple[int, float]] | None = None
) -> Path:
    """The path of a picture of the run: b_simple in examples against the step and the loss.

    The losses are `loss` as (step, value), else those of the log, else their panels are left out.
    ValueError for a log without readings, ImportError without matplotlib.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, MaxNLocator
    except ImportError as error:
        raise ImportError('a plot needs matplotlib: pip install "gnsmon[report]"') from error
    if not len(log.readings):
        raise ValueError(f"{log.path} holds no readings to plot yet: let the run go on")
    own = np.stack([log.losses["step"], log.losses["loss"]], axis=1)
    losses = own if loss is None else np.array(loss, dtype=float).reshape(-1, 2)
    losses = losses[np.isfinite(losses).all(axis=1)]
    with rc_context(STYLE):
        size = (11.6, 6.4) if len(losses) else (9.6, 5.0)
        figure = Figure(figsize=size, dpi=140, layout="constrained")
        if len(losses):
            panels: list[list[str]] = [["noise", "against"], ["loss", "against"]]
            shape = {"height_ratios": [2.6, 1], "width_ratios": [2.7, 1]}
            axes = figure.subplot_mosaic(panels, **shape)
            axes["loss"].sharex(axes["noise"])
            axes["noise"].tick_params(labelbottom=False)
            _loss(axes["loss"], losses)
            _against_loss(axes["against"], log, losses)
        else:
            axes = {"noise": figure.subplots()}
        notes = _noise(axes["noise"], log)
        bottom = axes.get("loss", axes["noise"])
        bottom.set_xlabel("optimizer step")
        bottom.xaxis.set_major_locator(MaxNLocator(9, integer=True, steps=[1, 2, 5, 10]))
        bottom.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        for panel in ("noise", "against"):
            if panel in axes:
                axes[panel].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes[panel].yaxis.set_major_formatter(lambda value, _: number(value))
                axes[panel].tick_params(which="minor", left=False, labelleft=False)
        figure.suptitle(_title(log), x=0.01, ha="left", fontsize=14, color=INK)
        if notes:
            figure.supxlabel(" ".join(notes), fontsize=9, color=FAINT, x=0.01, ha="left")
        figure.savefig(path)
    return Path(path)


def plot_curve(advice: Advice, path: str | Path) -> Path:
    """The path of a picture of steps against examples, each as a multiple of the fewest.

    The line is (S/S_min - 1)(E/E_min - 1) = 1 (McCandlish et al. 2018, 2.7); its band are batches
    that the interval of b_simple leaves open as the best.

    Raises:
        ValueError: where b_simple is not known.
        ImportError: without matplotlib.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    except ImportError as error:
        raise ImportError('a plot needs matplotlib: pip install "gnsmon[report]"') from error
    if not advice.b_simple:
        raise ValueError(f"no curve to plot: b_simple is not known ({advice.reason})")
    b = advice.b_simple
    marks = {advice.present: ("present", BATCH, "s")}
    if advice.batch_size not in (None, advice.present):
        marks[advice.batch_size] = ("suggested", MAIN, "o")
    with rc_context(STYLE):
        figure = Figure(figsize=(6.8, 4.8), dpi=120, layout="constrained")
        axes = figure.subplots()
        ends = [b / 32, b * 32, *marks]
        sizes = np.geomspace(min(ends) / 1.2, max(ends) * 1.2, 300)
        axes.plot(1 + b / sizes, 1 + sizes / b, color=FAINT, lw=1.2)
        if advice.best_low and advice.best_high:
            open_sizes = np.geomspace(advice.best_low, advice.best_high, 50)
            steps, examples = 1 + b / open_sizes, 1 + open_sizes / b
            label = f"best: {number(advice.best_low)} to {number(advice.best_high)} examples"
            axes.plot(steps, examples, color=MAIN, alpha=0.25, lw=9, label=label)
        for size, (what, colour, marker) in marks.items():
            at = 1 + b / size, 1 + size / b
            axes.plot(*at, marker, color=colour, ms=8, label=f"{what}: {size:,} examples a step")
        axes.set(xscale="log", yscale="log")
        axes.set(xlabel="steps / fewest possible", ylabel="examples / fewest possible")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axis.set_minor_formatter(FuncFormatter(lambda x, _: ""))
        axes.set_title(f"Noise scale {number(b)} examples: what a batch costs", loc="left")
        axes.legend(loc="upper right")
        figure.savefig(path)
    return Path(path)


def _noise(axes: Axes, log: Log) -> list[str]:
    records = _thin(log.of())
    step, value, low, high, batch = (
        records[k].astype(float) for k in ("step", "b_simple", "low", "high", "examples")
    )
    status = records["status"].astype(str)
    known, bound = np.isin(status, ("ok", "wide")), status == "lower_bound"
    main, *names = log.methods
    others = {name: _thin(log.of(name)) for name in names}
    lines = {name: rows["b_simple"] for name, rows in others.items()}
    axes.set_yscale("log")
    bottom, top = _limits([value, batch, *lines.values()], low, high)
    axes.set_ylim(bottom, top)
    band = (
        _only(known, np.where(np.isnan(low), bottom, low)),
        _only(known, np.where(np.isnan(high), top, high)),
    )
    if known.any():
        axes.fill_between(
            step, *band, color=MAIN, alpha=0.18, lw=0, label=f"{log.level * 100:g}% interval"
        )
        axes.plot(step, _only(known, value), color=MAIN, lw=2.2, label=f"noise scale ({main})")
    lone = known & ~np.r_[False, known[:-1]] & ~np.r_[known[1:], False]
    around = np.abs([edge[lone] - value[lone] for edge in band])
    axes.errorbar(step[lone], value[lone], around, fmt=".", color=MAIN, elinewidth=1)
    notes = []
    if bound.any():
        floor = _only(bound, low)
        axes.fill_between(step, floor, top, facecolor="none", hatch="//", edgecolor="#c4d5ea", lw=0)
        axes.plot(step, floor, color=MAIN, lw=1, alpha=0.6)
        arrows = np.flatnonzero(bound & ~np.isnan(low))
        apart = np.floor(step[arrows] / max(1.0, np.ptp(step)) * 30)  # 30 across the picture
        arrows = arrows[np.unique(apart, return_index=True)[1]]
        style: dict[str, Any] = {
            "ls": "none",
            "marker": "$\\uparrow$",
            "ms": 11,
            "mew": 0,
            "color": MAIN,
        }
        axes.plot(step[arrows], low[arrows] * (top / bottom) ** 0.025, **style, label="at least")
        notes.append("Hatched, with arrows: only a lower bound is known, the line under them.")
    if (status == "undefined").any():
        notes.append("Gaps: not measurable there.")
    for colour, (name, line) in zip(cycle(OTHERS), lines.items(), strict=False):
        axes.plot(others[name]["step"], line, color=colour, lw=1.1, label=name)
    label = f"batch size ({number(batch[-1])})"
    axes.step(step, batch, where="post", color=BATCH, lw=1.4, ls=(0, (5, 3)), label=label)
    axes.set_ylabel("gradient noise scale (examples)")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.015, 1.0), ncols=6, columnspacing=1.6)
    return notes


def _loss(axes: Axes, losses: Array) -> None:
    width, smooth = _smooth(losses)
    axes.plot(*_thin(losses).T, color=LOSS, lw=0.8, alpha=0.35)
    label = f"mean of {width} losses" if width > 1 else "loss"
    axes.plot(*smooth.T, color=LOSS, lw=1.8, label=label)
    axes.set_ylabel("training loss")
    axes.legend(loc="upper right")


def _against_loss(axes: Axes, log: Log, losses: Array) -> None:
    """b_simple with its interval against the smoothed loss, which falls to the right."""
    records = log.of()
    known = np.isin(records["status"].astype(str), ("ok", "wide")) & ~np.isnan(records["b_simple"])
    records = _thin(records[known])
    axes.set_xlabel("training loss, smoothed")
    axes.set_yscale("log")
    axes.invert_xaxis()
    if not len(records):
        return
    step, value, low, high = (records[k] for k in ("step", "b_simple", "low", "high"))
    _, smooth = _smooth(losses)
    loss = np.interp(step, *smooth.T)
    shown = np.unique(np.linspace(0, len(step) - 1, 30).astype(int))
    axes.vlines(loss[shown], low[shown], high[shown], color=MAIN, alpha=0.25, lw=2)
    axes.plot(loss, value, color=MAIN, lw=0.8, alpha=0.5)
    axes.plot(loss[shown], value[shown], ".", color=MAIN)
    axes.set_ylim(*_limits([value[value > 0]], low, high))


def _smooth(losses: Array) -> tuple[int, Array]:
    """Number of losses averaged over, and (step, mean) with the step of the last of each.

    Means are taken where they are drawn, which for a million losses is one window in hundreds.
    """
    step, value = losses[np.argsort(losses[:, 0], kind="stable")].T
    width = max(1, len(value) // 50)
    mean = _thin(sliding_window_view(value, width)).mean(axis=1)
    return width, np.stack([_thin(step[width - 1 :]), mean], axis=1)


def _limits(lines: list[Array], low: Array, high: Array) -> tuple[float, float]:
    """Room for every line and bound, and for intervals as far as three times beyond the lines."""
    centre = np.concatenate(lines)
    centre = centre[centre > 0]
    inside = np.r_[centre, low[low > centre.min() / 3], high[high < centre.max() * 3]]
    return inside.min() / 1.4, inside.max() * 1.6


def _only(mask: NDArray[np.bool_], values: Array) -> Array:
    return np.where(mask, values, np.nan)


def _thin(points: Any) -> Any:
    return points[:: -(-len(points) // MOST)] if len(points) else points


def _title(log: Log) -> str:
    named = [log.header.get("model"), log.header.get("optimizer")]
    parts = [" + ".join(n) if isinstance(n, list) else n for n in named if n]
    return "Gradient noise scale" + (f": {', '.join(parts)}" if parts else "")
