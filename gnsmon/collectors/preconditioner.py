"""The metric of an adaptive optimizer, frozen before the step whose gradient is measured in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gnsmon.collectors.reduction import ELSEWHERE
from gnsmon.collectors.shards import is_sharded
from gnsmon.collectors.step import Share, Skipped, StepNorms
from gnsmon.estimators.values import Array
from gnsmon.norms.contractions import wide
from gnsmon.norms.metric import Diagonal, Factored

State = Mapping[str, Any]
NO_STATE = "no optimizer state"
NOTHING_YET = Skipped(
    NO_STATE, "the optimizer has no second moments yet, so that nothing is preconditioned"
)
NO_MOMENT = "its optimizer has no second moment of it yet"
SHARDED = "its optimizer's second moment is in shards, of which no rank has the whole"
FOREIGN = "no optimizer that was given holds it"
UNKNOWN = "{} keeps no second moment of it that is known"


def _rooted(v: Tensor, eps: float) -> Tensor:
    """sqrt(v) + eps, and zero where v is: such a number has had no gradient yet, and no scale."""
    return torch.where(v > 0, v.sqrt() + eps, 0.0)


def _adam(state: State, group: State) -> Tensor:
    v = wide(state.get("max_exp_avg_sq", state["exp_avg_sq"]))
    betas = group.get("betas", ())
    if len(betas) > 1 and "step" in state:
        step = state["step"]
        beta = betas[1]
        v = v / (1 - beta ** (step.double() if isinstance(step, Tensor) else step))
    return _rooted(v, group.get("eps", 0.0))


def _adamax(state: State, group: State) -> Tensor:
    return wide(state["exp_inf"])


def _adadelta(state: State, group: State) -> Tensor:
    v, eps = wide(state["square_avg"]), group["eps"]
    return torch.where(v > 0, ((v + eps) / (wide(state["acc_delta"]) + eps)).sqrt(), 0.0)


def _rmsprop(state: State, group: State) -> Tensor:
    v = wide(state["square_avg"])
    if "grad_avg" in state:  # centered
        v = v - wide(state["grad_avg"]).square()
    return _rooted(v, group.get("eps", 0.0))


def _adagrad(state: State, group: State) -> Tensor:
    return _rooted(wide(state["sum"]), group.get("eps", 0.0))


def _adafactor(state: State, group: State) -> Tensor:
    rows, columns = (wide(state[key]) for key in ("row_var", "col_var"))
    mean = rows.mean(-2, keepdim=True)
    return torch.where(mean > 0, rows @ columns / mean, 0.0).sqrt()


def _adafactor_vector(state: State, group: State) -> Tensor:
    return wide(state["variance"]).sqrt()


# What a parameter's state has, and the denominator d of its update made of it: P = 1 / d. The
# first that is all there is taken; add a line for another optimizer.
DENOMINATORS: dict[tuple[str, ...], Callable[[State, State], Tensor]] = {
    ("exp_avg_sq",): _adam,
    ("exp_inf",): _adamax,
    ("square_avg", "acc_delta"): _adadelta,
    ("square_avg",): _rmsprop,
    ("sum",): _adagrad,
    ("row_var", "col_var"): _adafactor,
    ("variance",): _adafactor_vector,
}
WITHOUT = ("SGD", "ASGD", "Rprop", "LBFGS", "Muon")  # of torch.optim, known before they have state
SUPPORTED = (
    "supported are those whose state has exp_avg_sq (Adam, AdamW, NAdam, RAdam, SparseAdam), "
    "exp_inf (Adamax), square_avg (RMSprop, Adadelta), sum (Adagrad), or row_var and col_var "
    "(torch's Adafactor)"
)


def named(method: str) -> str:
    """The name of a method's preconditioned reading; it says where the metric is factored.

    >>> named("ranks"), named("pepgns")
    ('ranks_preconditioned', 'pepgns_preconditioned_factored')
    """
    return f"{method}_preconditioned" + "_factored" * (method == "pepgns")


class Preconditioner:
    """P = 1 / (sqrt(v) + eps) of every parameter, from the state of its optimizer when frozen.

    Frozen after one step and before the batch of the next is drawn, it is independent of that
    batch, so that the estimators of the step's gradient are unbiased in this metric too. Numbers
    whose v is zero have never had a gradient and weigh nothing.

    Args:
        model: whose parameters.
        optimizers: of which each parameter has one.
        diagonal: keep all of P, for sources that see whole gradients: a copy of the model's size.
        factored: keep rank-one weights, for sources of factored gradients.

    Raises:
        ValueError: if there is no optimizer, or none that could have a second moment.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        *,
        diagonal: bool,
        factored: bool,
    ):
        names = ", ".join(type(o).__name__ for o in optimizers)
        if not any(map(_fits, optimizers)):
            came = f"got {names}, which keeps none" if names else "none was given"
            raise ValueError(
                f"preconditioned: expected an optimizer with second moments, {came}; {SUPPORTED}. "
                "Pass it to attach, or leave preconditioned off"
            )
        self._model, self._optimizers, self._whole = model, tuple(optimizers), diagonal
        self.factored = (
            {name: Factored(p) for name, p in model.named_parameters()} if factored else {}
        )
        self.fault: Skipped | None = None  # why it could not be frozen
        self._clear()

    def freeze(self, measure: bool) -> None:
        """Take P as it is now, for the next step; without `measure` forget it."""
        self._clear()
        if measure:
            with torch.no_grad():
                self._read()

    def _clear(self) -> None:
        self.diagonal: dict[str, Diagonal] = {}
        self.known: set[str] = set()  # parameters with a metric
        self.missing: dict[str, str] = {}  # others -> why

    def _read(self) -> None:
        fit = [optimizer for optimizer in self._optimizers if _fits(optimizer)]
        held = {
            id(p): (optimizer, group)
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for p in group["params"]
        }
        for name, p in self._model.named_parameters():  # also of what is thawed before the step
            optimizer, group = held.get(id(p), (None, {}))
            if optimizer is None:
                found: Tensor | str = FOREIGN
            elif optimizer not in fit:
                found = UNKNOWN.format(type(optimizer).__name__)
            else:
                found = _denominator(optimizer, group, p)
            if isinstance(found, str):
                self.missing[name] = found
                continue
            if self._whole:
                self.diagonal[name] = Diagonal.of(found)
            if name in self.factored:
                self.factored[name].update(found)
            self.known.add(name)

    def norms(
        self,
        norms: StepNorms,
        share: Share,
        parts_sq_norm: Array,
        names: Sequence[str],
        *,
        ranks: int,
        missing: Mapping[str, str] | None = None,
    ) -> StepNorms | Skipped:
        """The norms of the same step in this metric.

        Args:
            norms: Euclidean ones.
            share: of all ranks.
            parts_sq_norm: in the metric, [n_parameters].
            names: of the columns.
            ranks: how many there are; a parameter needs a metric on all.
            missing: further parameters, and why they have no norm in the metric.
        """
        if self.fault is not None:
            return self.fault
        assert share.in_metric is not None
        big_sq_norm, known = share.in_metric
        unknown = {**self.missing, **(missing or {})}
        trainable = {n for n, p in self._model.named_parameters() if p.requires_grad}
        reasons = {
            name: unknown.get(name, ELSEWHERE)
            for name, on in zip(names, known, strict=True)
            if on < ranks and name in trainable and name not in norms.missing
        }
        left = norms.without(reasons, names)
        kept = np.array([name in trainable and name not in left.missing for name in names])
        big = np.where(kept, big_sq_norm, 0.0)
        parts = np.where(kept, parts_sq_norm, 0.0)
        if not (np.isfinite(big).all() and np.isfinite(parts).all()):
            return Skipped("nonfinite", "the gradient in the metric is infinite or undefined")
        if not big.any():
            if not reasons or NO_MOMENT in reasons.values():
                return NOTHING_YET
            name, why = next(iter(reasons.items()))
            return Skipped("no metric", f"{name}: {why}")
        return replace(left, big_sq_norm=big, parts_sq_norm=parts, parts_variance=None)


def _fits(optimizer: Optimizer) -> bool:
    """Whether it has second moments, or may have them once it has a state."""
    states = [state for state in optimizer.state.values() if state]
    if states:
        return any(_reader(state) is not None for state in states)
    return not any(isinstance(optimizer, getattr(torch.optim, n, ())) for n in WITHOUT)


def _reader(state: State) -> Callable[[State, State], Tensor] | None:
    """Raises nothing: a state that is no mapping of names to tensors has no reader."""
    if not isinstance(state, Mapping):
        return None
    for keys, denominator in DENOMINATORS.items():
        if all(isinstance(state.get(key), Tensor) for key in keys):
            return denominator
    return None


def _denominator(optimizer: Optimizer, group: State, p: Tensor) -> Tensor | str:
    """D of P = 1 / d, in the parameter's shape; or why there is none."""
    state = optimizer.state.get(p)
    if not state:
        return NO_MOMENT
    reader = _reader(state)
    if reader is None:
        return UNKNOWN.format(type(optimizer).__name__)
    if is_sharded(p) or any(map(is_sharded, state.values())):
        return SHARDED
    found = reader(state, group)
    if found.shape != p.shape:
        return UNKNOWN.format(type(optimizer).__name__) + f": it has shape {list(found.shape)}"
    return found
