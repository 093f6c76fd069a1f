"""The demo's models as `gnsmon check MODULE:FACTORY` takes them: (model, loss, batch)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from gnsmon.demo.models import CharGPT, DigitsCNN

Batch = tuple[Tensor, Tensor]
Model = TypeVar("Model", DigitsCNN, CharGPT)


def digits() -> tuple[DigitsCNN, object, Batch]:
    """The CNN, its mean cross-entropy, and four random images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 1, 28, 28, generator=generator)
    labels = torch.randint(10, (4,), generator=generator)

    def loss(model: DigitsCNN, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    return _seeded(DigitsCNN), loss, (images, labels)


def text() -> tuple[CharGPT, object, Batch]:
    """The transformer without dropout, its mean cross-entropy, and four random sequences."""
    generator = torch.Generator().manual_seed(0)
    window = torch.randint(100, (4, 65), generator=generator)

    def loss(model: CharGPT, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    model = _seeded(partial(CharGPT, 100, context=64, dropout=0.0))
    return model, loss, (window[:, :-1], window[:, 1:])


def _seeded(make: Callable[[], Model]) -> Model:
    """The same weights each time, so that a check can be repeated."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()
