"""The random directions along which examples' gradients must add up to `.grad`."""

from __future__ import annotations

from math import ceil, prod, sqrt

import torch
from torch import Tensor

from gnsmon.norms.contractions import wider

NUMBERS = 2**16  # of a parameter that are looked at; more are sampled by rows
LEAST = 16  # rows


class Direction:
    """A direction d of random signs behind the first axis of a parameter, for a block of its rows.

    E |e d|^2 = |e|^2 for any error e of a sum, so that it shows. Of a large parameter only some
    rows are looked at, others each time, and made as much larger that the expectation stays: one of
    equal blocks, for a block from just anywhere would seldom hold the first rows.
    """

    def __init__(self, p: Tensor, generator: torch.Generator):
        n, self._total = prod(p.shape[1:]), p.shape[0] if p.ndim else 1
        self._blocks = max(1, ceil(self._total / max(LEAST, NUMBERS // max(n, 1))))
        self.count = ceil(self._total / self._blocks)
        bits = torch.randint(0, 2, (n,), generator=generator)
        signs = (2 * bits - 1) * sqrt(self._blocks)
        self.signs = signs.to(p.device, wider(p.dtype))
        self.first = 0
        self._indices = torch.arange(self.count, device=p.device)

    @property
    def rows(self) -> slice | Tensor | None:
        """The rows that are looked at; None if all are."""
        if self.count == self._total:
            return None
        if torch.compiler.is_compiling():  # to which the first row would be a constant
            return self._indices
        return slice(self.first, self.first + self.count)

    def draw(self, generator: torch.Generator) -> None:
        """Other rows, in place, for what a compiled graph has taken in must stay where it is."""
        if self.count < self._total:
            block = int(torch.randint(self._blocks, (), generator=generator))
            first = min(block * self.count, self._total - self.count)
            self._indices += first - self.first
            self.first = first

    def along(self, gradient: Tensor, start: int = 0) -> tuple[int, Tensor]:
        """The rows times d, of those which a gradient has that begins at row `start`.

        Also how many of them come before.
        """
        dense = gradient.to_dense() if gradient.is_sparse else gradient
        # Not -1, for there may be no numbers at all.
        matrix = dense.detach().reshape(dense.shape[0] if dense.ndim else 1, len(self.signs))
        before = min(max(0, start - self.first), self.count)
        if torch.compiler.is_compiling() and self.rows is not None:
            some = matrix.index_select(0, self._indices)
        else:
            some = matrix[max(0, self.first - start) : max(0, self.first + self.count - start)]
        return before, some.to(self.signs.dtype) @ self.signs
