"""What a batch is to be good for, and which one is best for it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


def steps_factor(batch_size: float, b: float) -> float:
    """Steps to a given loss over S_min, the fewest, those of a huge batch: 1 + b / B.

    McCandlish et al. 2018, equation 2.11, with b the noise scale in examples.
    """
    return 1 + b / batch_size


def examples_factor(batch_size: float, b: float) -> float:
    """Examples to a given loss over E_min, the fewest, those of a tiny batch: 1 + B / b.

    McCandlish et al. 2018, equation 2.12; infinite where there is no noise.
    """
    return 1 + batch_size / b if b else math.inf


@dataclass(frozen=True)
class Goal:
    """Limits on what the batch may waste, and prices; without any, B = b, where both double.

    With prices the cost of a run, steps x (step_price + example_price x B), is least at
    B = sqrt(b step_price / example_price) (from McCandlish et al. 2018, 2.11); the limits then
    bound it. Only the ratio of the prices counts. In seconds they make the fastest run, and are
    told as such with `in_seconds`.

    Args:
        data_overhead: examples above the fewest, at most this share of them: B <= x b.
        step_overhead: steps above the fewest, at most this share of them: B >= b / x.
        step_price: of an optimizer step, whatever its batch.
        example_price: of each example in it.
        in_seconds: the prices are times.

    Raises:
        ValueError: on a price or limit that is not positive, one price without the other, and
            limits that no batch meets: (S/S_min - 1)(E/E_min - 1) = 1 at every batch.
    """

    data_overhead: float | None = None
    step_overhead: float | None = None
    step_price: float | None = None
    example_price: float | None = None
    in_seconds: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "in_seconds" or value is None:
                continue
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{field.name}: expected a number above 0, got {value!r}")
        if (self.step_price is None) != (self.example_price is None):
            raise ValueError(
                "prices: expected one of a step and one of an example, of which the ratio counts; "
                f"got step_price={self.step_price}, example_price={self.example_price}"
            )
        if self.data_overhead and self.step_overhead:
            product = self.data_overhead * self.step_overhead
            if product < 1 - 1e-9:
                raise ValueError(
                    f"no batch spends at most {self.data_overhead:.0%} more examples and "
                    f"{self.step_overhead:.0%} more steps than the fewest: at every batch the two "
                    f"shares multiply to 100 %, not to {product:.3g}; raise one of them to "
                    f"{1 / min(self.data_overhead, self.step_overhead):.3g} or drop it"
                )

    def batch_size(self, b: float) -> float:
        """The best batch at noise scale b, in examples; it grows with b."""
        best = b
        if self.step_price is not None and self.example_price is not None:
            best = math.sqrt(b * self.step_price / self.example_price)
        elif self.data_overhead and self.step_overhead is None:
            best = self.data_overhead * b
        elif self.step_overhead and self.data_overhead is None:
            best = b / self.step_overhead
        if self.step_overhead:
            best = max(best, b / self.step_overhead)
        return min(best, self.data_overhead * b) if self.data_overhead else best

    def cost(self, batch_size: float, b: float) -> float | None:
        """Of a run to a given loss, in the prices' unit over S_min; None without prices."""
        if self.step_price is None or self.example_price is None:
            return None
        return steps_factor(batch_size, b) * (self.step_price + self.example_price * batch_size)

    def __str__(self) -> str:
        """What is asked for, in words."""
        parts = []
        if self.step_price is not None:
            what = (
                "fastest run by these times" if self.in_seconds else "cheapest run at these prices"
            )
            parts.append(f"the {what}")
        if self.data_overhead:
            parts.append(f"at most {100 * self.data_overhead:.3g} % more examples than the fewest")
        if self.step_overhead:
            parts.append(f"at most {100 * self.step_overhead:.3g} % more steps than the fewest")
        return ", ".join(parts) or "as much waste in steps as in examples"
