"""The values that pass from one room to the next: norms of a step, moments, readings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from gnsmon.estimators.columns import Groups

Array = NDArray[np.float64]
Status = Literal["ok", "wide", "lower_bound", "undefined"]
SCHEMA = 2


@dataclass(frozen=True)
class NormPair:
    """Squared norms of one step's gradient and of its parts, all at one loss scale.

    With the step's gradient a sum of parts u_j of weight w_j (sum of w_j = 1):
    """

    big_sq_norm: Array  # [n_groups]  A = |sum_j u_j|^2
    parts_sq_norm: Array  # [n_groups]  q = sum_j |u_j|^2
    sum_sq_weights: float  # p = sum_j w_j^2, 1 / number of parts when they weigh the same
    examples: int  # examples in the step


@dataclass(frozen=True)
class Moments:
    """Unbiased one-step estimates; either may be negative."""

    grad_sq_norm: Array  # [n_groups]  of |G|^2
    tr_sigma: Array  # [n_groups]  of tr(Sigma), per example


@dataclass(frozen=True)
class Ratio:
    """b_simple with its interval; None where the data do not determine a value."""

    status: Status
    reason: str | None
    b_simple: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Approximation:
    """How good an approximate source's norms are; None where that is not known."""

    factor: (
        float | None
    )  # that corrects the source, from exact steps; None: a proxy of unknown bias
    spread: float | None  # rms relative error at later exact steps
    standard_error: float | None  # relative, of the parts (sketch), or of the factor
    exact_steps: int
    amplification: float | None  # 1 + b_simple / examples: what a relative error of q does to |G|²


@dataclass(frozen=True)
class Raw:
    """One step's own values, unsmoothed."""

    big_sq_norm: float
    parts_sq_norm: float
    sum_sq_weights: float
    grad_sq_norm: float
    tr_sigma: float


@dataclass(frozen=True)
class GroupReading:
    """The numbers of one group of parameters; fields as in `Reading`."""

    status: Status
    reason: str | None
    b_simple: float | None
    low: float | None
    high: float | None
    grad_sq_norm: float
    tr_sigma: float
    raw: Raw
    approximation: Approximation | None = None  # None: the norms are exact


@dataclass(frozen=True)
class Reading:
    """What the monitor knows after a measured step."""

    step: int  # optimizer steps since the run began
    examples: int  # examples in this step, over all microbatches
    tokens: int | None  # loss-bearing tokens in this step
    method: str
    status: Status
    reason: str | None
    b_simple: float | None  # examples
    low: float | None
    high: float | None
    grad_sq_norm: float  # smoothed
    tr_sigma: float  # smoothed, per example
    raw: Raw
    n_eff: float  # effective number of averaged steps
    coverage: float  # measured share of the trainable parameters, 0 to 1
    overhead: float | None  # share of the training time spent measuring
    skipped: Mapping[str, int] = field(default_factory=dict)  # reason -> dropped measurements
    suggested_batch_size: int | None = None
    groups: Mapping[str, GroupReading] = field(default_factory=dict)
    approximation: Approximation | None = None  # None: the norms are exact

    @property
    def proxy(self) -> bool:
        """Whether the source is approximate and nothing says by how much."""
        return self.approximation is not None and self.approximation.factor is None

    def to_json(self, *, arrays: bool = False) -> dict[str, Any]:
        """JSON-able dict, with the schema version of the log; the groups by columns.

        With `arrays` their columns are numpy arrays, as some writers of JSON can take them.
        """
        known = self.approximation
        return {
            "schema": SCHEMA,
            "kind": "reading",
            **{k: v for k, v in vars(self).items() if k != "groups"},
            "raw": {**vars(self.raw)},
            "skipped": {**self.skipped},
            "approximation": None if known is None else {**vars(known)},
            "groups": _columns().of(self.groups).to_json(arrays=arrays),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Reading:
        """The reading that `to_json` wrote."""
        known = record["approximation"]
        return cls(
            **{
                **{k: v for k, v in record.items() if k not in ("schema", "kind", "wall")},
                "raw": Raw(**record["raw"]),
                "approximation": None if known is None else Approximation(**known),
                "groups": _columns().from_json(record["groups"]),
            }
        )


def _columns() -> type[Groups]:
    from gnsmon.estimators.columns import Groups  # which is made of the values here

    return Groups
