"""Whether the parts of a step's gradient add up to it, along a random direction per parameter."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from gnsmon.collectors.step import Columns, Share
from gnsmon.estimators.values import Array
from gnsmon.norms.contractions import wide


class Directions:
    """A direction d of random signs for each parameter, the same in every process.

    <d, .> is linear and E <d, e>² = |e|², so it shows any error e of a sum from one number for each
    part. The signs are products of one for the row and one for the column: a direction is small
    beside its parameter.
    """

    def __init__(self, names: Sequence[str]):
        self._seeds = {name: seed for seed, name in enumerate(names)}
        self._signs: dict[str, tuple[Tensor, Tensor]] = {}

    def along(
        self, name: str, gradient: Tensor, *, shape: torch.Size | None = None, start: int = 0
    ) -> Tensor:
        """<d, gradient>, a scalar in float32 or wider; zero for a name that is not known.

        Args:
            name: of the parameter.
            gradient: its rows, or some of them.
            shape: of the parameter, where these are some.
            start: rows before the first of these.
        """
        dense = wide(gradient.detach().to_dense() if gradient.is_sparse else gradient.detach())
        if name not in self._seeds:
            return dense.new_zeros(())
        rows, columns = self._of(name, dense, dense.shape if shape is None else shape)
        rows = rows[start:][: len(dense) if dense.ndim else 1]
        # Not by matmul: TF32 would round it.
        return ((dense.reshape(len(rows), len(columns)) * columns).sum(1) * rows).sum()

    def _of(self, name: str, gradient: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        signs = self._signs.get(name)
        if signs is None or signs[0].device != gradient.device:
            generator = torch.Generator().manual_seed(self._seeds[name])
            sizes = shape[0] if shape else 1, prod(shape[1:])
            bits = torch.randint(0, 2, (sum(sizes),), generator=generator, dtype=torch.int8)
            rows, columns = (2 * bits - 1).to(gradient.device).split(sizes)
            signs = self._signs[name] = rows, columns
        return signs


def gaps(share: Share, columns: Columns, sq_norms: Array) -> Array:
    """How far the parts are from adding up to `.grad`, by parameter, relative to `sq_norms`."""
    n = len(columns.names)
    missed = np.bincount(columns.of_rows, np.square(share.along - share.big_along), n)
    # What is zero but for rounding (a key's bias in attention) proves nothing.
    of = np.sqrt(np.maximum(sq_norms, 1e-4 * share.whole))
    return np.sqrt(missed) / np.where(of > 0, of, 1)
