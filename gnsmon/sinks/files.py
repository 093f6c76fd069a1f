"""How a log file that grows line by line begins, resumes, and survives a kill."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import TextIO


def open_log(path: Path, step: int, step_of: Callable[[str], int | None]) -> TextIO:
    """`path` opened for appending whole lines, holding only what was written before `step`.

    A fresh run (step 0) never destroys an earlier log: it moves to `<stem>.<n><suffix>`, with a
    warning. A resumed run drops the lines with `step_of(line) >= step` (None: always kept) and a
    last line that a kill tore, by atomic replacement.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    held = path.exists() and path.stat().st_size > 0
    aside = _free_name(path) if held and step == 0 else None
    if aside:
        path.rename(aside)
    elif held:
        _cut(path, step, step_of)
    file = path.open("a", buffering=1, encoding="utf-8", newline="\n")  # a kill loses no line
    if aside:
        warnings.warn(
            f"gnsmon: {path} held an earlier run, now {aside.name}. To continue a run instead, "
            "load the monitor's state_dict; to avoid the move, use a new run folder.",
            UserWarning,
            stacklevel=2,
        )
    return file


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.stem}.{n}{path.suffix}") for n in count(1))
    return next(name for name in names if not name.exists())


def _cut(path: Path, step: int, step_of: Callable[[str], int | None]) -> None:
    part = path.with_name(path.name + ".part")
    with (
        path.open(encoding="utf-8", errors="replace", newline="\n") as old,
        part.open("w", encoding="utf-8", newline="\n") as new,
    ):
        for line in old:
            if line.endswith("\n") and ((at := step_of(line)) is None or at < step):
                new.write(line)
        new.flush()
        os.fsync(new.fileno())
    part.replace(path)
