"""Figure 1: what the sizes of the small and the big batch do to the error of the noise scale."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from gnsmon.estimators import moments
from gnsmon.figures.page import Page, Rows, percent
from gnsmon.simulation import Errors, Gradients, draw, errors, gradients

B_SIMPLE = (1.0, 100.0)
EXAMPLES = 2**16  # that every estimate has seen
FIXED_BIG = 128
D_EFF = 100
TITLE = "Error of b_simple after as many examples: what the two batch sizes do to it"


@dataclass(frozen=True)
class Point:
    """Relative standard errors of estimates from `EXAMPLES` examples, in steps of `b_big`."""

    b_simple: float
    b_small: int
    b_big: int
    theory: Errors  # closed form, of b_simple to first order
    simulated: float  # of b_simple
    simulated_error: float  # standard error of `simulated`


@dataclass(frozen=True)
class Numbers:
    """Points along both axes."""

    along_big: list[Point]  # at b_small = 1
    along_small: list[Point]  # at b_big = FIXED_BIG


def measure(*, repeat: int = 20_000, seed: int = 0) -> Numbers:
    """Closed form and simulation along both axes."""
    rng = np.random.default_rng(seed)
    big = [
        _point(gradients(b, d_eff=D_EFF), 1, 2**k, repeat, rng)
        for b in B_SIMPLE
        for k in range(1, 11)
    ]
    small = [
        _point(gradients(b, d_eff=D_EFF), 2**k, FIXED_BIG, repeat, rng)
        for b in B_SIMPLE
        for k in range(FIXED_BIG.bit_length() - 1)
    ]
    return Numbers(big, small)


def _point(of: Gradients, b_small: int, b_big: int, repeat: int, rng: np.random.Generator) -> Point:
    steps = EXAMPLES // b_big
    pair = draw(of, b_big=b_big, b_small=b_small, size=repeat, rng=rng, mean_of=steps)
    mean = moments(pair)
    ratio = mean.tr_sigma / mean.grad_sq_norm / of.b_simple
    one, root = errors(of, b_big=b_big, b_small=b_small), math.sqrt(steps)
    theory = Errors(one.grad_sq_norm / root, one.tr_sigma / root, one.b_simple / root)
    spread = float(ratio.std(ddof=1))
    return Point(of.b_simple, b_small, b_big, theory, spread, spread / math.sqrt(2 * repeat))


def page(numbers: Numbers) -> Page:
    """The figure."""
    said = []
    for b_simple in B_SIMPLE:
        big, small = (_factor(p, b_simple) for p in (numbers.along_big, numbers.along_small))
        said.append(
            f"At b_simple = {b_simple:g} the error changes by a factor of {big:.2g} over these "
            f"big batches and by {small:.2g} over these small ones."
        )
    text = (
        "Relative standard error of mean S over mean |G|², after "
        f"{EXAMPLES:,} examples whatever the batch size (it falls as one over the root of the "
        "examples, so that one number of them tells all). Gaussian gradients with the same noise "
        f"in {D_EFF} directions; lines are the closed form, points a simulation. Left: parts of "
        f"single examples, b_small = 1. Right: b_big = {FIXED_BIG}.",
        " ".join(said),
        "With little noise, as in the paper's figure, the small batch decides: Var S grows as "
        "b_small. Where b_simple is far above the batch, |G|² is what is hard to know, and its "
        "variance falls as 1/(b_big - b_small): then it is the big batch that decides, and parts "
        "may be as large as a good share of it.",
    )
    return Page("1", TITLE, text, _rows(numbers), partial(plot, numbers))


def _factor(points: list[Point], b_simple: float) -> float:
    own = [p.theory.b_simple for p in points if p.b_simple == b_simple]
    return max(own) / min(own)


def _rows(numbers: Numbers) -> Rows:
    rows: Rows = [
        ("b_simple", "b_small", "b_big", "error of b_simple", "simulated", "of |G|²", "of S")
    ]
    for p in [*numbers.along_big, *numbers.along_small]:
        shown = p.theory.b_simple, p.simulated, p.theory.grad_sq_norm, p.theory.tr_sigma
        rows.append((f"{p.b_simple:g}", str(p.b_small), str(p.b_big), *map(percent, shown)))
    return rows


def plot(numbers: Numbers, path: Path) -> None:
    """Draw both panels."""
    from gnsmon.figures.drawing import APPROXIMATE, EXACT, canvas, plain_numbers

    colours = dict(zip(B_SIMPLE, (EXACT, APPROXIMATE), strict=True))
    with canvas(path, TITLE, columns=2, size=(9.6, 4.4)) as panels:
        for axes, points, size, about in (
            (panels[0], numbers.along_big, "b_big", "single examples, b_small = 1"),
            (panels[1], numbers.along_small, "b_small", f"b_big = {FIXED_BIG}"),
        ):
            for b_simple, colour in colours.items():
                own = [p for p in points if p.b_simple == b_simple]
                x = [getattr(p, size) for p in own]
                label = f"b_simple = {b_simple:g}"
                axes.plot(x, [100 * p.theory.b_simple for p in own], color=colour, label=label)
                axes.plot(x, [100 * p.simulated for p in own], "o", ms=4.5, color=colour)
            axes.set(xscale="log", yscale="log", xlabel=f"{size} (examples)", title=about)
            plain_numbers(axes.xaxis, base=2)
            plain_numbers(axes.yaxis, subs=(1, 2, 5))
        panels[1].sharey(panels[0])
        panels[0].set_ylabel(f"standard error of b_simple\nafter {EXAMPLES:,} examples (%)")
        panels[0].legend(loc="upper right")
