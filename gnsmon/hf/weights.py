"""How much each example weighs in a Trainer's loss, proven on the loss itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # a label that bears no loss
TRIES = 3  # before a loss that is another is no longer looked at
ROWS = 1024  # of the logits that are read at a time, whose float32 copy may be large
TOLERANCE, HALF_TOLERANCE = 1e-4, 1e-2  # of the loss, relative


@dataclass(frozen=True)
class Seen:
    """One microbatch as the loss saw it."""

    labels: Tensor | None  # [B, ...]
    logits: Tensor | None  # [B, ..., classes]
    loss: Tensor | None
    items: Tensor | int | None  # the Trainer's num_items_in_batch: labels of the whole step
    examples: int | None = None
    shifted: bool = False  # whether the labels stand beside the logits that predict them already


@dataclass(frozen=True)
class Kind:
    """A loss over labels: which of them, and what their sum is divided by."""

    shift: bool  # each position predicts the next label
    whole_step: bool  # by the labels of all microbatches; otherwise of one, and it is a mean


class Weights:
    """Weights [B] of each microbatch's examples, up to a factor for the whole optimizer step.

    The loss of an example is the sum over its labels. A model that takes `num_items_in_batch`
    divides by the labels of all microbatches, so that an example weighs as many as it has; others
    take the mean over the microbatch, and an example weighs its share of it. Signatures do not tell
    which (BART takes the argument and ignores it, transformers 5.23). So the loss is computed again
    from logits and labels, until one way alone gives the value that came.

    Args:
        microbatches: in an optimizer step.
        ranks: that train together.
        averaged: whether the labels are counted over all ranks.
        scale: factor on the loss that is seen.
        smoothing: of the labels.
        shifts: what to expect; None where the model's loss is never shifted.
        doubt: called with the reason when the weights cannot be proven.
    """

    def __init__(
        self,
        *,
        microbatches: int,
        ranks: int = 1,
        averaged: bool = True,
        scale: float = 1.0,
        smoothing: float = 0.0,
        shifts: bool | None = None,
        doubt: Callable[[str], None],
    ):
        self._one = microbatches == 1 and ranks == 1
        self._common = ranks == 1 or averaged  # whether all ranks divide by the same number
        self._scale, self._smoothing, self._shifts = scale, smoothing, shifts
        self._doubt = doubt
        self._kind: Kind | None = None
        self._tries = 0

    def __call__(self, seen: Seen) -> Tensor | None:
        """The weights; None where nothing tells how many examples there are."""
        if seen.labels is None or not seen.labels.ndim:
            self._doubt("the loss has no labels")
            return None if seen.examples is None else self._mean(torch.ones(seen.examples).long())
        if seen.labels.is_floating_point():
            if not self._is_mean_over_elements(seen):
                self._doubt("the loss is no mean over its labels")
            return self._mean(torch.ones(len(seen.labels)).long())
        kind = self._kind or self._find(seen)
        counts = _bearing(_targets(seen, kind.shift)).reshape(len(seen.labels), -1).sum(1)
        if not kind.whole_step:
            return self._mean(counts)
        return counts if self._common else counts / seen.items

    def _mean(self, counts: Tensor) -> Tensor:
        return counts if self._one else counts / counts.sum()

    def _find(self, seen: Seen) -> Kind:
        """The kind that gives the loss; what may be expected, with a doubt, if none does."""
        found = {kind: error for kind, error in self._errors(seen) if error <= _tolerance(seen)}
        if not found:
            self._doubt("the loss is not that of the logits and labels")
            guess = Kind(bool(self._shifts) and not seen.shifted, seen.items is not None)
            self._tries += 1
            self._kind = guess if self._tries == TRIES else None
            return guess
        # Logits that are all alike give the same loss wherever the labels stand.
        likely = {kind: e for kind, e in found.items() if kind.shift == self._shifts} or found
        kind = min(likely, key=lambda kind: likely[kind])
        # A step that is short of microbatches may have one, which does not tell the divisors apart.
        if len({kind.shift for kind in found}) == 1 and (self._one or len(found) == 1):
            self._kind = kind
        return kind

    def _errors(self, seen: Seen) -> Iterator[tuple[Kind, float]]:
        """Relative error of the loss by each kind that is possible."""
        if seen.logits is None or seen.loss is None:
            return
        fixed = seen.shifted or self._shifts is None or _targets(seen, False).ndim < 2
        for shift in (False,) if fixed else (True, False):
            targets = _targets(seen, shift)
            if seen.logits.shape[:-1] != targets.shape:
                continue
            total = self._scale * _loss_sum(seen.logits, targets, self._smoothing)
            for whole_step in (True, False) if seen.items is not None else (False,):
                of = seen.items if whole_step else _bearing(targets).sum()
                yield Kind(shift, whole_step), _error(total / of, seen.loss)

    def _is_mean_over_elements(self, seen: Seen) -> bool:
        """Whether the loss of labels that are numbers is their mean, squared or by yes and no."""
        if self._kind is None and seen.logits is not None and seen.loss is not None:
            y, labels = seen.logits.detach().squeeze().float(), seen.labels.squeeze().float()
            if y.shape != labels.shape:
                return False
            means = F.mse_loss(y, labels), F.binary_cross_entropy_with_logits(y, labels)
            errors = [_error(self._scale * m, seen.loss) for m in means]
            if min(errors) <= _tolerance(seen):
                self._kind = Kind(shift=False, whole_step=False)
        return self._kind is not None


def _error(found: Tensor, loss: Tensor) -> float:
    """Relative to the loss; 0 where both are, as in a microbatch that bears none."""
    return float((found - loss).abs() / loss) if found != loss else 0.0


def _targets(seen: Seen, shift: bool) -> Tensor:
    """The label that each position is to predict, as large as the labels."""
    labels: Any = seen.labels
    return F.pad(labels[..., 1:], (0, 1), value=IGNORED) if shift else labels


def _bearing(targets: Tensor) -> Tensor:
    return targets.ne(IGNORED)


def _loss_sum(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    rows = logits.detach().flatten(0, -2).split(ROWS)
    return sum(
        (
            F.cross_entropy(y.float(), t, reduction="sum", label_smoothing=smoothing)
            for y, t in zip(rows, targets.flatten().to(logits.device).split(ROWS), strict=True)
        ),
        start=logits.new_zeros((), dtype=torch.float32),
    )


def _tolerance(seen: Seen) -> float:
    half = any(t is not None and t.dtype.itemsize == 2 for t in (seen.logits, seen.loss))
    return HALF_TOLERANCE if half else TOLERANCE
