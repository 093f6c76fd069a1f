"""Coverage of the default estimator's 95 % interval on Gaussian gradients, as a markdown table."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import numpy as np

from gnsmon.estimators import Estimator, NormPair


@dataclass(frozen=True)
class Cell:
    """One true ratio and one correlation: what the estimator made of it over the repetitions."""

    coverage: float  # share of the intervals that hold the true b_simple
    bounded: float  # share with an upper end (ok or wide); the others are lower bounds
    undefined: float  # share without any interval, counted as misses
    bias: float  # of the reported point, relative, where there is one
    plain_bias: float  # of the plain ratio on those same repetitions
    repetitions: int

    @property
    def error(self) -> float:
        """Binomial standard error of the coverage."""
        return math.sqrt(self.coverage * (1 - self.coverage) / self.repetitions)


def measure(
    r: float,
    correlation: float,
    *,
    repetitions: int = 2000,
    steps: int = 1000,
    batch: int = 64,
    dim: int = 100,
    seed: int = 0,
    estimator: Estimator | None = None,
) -> Cell:
    """Run the estimator on `repetitions` independent runs at once, one group each.

    Gradients are N(G, I / dim) in `dim` dimensions, so S = 1 and d_eff = dim, with
    |G|² = 1 / (r batch). |mean|² is noncentral chi-square and the spread about the mean is an
    independent chi-square, so both norms are drawn directly. The noise of the two moments is
    then AR(1) in time with the given correlation.
    """
    rng = np.random.default_rng(seed)
    estimator = estimator or Estimator(repetitions)
    sq_norm = 1 / (r * batch)
    noise = np.zeros((2, repetitions))
    for step in range(steps):
        big = rng.noncentral_chisquare(dim, sq_norm * batch * dim, repetitions) / (batch * dim)
        s = rng.chisquare((batch - 1) * dim, repetitions) / ((batch - 1) * dim)
        fresh = np.stack([s - 1, big - s / batch - sq_norm])
        noise = correlation * noise + math.sqrt(1 - correlation**2) * fresh if step else fresh
        estimator.update(norm_pair(1 + noise[0], sq_norm + noise[1], batch))
    truth = r * batch
    ratios = estimator.ratios()
    hit = [
        x.low is not None and x.low <= truth <= (math.inf if x.high is None else x.high)
        for x in ratios
    ]
    point = np.array([np.nan if x.b_simple is None else x.b_simple for x in ratios])
    plain = np.where(np.isnan(point), np.nan, estimator.tr_sigma / estimator.grad_sq_norm)
    return Cell(
        coverage=float(np.mean(hit)),
        bounded=float(np.mean(~np.isnan(point))),
        undefined=float(np.mean([x.status == "undefined" for x in ratios])),
        bias=float(np.nanmean(point)) / truth - 1,
        plain_bias=float(np.nanmean(plain)) / truth - 1,
        repetitions=repetitions,
    )


def norm_pair(s: np.ndarray, g: np.ndarray, batch: int) -> NormPair:
    """The norms over per-example parts whose moments are s and g."""
    return NormPair(g + s / batch, (g + s) / batch, 1 / batch, batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    print("| r | lag-1 | coverage | s.e. | bounded | undefined | bias of point | of plain ratio |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|")
    for r in (0.5, 4, 20):
        for correlation in (0.0, 0.5):
            x = measure(r, correlation, **options)
            print(
                f"| {r} | {correlation} | {x.coverage:.4f} | {x.error:.4f} | {x.bounded:.1%} "
                f"| {x.undefined:.1%} | {x.bias:+.2%} | {x.plain_bias:+.2%} |"
            )


if __name__ == "__main__":
    main()
