"""Norms of steps whose gradient and covariance are known, and what theory says of the estimates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gnsmon.estimators import Estimator, NormPair
from gnsmon.estimators.values import Array

if TYPE_CHECKING:
    from rich.console import RenderableType

LEVELS = 60  # distinct eigenvalues at most
DECAY = 0.99


@dataclass(frozen=True)
class Gradients:
    """Gaussian gradients of single examples, N(G, Sigma), as levels of equal noise.

    Level k has `directions[k]` eigenvectors of Sigma, each with eigenvalue `noise[k]`, and holds
    `signal[k]` of |G|^2. Squared norms depend on G and Sigma through nothing else.
    """

    signal: Array  # [levels]
    noise: Array  # [levels]
    directions: Array  # [levels]

    @property
    def grad_sq_norm(self) -> float:
        """|G|^2."""
        return float(self.signal.sum())

    @property
    def tr_sigma(self) -> float:
        """S = tr(Sigma)."""
        return float(self.noise @ self.directions)

    @property
    def tr_sigma_sq(self) -> float:
        """tr(Sigma^2)."""
        return float(self.noise**2 @ self.directions)

    @property
    def b_simple(self) -> float:
        """S / |G|^2."""
        return self.tr_sigma / self.grad_sq_norm

    @property
    def d_eff(self) -> float:
        """tr(Sigma)^2 / tr(Sigma^2): directions that the noise comes to."""
        return self.tr_sigma**2 / self.tr_sigma_sq


def gradients(b_simple: float, *, d_eff: int = 100, dimension: int | None = None) -> Gradients:
    """Gradients of the given noise scale, with S = 1.

    G has as much in one direction as in another. Noise is the same in all of `dimension` directions
    if that is d_eff, as it is by default; in more, its eigenvalues fall by the power law that has
    this d_eff (in steps, at most `LEVELS` of them).

    Raises:
        ValueError: unless 0 < b_simple, 1 <= d_eff <= dimension, and 1 < d_eff where it is below
            dimension.

    Example:
        >>> some = gradients(10, d_eff=20, dimension=1000)
        >>> round(some.b_simple, 6), round(some.d_eff, 6), int(some.directions.sum())
        (10.0, 20.0, 1000)
    """
    dimension = d_eff if dimension is None else dimension
    least = 1 if dimension == d_eff else 2
    if not (0 < b_simple < math.inf and least <= d_eff <= dimension):
        raise ValueError(
            "expected 0 < b_simple and 1 <= d_eff <= dimension (1 < d_eff where they differ), got "
            f"{b_simple=}, {d_eff=}, {dimension=}"
        )
    noise: Array = np.ones(1)
    directions: Array = np.array([float(d_eff)])
    if dimension > d_eff:
        edges = np.unique(np.geomspace(1, dimension + 1.0, LEVELS + 1).round())
        directions = np.diff(edges)
        noise = _power_law(np.sqrt(edges[1:] * edges[:-1]), directions, d_eff)
    noise = noise / (noise @ directions)
    return Gradients(directions / directions.sum() / b_simple, noise, directions)


def _power_law(rank: Array, directions: Array, d_eff: float) -> Array:
    """rank^-a with the `a` that gives d_eff, which falls with it, by bisection."""
    low, high = 0.0, 64.0
    for _ in range(80):
        a = (low + high) / 2
        noise = rank**-a
        too_many = (noise @ directions) ** 2 / (noise**2 @ directions) > d_eff
        low, high = (a, high) if too_many else (low, a)
    return np.asarray(rank**-low)


def draw(
    of: Gradients,
    *,
    b_big: int,
    b_small: int = 1,
    size: int,
    rng: np.random.Generator,
    mean_of: int = 1,
) -> NormPair:
    """Norms of `size` independent steps as groups of one pair; each is a mean over `mean_of` steps.

    A step has B = b_big examples in K = B / b_small parts of equal weight. Its gradient and the
    parts' scatter about it are independent and all that the norms depend on: |G_big|^2 is a sum
    over levels of noncentral chi-squares, and the unbiased S one of chi-squares with K - 1 times
    the directions in degrees of freedom. So no gradient is drawn.

    Raises:
        ValueError: unless b_big is a multiple of b_small, and above it.
    """
    parts = _parts(b_big, b_small)
    shape, n = (size, len(of.noise)), mean_of
    means = rng.noncentral_chisquare(n * of.directions, n * b_big * of.signal / of.noise, shape)
    scatter = rng.chisquare(n * (parts - 1) * of.directions, shape)
    big = means @ of.noise / (n * b_big)
    s = scatter @ of.noise / (n * (parts - 1))
    p = 1 / parts
    return NormPair(big, p * big + (1 - p) * s / b_big, p, b_big)


def _parts(b_big: int, b_small: int) -> int:
    if not (1 <= b_small < b_big and b_big % b_small == 0):
        raise ValueError(
            "expected b_big to be a multiple of b_small, and at least twice as large; got "
            f"{b_big=}, {b_small=}"
        )
    return b_big // b_small


@dataclass(frozen=True)
class Variances:
    """Of one step's unbiased estimates."""

    grad_sq_norm: float
    tr_sigma: float
    covariance: float


def variances(of: Gradients, *, b_big: int, b_small: int = 1) -> Variances:
    """The closed form for Gaussian gradients, which have no fourth cumulant.

        Var S = 2 tr(Sigma^2) b/(B - b)        Var |G|^2 = 4 G'Sigma G/B + 2 tr(Sigma^2)/(B (B - b))

    and Cov = -Var(S)/B, as |G|^2 is |G_big|^2 - S/B and the two are independent. Errors as `draw`.
    """
    _parts(b_big, b_small)
    square = 2 * of.tr_sigma_sq
    s = square * b_small / (b_big - b_small)
    g = 4 * float(of.signal @ of.noise) / b_big + square / (b_big * (b_big - b_small))
    return Variances(grad_sq_norm=g, tr_sigma=s, covariance=-s / b_big)


@dataclass(frozen=True)
class Errors:
    """Relative standard errors of one step's estimates; b_simple's is that of a long mean, scaled.

    So b_simple = mean S / mean |G|^2 over n independent steps is known to b_simple / sqrt(n), to
    first order in its error.
    """

    grad_sq_norm: float
    tr_sigma: float
    b_simple: float


def errors(of: Gradients, *, b_big: int, b_small: int = 1) -> Errors:
    """What `variances` comes to, relative to the truth."""
    v, s, g = variances(of, b_big=b_big, b_small=b_small), of.tr_sigma, of.grad_sq_norm
    of_s, of_g, both = v.tr_sigma / s**2, v.grad_sq_norm / g**2, v.covariance / (s * g)
    return Errors(math.sqrt(of_g), math.sqrt(of_s), math.sqrt(of_s + of_g - 2 * both))


def steps_needed(one_step: float, error: float = 0.1) -> float:
    """Independent steps whose mean is known to `error`, of the relative error of one step."""
    return (one_step / error) ** 2


@dataclass(frozen=True)
class Moment:
    """One unbiased estimate over all simulated steps; all relative to the truth."""

    bias: float
    bias_error: float  # standard error of `bias`
    one_step: float  # standard error of one step's estimate


@dataclass(frozen=True)
class Outcome:
    """What the monitor's estimator made of simulated runs."""

    of: Gradients
    b_big: int
    b_small: int
    steps: int
    repeat: int
    grad_sq_norm: Moment
    tr_sigma: Moment
    n_eff: float  # steps behind a reading
    bias: float  # of b_simple as read at the end of a run, relative, where it is read
    bias_error: float  # standard error of `bias`
    error: float  # its relative standard deviation over the runs; both NaN where it is read in < 2
    coverage: float  # share of the 95 % intervals that hold the true b_simple; NaN without any
    intervals: int  # runs that have one
    statuses: dict[str, float]  # status -> share of the runs

    @property
    def coverage_error(self) -> float:
        """Binomial standard error of the coverage."""
        if not self.intervals:
            return math.nan
        return math.sqrt(self.coverage * (1 - self.coverage) / self.intervals)

    def __rich__(self) -> RenderableType:
        return _page(self)


def simulate(
    of: Gradients,
    *,
    b_big: int,
    b_small: int = 1,
    steps: int = 1000,
    repeat: int = 500,
    decay: float = DECAY,
    seed: int = 0,
) -> Outcome:
    """Read b_simple at the end of `repeat` runs of `steps` independent steps each.

    Raises:
        ValueError: as `draw`, on `decay` outside [0, 1), or on fewer than two runs or steps.
    """
    if min(steps, repeat) < 2:
        raise ValueError(f"expected two or more steps and runs, got {steps=}, {repeat=}")
    rng = np.random.default_rng(seed)
    estimator = Estimator(repeat, decay=decay)
    truth = np.array([[of.grad_sq_norm], [of.tr_sigma]])
    sums = np.zeros((2, 2))  # of the relative errors and of their squares
    for _ in range(steps):
        pair = draw(of, b_big=b_big, b_small=b_small, size=repeat, rng=rng)
        step = estimator.update(pair)
        off = np.stack([step.grad_sq_norm, step.tr_sigma]) / truth - 1
        sums += np.stack([off.sum(1), np.square(off).sum(1)])
    ratios = estimator.ratios()
    point = ratios.b_simple[~np.isnan(ratios.b_simple)] / of.b_simple - 1
    error = float(point.std(ddof=1)) if len(point) > 1 else math.nan
    high = np.where(np.isnan(ratios.high), math.inf, ratios.high)
    found = [ratio.status for ratio in ratios]
    holds = ((ratios.low <= of.b_simple) & (of.b_simple <= high))[~np.isnan(ratios.low)]
    g, s = (_moment(*sums[:, i], count=steps * repeat) for i in range(2))
    return Outcome(
        of=of,
        b_big=b_big,
        b_small=b_small,
        steps=steps,
        repeat=repeat,
        grad_sq_norm=g,
        tr_sigma=s,
        n_eff=estimator.n_eff,
        bias=float(point.mean()) if len(point) > 1 else math.nan,
        bias_error=error / math.sqrt(len(point)) if len(point) > 1 else math.nan,
        error=error,
        coverage=float(holds.mean()) if len(holds) else math.nan,
        intervals=len(holds),
        statuses={status: found.count(status) / repeat for status in dict.fromkeys(found)},
    )


def _moment(total: float, squares: float, *, count: int) -> Moment:
    bias = total / count
    one_step = math.sqrt((squares - count * bias**2) / (count - 1))
    return Moment(float(bias), one_step / math.sqrt(count), one_step)


def _page(outcome: Outcome) -> RenderableType:
    """A table of the estimates and sentences on the readings."""
    from rich.console import Group
    from rich.table import Table

    of, seen = outcome.of, outcome
    exact = errors(of, b_big=seen.b_big, b_small=seen.b_small)
    table = Table(box=None, pad_edge=False, header_style="dim")
    columns = ("", "truth", "bias", "one step ±", "in theory", "steps for 10 %")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left")
    for name, truth, own, theory in (
        ("|G|²", of.grad_sq_norm, seen.grad_sq_norm, exact.grad_sq_norm),
        ("S", of.tr_sigma, seen.tr_sigma, exact.tr_sigma),
    ):
        bias = _signed(own.bias, own.bias_error)
        table.add_row(
            name, f"{truth:.4g}", bias, _share(own.one_step), _share(theory), _steps(theory)
        )
    bias, spread = _signed(seen.bias, seen.bias_error), seen.error * math.sqrt(seen.n_eff)
    theory = exact.b_simple
    table.add_row(
        "b_simple", f"{of.b_simple:.4g}", bias, _share(spread), _share(theory), _steps(theory)
    )
    statuses = ", ".join(f"{name} {share:.1%}" for name, share in seen.statuses.items())
    head = (
        f"Gaussian gradients, d_eff {of.d_eff:.4g} in {of.directions.sum():.0f} directions; "
        f"{seen.repeat:,} runs of {seen.steps:,} steps of {seen.b_big} examples, in parts of "
        f"{seen.b_small}; b_simple is {of.b_simple / seen.b_big:.3g} times the batch\n"
    )
    read = sum(seen.statuses.get(status, 0.0) for status in ("ok", "wide"))
    some = f" (Its row is of the {read:.1%} of runs that read a number.)" if read < 1 else ""
    error = (
        f"varies by {_share(seen.error)} (standard deviation over the runs; the table has it for "
        "a single step, larger by the root of the steps)."
    )
    if math.isnan(seen.error):
        some, error = "", "has no error to show: fewer than two runs read a number."
    held = (
        "No run has an interval."
        if not seen.intervals
        else f"Its 95 % interval holds the truth in {seen.coverage:.1%} ± "
        f"{seen.coverage_error:.1%} of the runs that have one."
    )
    foot = (
        f"\nb_simple, read from averages over {seen.n_eff:.4g} steps, {error} {held} "
        f"Status: {statuses}.{some}"
    )
    return Group(head, table, foot)


def _share(x: float) -> str:
    return "-" if math.isnan(x) else f"{100 * x:.3g} %"


def _signed(x: float, error: float) -> str:
    large = max(abs(x), error) >= 100  # such digits say nothing, and the table has no room for them
    form = ".1e" if large else ".2f"
    return "-" if math.isnan(x) else f"{100 * x:+{form}}% ± {100 * error:{form}}%"


def _steps(one_step: float) -> str:
    steps = max(1.0, float(f"{steps_needed(one_step):.2g}"))
    return f"{steps:,.0f}" if steps < 1e9 else f"{steps:.2g}"
