"""What the taps of an eager model bring, summed over microbatches in one tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from gnsmon.estimators.values import Array
from gnsmon.norms.taps import Brought, Fill, LayerTap

# The taps of a backward with the pieces of their vectors: the length of a tensor, or what is known.
Key = tuple[tuple[LayerTap, tuple[int | Fill, ...]], ...]


class Gathered:
    """Sums of vectors whose pieces are put together once a backward, and taken apart on the host.

    A tensor for each piece would cost an operation or two each, thousands in a large model.
    """

    def __init__(self) -> None:
        self.flat: dict[Key, Tensor] = {}
        self._times: Counter[Key] = Counter()

    def clear(self) -> None:
        """Forget all."""
        self.flat.clear()
        self._times.clear()

    def add(self, brought: Sequence[Brought]) -> None:
        """Take in what one backward brought, device by device."""
        by_device: dict[torch.device, list[Brought]] = {}
        for b in brought:
            by_device.setdefault(b.tap.probe.device, []).append(b)
        for some in by_device.values():
            self._add(some)

    def _add(self, brought: Sequence[Brought]) -> None:
        every = (p for b in brought for p in b.pieces if isinstance(p, Tensor))
        tensors = [p if p.ndim == 1 else p.reshape(-1) for p in every]
        key = tuple(
            (b.tap, tuple(p.numel() if isinstance(p, Tensor) else p for p in b.pieces))
            for b in brought
        )
        flat = torch.cat(tensors) if tensors else torch.zeros(0)
        self.flat[key] = self.flat[key] + flat if key in self.flat else flat
        self._times[key] += 1

    def vectors(self, flat: Mapping[Key, Array]) -> dict[LayerTap, Array]:
        """The summed vector of each tap, from `flat` on the host."""
        found: dict[LayerTap, Array] = {}
        for key, numbers in flat.items():
            times, at = self._times[key], 0
            for tap, pieces in key:
                parts = []
                for piece in pieces:
                    if isinstance(piece, Fill):
                        parts.append(np.full(piece.length, times * piece.value))
                    else:
                        parts.append(numbers[at : at + piece])
                        at += piece
                vector = np.concatenate(parts)
                found[tap] = found[tap] + vector if tap in found else vector
        return found
