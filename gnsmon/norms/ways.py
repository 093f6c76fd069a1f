"""The ways to take squared norms of per-example gradients: exact, SOGNS, sketch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gnsmon.norms.forms import Form
from gnsmon.norms.sketch import Sketch


class Way(NamedTuple):
    """How a form's squared norms are taken, summed over the examples."""

    width: int
    # (form, its sketch, its exact norms [B] if they are known) -> [width]: the sum and, of two,
    # its variance
    sums: Callable[[Form, Sketch | None, Tensor | None], Tensor]
    crossed: bool  # whether two uses of a parameter bring cross terms


def _exact(form: Form, sketch: Sketch | None, known: Tensor | None = None) -> Tensor:
    return (form.sq_norms() if known is None else known).sum().reshape(1)


def _sogns(form: Form, sketch: Sketch | None, known: Tensor | None = None) -> Tensor:
    return form.sogns_sq_norms().sum().reshape(1)


def _sketch(form: Form, sketch: Sketch | None, known: Tensor | None = None) -> Tensor:
    if sketch is None or known is not None:  # a parameter too small for one
        exact = _exact(form, None, known)
        return torch.cat([exact, torch.zeros_like(exact)])
    estimates, variance = sketch.sq_norms(form)
    return torch.stack([estimates.sum().to(variance.dtype), variance])


WAYS = {
    "exact": Way(1, _exact, crossed=True),
    "sogns": Way(1, _sogns, crossed=False),
    "sketch": Way(2, _sketch, crossed=True),
}
