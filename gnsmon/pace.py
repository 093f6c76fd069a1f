"""Which optimizer steps are measured: one in n, or as many as a share of the time pays for."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

SHORT, LONG = 1, 4  # steps of the two laps of a pair
FIRST = 8  # steps of another lap before the cost is known
ENOUGH, KEPT = 4, 50  # pairs that make a plan, and that are remembered
RARELY = 8  # other laps from one pair to the next, once as many pairs are remembered
COLD = 2  # laps of a process that is warming up
DEAREST = 10  # bare steps; measuring that takes longer is planned as if it took as long
LATELY = 20  # laps whose share of the time is told
SPREAD = 20  # laps over which measurements made ahead of the plan are saved again
KEEP = 1.15  # an interval within this factor of the one wanted stays
ODD = 1.4  # factor by which a lap must be longer or shorter than expected to stand out
IN_A_ROW = 3  # laps, a pair the last, that stand out likewise: no longer a pause, but a change


@dataclass(frozen=True)
class Cost:
    """What steps take, in seconds."""

    bare: float
    extra: float  # of a measured step
    error: float  # standard error of `extra`


class Fixed:
    """One step in `every`; what that costs is told where single steps can be timed.

    Args:
        every: optimizer steps.
        timed: whether a step has ended when the host says so, as on a CPU.
        clock: gives seconds.
    """

    def __init__(
        self,
        every: int,
        *,
        timed: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._every, self._timed, self._clock = every, timed, clock
        self._seconds: dict[bool, deque[float]] = {m: deque(maxlen=64) for m in (True, False)}
        self._last: float | None = None

    @property
    def interval(self) -> float | None:
        """Steps from one measured step to the next."""
        return self._every

    def due(self, step: int) -> bool:
        """Whether the step is to be measured."""
        return step % self._every == 0

    def ordinal(self, step: int) -> int:
        """How many steps were to be measured before this one."""
        return step // self._every

    def tick(self, measured: bool) -> None:
        """A step has ended."""
        now = self._clock()
        if self._last is not None:
            self._seconds[measured].append(now - self._last)
        self._last = now

    def lap(self, step: int) -> float:
        """Nothing: there is no plan for ranks to agree on."""
        return 0.0

    def record(self, step: int, seconds: float, examples: int | None) -> None:
        """Nothing to plan."""

    @property
    def cost(self) -> Cost | None:
        """What steps take; None until a few of both kinds are seen."""
        if min(map(len, self._seconds.values())) < 3 or not self._timed():
            return None
        bare = median(self._seconds[False])
        return Cost(bare, median(self._seconds[True]) - bare, math.nan)

    @property
    def overhead(self) -> float | None:
        """Share of the time that measuring takes; None where it is not known."""
        cost = self.cost
        return None if cost is None else cost.extra / (self._every * cost.bare + cost.extra)

    def state_dict(self) -> dict[str, Any] | None:
        """Nothing: the step says it all."""
        return None


class Paced:
    """Steps at such an interval that measuring them takes the share `overhead` of the time.

    A *lap* is the time from one measured step to the next, n bare steps and once what measuring
    adds: T_n = n bare + extra. Nothing within it is timed, for on a GPU the host knows only at a
    measured step, which waits for a copy, that the steps before it have ended. Now and then two
    laps in a row are of 1 and 4 steps, a *pair*:

        bare = (T_4 - T_1) / 3        extra = T_1 - bare

    As they are next to each other, a machine that slowly speeds up or down does not matter, and as
    they are short, pauses seldom fall into them; medians over the last pairs pass over those that
    do. The interval follows from extra / (n bare + extra) = overhead, with one standard error more
    than the median of `extra`: what is not known well costs measurements, not time.

    Measurements in excess of the plan (the first ones, those of pairs) are a debt, for which later
    laps are longer. A lap that is much longer or shorter than the cost says, or has another batch,
    has a pair after it at once; if the pair stands out likewise, the pairs before it count no more.

    Several ranks have the same plan if they record the same.

    Args:
        overhead: share of the time, between 0 and 1.
        state: of `state_dict`, to continue from; None to plan afresh.
        step: the next optimizer step.
        clock: gives seconds.
    """

    def __init__(
        self,
        overhead: float,
        *,
        state: Mapping[str, Any] | None = None,
        step: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._budget, self._clock = overhead, clock
        state = state or {}
        self._interval: float | None = state.get("interval")
        self._count: int = state.get("count", 0)  # steps measured
        self._last: int | None = state.get("last")  # step measured
        self._next: int = state.get("next", step)
        self._place: int = state.get("place", 0)  # laps since a pair began: it is of laps 0 and 1
        self._debt: float = state.get("debt", 0.0)  # measurements made ahead of the plan
        self._laps: deque[int] = deque(state.get("laps", ()), maxlen=LATELY)  # steps of each
        self._pairs: deque[tuple[float, float]] = deque(
            ((short, long) for short, long in state.get("pairs", ())), maxlen=KEPT
        )
        self._examples: int | None = state.get("examples")  # of the steps that the pairs are of
        self._marks: deque[tuple[str, float] | None] = deque(maxlen=IN_A_ROW)
        self._short: float | None = None  # seconds of the short lap that has just ended
        self._measured_at: float | None = None  # the last time in this process
        self._cold = COLD

    @property
    def interval(self) -> float | None:
        """Steps from one measured step to the next, on average; None until the cost is known."""
        return self._interval

    def due(self, step: int) -> bool:
        """Whether the step is to be measured."""
        return step >= self._next or step == self._last

    def ordinal(self, step: int) -> int:
        """How many steps were measured before this one."""
        return self._count - (step == self._last)

    def tick(self, measured: bool) -> None:
        """Nothing: single steps are not timed."""

    def lap(self, step: int) -> float:
        """Seconds to this measured step from the last one, in this process; NaN at the first."""
        if step == self._last:
            return math.nan
        before, self._measured_at = self._measured_at, self._clock()
        return math.nan if before is None else self._measured_at - before

    def record(self, step: int, seconds: float, examples: int | None) -> None:
        """A step has been measured, `seconds` after the last one; plans the next.

        Args:
            step: its number; nothing happens where it is recorded already.
            seconds: of the lap, the same on all ranks; NaN if not known.
            examples: in the step, over all ranks; None if not known.
        """
        if step == self._last:
            return
        if self._last is not None:
            self._ended(step - self._last, seconds, examples)
        self._count += 1
        self._last, self._next = step, step + self._length()

    @property
    def cost(self) -> Cost | None:
        """What steps take; None until enough pairs are seen."""
        if len(self._pairs) < ENOUGH:
            return None
        bares = [(long - short) / (LONG - SHORT) for short, long in self._pairs]
        extras = [short - SHORT * bare for (short, _), bare in zip(self._pairs, bares, strict=True)]
        bare, extra = median(bares), median(extras)
        # 1.48 makes the median of deviations a standard one; a median's error is 1.25 a mean's.
        error = 1.25 * 1.48 * median(abs(e - extra) for e in extras) / math.sqrt(len(extras))
        return Cost(bare, extra, error) if bare > 0 else None

    @property
    def overhead(self) -> float | None:
        """Share of the time that measuring took in the last laps; None until it is known."""
        cost = self.cost
        if cost is None:
            return None
        extra = len(self._laps) * cost.extra
        return extra / (sum(self._laps) * cost.bare + extra)

    def state_dict(self) -> dict[str, Any] | None:
        """The plan and what it rests on, JSON-able."""
        return {
            "interval": self._interval,
            "count": self._count,
            "last": self._last,
            "next": self._next,
            "place": self._place,
            "debt": self._debt,
            "laps": list(self._laps),
            "pairs": [list(pair) for pair in self._pairs],
            "examples": self._examples,
        }

    def _ended(self, steps: int, seconds: float, examples: int | None) -> None:
        """Learn from a lap."""
        self._laps.append(steps)
        if self._interval is not None:
            self._debt = max(self._debt + 1 - steps / self._interval, -1.0)
        timed, self._cold = math.isfinite(seconds) and not self._cold, max(self._cold - 1, 0)
        odd = self._odd(steps, seconds, examples) if timed else None
        self._marks.append(odd)
        if self._place == 0:
            self._short = seconds if timed and steps == SHORT else None
        elif self._place == 1 and timed and steps == LONG and self._short is not None:
            if odd and self._marks.count(odd) == IN_A_ROW:
                self._pairs.clear()
            self._examples = self._examples if self._pairs else examples
            self._pairs.append((self._short, seconds))
            self._plan()
        others = RARELY if len(self._pairs) >= RARELY else 1
        # Where pauses are in most laps, they are not doubted time and again.
        doubted = odd and self._marks.count(odd) == 1
        again = self._place > 1 and (doubted or self._place > others)
        self._place = 0 if again else self._place + 1

    def _odd(self, steps: int, seconds: float, examples: int | None) -> tuple[str, float] | None:
        """In what a lap stands out; None where it does not, or where that cannot be said."""
        cost = self.cost
        if cost is None:
            return None
        if examples is not None and self._examples is not None and examples != self._examples:
            return "examples", float(examples)
        ratio = seconds / (steps * cost.bare + cost.extra)
        return None if 1 / ODD < ratio < ODD else ("seconds", math.copysign(1, ratio - 1))

    def _plan(self) -> None:
        """Another interval, unless the present one is as good for all that is known."""
        cost = self.cost
        if cost is None:
            return
        low, aim, high = (self._wanted(cost, errors) for errors in (0, 1, 2))
        if self._interval is None:
            self._interval, self._debt = aim, len(self._laps) - sum(self._laps) / aim
        elif not min(low, aim / KEEP) <= self._interval <= max(high, aim * KEEP):
            self._interval = aim

    def _wanted(self, cost: Cost, errors: int) -> float:
        """The interval that keeps to the share, were `extra` so many standard errors larger."""
        ratio = min((cost.extra + errors * cost.error) / cost.bare, DEAREST)
        return max(ratio * (1 - self._budget) / self._budget, 1.0)

    def _length(self) -> int:
        """Steps of the lap that begins."""
        if self._place < 2:
            return (SHORT, LONG)[self._place]
        if self._interval is None:
            return FIRST
        return max(round(self._interval * (1 + self._debt / SPREAD)), 1)
