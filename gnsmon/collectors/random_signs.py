"""One optimizer step's norms by example from a second backward, whatever the model is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gnsmon.collectors.backward import Backwards, Fingerprint, fingerprint
from gnsmon.collectors.step import (
    HALF_TOLERANCE,
    NO_BACKWARD,
    NO_LOSSES,
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
from gnsmon.norms.contractions import wide
from gnsmon.norms.oracles import left_untouched, random_signs

METHODS = ("random_signs",)
PROOF_EVERY = 10  # measurements
SEVERAL = Skipped(
    "several passes",
    "several backwards went through one vector of losses, so its examples are not known apart; "
    "call backward once after each gns.losses",
)
UNHEARD = Skipped(
    "losses unknown",
    "a backward of this step reached .grad without coming through gns.losses, so its examples are "
    "not in the norms; call gns.losses before each backward",
)
UNWEIGHTED = Skipped(
    "weights",
    "the loss takes some of gns.losses with a plus and others with a minus, or none at all; give "
    "the vector as it is after such factors",
)
ADVICE = {  # in PyTorch's error -> what to do
    "donated buffers": (
        "a compiled model frees what it needs; import torch._functorch.config and set "
        "torch._functorch.config.donated_buffer = False before the first backward"
    ),
    "use_reentrant": "use checkpoint(..., use_reentrant=False)",
}
DISPROVED = (
    "the gradients of gns.losses do not add up to .grad (off by {:.1%}): another term of the loss "
    "reaches it too, a hook changes it, or it was not cleared since an earlier step"
)


@dataclass(frozen=True, eq=False)
class _Part:
    """What one vector of losses brought in one backward."""

    names: list[str]  # of the parameters that it reaches
    sq_norms: Tensor  # [names], |z|²
    weights: Tensor  # [4]: sum, sum of squares, least and largest
    examples: int
    proved: bool  # whether its gradient is in the proof


class RandomSigns:
    """Collects from the first backward after a step to the next step.

    z = gradient of sum_j e_j c_j loss_j with independent signs e_j = +-1 has E |z|² = sum_j |u_j|²,
    u_j = c_j grad loss_j, for E e_i e_j = 0 takes away the cross terms (Hutchinson's estimator of
    the trace of U U'). A hook on the vector of losses gets c, the gradient of the total loss, in
    the user's own backward; the graph below it has not been freed yet, so z is taken there and
    then. So c holds all that weighs and scales the examples, and nothing is to be configured.

    The proof takes a third backward, with all signs +1: sum_j u_j must be `.grad`, or the parameter
    is left out. It shows what does not come through the vector (penalties, auxiliary losses,
    gradients that were not cleared) and hooks that are not linear. As it costs so much, it is made
    at the first measurement, at one in `PROOF_EVERY` from then on, and when the vector reaches a
    parameter that was not proved yet; verdicts hold in between.

    Args:
        model: whose parameters are trained.
        strict: raise what goes wrong instead of leaving the measurement out.
    """

    def __init__(self, model: nn.Module, *, strict: bool = False):
        self.model = model
        self.wanted = False
        self.names = [name for name, _ in model.named_parameters()]
        self.columns = Columns(self.names)
        self.untapped: dict[str, str] = {}
        self._backwards = Backwards(model, ended=self._land, discarded=self._discard, strict=strict)
        self._generators: dict[torch.device, torch.Generator] = {}
        self._verdicts: dict[str, str | None] = {}  # parameter -> why it does not add up
        self._measured = 0
        self._calls = 0
        self._given: dict[int, tuple[Tensor, RemovableHandle]] = {}
        self._counts: Tensor | None
        self._watching: list[RemovableHandle] = []
        self._clear()

    def arm(self, measure: bool, *, exact: bool = False) -> None:
        """Measure the next step, or let it pass; there is nothing more exact to be had."""
        self.wanted = measure
        for handle in self._watching:
            handle.remove()
        grows = (p.register_post_accumulate_grad_hook(self._grows) for p in self._watched())
        self._watching = list(grows) if measure else []

    def _watched(self) -> Iterator[nn.Parameter]:
        return (p for p in self.model.parameters() if p.requires_grad and p.is_leaf)

    def share(self) -> Share | Skipped | None:
        """What the step brings, already proved; None if it is not measured."""
        try:
            with self._backwards.exactly():
                return self._share() if self.wanted else None
        finally:
            self._clear()

    @property
    def pending(self) -> bool:
        """Whether a backward has been measured since the last step."""
        return bool(self._parts) or self._backwards.fault is not None

    def losses(self, losses: Tensor) -> None:
        """Take note of the loss of each example, [B], whose backward comes next."""
        if self.wanted and torch.is_grad_enabled():
            with self._backwards.surviving():
                self._expect(losses)

    def weigh(self, weights: Tensor) -> None:
        """Count the tokens, if integer, of the examples whose backward comes next.

        How much the examples weigh in the loss is seen in the backward.
        """
        self._counts = weights

    def remove(self) -> None:
        """Leave the model as it was."""
        self.arm(False)
        self._clear()

    def draw(self, like: Tensor) -> Tensor:
        """Signs [B], from a random stream of their own."""
        if like.device not in self._generators:
            self._generators[like.device] = torch.Generator(like.device).manual_seed(0)
        return random_signs(like, self._generators[like.device])

    def _clear(self) -> None:
        for _, handle in self._given.values():
            handle.remove()
        # Held here, not by their hooks, lest tensor and hook keep each other and the graph.
        self._given.clear()
        self._within: int | None = None  # the vector whose losses are being differentiated
        self._counts = None
        self._arrived: list[tuple[int, _Part, dict[str, Tensor]]] = []  # in the present backward
        self._before: dict[str, Fingerprint] = {}
        self._grew = False  # whether the present backward has reached `.grad`
        self._backwards.clear()
        self._discard()

    def _discard(self) -> None:
        """The gradients so far were thrown away: begin again."""
        self._parts: list[_Part] = []
        self._tokens: list[Tensor | None] = []  # of each backward
        self._sums: dict[str, Tensor] = {}
        self._big: dict[str, Tensor] = {}
        self._gaps: dict[str, Tensor] = {}
        self._unheard = False  # whether a backward came through no vector of losses

    # What a forward brings.

    def _expect(self, losses: Tensor) -> None:
        if losses.ndim != 1 or losses.grad_fn is None:
            came = "" if losses.grad_fn is not None else " without a graph"
            raise ValueError(
                "gns.losses: expected the loss of each example, [B], with its graph; got shape "
                f'{list(losses.shape)}{came}. Take reduction="none", and of losses by token each '
                "example's mean, weighed by its tokens afterwards"
            )
        if all(losses is not given for given, _ in self._given.values()):
            hook = partial(self._arrives, self._calls)
            self._given[self._calls] = losses, losses.register_hook(hook)
            self._calls += 1

    # What a backward brings.

    def _arrives(self, key: int, c: Tensor) -> None:
        """The gradient [B] of the total loss has arrived at a vector of losses."""
        if key == self._within:
            self._backwards.own.add(torch._C._current_graph_task_id())
        if not (self.wanted and self._backwards.under_way(self._calls)) or self._backwards.fault:
            return
        if key not in self._given:
            self._backwards.fault = SEVERAL
            return
        with self._backwards.surviving(), torch.no_grad():
            self._measure(key, self._given[key][0], c)

    def _grows(self, _: Tensor) -> None:
        """Something was added to `.grad`: a backward is under way, perhaps without losses."""
        if self.wanted and self._backwards.under_way(self._calls):
            self._grew = True

    def _measure(self, key: int, losses: Tensor, c: Tensor) -> None:
        trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._before = self._before or {n: fingerprint(p.grad) for n, p in trainable.items()}
        signed = self._gradients(key, losses, self.draw(c) * c, trainable)
        if not signed:
            raise ValueError(
                "gns.losses: the vector reaches no parameter of the model. Is another model "
                "trained? Is all of it in checkpoint(..., use_reentrant=True)?"
            )
        with self._backwards.exactly():
            squares = torch.stack([square_sum(z).to(c.device) for z in signed.values()])
            weights = c.double()
            moments = weights.sum(), weights.square().sum(), weights.min(), weights.max()
        names = list(signed)
        del signed  # one gradient at a time
        due = self._measured % PROOF_EVERY == 0 or not self._verdicts.keys() >= set(names)
        # By half, so that a hook that clamps or normalises does not add up.
        sums = self._gradients(key, losses, c / 2, trainable) if due else {}
        part = _Part(names, squares, torch.stack(moments), len(c), due)
        self._arrived.append((key, part, sums))

    def _gradients(
        self, key: int, losses: Tensor, weights: Tensor, of: Mapping[str, nn.Parameter]
    ) -> dict[str, Tensor]:
        """Gradient of sum_j weights_j losses_j in the parameters that it reaches."""
        self._within = key
        try:
            with left_untouched(self.model):
                found = torch.autograd.grad(
                    losses, list(of.values()), weights, retain_graph=True, allow_unused=True
                )
        except RuntimeError as error:
            if advice := next((a for cause, a in ADVICE.items() if cause in str(error)), None):
                raise RuntimeError(f"a second backward is not possible: {advice}") from error
            raise
        finally:
            self._within = None
            self._backwards.own.clear()
        return {name: g for name, g in zip(of, found, strict=True) if g is not None}

    def _land(self) -> None:
        """Take in what the backward that has ended brought, and `.grad` as accumulated so far."""
        arrived, before, grew = self._arrived, self._before, self._grew
        self._arrived, self._before, self._grew = [], {}, False
        if not arrived:
            self._unheard = self._unheard or grew
            return
        grads = {n: p.grad for n, p in self.model.named_parameters() if p.requires_grad}
        # torch.autograd.grad comes through the losses too, but what it brings is not in .grad.
        if all(fingerprint(grads.get(name)) == was for name, was in before.items()):
            return
        self._tokens.append(_tokens(self._counts, sum(part.examples for _, part, _ in arrived)))
        self._counts = None
        for key, part, sums in arrived:
            self._given.pop(key)
            self._parts.append(part)
            for name, g in sums.items():
                self._sums[name] = self._sums[name] + g if name in self._sums else g
        self._big = {name: square_sum(grad) for name, grad in grads.items() if grad is not None}
        self._gaps = {
            name: square_sum(2 * _dense(total) - _dense(grad))
            for name, total in self._sums.items()
            if (grad := grads.get(name)) is not None
        }

    # What the step brings.

    def _share(self) -> Share | Skipped:
        if self._backwards.fault is not None:
            return self._backwards.fault
        if not self._parts:
            return self._nothing_came()
        if self._unheard:
            return UNHEARD
        squares, weights, big, gaps, tokens = to_host(
            {j: part.sq_norms for j, part in enumerate(self._parts)},
            {j: part.weights for j, part in enumerate(self._parts)},
            self._big,
            self._gaps,
            {j: total for j, total in enumerate(self._tokens) if total is not None},
        )
        total, squared, least, largest = np.stack(list(weights.values()), axis=1)
        if least.min() < 0 < largest.max() or not total.sum():
            return UNWEIGHTED
        sq_norms: dict[str, float] = {}
        for part, values in zip(self._parts, squares.values(), strict=True):
            for name, value in zip(part.names, values, strict=True):
                sq_norms[name] = sq_norms.get(name, 0.0) + float(value)
        big_sq_norm = {name: float(a[0]) for name, a in big.items()}
        if not np.isfinite(sum(big_sq_norm.values()) + sum(sq_norms.values())):
            return Skipped("nonfinite", "the gradient has infinite or undefined values")
        self._judge({name: float(a[0]) for name, a in gaps.items()}, big_sq_norm)
        why = {name: self._why(name, sq_norms, big_sq_norm) for name in self.names}
        counts = [int(tokens[j][0]) if j in tokens else None for j in range(len(self._tokens))]
        proved = np.zeros(len(self.names))
        return Share(
            parts_sq_norm=np.array([[sq_norms.get(name, 0.0) for name in self.names]]),
            along=proved,
            big_sq_norm=np.array([big_sq_norm.get(name, 0.0) for name in self.names]),
            big_along=proved,
            present=np.array([name in big for name in self.names]),
            seen=np.array([name in sq_norms for name in self.names]),
            half=proved > 0,
            whole=sum(big_sq_norm.values()),
            sum_weights=float(total.sum()),
            sum_sq_weights=float(squared.sum()),
            weighted=True,
            examples=sum(part.examples for part in self._parts),
            tokens=known_sum(counts),
            microbatch=self._parts[-1].examples,
            microbatches=len(self._parts),
            missing={name: reason for name, reason in why.items() if reason},
        )

    def _nothing_came(self) -> Skipped:
        if self._given:
            return Skipped(
                NO_BACKWARD,
                "a step was taken, but no backward from the vector of gns.losses reached .grad. "
                "Does the loss come from another tensor than the one given? Do the gradients come "
                "from torch.autograd.grad?",
            )
        return Skipped(
            NO_LOSSES,
            "method 'random_signs' needs the loss of each example: call gns.losses(losses) between "
            'forward and backward, with losses [B] of reduction="none"',
        )

    def _judge(self, gaps: Mapping[str, float], big: Mapping[str, float]) -> None:
        """Verdicts on the parameters all of whose parts are in the proof."""
        whole = sum(big.values())
        unproved = {name for part in self._parts if not part.proved for name in part.names}
        for name in gaps.keys() - unproved:
            # What is zero but for rounding (a key's bias in attention) proves nothing.
            of = max(big[name], 1e-4 * whole)
            gap = (gaps[name] / of) ** 0.5 if of else 0.0
            half = self.model.get_parameter(name).dtype.itemsize == 2
            proved = gap <= (HALF_TOLERANCE if half else TOLERANCE)
            self._verdicts[name] = None if proved else DISPROVED.format(gap)

    def norms(self, share: Share) -> Measured | Skipped:
        """The step's norms, from what it brought."""
        added = "it was added to the model after attach"
        trainable = [name for name, p in self.model.named_parameters() if p.requires_grad]
        known = {**dict.fromkeys(trainable, added), **dict.fromkeys(self.names), **share.missing}
        missing = {name: why for name in trainable if (why := known[name])}
        measured = np.array([name in trainable and name not in missing for name in self.names])
        if not measured.any():
            why = next(iter(missing.values()), "no parameter is trainable")
            return Skipped("nothing measured", why)
        self._measured += 1
        return {METHODS[0]: share.norms(measured, missing)}

    def _why(
        self, name: str, sq_norms: Mapping[str, float], big: Mapping[str, float]
    ) -> str | None:
        """Why a trainable parameter is not in this step's norms."""
        if name in sq_norms:
            return self._verdicts[name] if name in big else UNUSED
        if not big.get(name):
            return UNUSED
        return (
            "gns.losses does not reach it, but it has a gradient: another term of the loss reaches "
            "it, or it is in checkpoint(..., use_reentrant=True), which should be False"
        )


def _dense(gradient: Tensor) -> Tensor:
    return wide((gradient.to_dense() if gradient.is_sparse else gradient).detach())


def _tokens(counts: Tensor | None, examples: int) -> Tensor | None:
    """Their sum; None where none are given, or weights of floating point."""
    counts = None if counts is None else check_weights(counts, examples)
    return None if counts is None or counts.is_floating_point() else counts.sum()
