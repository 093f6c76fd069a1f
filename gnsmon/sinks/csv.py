"""Readings as rows of a spreadsheet: the numbers of the whole model, no groups."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, TextIO

from gnsmon.estimators.values import Reading
from gnsmon.sinks.files import open_log

FIELDS = (
    *("step", "method", "status", "reason", "b_simple", "low", "high", "grad_sq_norm", "tr_sigma"),
    *("examples", "tokens", "n_eff", "coverage", "overhead", "suggested_batch_size"),
)
KNOWN = ("factor", "spread", "standard_error", "amplification")  # of an approximate source


class Csv:
    """Appends a row per reading to `path`; a value that does not exist is an empty cell.

    Fresh and resumed runs treat an existing file as `Jsonl` does.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: TextIO | None = None

    def start(self, header: dict[str, Any], step: int) -> None:
        """Open the file, dropping rows from `step` on when resumed."""
        self.close()
        self._file = open_log(self.path, step, _step_of)
        if self.path.stat().st_size == 0:
            self._write([*FIELDS, *KNOWN, "skipped_steps"])

    def __call__(self, reading: Reading) -> None:
        """Append the reading's row."""
        cells = [getattr(reading, name) for name in FIELDS]
        known = [getattr(reading.approximation, name, None) for name in KNOWN]
        self._write([*cells, *known, sum(reading.skipped.values())])

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()
        self._file = None

    def _write(self, cells: list[Any]) -> None:
        if self._file is None:
            raise ValueError(f"{self.path} is not open: call start(header, step) first")
        row = [" ".join(c.split()) if isinstance(c, str) else c for c in cells]  # one line a row
        csv.writer(self._file, lineterminator="\n").writerow(row)


def _step_of(line: str) -> int | None:
    first = line.partition(",")[0]
    return int(first) if first.isdigit() else None
