"""How the cost of a measured step depends on the sizes of a GPT and on the number of groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure import Effort, Variant, compared
from bench.steps import monitored
from bench.workloads import text

METHODS = ("pepgns", "sketch", "sogns")
AXES: dict[str, tuple[str, tuple[int, ...]]] = {
    "context": ("positions T", (32, 64, 128, 256, 512)),
    "width": ("width", (64, 128, 256, 512)),
    "layers": ("layers", (1, 2, 4, 8)),
    "examples": ("examples B", (2, 4, 8, 16, 32)),
    "groups": ("groups", (1, 4, 16, 52)),
}
BASE = {"context": 128, "width": 256, "layers": 4, "examples": 8}
VOCABULARY, HEADS = 512, 4


@dataclass(frozen=True)
class Point:
    """One size of one thing, all else as in `BASE`."""

    axis: str
    size: int
    method: str
    ratio: float
    low: float  # quartiles
    high: float
    bare_seconds: float


def points(device: str, effort: Effort, *, tiny: bool = False) -> Iterator[Point]:
    """Every method at every size."""
    for axis, (_, sizes) in AXES.items():
        for size in sizes[:1] if tiny else sizes:
            shape = {**BASE, **({"width": 16, "layers": 1, "context": 8} if tiny else {})}
            settings: dict[str, Any] = {}
            if axis == "groups":
                settings["groups"] = in_turn(size)
            else:
                shape[axis] = size
            examples = shape.pop("examples")
            load = text("gpt", examples, vocabulary=VOCABULARY, heads=HEADS, **shape)
            for method in METHODS:
                make = partial(monitored, method=method, **settings)
                times, *_ = compared(replace(load, device=device), Variant(make), effort)
                ratios = 2 * times[:, 1] / (times[:, 0] + times[:, 2])
                low, middle, high = map(float, np.percentile(ratios, [25, 50, 75]))
                seconds = float(np.median(times[:, [0, 2]]))
                yield Point(axis, size, method, middle, low, high, seconds)


def in_turn(groups: int) -> Callable[[str], str]:
    """Parameters to so many groups, one after the other."""
    known: dict[str, int] = {}
    return lambda name: str(known.setdefault(name, len(known)) % groups)


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """The ratios over each axis, with their quartiles."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.6), layout="constrained")
    panels = figure.subplots(1, len(AXES), sharey=True)
    for panel, (axis, (label, sizes)) in zip(panels, AXES.items(), strict=True):
        for method in METHODS:
            own = [p for p in found if (p["axis"], p["method"]) == (axis, method)]
            x, y, low, high = np.array([[p[k] for k in _LINE] for p in own]).reshape(-1, 4).T
            panel.errorbar(x, y, (y - low, high - y), marker="o", markersize=3, label=method)
        panel.set_xscale("log", base=2)
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.minorticks_off()
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.set_xlabel(label)
    panels[0].set_ylabel("measured / bare step")
    panels[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


_LINE = ("size", "ratio", "low", "high")
