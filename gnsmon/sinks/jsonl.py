"""The run's own record, `gns.jsonl`: how it is written and how it is read back."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from gnsmon.estimators.values import SCHEMA, Array, Reading
from gnsmon.sinks.files import open_log

Record = dict[str, Any]
CHUNK = 1000  # lines parsed in one call


class Jsonl:
    """Appends one JSON object per line to `path`: headers, readings, losses, advice.

    Every line carries `schema`, `kind`, `step` and `wall` (Unix seconds) and is on disk when the
    call returns. A number that is not finite is written as null.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: TextIO | None = None
        self._step = 0

    def start(self, header: dict[str, Any], step: int) -> None:
        """Open the file for a run that writes from `step` on, and describe the run.

        A fresh run (step 0) moves an earlier log aside to `gns.<n>.jsonl` and warns. A resumed run
        drops the records from `step` on and a torn last line, then adds another header.
        """
        self.close()
        self._step = step
        self._file = open_log(self.path, step, _step_of)
        self._write({"schema": SCHEMA, "kind": "header", "step": step, **header})

    def __call__(self, reading: Reading) -> None:
        """Append the reading."""
        self._step = reading.step
        self._write(reading.to_json())

    def loss(self, step: int, value: float) -> None:
        """Append the training loss of one step."""
        self._write({"schema": SCHEMA, "kind": "loss", "step": step, "loss": value})

    def advise(self, text: str, suggested: int | None) -> None:
        """Append the advice, at the step of the last reading."""
        record = {"schema": SCHEMA, "kind": "advice", "step": self._step, "text": text}
        self._write({**record, "suggested_batch_size": suggested})

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()
        self._file = None

    def _write(self, record: Record) -> None:
        if self._file is None:
            raise ValueError(f"{self.path} is not open: call start(header, step) first")
        record = {**record, "wall": round(time.time(), 3)}
        try:
            line = json.dumps(record, allow_nan=False, default=_plain)
        except ValueError:
            line = json.dumps(_finite(record), allow_nan=False, default=_plain)
        self._file.write(line + "\n")


@dataclass(frozen=True)
class Log:
    """A run's log, as plain dicts in the order written."""

    path: Path
    headers: list[Record]  # one, and one more per resume
    readings: list[Record]  # every method's, interleaved
    losses: list[Record] = field(default_factory=list)
    advice: list[Record] = field(default_factory=list)
    unreadable: int = 0  # lines torn by a kill or a full disk, left out

    @property
    def header(self) -> Record:
        """The latest description of the run."""
        return self.headers[-1]

    @property
    def level(self) -> float:
        """Confidence level of the intervals."""
        return self.header.get("level") or 0.95

    @property
    def methods(self) -> list[str]:
        """Methods that have readings, the primary one first."""
        seen = dict.fromkeys(r["method"] for r in self.readings)
        declared = [m for m in self.header.get("methods") or [] if m in seen]
        return list(dict.fromkeys([*declared, *seen]))

    def of(self, method: str | None = None) -> list[Record]:
        """Readings of one method; without a name, of the primary one."""
        method = method or next(iter(self.methods), None)
        return [r for r in self.readings if r["method"] == method]

    def column(self, *keys: str, method: str | None = None) -> Array:
        """A number per reading of `method`, NaN where absent: `column("raw", "tr_sigma")`."""
        return np.array([_at(record, keys) for record in self.of(method)], dtype=float)

    def latest(self, method: str | None = None) -> Reading | None:
        """The last reading of `method`, None before the first."""
        records = self.of(method)
        return Reading.from_json(records[-1]) if records else None


def read_log(path: str | Path) -> Log:
    """The log in a run folder, or in the file `path`.

    Lines torn by a kill are counted and left out. FileNotFoundError without a log; ValueError for
    an empty file, a file that is not a log, or one that a newer gnsmon wrote.
    """
    path = log_file(path)
    kinds: dict[str, list[Record]] = {"header": [], "reading": [], "loss": [], "advice": []}
    unreadable = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        while lines := list(islice(file, CHUNK)):
            records = _parse(lines)
            unreadable += len(lines) - len(records)
            for record in records:
                if record["schema"] > SCHEMA:
                    raise ValueError(
                        f"{path}: expected schema {SCHEMA} or older, got {record['schema']}. "
                        "A newer gnsmon wrote it: pip install --upgrade gnsmon"
                    )
                kinds.setdefault(record["kind"], []).append(record)
    if not kinds["header"]:
        what = "no readable line" if unreadable else "an empty file"
        raise ValueError(f"{path}: expected a gns.jsonl with a header line, got {what}")
    headers, readings, losses, advice = (kinds[k] for k in ("header", "reading", "loss", "advice"))
    return Log(path, headers, readings, losses, advice, unreadable)


def log_file(path: str | Path) -> Path:
    """The gns.jsonl of a run folder, or `path` itself; FileNotFoundError says which is missing."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such run folder; pass the run_dir given to attach()")
    file = path / "gns.jsonl" if path.is_dir() else path
    if not file.exists():
        logs = sorted(str(p) for p in path.glob("*/gns.jsonl"))
        hint = f"did you mean one of {', '.join(logs[:5])}?" if logs else "is it the run_dir?"
        raise FileNotFoundError(f"{path} holds no gns.jsonl; {hint}")
    return file


def _parse(lines: list[str]) -> list[Record]:
    try:  # one call for many lines: twice as fast, and their keys share memory
        records = json.loads(f"[{','.join(lines)}]")
        whole = len(records) == len(lines)
    except ValueError:
        whole = False
    if not whole:
        if len(lines) == 1:
            return []
        return [record for line in lines for record in _parse([line])]
    return [r for r in records if isinstance(r, dict) and "kind" in r and "schema" in r]


def _step_of(line: str) -> int | None:
    return next((record.get("step") for record in _parse([line])), None)


def _at(record: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        record = (record or {}).get(key)
    return record


def _plain(value: object) -> object:
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, Real) and not isinstance(value, Integral):
        return float(value) if math.isfinite(value) else None
    return value
