"""From a reading of the noise scale to a batch size, what it costs, and what to set."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gnsmon.estimators.values import Reading, Status

ADAM_LIKE = ("adam", "lamb", "lion", "rmsprop", "adafactor", "adagrad")
PROXIES = {
    "sogns": "its per-example norms were 1.4 to 2.9 times the exact ones on a small GPT",
    "norm_layers": "norm layers follow the total up to a factor that differs from run to run",
}


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
    learning_rate_factor: float | None  # from the present to the suggested batch
    caveats: tuple[str, ...]
    reason: str | None = None
    b_simple: float | None = None
    microbatch: int | None = None
    world_size: int = 1
    tokens_per_example: float | None = None

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
            return f"Keep the batch at {present}. {noise}"
        verb = "Grow" if self.batch_size > self.present else "Shrink"
        least = "at least " if self.b_simple is None else ""
        return f"{verb} the batch from {present} to {least}{self._size(self.batch_size)}. {noise}"

    def _cost(self) -> str:
        if self.extra_steps is None or self.extra_examples is None:
            return ""
        return (
            f"At {_number(self.present)}, training takes {1 + self.extra_steps:.3g} times the "
            f"fewest possible steps (those of a huge batch) and {1 + self.extra_examples:.3g} "
            "times the fewest possible examples (those of a tiny batch)."
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
        if examples is None or self.tokens_per_example is None:
            return f"{_number(examples)} examples"
        tokens = examples * self.tokens_per_example
        exact = isinstance(examples, int) and tokens == int(tokens)
        return f"{_number(examples)} examples ({_number(int(tokens) if exact else tokens)} tokens)"


def advise(
    reading: Reading,
    *,
    present: int | None = None,
    microbatch: int | None = None,
    world_size: int = 1,
    optimizer: str | None = None,
    tokens_per_example: float | None = None,
) -> Advice:
    """What the reading says about the batch size.

    Training at batch B takes S_min (1 + b/B) steps and E_min (1 + B/b) examples, b = b_simple
    (McCandlish et al. 2018, 2.11 and 2.12), so at B = b both are twice the least.

    Args:
        reading: any reading; its b_simple, low and high are in examples.
        present: the batch in examples, unless it is that of the reading.
        microbatch: examples per worker and backward; without it any power of two will do.
        world_size: workers that average their gradients.
        optimizer: name of its class; without it no learning-rate factor.
        tokens_per_example: unless it is that of the reading; sizes are then told in tokens too.

    Raises:
        ValueError: if a size is below 1.
    """
    batch = reading.examples if present is None else present
    if min(batch, world_size, 1 if microbatch is None else microbatch) < 1:
        raise ValueError(f"expected sizes of 1 or more, got {batch=}, {microbatch=}, {world_size=}")
    if tokens_per_example is None and reading.tokens is not None:
        tokens_per_example = reading.tokens / reading.examples
    unit = world_size * (microbatch or 1)
    low, high = reading.low, reading.high
    b = reading.b_simple if reading.status in ("ok", "wide") else None
    size = suggested_batch_size(reading, present=batch, unit=unit)
    known = microbatch is not None and size is not None and size % unit == 0
    return Advice(
        status=reading.status,
        batch_size=size,
        low=low,
        high=high,
        present=batch,
        fraction_of_critical=batch / b if b else None,
        extra_steps=None if b is None else b / batch,
        extra_examples=batch / b if b else None,
        accumulation=size // unit if known and size is not None else None,
        learning_rate_factor=None if size is None else _rate_factor(batch, size, b, optimizer),
        caveats=tuple(_caveats(reading, batch, size, unit, optimizer)),
        reason=reading.reason,
        b_simple=b,
        microbatch=microbatch,
        world_size=world_size,
        tokens_per_example=tokens_per_example,
    )


def suggested_batch_size(reading: Reading, *, present: int, unit: int = 1) -> int | None:
    """The batch to use: `present` unless the interval excludes it by more than sqrt 2.

    Otherwise the power of two times `unit` that is nearest to b_simple in ratio. With a lower
    bound alone the batch is worth growing if the bound is that far above it, to the bound: at B up
    to b_simple the examples at most double. None where the reading does not say.
    """
    low, high = reading.low, reading.high
    if reading.status == "undefined" or low is None:
        return None
    if present < low / math.sqrt(2):
        target = low if reading.b_simple is None else reading.b_simple
        return max(_snap(target, unit), present)
    if high is not None and present > high * math.sqrt(2):
        return min(_snap(reading.b_simple or 0.0, unit), present)
    return None if reading.b_simple is None else present


def _snap(target: float, unit: int) -> int:
    return unit * 2 ** max(round(math.log2(target / unit)), 0) if target > unit else unit


def _rate_factor(before: int, after: int, b: float | None, optimizer: str | None) -> float | None:
    """Factor on the learning rate: McCandlish et al. 2018, 2.9, for SGD; sqrt for Adam-like."""
    if _is_adam_like(optimizer):
        return math.sqrt(after / before)
    if optimizer is not None and "sgd" in optimizer.lower() and b is not None:
        return (1 + b / before) / (1 + b / after)
    return None


def _is_adam_like(optimizer: str | None) -> bool:
    return optimizer is not None and any(name in optimizer.lower() for name in ADAM_LIKE)


def _caveats(
    reading: Reading, present: int, size: int | None, unit: int, optimizer: str | None
) -> list[str]:
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
    if size is not None and size == unit and size > math.sqrt(2) * (reading.high or math.inf):
        caveats.append(f"{unit} is the smallest batch of this layout: shrink the microbatch")
    if size is not None and size != present and _is_adam_like(optimizer):
        caveats.append(
            f"keep Adam's half-lives in tokens: raise beta2 to the power {size / present:.3g}"
        )
    if reading.status != "undefined":
        caveats.append(
            "b_simple takes the Hessian as a multiple of the identity and a learning rate near "
            "its best; under Adam-like optimizers it can be off by an order of magnitude or more"
        )
    return caveats


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
