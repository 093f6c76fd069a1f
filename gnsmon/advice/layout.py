"""How a batch is made of workers, microbatches and accumulation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple


class Split(NamedTuple):
    """A batch of world_size x microbatch x accumulation examples."""

    batch_size: int
    microbatch: int | None  # None where it is not known what a worker takes at once
    accumulation: int | None


@dataclass(frozen=True)
class Layout:
    """What the hardware allows.

    Args:
        world_size: workers that average their gradients.
        microbatch: examples of a worker's backward as it is now; kept, unless there is a limit.
        largest_microbatch: that fits into a worker's memory; the fewest microbatches are then made.
        powers_of_two: batches are powers of two times the smallest one; else any multiple.

    Raises:
        ValueError: if a size is below 1.
    """

    world_size: int = 1
    microbatch: int | None = None
    largest_microbatch: int | None = None
    powers_of_two: bool = True

    def __post_init__(self) -> None:
        sizes = {k: v for k, v in vars(self).items() if k != "powers_of_two" and v is not None}
        if min(sizes.values()) < 1:
            named = ", ".join(f"{k}={v}" for k, v in sizes.items())
            raise ValueError(f"expected sizes of 1 or more, got {named}")

    @property
    def unit(self) -> int:
        """The smallest batch."""
        fixed = self.largest_microbatch is None and self.microbatch is not None
        return self.world_size * (self.microbatch if fixed and self.microbatch else 1)

    def nearest(self, target: float) -> Split:
        """The batch that is nearest to `target` examples, in ratio if by powers of two.

        With a limit on the microbatch and without powers of two it is a multiple of the
        fewest microbatches that fit.
        """
        times = max(target / self.unit, 1.0)
        if self.powers_of_two:
            return self.split(2 ** round(math.log2(times)) * self.unit)
        each = round(times)
        if self.largest_microbatch is not None:
            fewest = math.ceil(each / self.largest_microbatch)
            each = round(each / fewest) * fewest
        return self.split(each * self.unit)

    def split(self, batch_size: int) -> Split:
        """This very batch, as workers and microbatches make it."""
        if batch_size % self.unit:
            return Split(batch_size, self.microbatch, None)
        each = batch_size // self.world_size
        if self.largest_microbatch is None:
            known = self.microbatch is not None
            return Split(batch_size, self.microbatch, batch_size // self.unit if known else None)
        accumulation = math.ceil(each / self.largest_microbatch)
        while each % accumulation:
            accumulation += 1
        return Split(batch_size, each // accumulation, accumulation)
