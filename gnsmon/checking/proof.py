"""Proof on the user's own model: a method's norms against one example at a time."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from gnsmon.checking import brute, findings
from gnsmon.checking.brute import Loss
from gnsmon.checking.findings import Finding
from gnsmon.checking.precision import backward, in_float64
from gnsmon.checking.values import Check, Norms, Row
from gnsmon.collectors.per_example import METHODS, PerExample
from gnsmon.collectors.step import Measured, Skipped, StepNorms
from gnsmon.estimators.moments import moments, obstacle
from gnsmon.estimators.values import Moments, NormPair
from gnsmon.norms.oracles import examples, left_untouched, map_tensors, named_tensors
from gnsmon.norms.rules import coupling

RANDOM = "random in eval mode too"


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
        raise ValueError(
            f"method: expected one of {', '.join(METHODS)}, got {method!r}; other methods know "
            "nothing of layers, so there is nothing of theirs to compare before training"
        )
    count, tensors, shared = _expect_batch(batch)
    notes = [
        *findings.of_parameters(model),
        *findings.of_batch(tensors, shared, getattr(model, "config", None)),
        *findings.of_batch_norm(model),
    ]
    model, batch = copy.deepcopy(model).double(), map_tensors(_double, batch)
    with in_float64():
        return _proved(model, *_carried(batch, loss, count), method, notes, count)


def _proved(
    model: nn.Module, batch: Any, loss: Loss, method: str, notes: list[Finding], count: int
) -> Check:
    """The check of a model that may be changed, all in float64."""
    for module in model.modules():
        if coupling(module):
            module.eval()
    _expect_loss(model, loss, batch)
    quiet, state = _without_draws(model, loss, batch)
    norms, collector = _collect(quiet, loss, batch, method, strict=True)
    alone, said = _alone(quiet, loss, batch, count) if state != RANDOM else (None, [])
    notes += said
    compared = _norms(quiet, norms, method, alone) if alone else {}
    chosen = norms if isinstance(norms, Skipped) else norms[method]
    rows = _rows(quiet, chosen, collector, compared)
    missing = {row.name: row.reason for row in rows if row.reason}
    sizes = {row.name: row.numbers for row in rows}
    if isinstance(chosen, StepNorms):
        notes += findings.of_coverage(sizes, missing, chosen.norm_fraction)
    if state == RANDOM:
        notes += findings.of_randomness_in_eval()
    elif state and alone:
        shares = brute.noise_shares(model, loss, batch)
        silent = brute.covariance_trace(alone.gradients)
        notes += findings.of_dropout(findings.random_layers(model), shares, silent, state)
    if state:
        noisy, _ = _collect(model, loss, batch, method, strict=False)
        lost = {} if isinstance(noisy, Skipped) else noisy[method].missing
        notes += findings.of_left_out_by_dropout(
            sizes, {name: why for name, why in lost.items() if name not in missing}
        )
    notes.sort(key=lambda finding: findings.SEVERITIES.index(finding.severity))
    covered = [row.norms for row in rows if row.norms]
    return Check(
        rows=rows,
        examples=count,
        method=method,
        findings=notes,
        whole=_moments([*compared.values()], "exact", alone),
        truth=_moments(covered, "exact", alone),
        read=_moments(covered, "found", alone),
    )


@dataclass(frozen=True, eq=False)
class _Alone:
    """What one example at a time has shown."""

    gradients: Tensor  # [B, n]
    whole: Tensor  # [n], of the batch
    weights: Tensor  # [B], with which the examples make up the batch


def _alone(
    model: nn.Module, loss: Loss, batch: Any, count: int
) -> tuple[_Alone | None, list[Finding]]:
    """The examples' gradients; None where they do not exist."""
    if any(coupling(module) for module in model.modules()):
        return None, []
    gradients = brute.gradient_matrix(model, loss, batch)
    if bad := list(findings.of_nonfinite(gradients)):
        return None, bad
    whole = brute.batch_gradient(model, loss, batch)
    fewer = brute.batch_gradient(model, loss, examples(batch, 0, count - 1))
    made = brute.compose(whole, gradients, fewer)
    said = list(findings.of_composition(made))
    return None if made.kind == "coupled" else _Alone(gradients, whole, made.weights), said


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
        reached = isinstance(value, Tensor) and value.numel() == 1 and _reaches(model, value)
    if not isinstance(value, Tensor) or value.numel() != 1:
        came = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"expected a loss(model, batch) that is a scalar tensor, got {came}")
    if not reached:
        raise ValueError(
            "expected a loss with a gradient: it does not depend on the parameters of the model it "
            "is called with, which is a copy; let the loss use its first argument"
        )
    if any(coupling(module) for module in model.modules()):
        return  # which may refuse a single example, and is never given one
    try:
        with left_untouched(model):
            loss(model, examples(batch, 0, 1))
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(
            "expected a loss of any number of examples, as each is taken alone too; it takes the "
            f"batch, but not its first example: {error}. If these cannot be taken alone (the nodes "
            "of a graph), there is nothing to check; take method='microbatch'"
        ) from error


def _reaches(model: nn.Module, value: Tensor) -> bool:
    """Whether any parameter has a part in it."""
    model.zero_grad()
    trained = [p for p in model.parameters() if p.requires_grad]
    backward(value)
    return any(p.grad is not None for p in trained)


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


def _without_draws(model: nn.Module, loss: Loss, batch: Any) -> tuple[nn.Module, str]:
    """The model, or a copy that draws nothing, and in words how it differs.

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
    return quiet, RANDOM if brute.draws_randomly(quiet, loss, batch) else "in eval mode"


def _collect(
    model: nn.Module, loss: Loss, batch: Any, method: str, *, strict: bool
) -> tuple[Measured | Skipped, PerExample]:
    """What the monitor would measure of this batch."""
    collector = PerExample(model, list(dict.fromkeys([method, "sogns"])), strict=strict)
    norms = None
    try:
        # Two examples first: that finds layers that are called twice, and shows the batch's axis.
        for part in (examples(batch, 0, 2), batch):
            collector.arm(True)
            model.zero_grad()
            with left_untouched(model):
                backward(loss(model, part))
            norms = collector.close()
    finally:
        collector.remove()
    assert norms is not None
    return norms, collector


def _rows(
    model: nn.Module,
    norms: StepNorms | Skipped,
    collector: PerExample,
    compared: Mapping[str, Norms],
) -> list[Row]:
    owner = {
        id(p): (path, type(module).__name__)
        for path, module in reversed(list(model.named_modules()))
        for p in module._parameters.values()
    }
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if isinstance(norms, Skipped):
        missing = {name: collector.untapped.get(name, norms.detail) for name in trainable}
    else:
        missing = norms.missing
    rows = []
    for name, p in trainable.items():
        path, layer = owner[id(p)]
        reason = missing.get(name)
        rows.append(
            Row(
                name=name,
                module=path,
                layer=layer,
                numbers=p.numel(),
                covered=0 if reason else p.numel(),
                norms=None if reason else compared.get(name),
                sum_error=collector.gaps.get(name),
                reason=reason,
            )
        )
    return rows


def _norms(
    model: nn.Module, norms: Measured | Skipped, method: str, alone: _Alone
) -> dict[str, Norms]:
    """The squared norms of every trainable parameter, by brute force and by the collector."""
    column = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    pieces = dict(zip(trainable, _split(alone.gradients, trainable), strict=True))
    wholes = dict(zip(trainable, _split(alone.whole, trainable), strict=True))
    exact = {n: float(alone.weights.square() @ g.square().sum(1)) for n, g in pieces.items()}
    floor = 1e-24 * max(exact.values())
    found, sogns = (
        np.zeros(len(column)) if isinstance(norms, Skipped) else norms[name].parts_sq_norm
        for name in (method, "sogns")
    )
    return {
        name: Norms(
            whole=float(wholes[name].square().sum()),
            exact=exact[name],
            found=float(found[column[name]]),
            sogns=float(sogns[column[name]]),
            floor=floor,
        )
        for name in trainable
    }


def _split(gradient: Tensor, trainable: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    return gradient.split([p.numel() for p in trainable.values()], -1)


def _moments(norms: list[Norms], by: str, alone: _Alone | None) -> Moments | None:
    """|G|² and S of some parameters in this batch, from the parts' norms `by` name."""
    if alone is None or not norms:
        return None
    scale = float(alone.weights.sum())
    share = float(alone.weights.square().sum()) / scale**2
    big, parts = (
        np.array([sum(getattr(n, key) for n in norms)]) / scale**2 for key in ("whole", by)
    )
    pair = NormPair(big, parts, share, len(alone.weights))
    return None if obstacle(pair) else moments(pair)
