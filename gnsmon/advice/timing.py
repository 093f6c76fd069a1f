"""How long a step takes as its batch grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gnsmon.advice.goal import Goal
from gnsmon.estimators.values import Array


@dataclass(frozen=True)
class StepTime:
    """A step of B examples takes `step_seconds + example_seconds B`, on `world_size` workers."""

    step_seconds: float
    example_seconds: float
    world_size: int = 1

    @classmethod
    def fit(
        cls,
        examples: Sequence[float] | Array,
        seconds: Sequence[float] | Array,
        world_size: int = 1,
    ) -> StepTime:
        """The line through the median time of each batch size, by least squares.

        Args:
            examples: batch size of each timed step.
            seconds: that it took.
            world_size: workers that took it together.

        Raises:
            ValueError: on fewer than two batch sizes, or where a larger batch takes no longer.
        """
        batch, taken = np.asarray(examples, float), np.asarray(seconds, float)
        sizes = np.unique(batch)
        if len(sizes) < 2:
            seen = f"all have {sizes[0]:,.0f} examples" if len(sizes) else "there is none"
            raise ValueError(
                f"the time of a step against its batch needs steps of two sizes, and {seen}: train "
                "a few steps at another batch size (another run's log will do), or give the two "
                "prices yourself"
            )
        medians = np.array([np.median(taken[batch == size]) for size in sizes])
        slope, start = np.polyfit(sizes, medians, 1)
        # Times that are alike leave a slope of their last digits, and a goal of billions.
        if slope * sizes[-1] <= 1e-9 * medians.max():
            raise ValueError(
                "a step of a larger batch took no longer "
                f"({', '.join(f'{s:,.0f}: {t:.3g} s' for s, t in zip(sizes, medians, strict=True))}"
                "), so that the largest batch is the fastest; give the two prices yourself"
            )
        return cls(max(float(start), 0.0), float(slope), world_size)

    def __str__(self) -> str:
        """In words."""
        on = f" on {self.world_size} workers" * (self.world_size > 1)
        line = f"{self.step_seconds:.3g} s + {self.example_seconds:.3g} s x B"
        return f"A step of B examples takes {line}{on}."

    def on(self, world_size: int) -> StepTime:
        """The same with other workers, among whom the examples of a step are shared out."""
        share = self.example_seconds * self.world_size / world_size
        return StepTime(self.step_seconds, share, world_size)

    def seconds(self, batch_size: float) -> float:
        """What a step takes."""
        return self.step_seconds + self.example_seconds * batch_size

    def goal(self, **limits: float | None) -> Goal:
        """The fastest run, within limits as a `Goal` has them.

        Raises:
            ValueError: where a step takes no time by itself: then the smallest batch is best.
        """
        if not self.step_seconds:
            raise ValueError(
                "a step takes no time beside that of its examples, by the steps that were timed: "
                "the smallest batch is the fastest; give the two prices yourself"
            )
        prices = {"step_price": self.step_seconds, "example_price": self.example_seconds}
        return Goal(**limits, **prices, in_seconds=True)
