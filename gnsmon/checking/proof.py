"""Proof on the user's own model: a method's norms against one example at a time."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gnsmon.checking import brute, findings
from gnsmon.checking.brute import Loss
from gnsmon.checking.values import Check, Norms, Row, together
from gnsmon.collectors.per_example import METHODS, PerExample
from gnsmon.collectors.step import Skipped, StepNorms
from gnsmon.estimators.moments import moments
from gnsmon.estimators.values import Moments, NormPair
from gnsmon.norms.oracles import examples, left_untouched, map_tensors, named_tensors
from gnsmon.norms.rules import coupling


def check(model: nn.Module, loss: Loss, batch: Any, *, method: str = "pepgns") -> Check:
    """Every covered parameter's squared norms against one example at a time, in float64.

    Works on copies of the model, in its modes but without random draws, whose masks would differ.
    Holds the gradient of every example, so a few are better than many.

    Args:
        model: any module.
        loss: `loss(model, batch)`, a scalar: the mean over the batch, each example alike.
        batch: nested tuples, lists and mappings of tensors, examples on the first axis; two at
            least.
        method: the source of small norms to compare, any of the per-example ones.

    Raises:
        ValueError: where the call makes no sense: fewer than two examples, a loss that is no
            scalar or has no gradient, an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    count, tensors, shared = _expect_batch(batch)
    notes = [
        *findings.of_parameters(model),
        *findings.of_batch(tensors, shared, getattr(model, "config", None)),
        *findings.of_batch_norm(model),
    ]
    model, batch = copy.deepcopy(model).double(), map_tensors(_double, batch)
    batch, loss = _carried(batch, loss, count)
    for module in model.modules():
        if coupling(module):
            module.eval()
    _expect_loss(model, loss, batch)
    quiet, state = _without_draws(model, loss, batch)
    norms, collector = _collect(quiet, loss, batch, method, strict=True)
    gradients = None
    if state is None:
        notes += findings.of_randomness_in_eval()
    elif not any(coupling(module) for module in quiet.modules()):
        gradients = brute.gradient_matrix(quiet, loss, batch)
        notes += findings.of_nonfinite(gradients)
        if not gradients.isfinite().all():
            gradients = None
    weights = None
    if gradients is not None:
        composition = brute.compose(_whole(quiet), gradients)
        notes += findings.of_composition(composition)
        weights = None if composition.kind == "coupled" else composition.weights
    if gradients is not None and quiet is not model and state is not None:
        shares = brute.noise_shares(model, loss, batch)
        silent = brute.covariance_trace(gradients)
        notes += findings.of_dropout(findings.random_layers(model), shares, silent, state)
    rows = _rows(quiet, norms, collector, method, gradients, weights)
    sizes = {row.name: row.numbers for row in rows}
    missing = {row.name: row.reason for row in rows if row.reason}
    if isinstance(norms, StepNorms):
        notes += findings.of_coverage(sizes, missing, norms.norm_fraction)
        if quiet is not model:
            noisy, _ = _collect(model, loss, batch, method, strict=False)
            if isinstance(noisy, StepNorms):
                lost = {name: why for name, why in noisy.missing.items() if name not in missing}
                share = sum(sizes[name] for name in lost) / sum(sizes.values())
                notes += findings.of_left_out_by_dropout(lost, share)
    rank = ("error", "warning", "note")
    notes.sort(key=lambda finding: rank.index(finding.severity))
    return Check(rows, count, method, notes, *_moments(quiet, rows, weights))


def _expect_batch(batch: Any) -> tuple[int, Mapping[str, Tensor], Mapping[str, Tensor]]:
    """The number of examples, the tensors that have so many on the first axis, and the others."""
    tensors = named_tensors(batch)
    if not tensors:
        raise ValueError(f"expected tensors in the batch, examples first; got a {type(batch)}")
    lengths = [len(t) for t in tensors.values()]
    count = max(lengths, key=lengths.count)  # the first of those that are as frequent
    if count < 2:
        raise ValueError(f"expected at least two examples in the batch, got {count}")
    carrying = {name: t for name, t in tensors.items() if len(t) == count}
    return count, carrying, {name: t for name, t in tensors.items() if len(t) != count}


def _expect_loss(model: nn.Module, loss: Loss, batch: Any) -> None:
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("expected a model with trainable parameters; all are frozen")
    with left_untouched(model):
        value = loss(model, batch)
    if not isinstance(value, Tensor) or value.numel() != 1:
        came = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"expected a loss(model, batch) that is a scalar tensor, got {came}")
    if not value.requires_grad:
        raise ValueError("expected a loss with a gradient: it does not depend on the parameters")


def _carried(batch: Any, loss: Loss, count: int) -> tuple[Any, Loss]:
    """The tensors of the batch that have its examples, and a loss that puts the others back."""
    tensors = list(named_tensors(batch).values())
    carrying = [t for t in tensors if len(t) == count]
    if len(carrying) == len(tensors):
        return batch, loss

    def whole(model: nn.Module, part: list[Tensor]) -> Tensor:
        rest = iter(part)
        return loss(model, map_tensors(lambda t: next(rest) if len(t) == count else t, batch))

    return carrying, whole


def _double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def _without_draws(model: nn.Module, loss: Loss, batch: Any) -> tuple[nn.Module, str | None]:
    """The model, or a copy that draws nothing, and how it differs; None if it draws all the same.

    Fewer changes are tried first: a model in eval mode may be another in more than its dropout.
    """
    if not brute.draws_randomly(model, loss, batch):
        return model, ""
    quiet = copy.deepcopy(model)
    for module in quiet.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
        elif isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
            module.dropout = 0.0
    if not brute.draws_randomly(quiet, loss, batch):
        return quiet, "without dropout"
    quiet.eval()
    return quiet, None if brute.draws_randomly(quiet, loss, batch) else "in eval mode"


def _collect(
    model: nn.Module, loss: Loss, batch: Any, method: str, *, strict: bool
) -> tuple[StepNorms | Skipped, PerExample]:
    """What the monitor would measure of this batch; leaves its gradient in `.grad`."""
    collector = PerExample(model, list(dict.fromkeys([method, "sogns"])), strict=strict)
    norms = None
    try:
        # Two examples first: that finds layers that are called twice, and shows the batch's axis.
        for part in (examples(batch, 0, 2), batch):
            collector.arm(True)
            model.zero_grad()
            with left_untouched(model):
                loss(model, part).backward()
            norms = collector.close()
    finally:
        collector.remove()
    assert norms is not None
    return norms, collector


def _whole(model: nn.Module) -> Tensor:  # [n]
    """The batch's gradient, all trainable parameters side by side."""
    grads = [
        torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
        for p in model.parameters()
        if p.requires_grad
    ]
    return torch.cat([grad.flatten() for grad in grads])


def _rows(
    model: nn.Module,
    norms: StepNorms | Skipped,
    collector: PerExample,
    method: str,
    gradients: Tensor | None,  # [B, n]
    weights: Tensor | None,  # [B]; None where there is nothing to compare with
) -> list[Row]:
    owner = {
        id(p): (path, type(module).__name__)
        for path, module in reversed(list(model.named_modules()))
        for p in module._parameters.values()
    }
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    column = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    exact: dict[str, float] = {}
    if gradients is not None and weights is not None:
        pieces = gradients.split([p.numel() for p in trainable.values()], 1)
        for name, piece in zip(trainable, pieces, strict=True):
            exact[name] = float(weights.square() @ piece.square().sum(1))
    floor = 1e-24 * max(exact.values(), default=0.0)

    def why(name: str) -> str | None:
        if isinstance(norms, Skipped):
            return collector.untapped.get(name, norms.detail)
        return norms.missing.get(name)

    def compared(name: str) -> Norms | None:
        if why(name) or name not in exact or isinstance(norms, Skipped):
            return None
        found, sogns = (norms.parts_sq_norm[m][column[name]] for m in (method, "sogns"))
        return Norms(exact[name], float(found), float(sogns), floor)

    return [
        Row(
            name=name,
            module=owner[id(p)][0],
            layer=owner[id(p)][1],
            numbers=p.numel(),
            covered=0 if why(name) else p.numel(),
            norms=compared(name),
            sum_error=collector.gaps.get(name),
            reason=why(name),
        )
        for name, p in trainable.items()
    ]


def _moments(
    model: nn.Module, rows: list[Row], weights: Tensor | None
) -> tuple[Moments | None, Moments | None]:
    """|G|² and S of the covered parameters in this batch, by brute force and by the method."""
    covered = {row.name for row in rows if row.norms}
    if weights is None or not covered:
        return None, None
    big = sum(
        float(p.grad.to_dense().square().sum())
        for name, p in model.named_parameters()
        if name in covered and p.grad is not None
    )
    scale = float(weights.sum())
    share = float(weights.square().sum()) / scale**2
    total = together(rows, "total").norms
    assert total is not None
    pairs = (
        NormPair(np.array([big]) / scale**2, np.array([q]) / scale**2, share, len(weights))
        for q in (total.exact, total.found)
    )
    exact, found = (moments(pair) for pair in pairs)
    return exact, found
