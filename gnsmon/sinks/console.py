"""Readings as sentences in a terminal, at a pace that a person can follow."""

from __future__ import annotations

import time
from typing import Any

import rich.console
from rich.text import Text

from gnsmon.estimators.values import Reading
from gnsmon.sinks.wording import approximation, noise_scale, verdict

STYLE = {"ok": "green", "wide": "yellow", "lower_bound": "yellow", "undefined": "dim"}


class Console:
    """Prints a line per reading, at most one in `every` seconds, and always the first and the last.

    Beside a rich progress bar pass its console: `Console(progress.console)`.
    """

    def __init__(self, console: rich.console.Console | None = None, *, every: float = 10.0) -> None:
        self._console = console or rich.console.Console()
        self._every = every
        self._primary: str | None = None
        self._level = 0.95
        self._printed: dict[str, float] = {}  # method -> when its last line was printed
        self._held: dict[str, Reading] = {}  # method -> its last reading, not printed yet

    def start(self, header: dict[str, Any], step: int) -> None:
        """Learn the primary method, whose lines do not repeat its name, and the level."""
        self._level = header.get("level") or self._level
        self._primary = next(iter(header.get("methods") or []), None)

    def __call__(self, reading: Reading) -> None:
        """Print the reading, or hold it while the last line is recent."""
        self._held[reading.method] = reading
        last = self._printed.get(reading.method)
        if last is None or time.monotonic() - last >= self._every:
            self._print(reading.method)

    def advise(self, text: str, suggested: int | None) -> None:
        """Print the advice, after the last readings."""
        self._print_held()
        self._say(Text(text, style="bold"))

    def close(self) -> None:
        """Print the last readings, where they were held back."""
        self._print_held()

    def _print_held(self) -> None:
        for method in list(self._held):
            self._print(method)

    def _print(self, method: str) -> None:
        reading = self._held.pop(method)
        self._printed[method] = time.monotonic()
        self._primary = self._primary or method
        suggested = reading.suggested_batch_size
        line = Text(f"step {reading.step:,}  ")
        line.append("" if method == self._primary else f"[{method}] ", style="cyan")
        line.append(noise_scale(reading, self._level), style=STYLE[reading.status])
        line.append(f"  {verdict(reading)}")
        known = approximation(reading)
        line.append(f"  | {known}" if known else "", style="dim")
        line.append(f"  | suggested {suggested:,}" if suggested else "", style="bold")
        line.append(f"  | {reading.coverage:.0%} covered" if reading.coverage < 0.995 else "")
        self._say(line)

    def _say(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True, highlight=False)
