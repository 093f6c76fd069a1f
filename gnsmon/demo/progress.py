"""What a person sees of a demo run while it trains, and how Ctrl-C ends it early."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from types import FrameType, TracebackType
from typing import Any, TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from gnsmon.estimators.values import Reading
from gnsmon.sinks.console import STYLE
from gnsmon.sinks.wording import noise_scale

Batch = TypeVar("Batch")
LINES = 10  # printed in a run where there is no terminal to redraw


class Ticker:
    """Counts a run's steps and shows the loss and each method's noise scale beside them.

    On a terminal it redraws in place, elsewhere it prints every tenth of the run. The first
    Ctrl-C lets the step in hand finish and ends `track`; a second one raises as usual.
    """

    def __init__(self, console: Console, steps: int) -> None:
        self.done = 0
        self.interrupted = False
        self._console = console
        self._steps = steps
        self._bar = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(32), TimeRemainingColumn()
        )
        self._task = self._bar.add_task("", total=steps)
        self._live = Live(console=console, refresh_per_second=8) if console.is_terminal else None
        self._outer: Any = None

    def __enter__(self) -> Ticker:
        if threading.current_thread() is threading.main_thread():
            self._outer = signal.signal(signal.SIGINT, self._interrupt)
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()
        if self._outer is not None:
            signal.signal(signal.SIGINT, self._outer)

    def track(self, batches: Iterable[Batch]) -> Iterator[tuple[int, Batch]]:
        """Numbers the batches from 1, as many as the run has steps or until Ctrl-C."""
        for batch in batches:
            yield self.done + 1, batch
            self.done += 1
            if self.interrupted or self.done == self._steps:
                return

    def show(self, step: int, loss: float, readings: Mapping[str, Reading]) -> None:
        """Show the loss of `step` and the last reading of every method."""
        words = [
            Text(f"{method:<7} ").append(noise_scale(reading), style=STYLE[reading.status])
            for method, reading in readings.items()
        ]
        if self._live:
            self._bar.update(self._task, completed=step)
            self._live.update(Group(self._bar, Text(f"loss    {loss:.3f}"), *words))
        elif step in (1, self._steps) or step % max(self._steps // LINES, 1) == 0:
            line = Text("  ").join([Text(f"step {step}/{self._steps}  loss {loss:.3f}"), *words])
            self._console.print(line, soft_wrap=True)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
