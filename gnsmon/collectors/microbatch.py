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

from gnsmon.collectors.backward import Backwards, exactly
from gnsmon.collectors.step import (
    HALF_TOLERANCE,
    NO_BACKWARD,
    TOLERANCE,
    UNUSED,
    Measured,
    Skipped,
    StepNorms,
    check_weights,
    known_sum,
    square_sum,
    to_host,
)
from gnsmon.estimators.values import Array
from gnsmon.norms.contractions import wide
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
    values: Tensor  # [names, 2]: |u|², and by how much u makes |.grad|² grow
    torn: set[str]  # parameters whose u came in pieces, so that |u|² is not known


class Microbatch:
    """Collects from the first backward after a step to the next step.

    A hook on each parameter sees what a backward is about to add to `.grad`: the microbatch's own
    gradient u, with all uses of a tied or reused parameter summed (torch 2.13). Its square is taken
    there and then, so that no gradient is copied or kept: two numbers a parameter and microbatch
    remain. The hooks are there while a step is measured only.

    Every measurement proves itself: |S + u|² = |S|² + 2 <S, u> + |u|², so the growth of all
    microbatches must be |.grad|² in the end. It shows what no hook can see: gradients that were not
    cleared, or that another hook changes.

    Args:
        model: what the training loop calls.
        method: any of `METHODS`.
        batch_dim: axis of the examples in the model's inputs.
        weigh: gives the weights [B] of the examples from the arguments of the model's forward.
        strict: raise what goes wrong instead of leaving the measurement out.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str,
        *,
        batch_dim: int = 0,
        weigh: Callable[..., Tensor] | None = None,
        strict: bool = False,
    ):
        self.model, self.method = model, method
        self.wanted = False
        self.names = [name for name, _ in model.named_parameters()]
        self.untapped: dict[str, str] = {}
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
        self._on_parameters: dict[str, tuple[nn.Parameter, RemovableHandle]] = {}
        self._clear()

    def arm(self, measure: bool, *, exact: bool = False) -> None:
        """Measure the next step, or let it pass without a hook on any parameter."""
        self.wanted = measure
        if measure:
            self._install()
            return
        for _, handle in self._on_parameters.values():
            handle.remove()
        self._on_parameters.clear()

    def close(self) -> Measured | Skipped | None:
        """The step's norms, read after its optimizer step; None when it was not to be measured."""
        try:
            with exactly(self.model):
                return self._close() if self.wanted else None
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
        self._seen: dict[str, tuple[_Fingerprint, Tensor]] = {}  # in the present backward
        self._torn: set[str] = set()
        self._flowed: list[_Forward] = []  # into the present backward
        self._forwards = 0  # since the last microbatch
        self._blind = False  # nothing tells which forward a backward belongs to
        self._batch: int | None = None
        self._tokens: int | None = None
        self._weights: Tensor | None = None
        self._by_hand = None

    def _install(self) -> None:
        """Hooks on all trainable parameters, those that were added or thawed lately too."""
        for name, p in self.model.named_parameters():
            if p.requires_grad and self._on_parameters.get(name, (None,))[0] is not p:
                self._on_parameters[name] = p, p.register_hook(partial(self._gradient, name, p))

    # What a forward brings.

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.wanted or in_backward():  # where a checkpoint computes again
            return
        if torch.compiler.is_compiling():
            self._learn(args, kwargs)
        else:
            self._install()
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
        forward = _Forward(self._batch, self._tokens, self._weights)
        outputs = [t for t in tensors_in(output) if t.grad_fn is not None]
        self._blind = self._blind or not outputs
        for t in outputs:
            t.register_hook(partial(self._flows, forward))

    # What a backward brings.

    def _flows(self, forward: _Forward, _: Tensor) -> None:
        if self.wanted:
            self._backwards.under_way(self._forwards)
            if forward not in self._flowed:
                self._flowed.append(forward)

    def _gradient(self, name: str, p: nn.Parameter, gradient: Tensor) -> None:
        self._backwards.under_way(self._forwards)
        self._backwards.guarded(self._see, name, p.grad, gradient)

    def _see(self, name: str, grad: Tensor | None, gradient: Tensor) -> None:
        square = square_sum(gradient)
        growth = square if grad is None else square + 2 * _dot(grad, gradient)
        before, values = _fingerprint(grad), torch.stack([square, growth])
        if name in self._seen:  # a reentrant checkpoint: <u', u''> is not known
            self._torn.add(name)
            before, values = self._seen[name][0], self._seen[name][1] + values
        self._seen[name] = before, values

    def _land(self) -> None:
        """Take in the microbatch whose backward has ended, and `.grad` as accumulated so far."""
        seen, torn, flowed = self._seen, self._torn, self._flowed
        self._seen, self._torn, self._flowed = {}, set(), []
        grads = {n: p.grad for n, p in self.model.named_parameters() if p.requires_grad}
        # torch.autograd.grad runs the hooks too, but what it brings does not reach .grad.
        landed = [n for n, (before, _) in seen.items() if _fingerprint(grads.get(n)) != before]
        if not landed:
            return
        device = seen[landed[0]][1].device
        values = torch.stack([seen[name][1].to(device) for name in landed])
        self._parts.append(_Part(self._forward_of(flowed), landed, values, torn))
        self._big = {name: square_sum(grad) for name, grad in grads.items() if grad is not None}
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

    def _close(self) -> Measured | Skipped:
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
        if len(forwards) == 1:
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
        return self._norms(
            [values[j].reshape(-1, 2) for j in range(len(forwards))],
            {name: float(a[0]) for name, a in big.items()},
            batches,
            weights / weights.sum(),
            tokens,
        )

    def _norms(
        self,
        values: list[Array],  # [names, 2] of each part
        big: Mapping[str, float],
        batches: list[int],
        weights: Array,
        tokens: int | None,
    ) -> Measured | Skipped:
        column = {name: i for i, name in enumerate(self.names)}
        sq_norms, growth = np.zeros((2, len(values), len(self.names)))
        for j, part in enumerate(self._parts):
            known = [i for i, name in enumerate(part.names) if name in column]
            columns = [column[part.names[i]] for i in known]
            sq_norms[j, columns], growth[j, columns] = values[j][known].T
        if not (np.isfinite(sum(big.values())) and np.isfinite(sq_norms).all()):
            return Skipped("nonfinite", "the gradient has infinite or undefined values")
        big_sq_norm = np.array([big.get(name, 0.0) for name in self.names])
        whole = sum(big.values())
        # What is zero but for rounding proves nothing.
        of = np.maximum(np.maximum(big_sq_norm, sq_norms.sum(0)), 1e-4 * whole)
        gaps = np.abs(growth.sum(0) - big_sq_norm) / np.where(of > 0, of, 1)
        trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        missing = {
            name: why
            for name, p in trainable.items()
            if (why := self._why(name, p, big, gaps[column[name]] if name in column else None))
        }
        left_in = np.array([name in trainable and name not in missing for name in self.names])
        if not left_in.any():
            why = next(iter(missing.values()), "no parameter is trainable")
            return Skipped("nothing measured", why)
        parts_sq_norm, sum_sq_weights = METHODS[self.method](sq_norms * left_in, weights)
        big_sq_norm = big_sq_norm * left_in
        norms = StepNorms(
            big_sq_norm=big_sq_norm,
            parts_sq_norm=parts_sq_norm,
            sum_sq_weights=sum_sq_weights,
            examples=sum(batches),
            tokens=tokens,
            microbatch=batches[-1],
            microbatches=len(batches),
            missing=missing,
            norm_fraction=float(big_sq_norm.sum() / whole) if whole > 0 else None,
        )
        return {self.method: norms}

    def _why(
        self, name: str, p: nn.Parameter, big: Mapping[str, float], gap: float | None
    ) -> str | None:
        """Why a trainable parameter is not in this step's norms; `gap` of those known at attach."""
        if gap is None:
            return "it was added to the model after attach"
        if name not in big:
            return UNUSED
        if any(name in part.torn for part in self._parts):
            return (
                "its gradient came in several pieces in one backward, as of a layer in several "
                "reentrant checkpoints; use checkpoint(..., use_reentrant=False)"
            )
        if not gap <= (HALF_TOLERANCE if p.dtype.itemsize == 2 else TOLERANCE):
            return (
                f"the gradients of the microbatches do not add up to .grad (off by {gap:.1%} of "
                "its square): it was not cleared since an earlier step, or a hook changes it"
            )
        return None


_Fingerprint = tuple[int, int] | None


def _fingerprint(grad: Tensor | None) -> _Fingerprint:
    """Another one after anything was added to `grad`, in place or not."""
    return None if grad is None else (id(grad), grad._version)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    a, b = (t.to_dense() if t.is_sparse else t for t in (a, b))
    return (wide(a.detach()) * wide(b.detach())).sum()


def _weights(forwards: list[_Forward]) -> list[Tensor]:
    """The weights of every microbatch's examples; empty where none were given."""
    if all(forward.weights is None for forward in forwards):
        return []
    return [check_weights(forward.weights, forward.batch or 0) for forward in forwards]
