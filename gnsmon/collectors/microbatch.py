"""One optimizer step's norms from its microbatches, whatever the model is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gnsmon.collectors.backward import Backwards, Fingerprint, fingerprint
from gnsmon.collectors.preconditioner import Preconditioner, named
from gnsmon.collectors.proof import Directions, gaps
from gnsmon.collectors.reduction import ALONE, UNREDUCED, Ranks
from gnsmon.collectors.shards import held, is_managed, is_sharded
from gnsmon.collectors.step import (
    HALF_TOLERANCE,
    NO_BACKWARD,
    TOLERANCE,
    UNUSED,
    Columns,
    Measured,
    Share,
    Skipped,
    check_weights,
    known_sum,
    square_sum,
    to_host,
)
from gnsmon.estimators.values import Array
from gnsmon.norms.inputs import Announce, in_backward, read_batch, tensors_in


def every_part(sq_norms: Array, weights: Array) -> tuple[Array, float]:
    """Q = Σ |u_j|² and p = Σ w_j² of all microbatches, from |u_j|² [K, n] and w_j [K]."""
    return sq_norms.sum(0), float(np.square(weights).sum())


def first_part(sq_norms: Array, weights: Array) -> tuple[Array, float]:
    """Q = |u_1|² / w_1 and p = w_1: as if 1 / w_1 microbatches were like the first.

    The first of a step whose noise is V brings E |u_1|² = w_1² |G|² + w_1 V, for its share of the
    noise is that of its examples; so E q = p |G|² + V, which is all that `moments` asks for. The
    share is exact where examples weigh the same, and where an example's noise falls as its weight
    grows, as that of a mean over tokens.
    """
    return sq_norms[0] / weights[0], float(weights[0])


METHODS: dict[str, Callable[[Array, Array], tuple[Array, float]]] = {
    "microbatch": every_part,
    "subbatch": first_part,
    "ranks": every_part,
}
SEVERAL = Skipped(
    "several passes",
    "several forward passes share one backward, or several backwards one forward, so it is not "
    "known how many examples a microbatch has; call backward once after each forward, or "
    "gns.weigh(torch.ones(examples)) before a backward of several",
)
UNKNOWN = Skipped(
    "examples unknown",
    "it is not known how many examples a microbatch has: the attached model's own forward was not "
    "called, or was compiled and called before attach. Let the loss call the model, or call "
    "gns.weigh(torch.ones(examples)) before each backward",
)
TORN = (
    "its gradient came in several pieces in one backward, as of a layer in several reentrant "
    "checkpoints; use checkpoint(..., use_reentrant=False)"
)


UNSEEN = (
    "fully_shard holds it, and its gradient could not be seen: its layer's forward was not called, "
    "or is compiled"
)


@dataclass(frozen=True, eq=False)
class _Forward:
    """What a forward of the model told of its batch."""

    batch: int | None
    tokens: int | None
    weights: Tensor | None


@dataclass(frozen=True)
class _Part:
    """A microbatch: what one backward added to `.grad`."""

    forward: _Forward
    names: list[str]
    # [names, 2]: |u|², and u along the parameter's direction; with a metric a third, |u|² in it
    values: Tensor
    torn: set[str]  # parameters whose u came in pieces, so that |u|² is not known


class Microbatch:
    """Collects from the first backward after a step to the next step.

    A hook on each parameter sees what a backward is about to add to `.grad`: the microbatch's own
    gradient u, with all uses of a tied or reused parameter summed (torch 2.13). Its square is taken
    there and then, so that no gradient is copied or kept: two numbers a parameter and microbatch
    remain. The hooks are there while a step is measured only. The whole parameters of
    `fully_shard`, whose gradients they see, are in the model while their layer runs: a hook on each
    layer finds them there.

    With several data-parallel ranks the parts are the microbatches of all, one or more a rank: a
    hook sees its rank's own gradient before it is reduced, and `.grad` is whole once it is. As the
    mean over ranks is taken, a rank whose share of the step's weights is w must have a loss of R w
    times its own mean: the sum over its tokens, divided by the tokens of all ranks, times R. With
    the same number of examples on each rank, or of tokens, its own mean is that.

    Every measurement proves itself: along a random direction, the sum of the microbatches must be
    `.grad`. It shows what no hook can see: gradients that were not cleared, or that another hook
    changes.

    Args:
        model: what the training loop calls.
        method: any of `METHODS`.
        batch_dim: axis of the examples in the model's inputs.
        weigh: gives the weights [B] of the examples from the arguments of the model's forward.
        strict: raise what goes wrong instead of leaving the measurement out.
        ranks: whose microbatches are the parts.
        metric: in which norms are taken too, by the name `named(method)`.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str,
        *,
        batch_dim: int = 0,
        weigh: Callable[..., Tensor] | None = None,
        strict: bool = False,
        ranks: Ranks = ALONE,
        metric: Preconditioner | None = None,
    ):
        self.model, self.method, self._ranks, self._metric = model, method, ranks, metric
        self.wanted = self._managed = False
        self.names = [name for name, _ in model.named_parameters()]
        self.columns = Columns(self.names, 1 if metric is None else 2, metric=metric is not None)
        self.untapped: dict[str, str] = {}
        self._directions = Directions(self.names)
        self._by_hand: Tensor | None = None
        self._batch_dim, self._weigh = batch_dim, weigh
        self._backwards = Backwards(
            model, ended=self._land, discarded=lambda: self._parts.clear(), strict=strict
        )
        self._hooks = [
            model.register_forward_pre_hook(
                Announce(model, self._begin), with_kwargs=True, prepend=True
            ),
            model.register_forward_hook(Announce(model, self._returned)),
        ]
        self._on_parameters: dict[str, tuple[nn.Parameter, list[RemovableHandle]]] = {}
        self._on_layers: list[RemovableHandle] = []
        self._clear()

    def arm(self, measure: bool, *, exact: bool = False) -> None:
        """Measure the next step, or let it pass without a hook on any parameter."""
        self.wanted = measure
        if measure:
            self._install()
            return
        for handle in [
            *self._on_layers,
            *(h for _, hs in self._on_parameters.values() for h in hs),
        ]:
            handle.remove()
        self._on_layers.clear()
        self._on_parameters.clear()

    def share(self) -> Share | Skipped | None:
        """What this process brings, read after its optimizer step; None if it is not measured."""
        try:
            with self._backwards.exactly():
                return self._share() if self.wanted else None
        finally:
            self._clear()

    @property
    def pending(self) -> bool:
        """Whether a backward has been measured since the last step."""
        return bool(self._parts) or self._backwards.fault is not None

    def weigh(self, weights: Tensor) -> None:
        """Weigh the examples of the microbatch whose backward comes next."""
        self._by_hand = weights

    def remove(self) -> None:
        """Leave the model as it was."""
        self.arm(False)
        for hook in self._hooks:
            hook.remove()
        self._clear()

    def _clear(self) -> None:
        self._backwards.clear()
        self._parts: list[_Part] = []
        self._big: dict[str, Tensor] = {}
        self._present: set[str] = set()
        self._seen: dict[str, tuple[Fingerprint, Tensor]] = {}  # in the present backward
        self._torn: set[str] = set()
        self._landed: set[str] = set()  # parameters to whose .grad something was added
        self._half: set[str] = set()  # parameters whose gradients came in half precision
        self._flowed: list[_Forward] = []  # into the present backward
        self._forwards = 0  # since the last microbatch
        self._entered = False  # a forward is under way, and none inside it was
        self._blind = False  # nothing tells which forward a backward belongs to
        self._batch: int | None = None
        self._tokens: int | None = None
        self._weights: Tensor | None = None
        self._by_hand = None

    def _install(self) -> None:
        """Hooks on all trainable parameters, those that were added or thawed lately too."""
        self._managed = is_managed(self.model)
        for name, p in _trainable(self.model).items():
            if not is_sharded(p):
                self._hook(name, p)
        if not self._managed or self._on_layers:
            return
        first = {id(p): name for name, p in self.model.named_parameters()}
        for module in self.model.modules():
            own = {at: first[id(p)] for at, p in module.named_parameters(recurse=False)}
            if own:
                gathered = Announce(module, partial(self._gathered, module, own))
                # Before fully_shard takes them away again.
                self._on_layers.append(module.register_forward_hook(gathered, prepend=True))

    def _hook(self, name: str, p: nn.Parameter) -> None:
        before, handles = self._on_parameters.get(name, (None, []))
        if before is p:
            return
        for handle in handles:
            handle.remove()
        self._on_parameters[name] = p, [p.register_hook(partial(self._gradient, name, p))]
        if self._managed:
            landed = p.register_post_accumulate_grad_hook(lambda _: self._landed.add(name))
            self._on_parameters[name][1].append(landed)

    def _gathered(self, module: nn.Module, own: Mapping[str, str], *_: Any) -> None:
        """A layer has run: its parameters are whole."""
        if torch.compiler.is_compiling():
            return
        for at, name in own.items():
            p = getattr(module, at)
            if p.requires_grad and not is_sharded(p):
                self._hook(name, p)

    # What a forward brings.

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.wanted or in_backward():  # where a checkpoint computes again
            return
        if torch.compiler.is_compiling():
            self._learn(args, kwargs)
        else:
            self._install()
            self._entered = True
            self._backwards.guarded(self._learn, args, kwargs)

    def _learn(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._forwards += 1
        found = read_batch(args, kwargs, self._batch_dim)
        self._batch, self._tokens = found.size, found.tokens
        if self._weigh is not None:
            self._weights = torch.as_tensor(self._weigh(*args, **kwargs))

    def _returned(self, args: tuple[Any, ...], output: Any) -> None:
        """Follow the outputs into the backward that they will take part in."""
        if not self.wanted or in_backward():
            return
        if torch.compiler.is_compiling():
            self._blind = True
            return
        if not self._entered:  # it called the model itself, as a Lightning training step under DDP
            return
        self._entered = False
        forward = _Forward(self._batch, self._tokens, self._weights)
        outputs = [t for t in tensors_in(output) if t.grad_fn is not None]
        self._blind = self._blind or not outputs
        for t in outputs:
            t.register_hook(partial(self._flows, forward))

    # What a backward brings.

    def _flows(self, forward: _Forward, _: Tensor) -> None:
        training = self.wanted and self._backwards.under_way(self._forwards)
        if training and forward not in self._flowed:
            self._flowed.append(forward)

    def _gradient(self, name: str, p: nn.Parameter, gradient: Tensor) -> None:
        if self._backwards.under_way(self._forwards):
            self._backwards.guarded(self._see, name, p.grad, gradient)

    def _see(self, name: str, grad: Tensor | None, gradient: Tensor) -> None:
        before, values = fingerprint(grad), self._values(name, gradient)
        if gradient.dtype.itemsize == 2:
            self._half.add(name)
        if name in self._seen:  # a reentrant checkpoint: <u', u''> is not known
            self._torn.add(name)
            before, values = self._seen[name][0], self._seen[name][1] + values
        self._seen[name] = before, values

    def _values(self, name: str, gradient: Tensor, **rows: Any) -> Tensor:
        values = [square_sum(gradient), self._directions.along(name, gradient, **rows)]
        if self._metric is not None:
            own = self._metric.diagonal.get(name)
            weighed = square_sum(own.scaled(gradient)) if own else torch.zeros_like(values[0])
            values.append(weighed)
        return torch.stack(values)

    def _land(self) -> None:
        """Take in the microbatch whose backward has ended, and `.grad` as accumulated so far."""
        seen, torn, flowed = self._seen, self._torn, self._flowed
        self._seen, self._torn, self._flowed = {}, set(), []
        grads = {name: p.grad for name, p in _trainable(self.model).items()}
        # torch.autograd.grad runs the hooks too, but what it brings does not reach .grad.
        # What fully_shard has not reduced yet is in no .grad of the model.
        landed = [
            name
            for name, (before, _) in seen.items()
            if name in self._landed or not self._managed and fingerprint(grads.get(name)) != before
        ]
        self._landed = set()
        if not landed:
            return
        device = seen[landed[0]][1].device
        values = torch.stack([seen[name][1].to(device) for name in landed])
        self._parts.append(_Part(self._forward_of(flowed), landed, values, torn))
        self._big, self._present = {}, {n for n, grad in grads.items() if grad is not None}
        for name, grad in grads.items():
            if grad is not None and (own := held(grad, self._ranks)):
                self._big[name] = self._values(name, own[0], shape=grad.shape, start=own[1])
        self._forwards, self._by_hand = 0, None

    def _forward_of(self, flowed: list[_Forward]) -> _Forward:
        """The forward of the backward that has ended; a fault where there is not just one."""
        forward = flowed[0] if len(flowed) == 1 else None
        if not flowed and self._blind and self._forwards == 1:
            forward = _Forward(self._batch, self._tokens, self._weights)
        if forward is None and self._by_hand is not None:
            forward = _Forward(len(self._by_hand), None, None)
        if forward is None or any(part.forward is forward for part in self._parts):
            unknown = not flowed and not self._blind
            self._backwards.fault = self._backwards.fault or (UNKNOWN if unknown else SEVERAL)
        forward = forward or _Forward(None, None, None)
        return forward if self._by_hand is None else replace(forward, weights=self._by_hand)

    # What the step brings.

    def _share(self) -> Share | Skipped:
        """The sums over this process's microbatches."""
        if self._backwards.fault is not None:
            return self._backwards.fault
        if not self._parts:
            return Skipped(
                NO_BACKWARD,
                "a step was taken, but no backward reached .grad. Is another model trained? Do the "
                "gradients come from torch.autograd.grad?",
            )
        forwards = [part.forward for part in self._parts]
        batches = [forward.batch for forward in forwards if forward.batch]
        if len(batches) < len(forwards):
            return UNKNOWN
        if len(forwards) == 1 and self._ranks.size == 1:
            return Skipped(
                "one part",
                f"method {self.method!r} compares the microbatches of gradient accumulation, and "
                "this step has one; accumulate two or more, or use method='pepgns'",
            )
        given = {
            j: torch.stack([w.double().sum(), w.new_tensor(not w.is_floating_point()).double()])
            for j, w in enumerate(_weights(forwards))
        }
        values, big, sums = to_host(
            {j: part.values for j, part in enumerate(self._parts)}, self._big, given
        )
        tokens = known_sum([forward.tokens for forward in forwards])
        weights = np.array(batches, dtype=np.float64)
        if given:
            weights = np.array([total for total, _ in sums.values()])
            tokens = int(weights.sum()) if all(i for _, i in sums.values()) else tokens
        tables = []
        for j, part in enumerate(self._parts):
            each = values[j].reshape(len(part.names), -1)
            tables.append(self._table(dict(zip(part.names, each, strict=True))))
        sq_norms, along, *in_metric = np.stack(tables, axis=1)  # [microbatches, n_parameters]
        seen = {name for part in self._parts for name in part.names}
        whole = sum(float(square) for square, *_ in big.values())
        if not (np.isfinite(whole) and np.isfinite(sq_norms).all()):
            return Skipped("nonfinite", "the gradient has infinite or undefined values")
        big_sq_norm, big_along, *big_in_metric = self._table(big)
        total = float(weights.sum())
        each = [
            METHODS[self.method](squares, weights / total) for squares in (sq_norms, *in_metric)
        ]
        parts_sq_norm, sum_sq_weights = np.stack([parts for parts, _ in each]), each[0][1]
        size = self._ranks.size  # the mean over so many is taken
        return Share(
            parts_sq_norm=parts_sq_norm / size**2,
            along=along.sum(0) / size,
            big_sq_norm=big_sq_norm,
            big_along=big_along,
            present=np.array([name in self._present for name in self.names]),
            seen=np.array([not self._managed or name in seen for name in self.names]),
            half=np.array([name in self._half for name in self.names]),
            whole=whole,
            sum_weights=total,
            sum_sq_weights=sum_sq_weights * total**2,
            weighted=bool(given),
            examples=sum(batches),
            tokens=tokens,
            microbatch=batches[-1],
            microbatches=len(batches),
            missing={name: TORN for part in self._parts for name in part.torn},
            in_metric=np.stack([*big_in_metric, self._known()]) if self._metric else None,
        )

    def _known(self) -> Array:
        """Of which parameters the metric is known, [n_parameters]."""
        assert self._metric is not None
        return np.array([name in self._metric.known for name in self.names], dtype=float)

    def _table(self, values: Mapping[str, Array]) -> Array:
        """The values of all parameters known at attach, [2 or 3, n_parameters], or zero."""
        none = np.zeros(2 if self._metric is None else 3)
        return np.array([values.get(name, none) for name in self.names]).T

    def norms(self, share: Share) -> Measured | Skipped:
        """The step's norms, from the share of this process or of all ranks."""
        missing = self._missing(share)
        left_in = np.array([name not in missing for name in self.names]) & share.present
        if not left_in.any():
            why = next(iter(missing.values()), "no parameter is trainable")
            return Skipped("nothing measured", why)
        norms = share.norms(left_in, missing)
        if self._metric is None:
            return {self.method: norms}
        weighed = self._metric.norms(
            norms, share, share.parts_sq_norm[1], self.names, ranks=self._ranks.size
        )
        return {self.method: norms, named(self.method): weighed}

    def _missing(self, share: Share) -> dict[str, str]:
        """Why trainable parameters are not in this step's norms."""
        missing, unreduced = {}, UNREDUCED if self._ranks.size > 1 else ""
        longer = np.maximum(share.big_sq_norm, share.parts_sq_norm[0])
        gap_of_each = gaps(share, self.columns, longer)
        of_each = zip(share.present, share.seen, gap_of_each, share.half, strict=True)
        known = dict(zip(self.names, of_each, strict=True))
        for name in _trainable(self.model):
            if name not in known:
                missing[name] = "it was added to the model after attach"
                continue
            present, seen, gap, half = known[name]
            if not present:
                missing[name] = UNUSED
            elif name in share.missing:
                missing[name] = share.missing[name]
            elif not seen:
                missing[name] = UNSEEN
            elif not gap <= (HALF_TOLERANCE if half else TOLERANCE):
                missing[name] = (
                    f"the gradients of the microbatches do not add up to .grad (off by {gap:.1%}): "
                    f"it was not cleared since an earlier step, or a hook changes it{unreduced}"
                )
        return missing


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _weights(forwards: list[_Forward]) -> list[Tensor]:
    """The weights of every microbatch's examples; empty where none were given."""
    if all(forward.weights is None for forward in forwards):
        return []
    return [check_weights(forward.weights, forward.batch or 0) for forward in forwards]
