"""Readings in a W&B run, on a step axis of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gnsmon.estimators.health import Health
from gnsmon.estimators.values import Reading
from gnsmon.sinks.keys import health_scalars, prefix, scalars


class Wandb:
    """Logs to the active W&B run, or to one of its own when a `project` is given.

    A run of yours keeps its own step: readings are logged with `gns/step` as their axis and ride on
    your next `run.log` (commit=False), so that a `step=` of yours is never overtaken. If you log
    more rarely than the monitor measures, and never pass `step=`, `commit=True` keeps every
    reading. A run of our own is finished by `close()`.
    """

    def __init__(
        self, project: str | None = None, *, folder: Path | None = None, commit: bool | None = None
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError(
                'the wandb sink needs a package: pip install "gnsmon[wandb]"'
            ) from error
        self._wandb = wandb
        self._project, self._folder = project, folder
        self._commit = commit
        self._header: dict[str, Any] = {}
        self._primary: str | None = None
        self._run: Any = None
        self._owned = False

    def start(self, header: dict[str, Any], step: int) -> None:
        """Join the active run, or begin one in the project."""
        self._header, self._primary = header, next(iter(header.get("methods") or []), None)
        self._join()

    def __call__(self, reading: Reading) -> None:
        """Log every number that the reading has, and `gns/step`."""
        run = self._join()
        self._primary = self._primary or reading.method
        self._log(reading.step, scalars(reading, prefix(reading.method, self._primary)))
        if reading.suggested_batch_size is not None and reading.method == self._primary:
            run.summary["gns/suggested_batch_size"] = reading.suggested_batch_size

    def health(self, health: Health) -> None:
        """Log every number of the layers' health, and `gns/step`."""
        self._log(health.step, health_scalars(health))

    def _log(self, step: int, values: dict[str, float]) -> None:
        commit = self._owned if self._commit is None else self._commit
        self._join().log({"gns/step": step, **values}, commit=commit)

    def advise(self, text: str, suggested: int | None) -> None:
        """Put the advice and the suggestion into the run's summary."""
        run = self._join()
        run.summary["gns/advice"] = text
        if suggested is not None:
            run.summary["gns/suggested_batch_size"] = suggested

    def close(self) -> None:
        """Finish a run of our own."""
        if self._owned:
            self._run.finish()
        self._run, self._owned = None, False

    def _join(self) -> Any:
        if self._run is None:
            self._run = self._wandb.run or self._init()
            self._run.define_metric("gns/step", hidden=True)
            self._run.define_metric("gns/*", step_metric="gns/step", step_sync=True)
        return self._run

    def _init(self) -> Any:
        if self._project is None:
            raise ValueError(
                "the wandb sink expected an active W&B run, got none: call wandb.init(...) first, "
                'or give a project, "wandb:my-project"'
            )
        if self._folder:
            self._folder.mkdir(parents=True, exist_ok=True)
        run = self._wandb.init(
            project=self._project,
            dir=self._folder,
            config={"gnsmon": self._header},
            settings=self._wandb.Settings(init_timeout=10),  # without a network, fail soon
        )
        self._owned = True
        return run
