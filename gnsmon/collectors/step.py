"""What a collector makes of one optimizer step, and how it is put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gnsmon.estimators.values import Array
from gnsmon.norms import contractions

# How far parts may be from `.grad`, relative, before a parameter is left out.
TOLERANCE, TF32_TOLERANCE, HALF_TOLERANCE = 1e-3, 5e-3, 5e-2


@dataclass(frozen=True)
class StepNorms:
    """The squared norms of one optimizer step, parameter by parameter, at the loss's own scale.

    A parameter that is not measured is zero in both norms and has its reason in `missing`.
    """

    big_sq_norm: Array  # [n_parameters]
    parts_sq_norm: Array  # [n_parameters]
    sum_sq_weights: float
    examples: int
    tokens: int | None
    microbatch: int  # examples in the last forward and backward
    microbatches: int
    missing: dict[str, str]
    norm_fraction: float | None  # measured share of the whole gradient's squared norm
    parts_variance: Array | None = None  # [n_parameters], of estimated `parts_sq_norm`

    def unscaled(self, scale: float) -> StepNorms:
        """The norms of a loss `scale` times smaller."""
        if scale == 1:
            return self
        variance = self.parts_variance
        return replace(
            self,
            big_sq_norm=self.big_sq_norm / scale**2,
            parts_sq_norm=self.parts_sq_norm / scale**2,
            parts_variance=None if variance is None else variance / scale**4,
        )

    def without(self, reasons: Mapping[str, str], names: Sequence[str]) -> StepNorms:
        """The same, less the parameters in `reasons`; `names` are those of the columns."""
        kept = np.array([name not in reasons for name in names])
        big, fraction = self.big_sq_norm * kept, self.norm_fraction
        whole = self.big_sq_norm.sum()
        return replace(
            self,
            big_sq_norm=big,
            parts_sq_norm=self.parts_sq_norm * kept,
            parts_variance=None if self.parts_variance is None else self.parts_variance * kept,
            missing={**self.missing, **reasons},
            norm_fraction=fraction * float(big.sum() / whole) if fraction and whole else None,
        )


@dataclass(frozen=True)
class Columns:
    """How a collector's shares are laid out, the same on every rank."""

    names: list[str]  # of the parameters
    slots: int = 1  # numbers of each parameter in `Share.parts_sq_norm`
    rows: Array | None = None  # position of the parameter of each number in the proof; of each one
    metric: bool = False  # whether there is `Share.in_metric`

    @property
    def of_rows(self) -> Array:
        """Position in `names` of each number in the proof."""
        return np.arange(len(self.names)) if self.rows is None else self.rows


@dataclass(frozen=True)
class Share:
    """What a process, or all ranks together, bring to a step's norms, before they are proved.

    The parts are as they are in the reduced `.grad`; of `.grad` a process has its own shard, and of
    several with the same one the first, so that all adds up over ranks. What is per parameter is
    [n_parameters], and zero where a parameter has no gradient.
    """

    parts_sq_norm: Array  # [slots, n_parameters]
    along: Array  # [rows] of the proof: the sum of the parts along each parameter's direction
    big_sq_norm: Array
    big_along: Array  # [rows]
    present: Array  # whether it has a gradient
    seen: Array  # whether it has parts
    half: Array  # whether they were computed in half precision
    whole: float  # squared norm of the whole `.grad`
    sum_weights: float
    sum_sq_weights: float
    weighted: bool  # whether weights were given; otherwise a part's is its number of examples
    examples: int
    tokens: int | None
    microbatch: int
    microbatches: int
    missing: dict[str, str]
    # [examples] of each one's own gradient, or why they are not known; None where not asked for
    each_sq_norms: Array | Skipped | None = None
    # [2, n_parameters]: squared norm of `.grad` in the optimizer's metric, and whether that is
    # known here.
    in_metric: Array | None = None

    def norms(self, measured: Array, missing: dict[str, str]) -> StepNorms:
        """Those of the parameters `measured` [n_parameters], by the first slot."""
        big_sq_norm = np.where(measured, self.big_sq_norm, 0.0)
        return StepNorms(
            big_sq_norm=big_sq_norm,
            parts_sq_norm=np.where(measured, self.parts_sq_norm[0], 0.0),
            sum_sq_weights=self.sum_sq_weights / self.sum_weights**2,
            examples=self.examples,
            tokens=self.tokens,
            microbatch=self.microbatch,
            microbatches=self.microbatches,
            missing=missing,
            norm_fraction=float(big_sq_norm.sum() / self.whole) if self.whole > 0 else None,
        )


@dataclass(frozen=True)
class Skipped:
    """A step without a measurement, and why."""

    reason: str  # short, to count by
    detail: str  # one sentence for a person


Measured = dict[str, StepNorms | Skipped]  # method -> its norms

# Reasons to skip a step whose gradients another optimizer's step may have closed already.
NO_TAP, NO_BACKWARD, NO_LOSSES = "no tap fired", "no backward", "no losses"
UNUSED = "no gradient in this step"
SEVERAL = Skipped(
    "several passes",
    "several forward passes share one backward, or several backwards one forward, so it is not "
    "known which of their examples are the same; call backward once after each forward",
)


def check_weights(weights: Tensor | None, examples: int) -> Tensor:
    """The weights [examples]; raises ValueError where there is not one for each."""
    if weights is None or weights.shape != (examples,):
        came = "none" if weights is None else list(weights.shape)
        raise ValueError(
            f"weights: expected one for each of the {examples} examples, [{examples}]; got {came}"
        )
    return weights.detach()


def known_sum(counts: Sequence[int | None]) -> int | None:
    """The sum; None where a count is not known."""
    known = [c for c in counts if c is not None]
    return sum(known) if len(known) == len(counts) else None


def square_sum(gradient: Tensor) -> Tensor:
    """Sum of the squares."""
    gradient = gradient.coalesce().values() if gradient.is_sparse else gradient
    return contractions.square_sum(gradient)


def to_host(*groups: dict[Any, Tensor]) -> list[dict[Any, Array]]:
    """The same groups as float64 arrays [numel], by one copy."""
    every = (tensor for group in groups for tensor in group.values())
    tensors = [tensor if tensor.ndim == 1 else tensor.reshape(-1) for tensor in every]
    device = tensors[0].device
    on_device = [t if t.device == device else t.to(device) for t in tensors]
    flat = torch.cat(on_device).detach().to("cpu", torch.float64).numpy()
    ends = accumulate(tensor.shape[0] for tensor in tensors)
    pieces = (flat[i:j] for i, j in pairwise(chain([0], ends)))
    return [{key: next(pieces) for key in group} for group in groups]
