"""What the runs say: the critical batch of each target beside the noise scale on the way to it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from critical.problems import Problem
from critical.runs import Run, learning_rate
from critical.search import Records, best_place, fewest_steps, fit_of
from gnsmon.estimators.critical import CriticalBatch
from gnsmon.estimators.interval import student_quantile
from gnsmon.estimators.jackknife import jackknife


class Estimate(NamedTuple):
    """Mean of S over steps and runs over that of |G|²; at 95 %, from the spread of the runs."""

    b_simple: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Noise:
    """The noise scale along the best runs, from their start to the target; examples."""

    batch_size: int
    rate: int
    runs: int
    own: Estimate
    in_metric: Estimate  # of the optimizer, as `preconditioned=True` measures it
    mean_reading: float | None  # of the monitor's smoothed readings, wherever there was one
    suggested: float | None  # median of the batch sizes that it suggested


@dataclass(frozen=True)
class Finding:
    """One target."""

    target: float
    steps: dict[int, tuple[int, list[float]]]  # batch size -> best rate, steps of its seeds
    fit: CriticalBatch
    noise: Noise | None

    def ratio(self, of: Estimate) -> float | None:
        """A noise scale over b_crit."""
        if of.b_simple is None or self.fit.b_crit is None:
            return None
        return of.b_simple / self.fit.b_crit


def findings(problem: Problem, records: Records) -> list[Finding]:
    """One for each target."""
    found = []
    for i, target in enumerate(problem.targets):
        steps = fewest_steps(problem, records, i)
        noise = _noise(problem, records, i)
        found.append(Finding(target, steps, fit_of(steps), noise))
    return found


def _noise(problem: Problem, records: Records, target: int) -> Noise | None:
    place = best_place(problem, records, target)
    if place is None:
        return None
    seeds = range(problem.noise_seeds)
    made = [records.get(Run(problem.name, *place, seed, noise=True)) for seed in seeds]
    along: list[dict[str, Any]] = [r["along"][target] for r in made if r and r["along"][target]]
    if not along:
        return None
    told, sizes = (
        [x[key] for x in along if x[key] is not None] for key in ("mean_reading", "suggested")
    )
    return Noise(
        *place,
        len(along),
        _estimate(along),
        _estimate([x["in_metric"] for x in along if x.get("in_metric")]),
        float(np.mean(told)) if told else None,
        float(np.median(sizes)) if sizes else None,
    )


def _estimate(along: list[dict[str, Any]]) -> Estimate:
    s, g = (np.array([x[key] for x in along]) for key in ("tr_sigma", "grad_sq_norm"))
    if not (s.sum() > 0 and g.sum() > 0):
        return Estimate()
    b_simple = float(s.sum() / g.sum())
    if len(along) < 2:
        return Estimate(b_simple)
    error = math.sqrt(float(jackknife(s, g).variance)) / b_simple
    factor = math.exp(student_quantile(len(along) - 1, 0.975) * error)
    return Estimate(b_simple, b_simple / factor, b_simple * factor)


def to_json(results: dict[str, list[Finding]], others: dict[str, Any]) -> str:
    """The numbers alone: problem -> targets; those of `others` that are not in `results` stay."""
    problems = {
        name: {"targets": [_numbers(finding) for finding in found]}
        for name, found in results.items()
    }
    return json.dumps({"problems": {**others, **problems}}, indent=1) + "\n"


def _numbers(finding: Finding) -> dict[str, Any]:
    fit, noise = finding.fit, finding.noise
    return {
        "loss": finding.target,
        "status": fit.status,
        "reason": fit.reason,
        "b_crit": fit.b_crit,
        "low": fit.low,
        "high": fit.high,
        "s_min": fit.s_min,
        "scatter": fit.scatter,
        "b_simple": noise and noise.own.b_simple,
        "b_simple_low": noise and noise.own.low,
        "b_simple_high": noise and noise.own.high,
        "in_metric": noise and noise.in_metric.b_simple,
        "in_metric_low": noise and noise.in_metric.low,
        "in_metric_high": noise and noise.in_metric.high,
        "mean_reading": noise and noise.mean_reading,
        "suggested": noise and noise.suggested,
        "batch_size": noise and noise.batch_size,
    }


def tables(problem: Problem, found: list[Finding], records: Records) -> str:
    """Markdown: the comparison, and the steps from which it comes."""
    own = [record for run, record in records.items() if run.problem == problem.name]
    reached = sum(record["outcome"] == "reached" for record in own)
    diverged = sum(record["outcome"] == "diverged" for record in own)
    seconds = sum(record["seconds"] for record in own)
    adaptive = any(f.noise and f.noise.in_metric.b_simple for f in found)
    lines = [
        f"{len(own)} runs, {seconds / 60:.0f} minutes of training: {reached} came to the last "
        f"target, {diverged} diverged, the others were given up.",
        "",
        "| held-out loss | b_crit | interval | S_min | E_min | scatter | b_simple along the best "
        "run | interval | b_simple / b_crit | mean of the readings | suggested batch |"
        + " in the optimizer's metric | interval | over b_crit |"
        * adaptive,
        "|--:|--:|:-:|--:|--:|--:|--:|:-:|--:|--:|--:|" + "--:|:-:|--:|" * adaptive,
    ]
    for f in found:
        fit, noise = f.fit, f.noise
        cells = [f"{f.target:g}", _critical(fit), _ends(fit.low, fit.high), _number(fit.s_min)]
        cells += [_number(fit.e_min), "" if fit.scatter is None else f"{fit.scatter:.1%}"]
        if noise is None:
            cells += [""] * (5 + 3 * adaptive)
        else:
            cells += _cells(f, noise.own)
            cells += [_number(noise.mean_reading), _number(noise.suggested)]
            cells += _cells(f, noise.in_metric) if adaptive else []
        lines.append(f"| {' | '.join(cells)} |")
    notes = [f"Loss {f.target:g}: {f.fit.reason}." for f in found if f.fit.reason]
    lines += ["", *notes] if notes else []
    lines += [
        "",
        "Steps at the best learning rate, geometric mean of the seeds (least to most):",
        "",
    ]
    heads = [f"loss {f.target:g} | lr" for f in found]
    heads.append(f"b_simple of one run to loss {problem.targets[-1]:g}")
    lines += [f"| batch | {' | '.join(heads)} |", "|--:" * (2 + 2 * len(found)) + "|"]
    for size in problem.batch_sizes:
        cells = [str(size)]
        for f in found:
            rate, steps = f.steps.get(size, (0, [math.inf]))
            if np.isfinite(steps).all():
                mean = math.exp(float(np.mean(np.log(steps))))
                mark = "*" if f.noise and f.noise.batch_size == size else ""
                spread = f"{_number(min(steps))} to {_number(max(steps))}"
                cells.append(f"{_number(mean)}{mark} ({spread})")
                cells.append(f"{learning_rate(problem, rate):.2g}")
            else:
                cells += ["not reached", ""]
        cells.append(_number(_alone(problem, size, found[-1], records)))
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "\\* the best run, along which the noise scale was averaged."]
    return "\n".join(lines)


def _cells(finding: Finding, of: Estimate) -> list[str]:
    return [_number(of.b_simple), _ends(of.low, of.high), _ratio(finding.ratio(of))]


def _alone(problem: Problem, size: int, last: Finding, records: Records) -> float | None:
    """b_simple along the first seed's best run of one batch size to the last target."""
    rate, _ = last.steps.get(size, (0, []))
    record = records.get(Run(problem.name, size, rate, 0, noise=True))
    along = record and record["along"][-1]
    if not along or along["grad_sq_norm"] <= 0:
        return None
    return float(along["tr_sigma"] / along["grad_sq_norm"])


def write(path: Path, problems: list[Problem], records: Records) -> dict[str, list[Finding]]:
    """Put tables between the marks of the document, figures and validation.json beside it.

    A document that is not there yet is made. The numbers of other problems stay.

    Raises:
        ValueError: when the document has no marks for a problem.
    """
    from critical.figures import draw

    marks = [(f"<!-- critical: {p.name} -->", f"<!-- end: {p.name} -->") for p in problems]
    anew = "# The critical batch, measured\n\n" + "\n\n".join(map("\n".join, marks)) + "\n"
    text, results = path.read_text() if path.exists() else anew, {}
    for problem, (begin, end) in zip(problems, marks, strict=True):
        found = results[problem.name] = findings(problem, records)
        before, opened, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not opened or not closed:
            raise ValueError(f"{path}: expected the marks {begin} and {end}, found them not; add")
        picture = f"figures/validation_{problem.name.replace('-', '_')}.png"
        (path.parent / "figures").mkdir(parents=True, exist_ok=True)
        draw(problem, found, path.parent / picture)
        part = f"![{problem.name}]({picture})\n\n{tables(problem, found, records)}"
        text = f"{before}{begin}\n\n{part}\n\n{end}{after}"
    path.write_text(text)
    numbers = path.with_suffix(".json")
    others = json.loads(numbers.read_text())["problems"] if numbers.exists() else {}
    numbers.write_text(to_json(results, others))
    return results


def _critical(fit: CriticalBatch) -> str:
    return fit.status if fit.b_crit is None else _number(fit.b_crit)


def _ends(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return ""
    if low is None:
        return f"below {_number(high)}"
    return f"above {_number(low)}" if high is None else f"{_number(low)} to {_number(high)}"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
