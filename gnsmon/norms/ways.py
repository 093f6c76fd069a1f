"""The ways to take squared norms of per-example gradients: exact, in a metric, SOGNS, sketch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gnsmon.norms.forms import Dense, Form, Rows
from gnsmon.norms.metric import Factored
from gnsmon.norms.sketch import Sketch


class Way(NamedTuple):
    """How a form's squared norms are taken, summed over the examples."""

    width: int
    # (form, what helps, its exact norms [B] if they are known) -> their sum, and in a width of two
    # its variance
    sums: Callable[[Form, Help, Tensor | None], Tensor]
    crossed: bool  # whether the links of a compiled graph bring its cross terms


class Help(NamedTuple):
    """What a way may have for one parameter."""

    sketch: Sketch | None
    metric: Factored | None


def _exact(form: Form, given: Help, known: Tensor | None = None) -> Tensor:
    return form.sum_sq_norms() if known is None else known.sum()


def _factored(form: Form, given: Help, known: Tensor | None = None) -> Tensor:
    assert given.metric is not None
    return given.metric.form(form).sum_sq_norms()


def _sogns(form: Form, given: Help, known: Tensor | None = None) -> Tensor:
    approximated = not isinstance(form, (Dense, Rows))
    return form.sogns_sq_norms().sum() if approximated else form.sum_sq_norms()


def _sketch(form: Form, given: Help, known: Tensor | None = None) -> Tensor:
    if given.sketch is None or known is not None:  # a parameter too small for one
        exact = _exact(form, given, known)
        return torch.stack([exact, torch.zeros_like(exact)])
    estimates, variance = given.sketch.sq_norms(form)
    return torch.stack([estimates.sum().to(variance.dtype), variance])


WAYS = {
    "exact": Way(1, _exact, crossed=True),
    "factored": Way(1, _factored, crossed=False),
    "sogns": Way(1, _sogns, crossed=False),
    "sketch": Way(2, _sketch, crossed=True),
}
