"""Prints what the host pays: a measured step by groups, a log of a million records, imports.

    python scripts/bench_host.py

Medians with quartiles. A step's cost is that of the estimators and of the log's line, without the
norms; what torch takes to import is there to compare with. Logs are made in a temporary folder
(2.5 GB at a million records) and read by `gnsmon report`, in processes of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from gnsmon.estimators import Estimator, Groups, NormPair, Raw, Reading
from gnsmon.sinks import Jsonl


def step_costs(n_groups: int, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Microseconds in the estimators and in the log of `rounds` measured steps."""
    rng, estimator = np.random.default_rng(0), Estimator(1 + n_groups)
    names = [f"transformer.blocks.{i}" for i in range(1 + n_groups)]
    sink = Jsonl(folder / f"{n_groups}.jsonl")
    sink.start({"methods": ["pepgns"]}, 0)
    seconds: dict[str, list[float]] = {"estimators": [], "JSONL": [], "together": []}
    for step in range(20 + rounds):
        big = rng.lognormal(0, 0.3, 1 + n_groups)
        pair = NormPair(big, big * rng.uniform(0.5, 0.7, 1 + n_groups), 1 / 64, 64)
        begin = time.perf_counter()
        reading = read(estimator, pair, names, step)
        middle = time.perf_counter()
        sink(reading)
        end = time.perf_counter()
        for key, value in zip(seconds, (middle - begin, end - middle, end - begin), strict=True):
            seconds[key].append(value * 1e6)
    sink.close()
    return {key: values[20:] for key, values in seconds.items()}


def read(estimator: Estimator, pair: NormPair, names: list[str], step: int) -> Reading:
    """The reading of a step, made as the monitor makes it."""
    own = estimator.update(pair)
    ratios = estimator.ratios()
    s, g = estimator.averages.mean
    p = np.full_like(g, pair.sum_sq_weights)
    norms = {"big_sq_norm": pair.big_sq_norm, "parts_sq_norm": pair.parts_sq_norm}
    raw = {**norms, "sum_sq_weights": p, **vars(own)}
    groups = Groups(names, ratios, {"grad_sq_norm": g, "tr_sigma": s, "raw": raw})
    return Reading(
        step=step,
        examples=pair.examples,
        tokens=None,
        method="pepgns",
        **vars(groups.at(0)),
        n_eff=estimator.n_eff,
        coverage=1.0,
        overhead=None,
        groups=groups.take(slice(1, None)),
    )


def write_log(folder: Path, readings: int, losses: int) -> None:
    """A log of so many readings of ten groups, and losses beside them."""
    rng, estimator = np.random.default_rng(0), Estimator(11)
    names = [f"transformer.blocks.{i}" for i in range(11)]
    for step in range(50):
        big = rng.lognormal(0, 0.3, 11)
        reading = read(estimator, NormPair(big, 0.6 * big, 1 / 64, 64), names, step)
    raw = Raw(**vars(reading.raw))
    sink = Jsonl(folder / "gns.jsonl")
    sink.start({"model": "GPT", "methods": ["pepgns"]}, 0)
    for i in range(max(readings, losses)):
        if i < readings:
            sink(replace(reading, step=10 * i, raw=raw, b_simple=300 + 50 * np.sin(i / 1e4)))
        if i < losses:
            sink.loss(10 * i, 3 - i / losses)
    sink.close()


def child(code: str) -> tuple[float, float, float, str]:
    """Seconds, those of the CPU, peak MB and what was printed, of a process that runs the code."""
    begin = time.perf_counter()
    code += "\nimport resource, sys; used = resource.getrusage(resource.RUSAGE_SELF)"
    code += "\nprint(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    cpu, peak = map(float, done.stderr.split()[-2:])
    return time.perf_counter() - begin, cpu, peak, done.stdout


def show(values: list[float], digits: int = 0) -> str:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:,.{digits}f} ({low:,.{digits}f}-{high:,.{digits}f})"


def main(
    records: Annotated[int, typer.Option(help="Lines of the logs that are read.")] = 1_000_000,
    rounds: Annotated[int, typer.Option(help="Steps per figure.")] = 300,
    processes: Annotated[int, typer.Option(help="Processes per figure.")] = 5,
) -> None:
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # byte code is kept, as where it is installed
    print("| a measured step | estimators, µs | JSONL, µs | together, µs |")
    print("|---|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as name:
        for n in (5, 50, 500):
            costs = step_costs(n, Path(name), rounds)
            print(f"| {n} groups | " + " | ".join(map(show, costs.values())) + " |")
    print("\n| `gnsmon report` | s | of the CPU | peak MB | file, MB |\n|---|--:|--:|--:|--:|")
    for readings, losses in ((records, 0), (records // 2, records // 2)):
        with tempfile.TemporaryDirectory() as name:
            write_log(Path(name), readings, losses)
            code = f"from gnsmon.cli import app; app(['report', {name!r}], standalone_mode=False)"
            runs = [child(code) for _ in range(3)]
            size = (Path(name) / "gns.jsonl").stat().st_size / 1e6
        seconds, cpu = (show([run[i] for run in runs], 1) for i in (0, 1))
        what, peak = f"{readings:,} readings, {losses:,} losses", max(run[2] for run in runs)
        print(f"| {what} | {seconds} | {cpu} | {peak:,.0f} | {size:,.0f} |")
    print("\n| start | ms |\n|---|--:|")
    for before, statement in (
        ("", "import torch"),
        ("import torch", "import gnsmon"),
        ("import torch, gnsmon", "gnsmon.attach"),
    ):
        code = f"import time; {before}\nt = time.perf_counter(); {statement}\n"
        code += "print(1e3 * (time.perf_counter() - t))"
        found = [float(child(code)[3]) for _ in range(1 + processes)][1:]  # the first one compiles
        print(f"| `{statement}` | {show(found, 1)} |")
    code = "from gnsmon.cli import app; app(['report', '--help'], standalone_mode=False)"
    print(f"| `gnsmon report --help` | {show([1e3 * child(code)[0] for _ in range(processes)])} |")


if __name__ == "__main__":
    typer.run(main)
