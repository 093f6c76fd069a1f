"""Readings as TensorBoard scalars, with the interval as a margin chart."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gnsmon.estimators.health import Health
from gnsmon.estimators.values import Reading
from gnsmon.sinks.keys import health_scalars, prefix, scalars

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# A margin chart refuses lines of unequal steps, and a lower bound has no other end: so the chart's
# own lines are written only where all three values exist.
MARGIN = ["gns/margin/b_simple", "gns/margin/low", "gns/margin/high"]
SUFFIX = ".gnsmon"  # ends the name of the event files that are ours


class TensorBoard:
    """Writes to `folder`, or to a `writer` of yours, which is then flushed and never closed.

    On resume the steps written before are purged, as `SummaryWriter(purge_step=)` does, where the
    folder holds our event files only: a purge reaches every file of a folder and would hide what
    your own writer has logged since. Pass that writer instead.
    """

    def __init__(
        self, folder: str | Path | None = None, *, writer: SummaryWriter | None = None
    ) -> None:
        if (folder is None) == (writer is None):
            raise ValueError(
                "TensorBoard expected a folder or writer=, "
                f"got {'neither' if writer is None else 'both'}"
            )
        if writer is None:
            _summary_writer()
        self._folder, self._writer, self._owned = folder, writer, writer is None
        self._primary: str | None = None
        self._step = 0

    def start(self, header: dict[str, Any], step: int) -> None:
        """Open the event file, purging from `step` on when resumed, and describe the chart."""
        self._primary, self._step = next(iter(header.get("methods") or []), None), step
        fresh = step == 0
        if self._owned:
            self.close()
            files = list(Path(str(self._folder)).glob("events.out.tfevents.*"))
            ours = [f for f in files if f.name.endswith(SUFFIX)]
            fresh = fresh or not ours
            purge = None if fresh or len(ours) < len(files) else step
            self._writer = _summary_writer()(
                str(self._folder), purge_step=purge, filename_suffix=SUFFIX, flush_secs=10
            )
        if fresh:  # a second call would add a second chart
            self._open().add_custom_scalars({"gns": {"noise scale": ["Margin", MARGIN]}})

    def __call__(self, reading: Reading) -> None:
        """Write every number that the reading has; a value that does not exist is not written."""
        self._primary, self._step = self._primary or reading.method, reading.step
        writer = self._open()
        for key, value in scalars(reading, prefix(reading.method, self._primary)).items():
            writer.add_scalar(key, value, reading.step)
        ends = reading.b_simple, reading.low, reading.high
        if reading.method == self._primary and None not in ends:
            for key, value in zip(MARGIN, ends, strict=True):
                writer.add_scalar(key, value, reading.step)

    def health(self, health: Health) -> None:
        """Write every number of the layers' health."""
        for key, value in health_scalars(health).items():
            self._open().add_scalar(key, value, health.step)

    def loss(self, step: int, value: float) -> None:
        """Write a training loss as train/loss, unless it is not a number."""
        if math.isfinite(value):
            self._open().add_scalar("train/loss", value, step)

    def advise(self, text: str, suggested: int | None) -> None:
        """Write the advice as text, and flush."""
        self._open().add_text("gns/advice", text.replace("\n", "  \n"), self._step)
        self._open().flush()

    def close(self) -> None:
        """Flush; close only a writer of ours."""
        if self._writer is not None:
            self._writer.flush()
            if self._owned:
                self._writer.close()
                self._writer = None

    def _open(self) -> SummaryWriter:
        if self._writer is None:
            raise ValueError("TensorBoard sink is not open: call start(header, step) first")
        return self._writer


def _summary_writer() -> type[SummaryWriter]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            'the tensorboard sink needs a package: pip install "gnsmon[tensorboard]"'
        ) from error
    return SummaryWriter
