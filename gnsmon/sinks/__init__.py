"""Where readings go: a sink is any callable that takes a `Reading`.

It may also have `start(header, step)`, `health(health)`, `loss(step, value)`,
`advise(text, suggested)` and `close()`; those it has are called (`gnsmon.sinks.base`). So
`readings.append` is a sink, and so is

>>> class Largest:
...     value = 0.0
...     def __call__(self, reading):
...         self.value = max(self.value, reading.b_simple or 0.0)
"""

from __future__ import annotations

from pathlib import Path

from gnsmon.sinks.base import Sink, SinkSet
from gnsmon.sinks.jsonl import Jsonl, Log, read_log

__all__ = ["Jsonl", "Log", "Sink", "SinkSet", "open_sink", "read_log"]

KINDS = ("jsonl", "csv", "console", "tensorboard", "wandb")


def open_sink(spec: str | Sink, run_dir: str | Path | None = None) -> Sink:
    """The sink that `spec` names; a callable is its own sink.

    `"jsonl"`, `"csv"` and `"tensorboard"` write to `run_dir`, or to what follows a colon: a file
    for names ending in .jsonl or .csv, else a folder. `"wandb"` joins the active run,
    `"wandb:project"` may begin one. ValueError for anything else, ImportError for a missing
    package.
    """
    if callable(spec):
        return spec
    kind, colon, place = str(spec).partition(":")
    if not isinstance(spec, str) or kind not in KINDS or (colon and not place):
        raise ValueError(
            f"expected a sink as one of {', '.join(KINDS)}, the same with ':' and a place "
            f"('tensorboard:runs/a'), or a callable taking a Reading; got {spec!r}"
        )
    if kind == "console":
        if place:
            raise ValueError(f"expected 'console' alone, got {spec!r}: it takes no place")
        from gnsmon.sinks.console import Console

        return Console()
    if kind == "wandb":
        from gnsmon.sinks.wandb import Wandb

        return Wandb(place or None, folder=Path(run_dir) if run_dir else None)
    if not place and run_dir is None:
        raise ValueError(f"sink {spec!r} needs a place: write '{kind}:PATH', or pass run_dir")
    path = Path(place or str(run_dir))
    if kind == "tensorboard":
        from gnsmon.sinks.tensorboard import TensorBoard

        return TensorBoard(path)
    path = path if path.suffix == f".{kind}" else path / f"gns.{kind}"
    if kind == "jsonl":
        return Jsonl(path)
    from gnsmon.sinks.csv import Csv

    return Csv(path)
