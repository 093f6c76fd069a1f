"""From a reading of the noise scale to a batch size, what it costs, and what to set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gnsmon.advice.goal import Goal, examples_factor, steps_factor
from gnsmon.advice.layout import Layout, Split
from gnsmon.advice.optimizers import ADAPTIVE, ANISOTROPIC, family_of
from gnsmon.estimators.values import GroupReading, Reading, Status

PROXIES = {
    "sogns": "its per-example norms were 1.4 to 2.9 times the exact ones on a small GPT",
    "norm_layers": "norm layers follow the total up to a factor that differs from run to run",
}


class Point(NamedTuple):
    """What a batch costs to a given loss."""

    batch_size: int
    steps: float  # over S_min, the fewest
    examples: float  # over E_min, the fewest
    cost: float | None  # in the goal's prices, over S_min


@dataclass(frozen=True)
class Advice:
    """What to do about the batch size; sizes in examples, None where the data do not say."""

    status: Status
    batch_size: int | None  # suggested; the present one where the data do not speak against it
    low: float | None
    high: float | None
    present: int
    fraction_of_critical: float | None  # present / b_simple
    extra_steps: float | None  # of the present batch, above S_min, as a fraction of S_min
    extra_examples: float | None  # of the present batch, above E_min, as a fraction of E_min
    accumulation: int | None  # microbatches per step and worker
    steps: float | None  # of the suggested batch over those of the present one
    examples: float | None  # likewise
    cost: float | None  # likewise, at the goal's prices; None without
    learning_rate_factor: float | None  # from the present to the suggested batch
    caveats: tuple[str, ...]
    reason: str | None = None
    b_simple: float | None = None
    microbatch: int | None = None
    world_size: int = 1
    tokens_per_example: float | None = None
    goal: Goal = Goal()
    best_low: float | None = None  # the goal's best batch at the ends of the interval
    best_high: float | None = None

    def curve(self, batch_sizes: Sequence[int] | None = None) -> list[Point]:
        """Steps and examples against the batch, the present and the suggested one among them.

        Args:
            batch_sizes: of the points; unless given, powers of two times the smallest batch from a
                sixteenth of b_simple to sixteen times it. Empty where b_simple is not known.
        """
        b = self.b_simple
        if not b:
            return []
        if batch_sizes is None:
            ends = math.log2(max(b / 16, 1)), math.log2(max(b * 16, 1))
            batch_sizes = [2**k for k in range(math.floor(ends[0]), math.ceil(ends[1]) + 1)]
        sizes = {*batch_sizes, self.present, self.batch_size or self.present}
        return [
            Point(n, steps_factor(n, b), examples_factor(n, b), self.goal.cost(n, b))
            for n in sorted(sizes)
        ]

    def __str__(self) -> str:
        """Short paragraphs for a terminal."""
        parts = [self._suggestion(), self._cost(), self._setting()]
        parts.append("\n".join(f"- {caveat}." for caveat in self.caveats))
        return "\n\n".join(part for part in parts if part)

    def _suggestion(self) -> str:
        present = self._size(self.present)
        if self.status == "undefined":
            return f"No suggestion: {self.reason}. The batch is {present}."
        if self.b_simple is None:
            noise = f"The noise scale is not measurable yet; it is at least {self._size(self.low)}."
        else:
            ends = f"{_number(self.low)} to {_number(self.high)}"
            noise = f"The noise scale is {self._size(self.b_simple)}, interval {ends}."
        if self.batch_size is None:
            return f"No reason yet to change the batch of {present}. {noise}"
        if self.batch_size == self.present:
            return f"Keep the batch at {present}.{self._aim()} {noise}"
        verb = "Grow" if self.batch_size > self.present else "Shrink"
        least = "at least " if self.b_simple is None else ""
        size = self._size(self.batch_size)
        return f"{verb} the batch from {present} to {least}{size}.{self._aim()} {noise}"

    def _aim(self) -> str:
        if self.goal == Goal():
            return ""
        if self.best_high is None:
            return f" For {self.goal}, {_number(self.best_low)} or more would be best."
        ends = f"{_number(self.best_low)} to {_number(self.best_high)}"
        return f" For {self.goal}, something from {ends} is best."

    def _cost(self) -> str:
        if self.extra_steps is None or self.extra_examples is None:
            return ""
        of = self.fraction_of_critical
        share = "" if of is None else f", {_number(of)} of the noise scale"
        return (
            f"At {_number(self.present)}{share}, training takes {1 + self.extra_steps:.3g} times "
            f"the fewest possible steps (those of a huge batch) and {1 + self.extra_examples:.3g} "
            "times the fewest possible examples (those of a tiny batch)." + self._change()
        )

    def _change(self) -> str:
        if self.batch_size in (None, self.present) or self.steps is None or self.examples is None:
            return ""
        of = "in {:.3g} times the time" if self.goal.in_seconds else "at {:.3g} times the cost"
        cost = "" if self.cost is None else f", {of.format(self.cost)}"
        return (
            f" At {_number(self.batch_size)} it takes {self.steps:.3g} times as many steps and "
            f"{self.examples:.3g} times as many examples as at {_number(self.present)}{cost}."
        )

    def _setting(self) -> str:
        if self.batch_size is None:
            return ""
        layout = ""
        if self.accumulation is not None:
            layout = f"{self.world_size} x {self.microbatch} x {self.accumulation}"
            layout = f"Set: {layout} (workers x microbatch x accumulation)"
        if self.batch_size == self.present or self.learning_rate_factor is None:
            return layout and layout + "."
        rate = f"learning rate times {self.learning_rate_factor:.2f}"
        return f"{layout}, {rate}." if layout else f"Set: {rate}."

    def _size(self, examples: float | None) -> str:
        count = "1 example" if examples == 1 else f"{_number(examples)} examples"
        if examples is None or self.tokens_per_example is None:
            return count
        tokens = examples * self.tokens_per_example
        exact = isinstance(examples, int) and tokens == int(tokens)
        return f"{count} ({_number(int(tokens) if exact else tokens)} tokens)"


def advise(
    reading: Reading,
    *,
    present: int | None = None,
    goal: Goal | None = None,
    microbatch: int | None = None,
    largest_microbatch: int | None = None,
    world_size: int = 1,
    powers_of_two: bool = True,
    optimizer: str | None = None,
    in_metric: Reading | None = None,
    tokens_per_example: float | None = None,
) -> Advice:
    """What the reading says about the batch size.

    Training at batch B takes S_min (1 + b/B) steps and E_min (1 + B/b) examples, b = b_simple
    (McCandlish et al. 2018, 2.11 and 2.12), so at B = b both are twice the least.

    Args:
        reading: any reading; its b_simple, low and high are in examples.
        present: the batch in examples, unless it is that of the reading.
        goal: limits and prices that make another batch than b_simple the best.
        microbatch: see `Layout`, as the next three.
        largest_microbatch: that fits into a worker's memory.
        world_size: workers that average their gradients.
        powers_of_two: times the smallest batch, or any multiple.
        optimizer: name of its class; without it no learning-rate factor. "momentum" for SGD's.
        in_metric: the preconditioned reading, to be told beside.
        tokens_per_example: unless it is that of the reading; sizes are then told in tokens too.

    Raises:
        ValueError: if a size is below 1.
    """
    batch = reading.examples if present is None else present
    if batch < 1:
        raise ValueError(f"expected sizes of 1 or more, got {batch=}")
    layout = Layout(world_size, microbatch, largest_microbatch, powers_of_two)
    goal = goal or Goal()
    if tokens_per_example is None and reading.tokens is not None:
        tokens_per_example = reading.tokens / reading.examples
    b = reading.b_simple if reading.status in ("ok", "wide") else None
    found = suggested(reading, present=batch, goal=goal, layout=layout)
    size = None if found is None else found.batch_size
    family = family_of(optimizer)
    return Advice(
        status=reading.status,
        batch_size=size,
        low=reading.low,
        high=reading.high,
        present=batch,
        fraction_of_critical=batch / b if b else None,
        extra_steps=None if b is None else b / batch,
        extra_examples=batch / b if b else None,
        accumulation=found.accumulation if found else None,
        steps=steps_factor(size, b) / steps_factor(batch, b) if b and size else None,
        examples=examples_factor(size, b) / examples_factor(batch, b) if b and size else None,
        cost=_cost_factor(goal, batch, size, b),
        learning_rate_factor=family.rate(batch, size, b) if size and family else None,
        caveats=tuple(_caveats(reading, batch, size, goal, layout, optimizer, in_metric)),
        reason=reading.reason,
        b_simple=b,
        microbatch=found.microbatch if found else microbatch,
        world_size=world_size,
        tokens_per_example=tokens_per_example,
        goal=goal,
        best_low=None if reading.low is None else goal.batch_size(max(reading.low, 0.0)),
        best_high=None if reading.high is None else goal.batch_size(max(reading.high, 0.0)),
    )


def suggested(
    reading: Reading | GroupReading,
    *,
    present: int,
    goal: Goal | None = None,
    layout: Layout | None = None,
) -> Split | None:
    """The batch to use: `present` unless the interval excludes it by more than sqrt 2.

    Otherwise the one of the layout that is nearest to the goal's best. With a lower bound alone the
    batch is worth growing if the goal's best for the bound is that far above it, to that one: at B
    up to b_simple the examples at most double. None where the reading does not say.
    """
    low, high = reading.low, reading.high
    if reading.status == "undefined" or low is None:
        return None
    goal, layout = goal or Goal(), layout or Layout()
    least = goal.batch_size(low)
    best = least if reading.b_simple is None else goal.batch_size(reading.b_simple)
    if present < least / math.sqrt(2):
        found = layout.nearest(best)
        return found if found.batch_size > present else layout.split(present)
    if high is not None and present > goal.batch_size(high) * math.sqrt(2):
        found = layout.nearest(best)
        return found if found.batch_size < present else layout.split(present)
    return None if reading.b_simple is None else layout.split(present)


def _cost_factor(goal: Goal, before: int, after: int | None, b: float | None) -> float | None:
    if after is None or b is None:
        return None
    now, then = goal.cost(before, b), goal.cost(after, b)
    return then / now if now and then else None


def _caveats(
    reading: Reading,
    present: int,
    size: int | None,
    goal: Goal,
    layout: Layout,
    optimizer: str | None,
    in_metric: Reading | None,
) -> list[str]:
    family, unit = family_of(optimizer), layout.unit
    caveats = []
    proxy, known = reading.proxy, reading.approximation
    if proxy:
        why = PROXIES.get(reading.method.partition("+")[0], "nothing says how far off it is")
        caveats.append(
            f"{reading.method!r} is a proxy of uncalibrated bias ({why}); {_remedy(reading)}"
        )
    elif known is not None and known.exact_steps and known.standard_error is None:
        caveats.append("calibrated by a single exact step: how far off it is will show at the next")
    r = (reading.b_simple or 0.0) / reading.examples
    if r >= (1 if proxy else 10):
        caveats.append(
            f"an error of 1 % in the parts' norms moves b_simple by about {1 + r:.0f} %, as it is "
            f"{r:.3g} times the batch it was measured at"
        )
    if reading.status == "wide" and reading.reason:
        caveats.append(reading.reason)
    if reading.coverage < 0.99:
        caveats.append(
            f"measured on {reading.coverage:.0%} of the trainable parameters; the others may differ"
        )
    if size is not None and size % unit:
        caveats.append(f"{size} is no multiple of the smallest batch of this layout, {unit}")
    most = math.inf if reading.high is None else math.sqrt(2) * goal.batch_size(reading.high)
    if size is not None and size == unit and size > max(most, 1):
        remedy = "shrink the microbatch" if unit > layout.world_size else "take fewer workers"
        caveats.append(f"{unit} is the smallest batch of this layout: {remedy}")
    if size is not None and size != present and family is not None and family.has_beta2:
        caveats.append(
            f"keep Adam's half-lives in tokens: raise beta2 to the power {size / present:.3g}"
        )
    if reading.status != "undefined":
        caveats.append(ANISOTROPIC)
        for caveat in family.caveats if family else ():
            caveats.append(caveat + _beside(in_metric) * (caveat == ADAPTIVE))
        if optimizer and family is None and size not in (None, present):
            caveats.append(f"how the learning rate goes with the batch is not known of {optimizer}")
    return caveats


def _beside(in_metric: Reading | None) -> str:
    """What the noise scale in an adaptive optimizer's own metric is."""
    if in_metric is None:
        return ": compare the preconditioned one (preconditioned=True)"
    b, low, high = (_number(x) for x in (in_metric.b_simple, in_metric.low, in_metric.high))
    if in_metric.b_simple is None:
        least = f", at least {low} examples" if in_metric.low else ""
        return f": in its metric ({in_metric.method}) it is not measurable yet{least}"
    return f": in its metric ({in_metric.method}) it is {b} examples, interval {low} to {high}"


def _remedy(reading: Reading) -> str:
    known = reading.approximation
    steps = 0 if known is None else known.exact_steps
    if steps:
        return f"no calibration can be told yet from {steps} exact steps; let the run go on"
    return (
        "set calibrate_every=, or compare it with method 'pepgns' on this model before acting on it"
    )


def _number(x: float | None) -> str:
    """Counts in full, measured numbers to three digits."""
    if x is None:
        return "unknown"
    if isinstance(x, int):
        return f"{x:,}"
    return f"{x:.3g}" if x < 100 else f"{float(f'{x:.3g}'):,.0f}"
