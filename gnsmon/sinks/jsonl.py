"""The run's own record, `gns.jsonl`: how it is written and how it is read back."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from numbers import Integral, Real
from operator import itemgetter
from pathlib import Path
from sys import intern
from typing import Any, NamedTuple, TextIO

import numpy as np
import orjson
from numpy.typing import NDArray

from gnsmon.estimators.health import Health
from gnsmon.estimators.values import SCHEMA, Array, Reading, Status
from gnsmon.sinks.files import open_log
from gnsmon.sinks.keys import OF_HEALTH

Record = dict[str, Any]
CHUNK = 10_000  # rows of a table that wait for their place in it
LONG = 1 << 20  # bytes of the file read at once
READING = np.dtype(
    [("step", int), ("examples", int), ("method", object), ("status", object)]
    + [(name, float) for name in ("b_simple", "low", "high", "grad_sq_norm", "tr_sigma", "wall")]
)
HEALTH = np.dtype([("step", int)] + [(name, float) for name in OF_HEALTH])
LINE = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
LOSS = np.dtype([("step", int), ("loss", float)])


class Jsonl:
    """Appends one JSON object per line to `path`: headers, readings, health, losses, advice.

    Every line carries `schema`, `wall` (Unix seconds), `kind` and `step` and is on disk when the
    call returns. A number that is not finite is written as null. The `groups` of a reading or of
    health are its last field, and by columns: `name`, `status`, `b_simple`, ... are lists in the
    same order; a group's reason is the text at position `reason` of `reasons`, with the number
    `about` in its braces.
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
        self._write({"kind": "header", "step": step, **header})

    def __call__(self, reading: Reading) -> None:
        """Append the reading."""
        self._step = reading.step
        self._write(reading.to_json(arrays=True))

    def health(self, health: Health) -> None:
        """Append the layers' health."""
        self._write(health.to_json(arrays=True))

    def loss(self, step: int, value: float) -> None:
        """Append the training loss of one step."""
        self._write({"kind": "loss", "step": step, "loss": value})

    def advise(self, text: str, suggested: int | None) -> None:
        """Append the advice, at the step of the last reading."""
        record = {"kind": "advice", "step": self._step, "text": text}
        self._write({**record, "suggested_batch_size": suggested})

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()
        self._file = None

    def _write(self, record: Record) -> None:
        if self._file is None:
            raise ValueError(f"{self.path} is not open: call start(header, step) first")
        stamped = {"schema": SCHEMA, "wall": round(time.time(), 3)}
        # As bytes, past the text layer, which would look through 100 kB of groups for line ends.
        self._file.buffer.write(_line({**stamped, **record}))
        self._file.buffer.flush()


class Known(NamedTuple):
    """A reading, less what a schedule does not ask for; None where it does not say."""

    step: int
    examples: int
    status: Status
    b_simple: float | None
    low: float | None


@dataclass(frozen=True)
class Log:
    """A run's log in the order written: the readings' and the losses' numbers as tables.

    A table is a structured array, so that `log.losses["loss"]` is a column and `log.losses[0]` a
    row; a number that is absent is NaN.
    """

    path: Path
    headers: list[Record]  # one, and one more per resume
    readings: NDArray[np.void]  # of type READING: every method's, interleaved
    losses: NDArray[np.void]  # of type LOSS
    last: dict[str, Record]  # each method's last reading, whole
    advice: list[Record] = field(default_factory=list)
    unreadable: int = 0  # lines torn by a kill or a full disk, left out
    health: NDArray[np.void] = field(  # of type HEALTH: the whole model's numbers
        default_factory=lambda: np.zeros(0, HEALTH)
    )
    last_health: Record | None = None  # whole

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
        declared = [m for m in self.header.get("methods") or [] if m in self.last]
        return list(dict.fromkeys([*declared, *self.last]))

    def of(self, method: str | None = None) -> NDArray[np.void]:
        """Readings of one method; without a name, of the primary one."""
        return self.readings[self.readings["method"] == self._named(method)]

    def column(self, *keys: str, method: str | None = None) -> Array:
        """A number per reading of `method`, NaN where absent: `column("raw", "tr_sigma")`.

        What is not in the table of `readings` is read from the file.
        """
        if len(keys) == 1 and keys[0] in READING.names:
            return np.array(self.of(method)[keys[0]], dtype=float)
        method = self._named(method)
        found = (_at(r, keys) for r in self._whole() if r["method"] == method)
        return np.array(list(found), dtype=float)

    def known(self, method: str | None = None) -> Iterator[Known]:
        """What the readings of `method` say of the noise scale, as a schedule takes it."""
        rows = self.of(method)
        columns = (rows[name].tolist() for name in Known._fields)
        for step, examples, status, *numbers in zip(*columns, strict=True):
            yield Known(step, examples, status, *(None if x != x else x for x in numbers))

    def step_times(self) -> tuple[Array, Array]:
        """Examples and seconds of a step, between any two readings at one batch size.

        With what else was done in between, such as validation: of many the median counts. Not where
        the clock was set back.
        """
        rows = self.of()
        steps, wall, examples = (rows[name] for name in ("step", "wall", "examples"))
        alike = (np.diff(examples) == 0) & (np.diff(steps) > 0) & (np.diff(wall) >= 0)
        seconds = np.diff(wall)[alike] / np.diff(steps)[alike]
        return examples[1:][alike].astype(float), seconds

    def latest(self, method: str | None = None) -> Reading | None:
        """The last reading of `method`, None before the first."""
        record = self.last.get(self._named(method) or "")
        return None if record is None else Reading.from_json(record)

    def latest_health(self) -> Health | None:
        """The layers' health at the last measured step, None without diagnostics."""
        return None if self.last_health is None else Health.from_json(self.last_health)

    def in_metric(self) -> Reading | None:
        """The primary method's last reading in the optimizer's metric, if there is one."""
        own = f"{self._named(None)}_preconditioned"
        return next((self.latest(name) for name in self.methods if name.startswith(own)), None)

    def _named(self, method: str | None) -> str | None:
        return method or next(iter(self.methods), None)

    def _whole(self) -> Iterator[Record]:
        """The readings' records; no more of them than were there when the log was read."""
        readings = (r for r in map(_parse, _lines(self.path)) if r and r["kind"] == "reading")
        return islice(readings, len(self.readings))


def read_log(path: str | Path) -> Log:
    """The log in a run folder, or in the file `path`.

    Lines torn by a kill are counted and left out. FileNotFoundError without a log; ValueError for
    an empty file, a file that is not a log, or one that another version of gnsmon wrote.
    """
    path = log_file(path)
    readings, losses, healths = _Table(READING), _Table(LOSS), _Table(HEALTH)
    healthy: bytes | None = None
    headers: list[Record] = []
    advice: list[Record] = []
    last: dict[str, bytes] = {}
    unreadable = 0
    for line in _lines(path):
        record = _parse(_head(line))
        kind = record and _known(record, path)["kind"]
        if record is None:
            unreadable += 1
        elif kind == "reading":
            readings.add(record)
            last[record["method"]] = line
        elif kind == "health":
            healths.add(record)
            healthy = line
        elif kind == "loss":
            losses.add(record)
        elif kind == "header":
            headers.append(record)
        elif kind == "advice":
            advice.append(record)
    if not headers:
        what = "no readable line" if unreadable else "an empty file"
        raise ValueError(f"{path}: expected a gns.jsonl with a header line, got {what}")
    whole = {method: orjson.loads(line) for method, line in last.items()}
    health = None if healthy is None else orjson.loads(healthy)
    tables = readings.whole(), losses.whole(), whole, advice, unreadable
    return Log(path, headers, *tables, healths.whole(), health)


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


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb", buffering=LONG) as file:
        yield from file


def _head(line: bytes) -> bytes:
    """What a table wants of a line: a reading's comes before `raw`, health's before its `groups`.

    All of a line that is torn, or that is two of which the first is torn.
    """
    end = line.find(b',"raw":{')
    if end < 0:
        end = line.find(b',"groups":{"name":')
    whole = end > 0 and line.endswith(b"}}\n") and line.find(b'"schema":', end) < 0
    return line[:end] + b"}" if whole else line


def _parse(line: bytes | str) -> Record | None:
    try:
        record = orjson.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "kind" in record and "schema" in record else None


def _known(record: Record, path: Path) -> Record:
    """The record; ValueError where it is of another schema."""
    if (schema := record["schema"]) == SCHEMA:
        return record
    remedy = (
        "A newer gnsmon wrote it: pip install --upgrade gnsmon"
        if schema > SCHEMA
        else "An older gnsmon wrote it: read it with that one, or log the run anew"
    )
    raise ValueError(f"{path}: expected schema {SCHEMA}, got {schema}. {remedy}")


def _step_of(line: str) -> int | None:
    return (_parse(line) or {}).get("step")


def _at(record: Any, keys: Sequence[str]) -> Any:
    if keys[0] == "groups" and (group := keys[1]) in (groups := record["groups"])["name"]:
        column = _at(groups, keys[2:])
        return column and column[groups["name"].index(group)]
    for key in keys:
        record = (record or {}).get(key)
    return record


class _Table:
    """Collects some fields of many records; a row takes what its numbers do."""

    def __init__(self, dtype: np.dtype[np.void]) -> None:
        self._dtype, self._fields = dtype, itemgetter(*(dtype.names or ()))
        self._texts = [name for name in dtype.names or () if dtype[name].hasobject]
        self._rows: list[tuple[Any, ...]] = []
        self._chunks: list[NDArray[np.void]] = []

    def add(self, record: Record) -> None:
        self._rows.append(self._fields(record))
        if len(self._rows) == CHUNK:
            self._pack()

    def whole(self) -> NDArray[np.void]:
        self._pack()
        return np.concatenate(self._chunks)

    def _pack(self) -> None:
        chunk = np.array(self._rows, dtype=self._dtype)
        for name in self._texts:  # one object for all that are equal
            chunk[name] = [intern(text) for text in chunk[name]]
        self._chunks.append(chunk)
        self._rows = []


def _line(record: Record) -> bytes:
    try:
        return orjson.dumps(record, default=_plain, option=LINE)
    except TypeError:  # what orjson does not take: keys that are no text, integers above 64 bits
        text = json.dumps(_finite(record), allow_nan=False, default=_plain)
        return text.encode() + b"\n"


def _plain(value: object) -> object:
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, str):  # half of a character pair is no text
        return value.encode(errors="replace").decode()
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, Real) and not isinstance(value, Integral):
        return float(value) if math.isfinite(value) else None
    return value
