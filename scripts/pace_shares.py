"""Prints what share of a run goes into measuring with every="auto", simulated.

    python scripts/pace_shares.py

Steps stray by 5 %, what measuring adds by 10 %, one step in a hundred takes up to six times as
long, and after every hundredth there is a pause of thirty. Pauses do not count as training time.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import typer

from gnsmon.pace import Paced

STEPS = (60, 300, 1000, 3000, 10_000, 30_000)


def main(
    overhead: Annotated[float, typer.Option(help="Share of the time it may take.")] = 0.01,
    runs: Annotated[int, typer.Option(help="Simulated runs of each kind.")] = 20,
) -> None:
    head = ["a measured step costs", *(f"first {steps:,} steps" for steps in STEPS)]
    print(f"| {' | '.join(head)} |\n|--:{'|--:' * len(STEPS)}|")
    for extra in (0.01, 0.05, 0.1, 0.2, 0.6, 0.9, 1.7):
        found = np.mean([run(extra, overhead, seed) for seed in range(runs)], axis=0)
        cells = [f"{measured:.0f}, {share:.2%}" for measured, share in found]
        print(f"| {1 + extra:.2f} | {' | '.join(cells)} |")


def run(extra: float, overhead: float, seed: int) -> list[tuple[int, float]]:
    """Measured steps, and the share of the time that went into them, in the first of STEPS."""
    rng = np.random.default_rng(seed)
    now, worked, spent, measured = 0.0, 0.0, 0.0, 0
    pace, found = Paced(overhead, clock=lambda: now), []
    for step in range(max(STEPS)):
        took = np.exp(0.05 * rng.normal()) * (rng.uniform(1, 6) if rng.random() < 0.01 else 1)
        due = pace.due(step)
        more = due * extra * np.exp(0.1 * rng.normal())
        worked, spent, measured = worked + took + more, spent + more, measured + due
        now += took + more + 30 * (step % 100 == 99)
        if due:
            pace.record(step, pace.lap(step), None)
        if step + 1 in STEPS:
            found.append((measured, spent / worked))
    return found


if __name__ == "__main__":
    typer.run(main)
