"""Prints how much of each model family is covered, and how far it is from brute force.

python scripts/model_families.py [FAMILY ...]
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from pathlib import Path

import torch

import gnsmon

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import families  # noqa: E402


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("| family | parameters | covered | largest error | left out, and why |")
    print("|---|--:|--:|--:|---|")
    for name in sys.argv[1:] or families.families():
        print(row(name, families.check(name)), flush=True)


def row(name: str, check: gnsmon.checking.Check) -> str:
    total = sum(r.numbers for r in check.rows)
    errors = [e for r in check.rows if not r.reason for e in (r.error, r.sum_error) if e]
    why = Counter()
    for r in check.rows:
        if r.reason:
            why[r.reason.split(": ", 1)[-1]] += r.numbers
    reasons = "; ".join(f"{n / total:.2%} {reason}" for reason, n in why.most_common())
    return f"| {name} | {total:,} | {check.fraction:.2%} | {max(errors):.0e} | {reasons} |"


if __name__ == "__main__":
    main()
