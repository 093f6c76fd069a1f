"""Prints, for every layer rule, its largest error in float64 against one example at a time.

python scripts/rule_errors.py
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import torch

import gnsmon

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import cases  # noqa: E402


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, list[gnsmon.checking.Row]] = defaultdict(list)
    names: dict[str, set[str]] = defaultdict(set)
    for case in cases.CASES:
        model, batch = case.make()
        for row in gnsmon.check(model, case.loss, batch).rows:
            found[row.layer].append(row)
            names[row.layer].add(case.name)
    print(
        "| layer | cases | parameters | largest error of the norms | of the sum against `.grad` |"
    )
    print("|---|--:|--:|--:|--:|")
    for layer, rows in sorted(found.items()):
        measured = [row for row in rows if row.reason is None]
        norms, sums = (
            max(getattr(r, key) or 0 for r in measured) for key in ("error", "sum_error")
        )
        print(f"| {layer} | {len(names[layer])} | {len(measured)} | {norms:.0e} | {sums:.0e} |")
    left_out = {row.reason for rows in found.values() for row in rows if row.reason}
    print("\nLeft out:", *(left_out or ["nothing"]), sep="\n- ")


if __name__ == "__main__":
    main()
