"""What the taps of an eager model bring, summed over microbatches in one tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gnsmon.estimators.values import Array
from gnsmon.norms.taps import Brought, Fill, LayerTap

# The taps of a backward with the pieces of their vectors: the length of a tensor, or what is known.
Key = tuple[tuple[LayerTap, tuple[int | Fill, ...]], ...]


class _Layout(NamedTuple):
    """Where the numbers of a backward belong in the vectors of its taps, one after the other."""

    known: Array  # [n], zero where a tensor's number belongs
    drawn: Array  # [n], whether one belongs there
    taps: list[tuple[LayerTap, slice]]


class Gathered:
    """Sums of vectors whose pieces are put together once a backward, and taken apart on the host.

    A tensor for each piece would cost an operation or two each, thousands in a large model.
    """

    def __init__(self) -> None:
        self.flat: dict[Key, Tensor] = {}
        self._times: Counter[Key] = Counter()
        self._layouts: dict[Key, _Layout] = {}  # of the last step

    def clear(self) -> None:
        """Forget all sums."""
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
        # isinstance(p, Tensor) is ten times slower.
        every = (p for b in brought for p in b.pieces if type(p) is not Fill)
        tensors = [p if p.ndim == 1 else p.reshape(-1) for p in every]
        key = tuple(
            (b.tap, tuple(p if type(p) is Fill else p.numel() for p in b.pieces)) for b in brought
        )
        flat = torch.cat(tensors) if tensors else torch.zeros(0)
        self.flat[key] = self.flat[key] + flat if key in self.flat else flat
        self._times[key] += 1

    def vectors(self, flat: Mapping[Key, Array]) -> dict[LayerTap, Array]:
        """The summed vector of each tap, from `flat` on the host."""
        self._layouts = {key: self._layouts.get(key) or _layout(key) for key in flat}
        found: dict[LayerTap, Array] = {}
        for key, numbers in flat.items():
            layout = self._layouts[key]
            whole = self._times[key] * layout.known
            whole[layout.drawn] = numbers
            for tap, own in layout.taps:
                found[tap] = found[tap] + whole[own] if tap in found else whole[own]
        return found


def _layout(key: Key) -> _Layout:
    pieces = [p if isinstance(p, Fill) else Fill(0.0, p) for _, some in key for p in some]
    drawn = [not isinstance(p, Fill) for _, some in key for p in some]
    lengths = [p.length for p in pieces]
    ends = np.cumsum([sum(p.length if isinstance(p, Fill) else p for p in some) for _, some in key])
    starts = [0, *map(int, ends[:-1])]
    taps = [(tap, slice(i, int(j))) for (tap, _), i, j in zip(key, starts, ends, strict=True)]
    return _Layout(np.repeat([p.value for p in pieces], lengths), np.repeat(drawn, lengths), taps)
