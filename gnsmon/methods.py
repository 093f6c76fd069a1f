"""What a method's reading is made of: a source, another for the rest, a calibration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from gnsmon.collectors import microbatch, per_example, random_signs
from gnsmon.collectors.combine import combined
from gnsmon.collectors.preconditioner import Preconditioner, named
from gnsmon.collectors.reduction import Ranks
from gnsmon.collectors.step import Skipped, StepNorms
from gnsmon.estimators.calibration import PartsCalibration, RatioCalibration, corrected
from gnsmon.estimators.columns import Ratios
from gnsmon.estimators.moments import moments, obstacle
from gnsmon.estimators.values import Approximation, Array, NormPair

if TYPE_CHECKING:
    from gnsmon.config import MonitorConfig

PATIENCE = 3
Outcome = StepNorms | Skipped | None
FIELDS = tuple(field.name for field in fields(Approximation))
NO_EXAMPLES = ("coupled examples", "nothing measured")  # reasons why there are none to tell apart

UNLIKE = (
    "{} takes sum w^2 of the examples' weights for {:.3g}, while the loss puts {:.3g} on "
    "gns.losses. If it weighs them unequally, as by their tokens, do so after gns.losses and tell "
    "the weights: attach(..., weights=...) or gns.weigh"
)


def readings(config: MonitorConfig) -> list[str]:
    """The methods, one reading each: those asked for, and beside them preconditioned ones."""
    return [
        name
        for method in config.method
        for name in (method, named(method))[: 1 + (method in config.weighed)]
    ]


def metric(
    model: nn.Module, config: MonitorConfig, optimizers: Sequence[Optimizer]
) -> Preconditioner | None:
    """The optimizers', if the settings ask for it; raises ValueError where they have none."""
    if not config.preconditioned:
        return None
    by_example = [method in per_example.METHODS for method in config.weighed]
    return Preconditioner(model, optimizers, diagonal=not all(by_example), factored=any(by_example))


def sources(
    model: nn.Module,
    config: MonitorConfig,
    weights: Callable[..., Tensor] | None,
    ranks: Ranks,
    metric: Preconditioner | None = None,
) -> list[tuple[Any, list[str]]]:
    """Collectors, each with its methods: one for all that share the taps, one for each other."""

    def weighed(*methods: str) -> tuple[Preconditioner | None, list[str]]:
        """The metric, if one of them is taken in it too, and all names."""
        extra = [named(method) for method in methods if method in config.weighed]
        return metric if extra else None, [*methods, *extra]

    options: dict[str, Any] = {
        "batch_dim": config.batch_dim,
        "weigh": weights,
        "strict": config.strict,
    }
    wanted = list(dict.fromkeys(part for name in config.method for part in name.split("+")))
    tapped = [name for name in wanted if name in per_example.METHODS]
    found: dict[str, tuple[Any, list[str]]] = {}
    for name in wanted:
        if name in microbatch.METHODS:
            own, names = weighed(name)
            parts = microbatch.Microbatch(model, name, ranks=ranks, metric=own, **options)
            found[name] = (parts, names)
        if name in random_signs.METHODS:
            found[name] = (random_signs.RandomSigns(model, strict=config.strict), [name])
    if tapped:
        own, names = weighed(*tapped)
        collector = per_example.PerExample(
            model,
            tapped,
            calibrated=config.calibrate_every is not None,
            subspace=config.subspace,
            probes=config.probes,
            engine=config.engine,
            each=config.norm_bound is not None,
            ranks=ranks,
            metric=own,
            **options,
        )
        found[tapped[0]] = (collector, names)
    return [found[name] for name in wanted if name in found]


class Method:
    """One of the monitor's methods: turns what the sources found into its own norms and ratio.

    Args:
        name: a source, or two with a plus between: the second for what the first leaves out.
        names: of the parameters.
        by_group: sums over parameters [n_parameters] as [n_groups], the total first.
        level: of the interval.
        patience: faults in a row after which it is switched off.
    """

    def __init__(
        self,
        name: str,
        names: Sequence[str],
        by_group: Callable[[Array], Array],
        *,
        level: float,
        patience: float = PATIENCE,
    ):
        self._patience = patience
        self.name, self._names, self._by_group, self._level = name, names, by_group, level
        self.first, _, self.rest = name.partition("+")
        self.last: StepNorms | None = None
        self.last_step: int | None = None
        self.closed_step: int | None = None  # the last that was measured, or could not be
        self.nothing: str | None = None  # why no parameter at all could be measured in it
        self.faults = 0  # in a row
        self._own = np.array(True)  # [n_groups] or []: whether the first source measured the group
        self._parts = PartsCalibration(len(names), by_group) if self.first == "sogns" else None
        self._ratio = RatioCalibration() if self.first == "norm_layers" else None

    @property
    def off(self) -> bool:
        """Whether it failed too often."""
        return self.faults >= self._patience

    def norms(self, found: Mapping[str, Outcome]) -> Outcome:
        """This method's norms of the step; calibrated, where the step was measured exactly too."""
        first, exact = found[self.first], found.get(per_example.EXACT)
        if isinstance(first, StepNorms) and isinstance(exact, StepNorms):
            self._calibrate(first, exact)
        if isinstance(first, StepNorms) and self._parts is not None and self._parts.steps:
            first = replace(first, parts_sq_norm=first.parts_sq_norm * self._parts.factors)
        rest = found[self.rest] if self.rest else None
        self._own = self._groups_of(first)
        if isinstance(first, Skipped) and first.reason in NO_EXAMPLES:
            return rest or first
        if isinstance(first, StepNorms) and isinstance(rest, StepNorms):
            p, seen = first.sum_sq_weights, rest.sum_sq_weights
            if self.rest in random_signs.METHODS and not math.isclose(p, seen, rel_tol=1e-2):
                return Skipped("weights", UNLIKE.format(self.first, p, seen))
            return combined(first, rest, self._names)
        return rest if isinstance(rest, Skipped) else first

    def _groups_of(self, first: Outcome) -> NDArray[np.bool_]:
        if not self.rest:
            return np.array(True)
        gone = first.missing if isinstance(first, StepNorms) else self._names
        return self._by_group(np.array([name not in gone for name in self._names], float)) > 0

    def _calibrate(self, own: StepNorms, exact: StepNorms) -> None:
        if self._parts is not None:
            self._parts.update(own.parts_sq_norm, exact.parts_sq_norm)
        if self._ratio is not None and obstacle(self.pair(exact)) is None:
            self._ratio.update(_total(own), _total(exact))

    def pair(self, norms: StepNorms) -> NormPair:
        """The norms by group."""
        return NormPair(
            self._by_group(norms.big_sq_norm),
            self._by_group(norms.parts_sq_norm),
            norms.sum_sq_weights,
            norms.examples,
        )

    def ratios(self, found: Ratios, examples: int) -> Ratios:
        """The estimators' ratios of all groups, corrected, with what the correction is off by.

        An error of the parts' norms moves b_simple by 1 + b_simple / B times itself.
        """
        n = len(found)
        if self._ratio is not None:
            if (factor := self._ratio.factor) is None:
                return found
            error = self._ratio.standard_error or 0.0
            return corrected(
                found, _total_alone(factor, n, 1.0), _total_alone(error, n, 0.0), level=self._level
            )
        errors = None if self._parts is None else self._parts.standard_error
        if errors is None:
            return found
        b, low = found.b_simple, found.low
        least = np.where(b > 0, b, np.where(low > 0, low, 0.0))
        amplified = np.nan_to_num(errors) * (1 + least / examples) * self._own
        return corrected(found, np.ones(n), amplified, level=self._level)

    def approximations(self, norms: StepNorms, ratios: Ratios) -> dict[str, Array] | None:
        """How good the norms are, the fields of `Approximation` by columns, NaN where not known.

        None where the source is not approximate; of groups that are exact all is NaN.
        """
        n = len(ratios)
        if self._ratio is not None:
            # The norm layers' own norms are exact; the factor is on b_simple, so nothing amplifies.
            of = self._ratio
            known = (of.factor, None, of.standard_error, of.steps, None)
            return dict(zip(FIELDS, (_total_alone(value, n) for value in known), strict=True))
        if self.first not in ("sogns", "sketch"):
            return None
        factor = spread = error = np.full(n, np.nan)
        steps = 0
        if self._parts is not None and (steps := self._parts.steps):
            factor = self._parts.group_factors
            spread = error if self._parts.spread is None else self._parts.spread
            judged = self._parts.standard_error
            error = error if judged is None else judged
        elif norms.parts_variance is not None:
            parts = self._by_group(norms.parts_sq_norm)
            deviation = np.sqrt(self._by_group(norms.parts_variance))
            error = np.divide(deviation, parts, out=np.full(n, np.nan), where=parts > 0)
            factor = np.ones(n)
        amplification = 1 + ratios.b_simple / norms.examples
        known = (factor, spread, error, np.full(n, float(steps)), amplification)
        return {
            name: np.where(self._own, value, np.nan)
            for name, value in zip(FIELDS, known, strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """The calibration and the last measured step, JSON-able."""
        calibration = self._parts or self._ratio
        return {
            "last_step": self.last_step,
            "calibration": calibration.state_dict() if calibration is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.last_step = state["last_step"]
        calibration = self._parts or self._ratio
        if calibration is not None and state["calibration"] is not None:
            calibration.load_state_dict(state["calibration"])


def _total(norms: StepNorms) -> tuple[float, float]:
    """(S, |G|²) of all the parameters in `norms`."""
    big, parts = norms.big_sq_norm.sum(keepdims=True), norms.parts_sq_norm.sum(keepdims=True)
    found = moments(NormPair(big, parts, norms.sum_sq_weights, norms.examples))
    return float(found.tr_sigma[0]), float(found.grad_sq_norm[0])


def _total_alone(value: float | None, n: int, others: float = math.nan) -> Array:
    """The value for the total, another for the groups, [n]."""
    values = np.full(n, others)
    values[0] = math.nan if value is None else value
    return values
