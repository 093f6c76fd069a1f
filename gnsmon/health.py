"""Watches the layers' health: a measured step's gradient, and how far its update moves them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gnsmon.collectors.reduction import Ranks
from gnsmon.collectors.shards import is_sharded, local
from gnsmon.collectors.step import UNUSED, Share, Skipped, StepNorms, to_host
from gnsmon.estimators.health import (
    COLUMNS,
    Clips,
    Flags,
    Health,
    Layers,
    clip_factors,
    clipped_by_layer,
    depth_ratio,
    spread,
)
from gnsmon.estimators.values import Array

if TYPE_CHECKING:
    from gnsmon.config import MonitorConfig
    from gnsmon.methods import Outcome

SAMPLE = 2**20  # numbers of a parameter that are compared; of a larger one, at most so many
NO_OPTIMIZER = "no optimizer was given, so that the weights before its step are not known"
NO_STEP = "no step of an optimizer ended with this measurement"
SOME_OPTIMIZERS = "of the optimizers that stepped with this measurement alone"
SHARDS = "of this rank's shards alone"
NO_DEPTH = "it takes two layers or more, reported by layer, with weights and a gradient"
SEVERAL_RANKS = "the norms of single examples are not gathered over ranks"
NOT_EXACT = "it takes the exact norms of the examples: method 'pepgns', or an exact step"


@dataclass(frozen=True)
class _Measured:
    health: Health
    seen: Flags  # [n_groups] those with a gradient, without the total


class HealthWatch:
    """Makes a `Health` of each measured step, once the optimizers have taken it.

    What moves is compared around the step of each optimizer, so that nothing is kept in between and
    no rank waits for another. Training is only read.

    Args:
        model: whose parameters are watched.
        optimizers: whose steps move them; without any the change is absent.
        names: of the parameters, in the order of a `Share`.
        groups: names, the total first.
        by_group: sums over parameters [n_parameters] as [n_groups].
        config: the monitor's.
        ranks: who takes part.
        deliver: is given each `Health`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        names: Sequence[str],
        groups: Sequence[str],
        by_group: Callable[[Array], Array],
        *,
        config: MonitorConfig,
        ranks: Ranks,
        deliver: Callable[[Health], None],
    ):
        self._model, self._optimizers = model, optimizers
        self._names, self._groups, self._by_group = list(names), list(groups), by_group
        self._config, self._ranks, self._deliver = config, ranks, deliver
        self._clips = None if config.clip is None else Clips(config.clip, len(groups))
        parameters = dict(model.named_parameters())
        deep = _deep(model)
        self._sizes = np.array([parameters[name].numel() for name in names], dtype=float)
        self._deep = by_group(np.array([name in deep for name in names], dtype=float)) > 0
        self._in_order = config.groups not in ("kind", "total")
        self._waiting: _Measured | None = None
        self._begin()

    def _begin(self) -> None:
        self._before: dict[int, dict[str, Tensor]] = {}  # optimizer -> its parameters
        self._moved: dict[str, tuple[Tensor, float]] = {}  # parameter -> sums, its share of them
        self._done: set[int] = set()  # optimizers that have stepped
        self._in_shards = False

    # Around an optimizer's step.

    def before(self, i: int, asked: bool) -> None:
        """Optimizer `i` is about to step; `asked` says whether the step is to be measured."""
        if i in self._done:  # and begins another one
            self.flush()
        if asked or self._waiting:
            own = {id(p): name for name, p in self._model.named_parameters()}
            groups = self._optimizers[i].param_groups
            ours = {own[id(p)]: p for group in groups for p in group["params"] if id(p) in own}
            self._before[i] = {name: sampled(p).clone() for name, p in ours.items()}

    def after(self, i: int) -> None:
        """Optimizer `i` has stepped."""
        if (before := self._before.pop(i, None)) is None:
            return
        now = dict(self._model.named_parameters())
        for name, old in before.items():
            p = now[name]
            if p.grad is not None and p.requires_grad and old.numel():
                share = local(p).numel() / old.numel()
                self._moved[name] = change(old, sampled(p)), share
                self._in_shards = self._in_shards or is_sharded(p)
        self._done.add(i)
        if self._waiting and len(self._done) == len(self._optimizers):
            self.flush()

    # A measured step.

    def take(
        self,
        step: int,
        shares: Sequence[Share | Skipped | None],
        exact: Outcome,
        scale: float,
    ) -> None:
        """Make the health of a measured step, delivered once all optimizers have taken it.

        Args:
            step: its number.
            shares: what the sources brought, of all ranks together.
            exact: the norms by example, if a source measured them.
            scale: of the loss.
        """
        if self._waiting:
            self.flush()
        found = [share for share in shares if isinstance(share, Share)]
        if not found:
            return
        self._waiting = self._measured(step, found[0], scale)
        health, (above, why) = self._waiting.health, self._above(found, exact, scale)
        notes = {**health.notes, **({"above_bound": why} if why else {})}
        health = replace(health, above_bound=above, notes=notes)
        self._waiting = replace(self._waiting, health=health)
        if not self._done or len(self._done) == len(self._optimizers):
            self.flush()

    def flush(self) -> None:
        """Deliver what waits, with the changes known by now."""
        waiting, self._waiting = self._waiting, None
        if waiting:
            self._deliver(self._changed(waiting))
        self._begin()

    def _measured(self, step: int, share: Share, scale: float) -> _Measured:
        sq_norms = self._by_group(share.big_sq_norm) / scale**2
        sq_norms[0] = share.whole / scale**2
        norms, n = np.sqrt(sq_norms), len(sq_norms)
        present = np.where(share.present, self._sizes, 0.0)
        sizes = self._by_group(present)
        seen = sizes > 0
        seen[0] = False
        columns = {name: np.full(n, math.nan) for name in COLUMNS}
        columns["grad_norm"] = norms
        if sq_norms[0]:
            columns["grad_share"] = sq_norms / sq_norms[0]
        clipped: dict[str, Any] = {}
        notes: dict[str, str] = {}
        if self._clips is not None:
            clipped = self._clipped(norms, seen, columns)
        layers = np.flatnonzero(seen & self._deep)
        ratio, k = depth_ratio(sq_norms[layers], sizes[layers]) if self._in_order else (None, 0)
        if not k:
            notes["depth_ratio"] = NO_DEPTH
        elif ratio is None:
            notes["depth_ratio"] = "no gradient reaches the first layers"
        names = [self._groups[i] for i in layers]
        health = Health(
            step=step,
            grad_norm=float(norms[0]),
            **{
                "clip": None,
                "clip_factor": None,
                "clip_share": None,
                "layer_clip_factor": None,
                "layer_clip_cosine": None,
                "layer_clip_share": None,
                "steps": 0,
                **clipped,
            },
            depth_ratio=ratio,
            first=tuple(names[:k]),
            last=tuple(names[len(names) - k :]),
            relative_change=None,
            change_ratio=None,
            change_variation=None,
            norm_bound=self._config.norm_bound,
            above_bound=None,
            notes=notes,
            groups=Layers(self._groups, columns),
        )
        return _Measured(health, seen)

    def _clipped(self, norms: Array, seen: Flags, columns: dict[str, Array]) -> dict[str, Any]:
        """What clipping would do to the whole; by group it goes to `columns`."""
        clips = self._clips
        assert clips is not None
        clips.update(np.where(seen | (np.arange(len(norms)) == 0), norms, 0.0))
        columns["clip_factor"] = clip_factors(norms, clips.threshold)
        columns["clip_share"] = clips.clipped / clips.steps
        left, cosine = clipped_by_layer(norms[seen], clips.threshold)
        return {
            "clip": clips.threshold,
            "clip_factor": float(columns["clip_factor"][0]),
            "clip_share": float(columns["clip_share"][0]),
            "layer_clip_factor": left,
            "layer_clip_cosine": cosine,
            "layer_clip_share": clips.any_layer / clips.steps if seen.any() else None,
            "steps": clips.steps,
        }

    def _above(
        self, shares: Sequence[Share], exact: Outcome, scale: float
    ) -> tuple[float | None, str | None]:
        """The share of examples above the bound; or why it is not known."""
        bound = self._config.norm_bound
        if bound is None:
            return None, None
        if self._ranks.size > 1:
            return None, SEVERAL_RANKS
        each = next((s.each_sq_norms for s in shares if s.each_sq_norms is not None), None)
        if each is None:
            return None, NOT_EXACT
        if isinstance(each, Skipped):
            return None, each.detail
        if not isinstance(exact, StepNorms):
            return None, exact.detail if exact else NOT_EXACT
        missing = {name: why for name, why in exact.missing.items() if why != UNUSED}
        if missing:
            name, why = next(iter(missing.items()))
            return None, f"{len(missing)} parameter(s) left out, {name}: {why}"
        return float((np.sqrt(each) / scale > bound).mean()), None

    # What moved.

    def _changed(self, measured: _Measured) -> Health:
        health, notes = measured.health, dict(measured.health.notes)
        layers = Layers.of(health.groups)
        columns = layers.columns
        missed = len(self._done) < len(self._optimizers)
        total = ratio = variation = None
        if self._moved:
            columns, total = self._change_columns(columns)
            ratio, variation = spread(columns["relative_change"][measured.seen])
            if missed:
                notes["relative_change"] = SOME_OPTIMIZERS
            elif self._in_shards:
                notes["relative_change"] = SHARDS
        else:
            notes["relative_change"] = NO_STEP if self._optimizers else NO_OPTIMIZER
        return replace(
            health,
            relative_change=total,
            change_ratio=ratio,
            change_variation=variation,
            notes=notes,
            groups=Layers(layers.names, columns).take(measured.seen),
        )

    def _change_columns(
        self, columns: Mapping[str, Array]
    ) -> tuple[dict[str, Array], float | None]:
        """The columns with those of the change, and the change of all parameters together."""
        (sums,) = to_host({name: found for name, (found, _) in self._moved.items()})
        table = np.zeros((4, len(self._names)))  # weighted sum and count, looked at, zeros
        at = {name: i for i, name in enumerate(self._names)}
        for name, (total, moved, looked) in sums.items():
            if name in at:
                share = self._moved[name][1]
                table[:, at[name]] = share * total, share * moved, looked, looked - moved
        total, count, looked, zeros = (self._by_group(row) for row in table)
        mean = np.divide(total, count, out=np.full(len(total), math.nan), where=count > 0)
        mean[~np.isfinite(mean)] = math.nan
        known = looked > 0
        found = {
            "relative_change": mean,
            "coordinates": np.where(known, looked, math.nan),
            "zeros": np.where(known, zeros, math.nan),
        }
        return {**columns, **found}, None if math.isnan(mean[0]) else float(mean[0])

    def state_dict(self) -> dict[str, Any]:
        """How often clipping would have acted, JSON-able."""
        return {"clips": self._clips.state_dict() if self._clips else None}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on from `state_dict`; without one, or of another threshold, count afresh."""
        if self._clips and state and state["clips"]:
            self._clips.load_state_dict(state["clips"])


def sampled(p: Tensor) -> Tensor:
    """Numbers of what this rank has of `p`, at most SAMPLE, at places that are always the same."""
    flat = local(p).detach().reshape(-1)
    return flat[:: _step(flat.numel())]


def _step(size: int) -> int:
    """The least that leaves no more than SAMPLE; prime to the size, lest it go down a column."""
    step = max(-(-size // SAMPLE), 1)
    while math.gcd(step, size) > 1:
        step += 1
    return step


def change(before: Tensor, after: Tensor) -> Tensor:
    """Sum of |dw / w| where w is not 0, the count of these and of all numbers, [3] float64.

    Their quotient is the L1 relative change of Abu-El-Haija 2017, "Proportionate gradient updates
    with PercentDelta".
    """
    wide = torch.promote_types(before.dtype, torch.float64)
    old, new = before.to(wide), after.to(wide)
    there = old != 0
    relative = torch.where(there, ((new - old) / old).abs(), 0.0)
    looked = relative.new_tensor(float(len(old)))
    return torch.stack([relative.sum(), there.sum().to(relative.dtype), looked])


def _deep(model: nn.Module) -> set[str]:
    """Weights of two axes or more, less those of embeddings, most of whose rows rest in a step."""
    tables = {
        id(p)
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for p in module.parameters(recurse=False)
    }
    return {n for n, p in model.named_parameters() if p.ndim > 1 and id(p) not in tables}
