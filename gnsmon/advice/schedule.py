"""A batch that grows as the noise scale does, for those who ask for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

from gnsmon.advice.goal import Goal
from gnsmon.advice.layout import Layout
from gnsmon.advice.optimizers import family_of
from gnsmon.estimators.values import Status


@dataclass(frozen=True)
class Stage:
    """A stretch of training at one batch size."""

    examples: int  # seen before it begins
    step: int  # optimizer steps before it begins
    batch_size: int
    accumulation: int | None  # microbatches per step and worker
    learning_rate_factor: float | None  # over that of the first stage; None: no rule is known


class Known(Protocol):
    """What a decision is made of: a `Reading`, or what a log's table has of it."""

    @property
    def step(self) -> int: ...  # noqa: D102
    @property
    def examples(self) -> int: ...  # noqa: D102
    @property
    def status(self) -> Status: ...  # noqa: D102
    @property
    def b_simple(self) -> float | None: ...  # noqa: D102
    @property
    def low(self) -> float | None: ...  # noqa: D102


class _Seen(NamedTuple):
    step: float
    examples: int


class BatchSizeSchedule:
    """Multiplies the batch by an integer when the noise scale allows it, and never goes back.

    A batch is held for `dwell` optimizer steps at least. Then it grows if the lower end of the
    interval asks for `factor` times as much, and only if that lasts over `patience` readings in a
    row: the suggestion's own noise does not move it (batch warm-up by the measured critical batch:
    Merrill et al. 2025, "Critical batch size revisited"). It changes nothing by itself: the loop
    reads `accumulation` (or `batch_size`) and `learning_rate_factor`.

        schedule = gnsmon.BatchSizeSchedule(start=64, largest=1024, microbatch=16)
        while training:
            for _ in range(schedule.accumulation):
                (loss(next(batches)) / schedule.accumulation).backward()
            optimizer.step()
            schedule.update(gns.reading)

    Args:
        start: examples of the first batch.
        largest: no batch grows beyond it.
        factor: integer above 1, by which a batch grows.
        dwell: optimizer steps.
        patience: readings.
        goal: what a batch is to be good for; see `Goal`.
        microbatch, world_size: that make up a batch; without them no `accumulation`.
        optimizer: name of its class, for the learning rate.

    Raises:
        ValueError: on sizes that do not fit one another.
    """

    def __init__(
        self,
        start: int,
        *,
        largest: int | None = None,
        factor: int = 2,
        dwell: int = 100,
        patience: int = 3,
        goal: Goal | None = None,
        microbatch: int | None = None,
        world_size: int = 1,
        optimizer: str | None = None,
    ) -> None:
        for name, value, least in (
            ("factor", factor, 2),
            ("dwell", dwell, 1),
            ("patience", patience, 1),
            ("start", start, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected an integer of {least} or more, got {value!r}")
        if largest is not None and largest < start:
            raise ValueError(f"largest: expected at least start={start}, got {largest}")
        self._layout = Layout(world_size, microbatch)
        if start % self._layout.unit:
            raise ValueError(
                f"start: expected a multiple of {self._layout.unit} (workers x microbatch), got "
                f"{start}"
            )
        self._largest, self._factor, self._dwell, self._patience = largest, factor, dwell, patience
        self._goal, self._family = goal or Goal(), family_of(optimizer)
        self.stages = [self._stage(_Seen(0, 0), start, 1.0)]
        self._asked = 0  # readings in a row that ask for more
        self._last_step = -1

    @property
    def batch_size(self) -> int:
        """Examples of a step from now on."""
        return self.stages[-1].batch_size

    @property
    def accumulation(self) -> int:
        """Microbatches of a step and worker from now on; ValueError where none was given."""
        if (count := self.stages[-1].accumulation) is None:
            raise ValueError("accumulation: give microbatch= (and world_size=) to have it")
        return count

    @property
    def learning_rate_factor(self) -> float | None:
        """On the learning rate that goes with `start`; None where no rule is known."""
        return self.stages[-1].learning_rate_factor

    def update(self, reading: Known | None) -> bool:
        """Whether the batch has grown; without a reading, or at one seen before, it does not.

        Raises:
            ValueError: at a reading from before the last one.
        """
        if reading is None or reading.step == self._last_step:
            return False
        if reading.step < self._last_step:
            raise ValueError(
                f"reading: expected one after step {self._last_step}, got step {reading.step}; "
                "after a restart load the monitor's state_dict too, so that it counts on"
            )
        self._last_step = reading.step
        now = self.stages[-1]
        return self._consider(reading, self._seen(reading.step + 1, now))

    def _seen(self, step: int, now: Stage) -> _Seen:
        return _Seen(step, now.examples + (step - now.step) * now.batch_size)

    def _consider(self, reading: Known, seen: _Seen) -> bool:
        now = self.stages[-1]
        larger = now.batch_size * self._factor
        least = reading.low if reading.status in ("ok", "wide", "lower_bound") else None
        asks = least is not None and least > 0 and self._goal.batch_size(least) >= larger
        self._asked = self._asked + 1 if asks else 0
        fits = self._largest is None or larger <= self._largest
        if not fits or self._asked < self._patience or seen.step - now.step < self._dwell:
            return False
        b = reading.b_simple if reading.b_simple is not None else least
        rate = self._family.rate(now.batch_size, larger, b) if self._family else None
        known = rate is not None and now.learning_rate_factor is not None
        factor = rate * now.learning_rate_factor if known else None  # type: ignore[operator]
        self.stages.append(self._stage(seen, larger, factor))
        self._asked = 0
        return True

    def _stage(self, seen: _Seen, batch_size: int, factor: float | None) -> Stage:
        accumulation = self._layout.split(batch_size).accumulation
        return Stage(seen.examples, round(seen.step), batch_size, accumulation, factor)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, JSON-able."""
        stages = [asdict(stage) for stage in self.stages]
        return {"stages": stages, "asked": self._asked, "last_step": self._last_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.stages = [Stage(**stage) for stage in state["stages"]]
        self._asked, self._last_step = state["asked"], state["last_step"]


def planned(readings: Iterable[Known], schedule: BatchSizeSchedule) -> list[Stage]:
    """The stages that a recorded run would have led to, had the schedule been in force.

    A reading counts as what is known after so many *examples*: as long as the batch is below the
    noise scale, training gets about as far by them whatever their batch. The steps of a stage are
    counted anew. The schedule is used up.

    Args:
        readings: of one method, in their order.
        schedule: as it would start.
    """
    seen, last = _Seen(0, 0), -1
    for reading in readings:
        more = (reading.step - last) * reading.examples
        last = reading.step
        batch = schedule.batch_size
        seen = _Seen(seen.step + more / batch, seen.examples + more)
        schedule._consider(reading, seen)
    return schedule.stages
