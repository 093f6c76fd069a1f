"""The random directions along which examples' gradients must add up to `.grad`."""

from __future__ import annotations

from math import prod, sqrt

import torch
from torch import Tensor

from gnsmon.norms.contractions import wider

NUMBERS = 2**16  # of a parameter that are looked at; more are sampled by rows
LEAST = 16  # rows


class Direction:
    """A direction d of random signs behind the first axis of a parameter, for some of its rows.

    E |e d|^2 = |e|^2 for any error e of a sum, so that it shows. Of many rows a few are looked at,
    others each time, and their numbers made as much larger that the expectation stays.
    """

    def __init__(self, p: Tensor, generator: torch.Generator):
        n, self._total = prod(p.shape[1:]), p.shape[0] if p.ndim else 1
        few = max(LEAST, NUMBERS // max(n, 1))
        self.stride = max(1, self._total // few)
        self.count = self._total // self.stride
        bits = torch.randint(0, 2, (n,), generator=generator)
        signs = (2 * bits - 1) * sqrt(self._total / max(self.count, 1))
        self.signs = signs.to(p.device, wider(p.dtype))
        self.first = 0
        self.rows = None if self.stride == 1 else self._chosen().to(p.device)

    def draw(self, generator: torch.Generator) -> None:
        """Other rows, in place, for what a compiled graph has taken in must stay where it is."""
        if self.rows is not None:
            high = self._total - self.stride * (self.count - 1)
            self.first = int(torch.randint(high, (), generator=generator))
            self.rows.copy_(self._chosen())

    def _chosen(self) -> Tensor:
        return self.first + self.stride * torch.arange(self.count)

    def along(self, gradient: Tensor, start: int = 0) -> tuple[int, Tensor]:
        """The chosen rows times d, of those which a gradient has that begins at row `start`.

        Also how many of the chosen ones come before.
        """
        dense = gradient.to_dense() if gradient.is_sparse else gradient
        before = min(max(0, -(-(start - self.first) // self.stride)), self.count)
        # Not -1, for there may be no numbers at all.
        matrix = dense.detach().reshape(dense.shape[0] if dense.ndim else 1, len(self.signs))
        some = matrix[self.first + before * self.stride - start :: self.stride]
        return before, some[: self.count - before].to(self.signs.dtype) @ self.signs
