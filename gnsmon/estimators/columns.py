"""The numbers of all groups by columns, and those of one group where somebody asks for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from gnsmon.estimators.values import Approximation, Array, GroupReading, Ratio, Raw, Status

STATUSES: tuple[Status, ...] = ("ok", "wide", "lower_bound", "undefined")
OK, WIDE, LOWER_BOUND, UNDEFINED = range(4)
_NAMES = np.array(STATUSES, dtype=object)
Codes = NDArray[np.intp]
# Names of arrays [n_groups], nested as the fields of a GroupReading are; NaN: does not exist.
Columns = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Ratios(Sequence[Ratio]):
    """b_simple of every group with its interval; NaN where the data do not determine a value.

    As a sequence, the `Ratio` of each group. A reason is a text with a place for one number.
    """

    status: Codes  # [n_groups] positions in STATUSES
    reason: Codes  # [n_groups] positions in `reasons`
    reasons: tuple[str | None, ...]
    about: Array  # [n_groups] the number in the reason
    b_simple: Array  # [n_groups]
    low: Array  # [n_groups]
    high: Array  # [n_groups]

    @classmethod
    def undefined(cls, n_groups: int, reason: str) -> Ratios:
        """The same reason why nothing is known, for all groups."""
        nothing, code = np.full(n_groups, np.nan), np.zeros(n_groups, np.intp)
        return cls(code + UNDEFINED, code, (reason,), *[nothing] * 4)

    def __len__(self) -> int:
        return len(self.status)

    @overload
    def __getitem__(self, i: int) -> Ratio: ...
    @overload
    def __getitem__(self, i: slice) -> list[Ratio]: ...
    def __getitem__(self, i: int | slice) -> Ratio | list[Ratio]:
        """One group's ratio, as a person reads it."""
        if isinstance(i, slice):
            return [self[k] for k in range(len(self))[i]]
        reason, about = self.reasons[self.reason[i]], _known(self.about[i])
        return Ratio(
            STATUSES[self.status[i]],
            reason if reason is None or about is None else reason.format(about),
            *(_known(column[i]) for column in (self.b_simple, self.low, self.high)),
        )

    def take(self, groups: slice | NDArray[np.intp]) -> Ratios:
        """Those of some groups."""
        own = {k: v if k == "reasons" else v[groups] for k, v in vars(self).items()}
        return Ratios(**own)


class Groups(Mapping[str, GroupReading]):
    """The groups of a reading by name; each is made of the columns when it is looked at.

    Args:
        names: of the groups.
        ratios: of the groups.
        columns: the other fields of a `GroupReading`; no "approximation" where all are exact, and
            of a group that is exact among others NaN for `exact_steps`.
    """

    def __init__(self, names: Sequence[str], ratios: Ratios, columns: Columns) -> None:
        self.names, self.ratios, self.columns = tuple(names), ratios, columns

    @classmethod
    def of(cls, groups: Mapping[str, GroupReading]) -> Groups:
        """The same groups by columns."""
        if isinstance(groups, Groups):
            return groups
        found = list(groups.values())
        reasons = list(dict.fromkeys(group.reason for group in found))
        known = [group.approximation for group in found]
        return cls.from_json(
            {
                **_by_field(GroupReading, found),
                "name": [*groups],
                "reason": [reasons.index(group.reason) for group in found],
                "reasons": reasons,
                "about": [None] * len(found),
                "raw": _by_field(Raw, [group.raw for group in found]),
                "approximation": _by_field(Approximation, known) if any(known) else None,
            }
        )

    def take(self, groups: slice | NDArray[np.intp]) -> Groups:
        """Some of them."""
        names = self.names[groups] if isinstance(groups, slice) else [self.names[i] for i in groups]
        return Groups(names, self.ratios.take(groups), _each(self.columns, lambda x: x[groups]))

    def to_json(self, *, arrays: bool = False) -> dict[str, Any]:
        """Columns in lists, or in numpy arrays; the status as text, the reason as a position."""
        numbers = {k: getattr(self.ratios, k) for k in _NUMBERS}
        columns = {"reason": self.ratios.reason, **numbers, **self.columns}
        return {
            "name": self.names if arrays else list(self.names),
            "status": _NAMES[self.ratios.status].tolist(),
            "reasons": list(self.ratios.reasons),
            **(columns if arrays else _each(columns, _list)),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Groups:
        """The groups that `to_json` wrote; null is NaN."""
        columns = {k: v for k, v in record.items() if k not in _OF_RATIOS and v is not None}
        return cls(
            record["name"],
            Ratios(
                np.array([STATUSES.index(status) for status in record["status"]], dtype=np.intp),
                np.array(record["reason"], dtype=np.intp),
                tuple(record["reasons"]),
                *(np.array(record[k], dtype=float) for k in _NUMBERS),
            ),
            _each(columns, lambda x: np.array(x, dtype=float)),
        )

    @cached_property
    def _position(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __getitem__(self, name: str) -> GroupReading:
        return self.at(self._position[name])

    def at(self, i: int) -> GroupReading:
        """The group at a position."""
        own: dict[str, Any] = _each(self.columns, lambda x: _known(x[i]))
        known = own.get("approximation")
        if known is not None:
            steps = known["exact_steps"]
            own["approximation"] = (
                None if steps is None else Approximation(**{**known, "exact_steps": int(steps)})
            )
        return GroupReading(**{**vars(self.ratios[i]), **own, "raw": Raw(**own["raw"])})

    def __repr__(self) -> str:
        return repr(dict(self))


_NUMBERS = ("about", "b_simple", "low", "high")
_OF_RATIOS = ("name", "status", "reason", "reasons", *_NUMBERS)


def _known(value: Any) -> float | None:
    return None if value != value else float(value)


def _list(values: Array) -> list[float | None]:
    return [None if x != x else x for x in values.tolist()]


def _each(columns: Columns, fn: Any) -> dict[str, Any]:
    return {k: _each(v, fn) if isinstance(v, Mapping) else fn(v) for k, v in columns.items()}


def _by_field(kind: type, values: Sequence[Any]) -> dict[str, list[Any]]:
    return {field.name: [getattr(v, field.name, None) for v in values] for field in fields(kind)}
