"""What a sink is, and the set that feeds several of them without ever stopping training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

from gnsmon.estimators.health import Health
from gnsmon.estimators.values import Reading

Sink: TypeAlias = Callable[[Reading], object]
PATIENCE = 3  # failures in a row after which a sink is switched off


@runtime_checkable
class Starts(Protocol):
    """A sink that wants the run's description before the first reading."""

    def start(self, header: dict[str, Any], step: int) -> None:
        """Get ready to write from `step` on, dropping what an earlier process wrote from there.

        `step` is 0 for a fresh run and the resumed step otherwise.
        """


@runtime_checkable
class ShowsHealth(Protocol):
    """A sink that wants the layers' health too."""

    def health(self, health: Health) -> None:
        """Take the health of a measured step, after the step's readings."""


@runtime_checkable
class LogsLoss(Protocol):
    """A sink that keeps training losses beside the readings."""

    def loss(self, step: int, value: float) -> None:
        """Record the training loss of one step."""


@runtime_checkable
class Advises(Protocol):
    """A sink that shows advice."""

    def advise(self, text: str, suggested: int | None) -> None:
        """Show the advice: when it changes, and at the end."""


@runtime_checkable
class Closes(Protocol):
    """A sink that holds something to flush or to release."""

    def close(self) -> None:
        """Finish; safe to call twice."""


@dataclass
class _Member:
    sink: Sink
    name: str
    failures: int = 0
    in_a_row: int = 0


class SinkSet:
    """Hands every event to every sink; a sink that fails stops neither training nor the others.

    A failure is counted and warned of once per sink; after three in a row the sink is switched off,
    which is also said. `strict=True` raises instead.
    """

    def __init__(self, sinks: Iterable[Sink], *, strict: bool = False) -> None:
        self._members = [_Member(s, getattr(s, "__qualname__", type(s).__name__)) for s in sinks]
        self._strict = strict

    def start(self, header: dict[str, Any], step: int = 0) -> None:
        """Announce the run to the sinks that have `start`."""
        self._each(lambda sink: isinstance(sink, Starts) and sink.start(header, step))

    def __call__(self, reading: Reading) -> None:
        """Hand a reading to every sink."""
        self._each(lambda sink: sink(reading))

    def health(self, health: Health) -> None:
        """Hand the layers' health to the sinks that have `health`."""
        self._each(lambda sink: isinstance(sink, ShowsHealth) and sink.health(health))

    def loss(self, step: int, value: float) -> None:
        """Hand a training loss to the sinks that have `loss`."""
        self._each(lambda sink: isinstance(sink, LogsLoss) and sink.loss(step, value))

    def advise(self, text: str, suggested: int | None = None) -> None:
        """Hand the advice to the sinks that have `advise`."""
        self._each(lambda sink: isinstance(sink, Advises) and sink.advise(text, suggested))

    def close(self) -> None:
        """Close every sink once, those switched off included."""
        self._each(lambda sink: isinstance(sink, Closes) and sink.close(), even_if_off=True)
        self._members = []

    @property
    def failures(self) -> dict[str, int]:
        """Failed events per sink, of those that failed."""
        return {m.name: m.failures for m in self._members if m.failures}

    def _each(self, send: Callable[[Sink], object], *, even_if_off: bool = False) -> None:
        said: list[str] = []
        for member in self._members:
            if member.in_a_row < PATIENCE or even_if_off:
                said += self._guarded(member, send)
        for text in said:  # after the last sink: under -W error a warning raises
            warnings.warn(text, RuntimeWarning, stacklevel=3)

    def _guarded(self, member: _Member, send: Callable[[Sink], object]) -> list[str]:
        try:
            send(member.sink)
        except Exception as error:
            if self._strict:
                raise
            member.failures += 1
            member.in_a_row += 1
            what = f"gnsmon: sink {member.name} failed with {type(error).__name__}: {error}"
            first = [f"{what}. Training goes on."] if member.failures == 1 else []
            off = [f"{what}. Switched off after {PATIENCE} failures in a row."]
            return first + (off if member.in_a_row == PATIENCE else [])
        member.in_a_row = 0
        return []
