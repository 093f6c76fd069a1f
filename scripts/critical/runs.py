"""One training run: how many steps it takes to each target, and its noise scale on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

import gnsmon
from critical.problems import OPTIMIZERS, Batch, Problem, Task, load_task

GROWTH = 1.05  # from one evaluation's step to the next
SMOOTHED = 3  # evaluations in the mean that is held against the targets
DIVERGED = 4.0  # times the loss of the first evaluation


@dataclass(frozen=True)
class Run:
    """A point of the grid; the learning rate is the problem's times 2^(rate / 2)."""

    problem: str
    batch_size: int
    rate: int  # half-octaves
    seed: int
    noise: bool = False  # with the monitor attached, every step measured


@dataclass(frozen=True)
class Job:
    """A run with all that a worker has to know."""

    run: Run
    problem: Problem
    budget: int  # steps


def train(job: Job) -> dict[str, Any]:
    """The record of the run, a line of the results."""
    torch.set_num_threads(1)
    run, problem = job.run, job.problem
    begin = time.perf_counter()
    with TemporaryDirectory() as folder:
        outcome = _train(job, load_task(problem.task), Path(folder))
    return {
        **vars(run),
        "lr": learning_rate(problem, run.rate),
        "budget": job.budget,
        **outcome,
        "seconds": round(time.perf_counter() - begin, 3),
    }


def learning_rate(problem: Problem, rate: int) -> float:
    """That of a rate in half-octaves."""
    return problem.lr * 2 ** (rate / 2)


def evaluations(budget: int) -> Iterator[int]:
    """Steps after which the held-out loss is taken, each a twentieth later than the one before."""
    step = 1
    while step <= budget:
        yield step
        step = max(step + 1, math.ceil(step * GROWTH))


class Crossings:
    """When the mean of the last evaluations first comes down to each target.

    Between two evaluations the logarithm of the step is taken as linear in the loss. Evaluations
    are spaced in ratio, so that the mean's delay is one factor at all batch sizes.
    """

    def __init__(self, targets: tuple[float, ...]) -> None:
        self.steps: list[float | None] = [None] * len(targets)
        self._targets = targets
        self._losses: list[float] = []
        self._last = (0, math.inf)  # step and mean

    def evaluated(self, step: int, loss: float) -> list[int]:
        """Take in an evaluation; the places of the targets that it reaches."""
        self._losses = [*self._losses, loss][-SMOOTHED:]
        if len(self._losses) < SMOOTHED:
            return []
        mean, (before, mean_before) = sum(self._losses) / SMOOTHED, self._last
        reached = []
        for i, target in enumerate(self._targets):
            if self.steps[i] is None and mean <= target:
                share = (mean_before - target) / (mean_before - mean) if before else 1.0
                self.steps[i] = float(step * (max(before, 1) / step) ** (1 - share))
                reached.append(i)
        self._last = (step, mean)
        return reached


def _train(job: Job, task: Task, folder: Path) -> dict[str, Any]:
    run, problem = job.run, job.problem
    torch.manual_seed(run.seed)
    model = task.model()
    rate = learning_rate(problem, run.rate)
    optimizer = OPTIMIZERS[problem.optimizer](model.parameters(), lr=rate)
    readings: list[gnsmon.Reading] = []
    noise: list[dict[str, Any] | None] = [None] * len(problem.targets)
    crossings = Crossings(problem.targets)
    first, loss, step, outcome = math.inf, math.inf, 0, "out of steps"
    monitor: Any = nullcontext()
    if run.noise:
        settings = {"method": "pepgns", "every": 1, "engine": "hooks", "groups": "total"}
        settings["preconditioned"] = problem.optimizer == "adam"
        monitor = gnsmon.attach(
            model, optimizer, sinks=[readings.append], run_dir=folder, strict=True, **settings
        )
    with monitor:
        for until in evaluations(job.budget):
            while step < until:
                optimizer.zero_grad()
                batch = task.sample(run.batch_size)
                for part in _apart(batch, task) if run.noise and step == 0 else [batch]:
                    share = len(part[0]) / run.batch_size
                    (task.loss(model, part) * share).backward()
                optimizer.step()
                step += 1
            loss = _held_out(model, task, task.held_out)
            first = min(first, loss) if until == 1 else first
            if not loss <= DIVERGED * first:
                outcome = "diverged"
                break
            if run.noise and not readings:
                raise RuntimeError(f"{run}: expected readings, got {dict(monitor.skipped)}")
            for i in crossings.evaluated(step, loss):
                noise[i] = _noise(readings) if run.noise else None
            if crossings.steps[-1] is not None:
                outcome = "reached"
                break
    known = loss if math.isfinite(loss) else None
    result = {"outcome": outcome, "ran": step, "loss": known, "steps": crossings.steps}
    return {**result, "along": noise} if run.noise else result


def _apart(batch: Batch, task: Task) -> list[Batch]:
    """The batch, or two unequal parts of it where it has as many examples as they have positions.

    The monitor takes an axis for that of the examples only when it has been of a size of its own
    once.
    """
    x, y = batch
    if len(x) != task.positions:
        return [batch]
    cut = len(x) // 2 + 1
    return [(x[:cut], y[:cut]), (x[cut:], y[cut:])]


@torch.no_grad()
def _held_out(model: nn.Module, task: Task, batch: Batch) -> float:
    return task.loss(model, batch).item()


def _noise(every: list[gnsmon.Reading]) -> dict[str, Any]:
    """What the monitor said from the start of the run until now."""
    readings = [r for r in every if r.method == "pepgns"]
    in_metric = [r for r in every if r.method != "pepgns"]
    told = [r.b_simple for r in readings if r.b_simple is not None]
    sizes = [r.suggested_batch_size for r in readings if r.suggested_batch_size is not None]
    return {
        "measured": len(readings),
        **_moments(readings),
        "in_metric": _moments(in_metric) if in_metric else None,
        "readings": len(told),
        "mean_reading": float(np.mean(told)) if told else None,
        "suggested": float(np.median(sizes)) if sizes else None,
    }


def _moments(readings: list[gnsmon.Reading]) -> dict[str, float]:
    return {
        "tr_sigma": float(np.mean([r.raw.tr_sigma for r in readings])),
        "grad_sq_norm": float(np.mean([r.raw.grad_sq_norm for r in readings])),
    }
