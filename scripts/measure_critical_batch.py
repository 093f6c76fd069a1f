"""Measures the critical batch size by a grid of runs and compares it with the noise scale.

Batch size x learning rate x seed to several held-out losses, the fit of the steps with its
interval, and gnsmon's noise scale along the best run at each loss. A stopped measurement goes on
where it was when the same command is given again:

python scripts/measure_critical_batch.py --markdown docs/validation.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

from critical.findings import findings, tables, write
from critical.problems import PROBLEMS, quick
from critical.search import load, measure
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", default=",".join(PROBLEMS), help="names, by commas")
    parser.add_argument("--quick", action="store_true", help="a small grid, for a look")
    parser.add_argument("--out", type=Path, help="JSON lines of the runs, to be taken up again")
    parser.add_argument("--markdown", type=Path, help="document for tables, figures and numbers")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--report", action="store_true", help="no runs, only what is there")
    options = parser.parse_args()
    names = options.problems.split(",")
    if unknown := set(names) - set(PROBLEMS):
        parser.error(f"problems: expected some of {', '.join(PROBLEMS)}, got {', '.join(unknown)}")
    problems = [quick(PROBLEMS[n]) if options.quick else PROBLEMS[n] for n in names]
    name = "critical-batch-quick" if options.quick else "critical-batch"
    path = options.out or Path("runs") / f"{name}.jsonl"
    console = Console()
    if options.workers < 0:
        parser.error(f"workers: expected 0 (train in this process) or more, got {options.workers}")
    if options.report and not path.exists():
        parser.error(f"report: expected runs in {path}, which is not there; measure them first")
    try:
        records = load(path, problems)
    except ValueError as error:
        parser.error(str(error))
    if not options.report:
        columns = (TextColumn("runs"), MofNCompleteColumn(), BarColumn(32))
        times = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        with Progress(*columns, *times, console=console) as bar:
            task = bar.add_task("", total=None)

            def show(done: int, total: int, last: str) -> None:
                bar.update(task, completed=done, total=total, description=last)

            records = measure(problems, path, workers=options.workers, show=show)
    if options.markdown:
        write(options.markdown, problems, records)
    for problem in problems:
        console.print(f"\n{problem.name}\n", style="bold")
        table = tables(problem, findings(problem, records), records)
        console.print(table, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
