"""What a step's gradient and its update say about the health of the layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gnsmon.estimators.values import SCHEMA, Array

STEEP = 100.0  # ratio of last to first layers beyond which gradients vanish, or explode
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class LayerHealth:
    """The numbers of one group of parameters; None where one does not exist."""

    grad_norm: float  # |g|, a norm and not squared, at the scale of the loss
    grad_share: float | None  # of the squared norm of the whole gradient
    clip_factor: float | None  # by which its own norm would be clipped in this step
    clip_share: float | None  # of the steps so far, those in which it would be
    relative_change: float | None  # mean |dw / w| of the step
    coordinates: float | None  # numbers looked at for it
    zeros: float | None  # of these, those with w = 0, which are left out


@dataclass(frozen=True)
class Health:
    """What the monitor knows of the layers' health after a measured step; docs/health.md.

    Absent values are None; `notes` has the reason of each that was asked for, under its name.
    """

    step: int
    grad_norm: float  # of the whole gradient, before clipping, at the scale of the loss
    clip: float | None  # the threshold
    clip_factor: float | None  # by which the global norm would be clipped in this step
    clip_share: float | None  # of the `steps`, those in which it would be
    layer_clip_factor: float | None  # what is left of the norm where each layer's own is clipped
    layer_clip_cosine: float | None  # of that gradient and the whole one
    layer_clip_share: float | None  # of the `steps`, those in which some layer would be
    steps: int  # measured so far, by which the shares are taken
    depth_ratio: float | None  # rms gradient of the last layers over that of the first
    first: tuple[str, ...]  # which layers these were
    last: tuple[str, ...]
    relative_change: float | None  # mean |dw / w| of all parameters
    change_ratio: float | None  # largest over smallest of the layers'
    change_variation: float | None  # standard deviation over mean of the layers'
    norm_bound: float | None
    above_bound: float | None  # share of the step's examples whose gradient's norm is above it
    notes: Mapping[str, str] = field(default_factory=dict)
    groups: Mapping[str, LayerHealth] = field(default_factory=dict)

    def to_json(self, *, arrays: bool = False) -> dict[str, Any]:
        """JSON-able dict, with the schema version of the log; the groups by columns.

        With `arrays` their columns are numpy arrays, as some writers of JSON can take them.
        """
        return {
            "schema": SCHEMA,
            "kind": "health",
            **{k: v for k, v in vars(self).items() if k != "groups"},
            "first": list(self.first),
            "last": list(self.last),
            "notes": {**self.notes},
            "groups": Layers.of(self.groups).to_json(arrays=arrays),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Health:
        """The health that `to_json` wrote."""
        own = {k: v for k, v in record.items() if k not in ("schema", "kind", "wall")}
        own |= {"first": tuple(record["first"]), "last": tuple(record["last"])}
        return cls(**{**own, "groups": Layers.from_json(record["groups"])})


COLUMNS = tuple(field.name for field in fields(LayerHealth))


class Layers(Mapping[str, LayerHealth]):
    """The groups by name, in their order; each is made of the columns when it is looked at.

    Args:
        names: of the groups.
        columns: the fields of a `LayerHealth`, each [n_groups]; NaN: does not exist.
    """

    def __init__(self, names: Sequence[str], columns: Mapping[str, Array]) -> None:
        self.names, self.columns = tuple(names), dict(columns)

    @classmethod
    def of(cls, groups: Mapping[str, LayerHealth]) -> Layers:
        """The same groups by columns."""
        if isinstance(groups, Layers):
            return groups
        found = list(groups.values())
        columns = {k: np.array([getattr(g, k) for g in found], dtype=float) for k in COLUMNS}
        return cls(list(groups), columns)

    def take(self, groups: Flags) -> Layers:
        """Some of them, [n_groups]."""
        names = [name for name, taken in zip(self.names, groups, strict=True) if taken]
        return Layers(names, {k: v[groups] for k, v in self.columns.items()})

    def to_json(self, *, arrays: bool = False) -> dict[str, Any]:
        """Columns in lists, or in numpy arrays."""
        columns = self.columns if arrays else {k: _list(v) for k, v in self.columns.items()}
        return {"name": list(self.names), **columns}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Layers:
        """The groups that `to_json` wrote; null is NaN."""
        return cls(record["name"], {k: np.array(record[k], dtype=float) for k in COLUMNS})

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __getitem__(self, name: str) -> LayerHealth:
        if name not in self.names:
            raise KeyError(name)
        i = self.names.index(name)
        return LayerHealth(**{k: known(float(v[i])) for k, v in self.columns.items()})  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return repr(dict(self))


def clip_factors(norms: Array, threshold: float) -> Array:
    """What each norm is multiplied by where it is clipped: min(1, c / |g|), 1 for a norm of 0.

    Pascanu, Mikolov & Bengio 2013, "On the difficulty of training recurrent neural networks",
    algorithm 1. (torch's `clip_grad_norm_` adds 1e-6 to the norm.)
    """
    return np.divide(threshold, norms, out=np.ones_like(norms), where=norms > threshold)


def clipped_by_layer(norms: Array, threshold: float) -> tuple[float | None, float | None]:
    """What each layer's own clipping does to the whole gradient; None where that is zero.

    With f_l = min(1, c / |g_l|), the layers' gradients become f_l g_l: what is left of the norm,
    sqrt(sum f_l² |g_l|²) / |g|, and the cosine between the two gradients,
    sum f_l |g_l|² / (|g| sqrt(sum f_l² |g_l|²)). By the global norm the cosine is 1.

    Args:
        norms: of the layers, which together are the whole gradient, [n_layers].
        threshold: c.
    """
    factors, squares = clip_factors(norms, threshold), norms**2
    whole, left = math.sqrt(squares.sum()), math.sqrt((factors**2 * squares).sum())
    if not whole:
        return None, None
    return left / whole, float((factors * squares).sum()) / (whole * left)


def depth_ratio(sq_norms: Array, sizes: Array) -> tuple[float | None, int]:
    """The last layers' gradient over that of the first, and how many of each were taken.

    A layer's gradient is taken as its root mean square, sqrt(|g_l|² / size), so that its size does
    not matter; of n layers the first and the last max(1, n // 4) are taken, their mean squares
    averaged. None for less than two layers, or first ones without any gradient.

    Args:
        sq_norms: of the layers, from the first to the last, [n_layers].
        sizes: numbers in each.
    """
    n = len(sq_norms)
    if n < 2:
        return None, 0
    k, squares = max(1, n // 4), sq_norms / sizes
    first, last = float(squares[:k].mean()), float(squares[-k:].mean())
    return (math.sqrt(last / first) if first > 0 else None), k


def spread(values: Array) -> tuple[float | None, float | None]:
    """Largest over smallest, and standard deviation over mean; None where that is no number.

    Args:
        values: of the layers, none below 0; NaN where there is none.
    """
    values = values[np.isfinite(values)]
    if len(values) < 2 or not values.sum():
        return None, None
    low, mean = float(values.min()), float(values.mean())
    return (float(values.max()) / low if low else None), float(values.std()) / mean


class Clips:
    """In how many steps the norms were above the threshold.

    Args:
        threshold: c.
        n_groups: the total first.
    """

    def __init__(self, threshold: float, n_groups: int) -> None:
        self.threshold = threshold
        self.steps, self.any_layer = 0, 0
        self.clipped: Array = np.zeros(n_groups)

    def update(self, norms: Array) -> None:
        """Count a step with these norms [n_groups]."""
        above = norms > self.threshold
        self.steps += 1
        self.clipped += above
        self.any_layer += bool(above[1:].any())

    def state_dict(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return {**vars(self), "clipped": self.clipped.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`, unless that counted by another threshold."""
        if state["threshold"] == self.threshold:
            self.steps, self.any_layer = state["steps"], state["any_layer"]
            self.clipped = np.array(state["clipped"], dtype=float)


def known(value: float) -> float | None:
    """The value, None for NaN."""
    return None if value != value else value


def _list(values: Array) -> list[float | None]:
    return [known(x) for x in values.tolist()]
