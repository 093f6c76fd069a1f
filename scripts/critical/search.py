"""Which runs to make: batch size by batch size, the learning rates around the best."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, fields
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

from critical.problems import Problem
from critical.runs import Job, Run, train
from gnsmon.estimators.critical import CriticalBatch, fit_critical_batch

COARSE = 2  # half-octaves between the rates that bracket the best one on the first seed
FURTHEST = 8  # half-octaves from the best rate of the next larger batch
HOPELESS = 1.5  # times the best rate's steps on the first seed: not repeated on the others
PATIENCE = 2.0  # times the fewest steps known, after which a run is given up
TYPICAL = 12  # runs for a batch size, until some are known

Records = dict[Run, dict[str, Any]]


def wanted(problem: Problem, records: Records) -> list[Run]:
    """The runs to make next, as far as they are known; none when the measurement is complete.

    From the largest batch to the smallest, each from the best rate of the one before. When the
    grid is complete, the runs whose noise scale is compared with it.
    """
    start = 0
    for size in reversed(problem.batch_sizes):
        if missing := _missing(problem, size, start, records):
            return missing
        best = best_rate(problem, records, size, len(problem.targets) - 1)
        start = start if best is None else best
    return [run for run in noise_runs(problem, records) if run not in records]


def noise_runs(problem: Problem, records: Records) -> list[Run]:
    """Runs with the monitor: at the batch size nearest to each target's critical one, on all seeds.

    And on one seed at every batch size, at its best rate for the last target: at the nearest
    alone, agreement could come from the choice of the batch.
    """
    chosen = dict.fromkeys(
        place
        for target in range(len(problem.targets))
        if (place := best_place(problem, records, target)) is not None
    )
    seeds = range(problem.noise_seeds)
    runs = [Run(problem.name, *place, seed, noise=True) for place in chosen for seed in seeds]
    for size in problem.batch_sizes:
        rate = best_rate(problem, records, size, len(problem.targets) - 1)
        if rate is not None:
            runs.append(Run(problem.name, size, rate, 0, noise=True))
    return list(dict.fromkeys(runs))


def best_place(problem: Problem, records: Records, target: int) -> tuple[int, int] | None:
    """Batch size and rate of the best run: the fewest steps at the size nearest to b_crit.

    The smallest size where b_crit is below all, the largest where it is above, the middle one
    where it is not known.
    """
    steps = fewest_steps(problem, records, target)
    sizes = [size for size, (_, taken) in steps.items() if np.isfinite(taken).all()]
    if not sizes:
        return None
    fit = fit_of(steps)
    about = {
        "ok": fit.b_crit or 1.0,
        "below": sizes[0],
        "above": sizes[-1],
        "undefined": sizes[len(sizes) // 2],
    }[fit.status]
    size = min(sizes, key=lambda size: abs(math.log(size / about)))
    return size, steps[size][0]


def fit_of(steps: Mapping[int, tuple[int, list[float]]]) -> CriticalBatch:
    """The fit to `fewest_steps`."""
    pairs = [(size, taken) for size, (_, runs) in steps.items() for taken in runs]
    return fit_critical_batch([size for size, _ in pairs], [taken for _, taken in pairs])


def fewest_steps(
    problem: Problem, records: Records, target: int
) -> dict[int, tuple[int, list[float]]]:
    """For each batch size the best rate and the steps of its seeds; infinite if none reached it."""
    steps = {}
    for size in problem.batch_sizes:
        rate = best_rate(problem, records, size, target)
        if rate is not None:
            steps[size] = (rate, _steps(records, problem, size, target)[rate])
        elif any(run.problem == problem.name and run.batch_size == size for run in records):
            steps[size] = (0, [math.inf])
    return steps


def best_rate(problem: Problem, records: Records, size: int, target: int) -> int | None:
    """That of the least geometric mean of the steps, of the rates at which every seed arrived."""
    full = {
        rate: float(np.mean(np.log(steps)))
        for rate, steps in _steps(records, problem, size, target).items()
        if len(steps) == problem.seeds and np.isfinite(steps).all()
    }
    return min(full, key=lambda rate: full[rate]) if full else None


def budget(problem: Problem, size: int, records: Records) -> int:
    """Steps after which a run at this batch size is given up.

    From the fewest known here or at the next larger size, whence they grow like 1 / B at most.
    """
    for larger in (other for other in problem.batch_sizes if other >= size):
        last = _steps(records, problem, larger, len(problem.targets) - 1)
        known = [steps for taken in last.values() for steps in taken if math.isfinite(steps)]
        if known:
            return math.ceil(PATIENCE * min(known) * larger / size)
    return problem.max_steps


def measure(
    problems: Iterable[Problem],
    path: Path,
    *,
    workers: int,
    show: Callable[[int, int, str], None] = lambda done, total, last: None,
) -> Records:
    """Make all runs that `path` does not hold yet, a line appended for each; all records.

    Args:
        problems: to be measured, side by side.
        path: of the results; a later call takes them up where this one was stopped.
        workers: processes, of one thread each; 0 trains in this one.
        show: told of the runs that are done, of how many there may be, and of the last one.

    Raises:
        ValueError: when `path` holds runs of the same problem with other settings.
    """
    problems = list(problems)
    records = load(path, problems)
    if workers == 0:
        while plan := _plan(problems, records, set()):
            _save(path, records, train(plan[0]), show, problems)
        return records
    with path.open("a"), workers_of(workers) as pool:
        running: dict[Future[dict[str, Any]], Run] = {}
        _fill(pool, running, problems, records, workers)
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                _save(path, records, future.result(), show, problems)
            _fill(pool, running, problems, records, workers)
    return records


def workers_of(count: int) -> ProcessPoolExecutor:
    """Processes that end with this one, even if it is killed: by themselves they wait for ever."""
    context = get_context("spawn")  # a fork would inherit torch's threads
    return ProcessPoolExecutor(count, mp_context=context, initializer=_end_with_parent)


def _end_with_parent() -> None:
    def end() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    Thread(target=end, daemon=True).start()


def load(path: Path, problems: Iterable[Problem]) -> Records:
    """The runs in `path`, where settings of problems that it does not know are noted.

    A last line that was cut off by a kill is dropped.

    Raises:
        ValueError: on another line that cannot be read, or runs of a problem with other settings.
    """
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    lines = [_read(path, n, line) for n, line in enumerate(whole.split("\n")[:-1], 1)]
    settings = {line["name"]: line for line in lines if line["kind"] == "problem"}
    path.parent.mkdir(parents=True, exist_ok=True)
    for problem in problems:
        own = json.loads(json.dumps({"kind": "problem", **asdict(problem)}))
        known = settings.setdefault(problem.name, own)
        if known != own:
            odd = sorted(key for key in own if known.get(key) != own[key])
            raise ValueError(
                f"{path}: expected runs of {problem.name} as it is set now; they have other "
                f"{', '.join(odd)}; remove the file or write to another one with --out"
            )
        if own not in lines:
            whole += json.dumps(own) + "\n"
    if whole != text:
        path.write_text(whole)
    return {_run(line): line for line in lines if line["kind"] == "run"}


def _read(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or record.get("kind") not in ("problem", "run"):
        raise ValueError(
            f"{path}, line {number}: expected a run as JSON, got {line[:60]!r}; remove that line: "
            "its run is made again if it is still wanted"
        )
    return record


def _missing(problem: Problem, size: int, start: int, records: Records) -> list[Run]:
    """The next runs at one batch size; none when the best rate of every target is interior."""
    bracket: set[tuple[int, int]] = set()
    around: set[tuple[int, int]] = set()
    for target in range(len(problem.targets)):
        steps = _by_seed(records, problem, size, target)
        first = {rate: taken[0] for rate, taken in steps.items() if 0 in taken}
        outcome = {
            rate: records[Run(problem.name, size, rate, 0)]["outcome"] == "diverged"
            for rate in first
        }
        bracket |= {(rate, 0) for rate in _bracket(first, outcome, start)}
        around |= _around(problem, steps, first)
    known = {(r.rate, r.seed) for r in records if _of(r, problem, size)}
    for wishes in (bracket, around):
        missing = {wish for wish in wishes - known if abs(wish[0] - start) <= FURTHEST}
        if missing:
            return [Run(problem.name, size, *wish) for wish in sorted(missing)]
    return []


def _bracket(first: dict[int, float], diverged: dict[int, bool], start: int) -> set[int]:
    """Rates to try on the first seed until the best has a neighbour on both sides."""
    if not first:
        return {start}  # alone: from its steps comes the budget of the others
    best = min(first, key=lambda rate: first[rate])
    if math.isinf(first[best]):
        return {min(first) - COARSE} if diverged[max(first)] else {max(first) + COARSE}
    missing = set()
    if not any(best - COARSE <= rate < best for rate in first):
        missing.add(best - COARSE)
    if not any(best < rate <= best + COARSE for rate in first):
        missing.add(best + COARSE)
    return missing


def _around(
    problem: Problem, steps: dict[int, dict[int, float]], first: dict[int, float]
) -> set[tuple[int, int]]:
    """Rates and seeds: the best rate and those half an octave beside it, on every seed."""
    means = {
        rate: float(np.mean(np.log(list(taken.values()))))
        for rate, taken in steps.items()
        if len(taken) == problem.seeds
    }
    finite = {rate: mean for rate, mean in means.items() if math.isfinite(mean)}
    if finite:
        best = min(finite, key=lambda rate: finite[rate])
    elif means:
        best = min(means) - 1
    elif first:
        best = min(first, key=lambda rate: first[rate])
    else:
        return set()
    needed = {(best, seed) for seed in range(problem.seeds)}
    for rate in (best - 1, best + 1):
        hopeless = rate in first and first[rate] > HOPELESS * first.get(best, math.inf)
        seeds = problem.seeds if rate in first and not hopeless else 1
        needed |= {(rate, seed) for seed in range(seeds)}
    return needed


def _by_seed(
    records: Records, problem: Problem, size: int, target: int
) -> dict[int, dict[int, float]]:
    """Rate -> seed -> steps to the target, infinite where it was not reached."""
    found: dict[int, dict[int, float]] = {}
    for run, record in records.items():
        if _of(run, problem, size):
            steps = record["steps"][target]
            found.setdefault(run.rate, {})[run.seed] = math.inf if steps is None else steps
    return found


def _steps(records: Records, problem: Problem, size: int, target: int) -> dict[int, list[float]]:
    found = _by_seed(records, problem, size, target)
    return {rate: list(steps.values()) for rate, steps in found.items()}


def _of(run: Run, problem: Problem, size: int) -> bool:
    return (run.problem, run.batch_size, run.noise) == (problem.name, size, False)


def _plan(problems: Iterable[Problem], records: Records, running: set[Run]) -> list[Job]:
    return [
        Job(run, problem, budget(problem, run.batch_size, records))
        for problem in problems
        for run in wanted(problem, records)
        if run not in running
    ]


def _fill(
    pool: Executor,
    running: dict[Future[dict[str, Any]], Run],
    problems: list[Problem],
    records: Records,
    workers: int,
) -> None:
    """Start runs until every worker has one; the problem with the fewest runs first."""
    while len(running) < workers:
        plan = _plan(problems, records, set(running.values()))
        if not plan:
            return
        made = {p.name: sum(run.problem == p.name for run in records) for p in problems}
        job = min(plan, key=lambda job: made[job.problem.name])
        running[pool.submit(train, job)] = job.run


def _save(
    path: Path,
    records: Records,
    record: dict[str, Any],
    show: Callable[[int, int, str], None],
    problems: list[Problem],
) -> None:
    line = {"kind": "run", **record}
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    records[_run(line)] = line
    last = f"{record['problem']} batch {record['batch_size']} lr {record['lr']:.3g}"
    total = sum(_expected(problem, records) for problem in problems)
    names = {problem.name for problem in problems}
    show(sum(run.problem in names for run in records), total, f"{last}: {record['outcome']}")


def _expected(problem: Problem, records: Records) -> int:
    """About how many runs the problem takes in all."""
    if not wanted(problem, records):
        return sum(run.problem == problem.name for run in records)
    made = [sum(_of(run, problem, size) for run in records) for size in problem.batch_sizes]
    begun = [count for count in made if count]
    typical = max(begun[1:], default=TYPICAL)  # the smallest is still being searched
    grid = sum(begun[1:]) + max(begun[0], typical) if begun else 0
    noise = problem.noise_seeds * len(problem.targets) + len(problem.batch_sizes)
    return grid + typical * (len(made) - len(begun)) + noise


def _run(line: dict[str, Any]) -> Run:
    return Run(**{field.name: line[field.name] for field in fields(Run)})
