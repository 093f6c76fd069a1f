"""Gradients measured in a metric: each number times the root of its own weight."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from gnsmon.norms.contractions import cast_like, wide, wider
from gnsmon.norms.convolved import Convolved
from gnsmon.norms.forms import Dense, Form, Joined, Outer, Rows


class Metric(Protocol):
    """|u|²_P = sum_k p_k u_k² of one parameter's gradients, by way of sqrt(P) u."""

    def scaled(self, gradient: Tensor) -> Tensor:
        """sqrt(P) times a gradient in the parameter's shape; dense, float32 or wider."""
        ...


@dataclass(frozen=True, eq=False)
class Diagonal:
    """Any weights p, one for each number of the parameter."""

    root: Tensor  # sqrt(p), in the parameter's shape

    @classmethod
    def of(cls, denominator: Tensor) -> Diagonal:
        """P = 1 / d, and 0 where d is."""
        return cls(_power(denominator, -0.5))

    def scaled(self, gradient: Tensor) -> Tensor:  # noqa: D102
        return _dense(gradient) * self.root


class Factored:
    """Weights p_ki = a_k c_i, k along the first axis of a parameter and i along all others.

    They scale a gradient in factored form factor by factor, so that its norm stays exact. The two
    tensors keep their places, for a compiled graph takes them in.

    Args:
        p: the parameter; until `update` all weights are zero.
    """

    def __init__(self, p: Tensor):
        self.shape = tuple(p.shape)
        sizes = prod(self.shape[:1]), prod(self.shape[1:])
        # Roots of a and c.
        self.rows, self.columns = (
            torch.zeros(size, dtype=wider(p.dtype), device=p.device) for size in sizes
        )

    def update(self, denominator: Tensor) -> None:
        """Weights for P = 1 / d: Adafactor's for v = d² (Shazeer & Stern 2018, section 3).

        With R, C and M the means of v over rows, columns and all, v_ki is taken for R_k C_i / M,
        which it is where v has rank one, as of a parameter with one axis. A row or column in which
        d is zero throughout weighs nothing.
        """
        v = cast_like(denominator.reshape(len(self.rows), len(self.columns)), self.rows).square()
        columns = v.mean(0)
        self.rows.copy_(_power(v.mean(1), -0.25))
        self.columns.copy_(_power(columns, -0.25) * columns.mean() ** 0.25)

    def scaled(self, gradient: Tensor) -> Tensor:  # noqa: D102
        return _dense(gradient) * self._weights()

    def form(self, form: Form) -> Form:
        """The form of sqrt(P) times each example's gradient; float32 or wider."""
        rows, columns = self.rows, self.columns
        if isinstance(form, Joined):
            return Joined(tuple(self.form(part) for part in form.parts))
        if isinstance(form, Convolved):
            form = form.outer()
        if isinstance(form, Outer):
            left, right = form.left, form.right
            if left.ndim == 4:
                rows = rows.view(left.shape[1], 1, left.shape[3])
            return Outer(left * rows, right * columns, form.shape, form.inputs)
        if isinstance(form, Rows):
            value = form.value * columns * rows[form.index][..., None]
            return Rows(form.index, value, form.shape)
        return Dense(form.dense() * self._weights())

    def _weights(self) -> Tensor:
        return (self.rows[:, None] * self.columns).view(self.shape)


def _dense(gradient: Tensor) -> Tensor:
    gradient = gradient.detach()
    return wide(gradient.to_dense() if gradient.is_sparse else gradient)


def _power(t: Tensor, exponent: float) -> Tensor:
    """Of what is positive; zero elsewhere."""
    return torch.where(t > 0, t**exponent, 0.0)
