"""The random directions along which examples' gradients must add up to `.grad`."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod, sqrt
from random import Random

import torch
from torch import Tensor

from gnsmon.norms.contractions import cast_like, wider
from gnsmon.norms.forms import Form

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
        self.blocks = max(1, ceil(self._total / max(LEAST, NUMBERS // max(n, 1))))
        self.count = ceil(self._total / self.blocks)
        bits = torch.randint(0, 2, (n,), generator=generator)
        # Of one axis each number is looked at by itself, whatever its sign.
        signs = (2 * bits - 1 if p.ndim > 1 else torch.ones(n)) * sqrt(self.blocks)
        self.whole = p.ndim < 2 and self.blocks == 1  # the parameter itself is all there is to see
        self.signs = signs.to(p.device, wider(p.dtype))
        self.first = 0
        self.suspect = False  # an error was seen in these rows; they are looked at until it is gone
        # The same for a compiled graph, to which a number would be a constant.
        self.first_on_device = torch.zeros((), dtype=torch.long, device=p.device)
        self._block = torch.arange(self.count, device=p.device)

    @property
    def rows(self) -> slice | Tensor | None:
        """The rows that are looked at; None if all are."""
        if self.count == self._total:
            return None
        if torch.compiler.is_compiling():
            return self._block + self.first_on_device
        return slice(self.first, self.first + self.count)

    def look_at(self, block: int) -> None:
        """The rows of a block, if an error is not looked into; the last one ends with the last."""
        if not self.suspect:
            self.first = min(block * self.count, self._total - self.count)

    def along_sum(self, form: Form) -> Tensor:
        """The rows times d, of the sum of a form's gradients."""
        return form.sum() if self.whole else form.sum_along(self.signs, self.rows)

    def along(self, gradient: Tensor, start: int = 0) -> tuple[int, Tensor]:
        """The rows times d, of those which a gradient has that begins at row `start`.

        Also how many of them come before.
        """
        if self.whole:
            return start, gradient.clone()  # whoever else has it may change it in place
        dense = gradient.to_dense() if gradient.is_sparse else gradient
        # Not -1, for there may be no numbers at all.
        sizes = dense.shape[0] if dense.ndim else 1, self.signs.shape[0]
        matrix = dense if dense.ndim == 2 else dense.reshape(sizes)
        rows, before = self.rows, 0
        if isinstance(rows, Tensor):
            some = matrix.index_select(0, rows)
        else:
            before = min(max(0, start - self.first), self.count)
            some = matrix[max(0, self.first - start) : max(0, self.first + self.count - start)]
        return before, cast_like(some, self.signs) @ self.signs


def share_memory(directions: Sequence[Direction]) -> Tensor:
    """The first rows of all [n], in one tensor of which each direction then has its own."""
    firsts = torch.stack([direction.first_on_device for direction in directions])
    for direction, first in zip(directions, firsts, strict=True):
        direction.first_on_device = first
    return firsts


def look_elsewhere(directions: Sequence[Direction], firsts: Tensor, chance: Random) -> None:
    """Draw other rows for all, in place, for what a compiled graph has taken in must stay put."""
    for direction in directions:
        direction.look_at(chance.randrange(direction.blocks))
    firsts.copy_(torch.tensor([direction.first for direction in directions]))
