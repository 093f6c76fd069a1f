"""Taps: squared norms of per-example gradients, leaving backward as the gradient of a leaf."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gnsmon.norms.forms import Form
from gnsmon.norms.rules import find_rule, refusal

SqNorms = Callable[[Form], Tensor]  # form -> squared norms [B]
ABSENT = -1.0  # in place of a sum of squares: the rule gave no gradient


class _Tap(torch.autograd.Function):
    """The identity on a layer's output; its backward gives `probe` the statistics as a gradient.

    A side effect in backward would break a compiled graph; the gradient of an extra leaf does not
    (torch 2.13). `x` is saved through autograd, so that checkpointing and offloading see it.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, probe: Tensor, tap: LayerTap, layout: Layout, *x: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*x)
        ctx.tap, ctx.layout = tap, layout
        ctx.set_materialize_grads(False)
        if torch.compiler.is_compiling():
            return y.clone()  # fused away
        # A view would forbid in-place operations on the output, such as ReLU(inplace=True).
        return torch.ops.aten._unsafe_view(y, y.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        rest = (None,) * (len(ctx.needs_input_grad) - 2)
        if dy is None:
            return None, None, *rest
        with torch.no_grad(), torch.autocast(dy.device.type, enabled=False):
            statistics = ctx.tap.statistics(ctx.saved_tensors, dy, ctx.layout)
        return dy, statistics, *rest


@dataclass(frozen=True)
class Layout:
    """How the rows of a layer's input belong to the examples of the batch."""

    batch: int
    batch_dim: int = 0
    rows_per_example: int = 1

    def batch_first(self, tensor: Tensor) -> Tensor:
        """`tensor` with the rows of one example adjacent on the leading axis."""
        if self.batch_dim == 0:
            return tensor
        if self.rows_per_example == 1:
            return tensor.movedim(self.batch_dim, 0)
        rows = tensor.unflatten(0, (self.rows_per_example, self.batch))
        return rows.transpose(0, 1).flatten(0, 1)


class LayerTap:
    """A forward hook on one layer; owns the probe that carries the layer's statistics out.

    The probe is one vector: the number of examples; for every method and each of the layer's
    parameters the sum over examples of its squared norms, `ABSENT` where the rule gives none; and,
    while proving, each parameter's `Form.sum_along`.
    """

    def __init__(
        self, taps: Taps, path: str, module: nn.Module, rule: Callable[..., dict[str, Form]]
    ):
        self.taps, self.path, self.module, self.rule = taps, path, module, rule
        self.owned = [name for name, _ in module.named_parameters(recurse=False)]
        self.names = [taps.canonical[id(p)] for _, p in module.named_parameters(recurse=False)]
        self.shared = any(taps.uses[name] > 1 for name in self.names)
        self.reason: str | None = None  # why this layer is left out of the present measurement
        self.last_call = -1
        self.half = False
        self.rows = {
            name: p.shape[0] if p.ndim else 1 for name, p in module.named_parameters(recurse=False)
        }
        self.probe = torch.zeros(0)

    def size(self, proving: bool) -> int:
        """Length of the probe."""
        statistics = 1 + len(self.taps.methods) * len(self.owned)
        return statistics + (sum(self.rows.values()) if proving else 0)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Tensor | None:
        """The tapped output, or None to leave the layer's output alone."""
        if module is not self.module or not self.taps.active or not torch.is_grad_enabled():
            return None
        if not any(p.requires_grad for p in module.parameters(recurse=False)):
            return None
        if not isinstance(output, Tensor):
            self.reason = f"{self.path}: output is a {type(output).__name__}, expected one tensor"
            return None
        x = _tensors(module, args, kwargs)
        layout = self.taps.layout(self, x, output)
        if layout is None or not self._joinable():
            return None
        self.half = output.dtype in (torch.float16, torch.bfloat16)
        return _Tap.apply(output, self.probe, self, layout, *x)  # type: ignore[no-any-return]

    def __reduce__(self) -> tuple[Any, ...]:
        return _Inert, ()

    def _joinable(self) -> bool:
        """Notice a second call in one forward; whether this call's statistics can be had."""
        if torch.compiler.is_compiling():
            if self.shared:
                self.reason = (
                    f"{self.path}: its parameters are used more than once, and in a compiled model "
                    "the uses cannot be joined"
                )
            return not self.shared
        # Activation checkpointing calls forward again inside backward: that is not another use.
        if torch._C._current_graph_task_id() != -1:
            return True
        if self.last_call == self.taps.serial and not self.shared:
            self.shared = True
            self.reason = f"{self.path}: called twice in one forward; joined from the next step on"
        self.last_call = self.taps.serial
        return True

    def statistics(self, x: Sequence[Tensor], dy: Tensor, layout: Layout) -> Tensor:
        """The probe's gradient: see the class."""
        if torch.compiler.is_compiling() or self.taps.strict:
            return self._statistics(x, dy, layout)
        try:
            return self._statistics(x, dy, layout)
        except Exception as error:  # noqa: BLE001  training must survive a faulty rule
            self.reason = f"{self.path}: its rule failed: {type(error).__name__}: {error}"
            return torch.zeros_like(self.probe)

    def _statistics(self, x: Sequence[Tensor], dy: Tensor, layout: Layout) -> Tensor:
        inputs = [layout.batch_first(t) if t.ndim else t for t in x]
        forms = self.rule(
            self.module, inputs[0] if len(inputs) == 1 else tuple(inputs), layout.batch_first(dy)
        )
        if layout.rows_per_example > 1:
            forms = {name: form.regroup(layout.batch) for name, form in forms.items()}
        if self.shared:
            uses = {name: forms[own] for own, name in self.pairs() if own in forms}
            self.taps.deferred.append((torch._C._current_graph_task_id(), uses))
        like = self.probe
        absent = like.new_full((1,), 0.0 if self.shared else ABSENT)
        mine = {} if self.shared else forms
        pieces = [like.new_full((1,), float(layout.batch))]
        for sq_norms in self.taps.methods.values():
            for own in self.owned:
                pieces.append(sq_norms(mine[own]).sum().reshape(1) if own in mine else absent)
        if self.taps.directions is not None:
            for own, name in self.pairs():
                along = mine[own].sum_along(self.taps.directions[name]) if own in mine else None
                pieces.append(like.new_zeros(self.rows[own]) if along is None else along)
        return torch.cat([piece.to(like.dtype) for piece in pieces])

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The layer's parameters under their names in the model."""
        for own, name in self.pairs():
            yield name, getattr(self.module, own)

    def pairs(self) -> Iterator[tuple[str, str]]:
        """The layer's own names of its parameters, each with the name in the model."""
        return zip(self.owned, self.names, strict=True)


class Taps:
    """All taps on a model: which layers have one, and what one forward pass tells them.

    Args:
        model: its layers with a rule are tapped; nothing is kept on it but hooks, which `remove`
            takes away.
        methods: name -> squared norms of a form.
        batch_dim: axis of the examples in the input and output of every layer.
        weigh: gives the weights [B] of the examples from the arguments of the model's forward.
        strict: raise what goes wrong in a rule instead of leaving the layer out.
    """

    def __init__(
        self,
        model: nn.Module,
        methods: Mapping[str, SqNorms],
        *,
        batch_dim: int = 0,
        weigh: Callable[..., Tensor] | None = None,
        strict: bool = False,
    ):
        self.model, self.methods, self.batch_dim = model, methods, batch_dim
        self.weigh, self.strict = weigh, strict
        self.canonical = {id(p): name for name, p in model.named_parameters()}
        self.uses = Counter(
            self.canonical[id(p)]
            for module in model.modules()
            for p in module._parameters.values()
            if p is not None
        )
        self.untapped: dict[str, str] = {}  # parameter -> why no rule gives its gradient
        # Forms of shared parameters, a dict a use, each with the backward that it came from.
        self.deferred: list[tuple[int, dict[str, Form]]] = []
        self.directions: dict[str, Tensor] | None = None  # not None while proving
        self.wanted = self.active = False
        self.rooted = False  # the model's own forward is called, not only its layers'
        self.batch: int | None = None
        self.tokens: int | None = None
        self.weights: Tensor | None = None
        self.inner: tuple[int, ...] = ()  # sizes seen behind the batch axis: sequence lengths
        self.forwards = 0  # since the last backward
        self.serial = 0  # of the present forward, eager only
        self.layers: list[LayerTap] = []
        self._hooks = [
            model.register_forward_pre_hook(_Begin(self), with_kwargs=True, prepend=True)
        ]
        for path, module in model.named_modules():
            self._tap(path, module)

    def _tap(self, path: str, module: nn.Module) -> None:
        own = dict(module.named_parameters(recurse=False))
        if not own:
            return
        rule, why, kind = find_rule(module), refusal(module), type(module).__name__
        if why is None and rule is None:
            why = f"{kind} has no rule; write one with @gnsmon.rule({kind})"
        if rule is None or why is not None:
            self.untapped |= {self.canonical[id(p)]: f"{path or kind}: {why}" for p in own.values()}
            return
        tap = LayerTap(self, path or kind, module, rule)
        self.layers.append(tap)
        self._hooks.append(module.register_forward_hook(tap, with_kwargs=True, prepend=True))

    def remove(self) -> None:
        """Leave the model as it was."""
        self.wanted = self.active = False
        for hook in self._hooks:
            hook.remove()

    def want(self, measure: bool) -> None:
        """Statistics from the next forward of the model on, or none."""
        self.wanted = measure
        if not self.rooted:
            self.active = measure

    def ready(self, fired: Callable[[Tensor], None], proof: torch.Generator | None) -> None:
        """A probe for every layer; `fired` is called when it receives its gradient.

        With `proof`, it draws the directions along which the layers' gradients are proven.
        """
        self.directions = None
        if proof is not None:
            self.directions = {
                name: _signs(p, proof) for tap in self.layers for name, p in tap.parameters()
            }
        for tap in self.layers:
            _, p = next(tap.parameters())
            size = tap.size(proof is not None)
            if tap.probe.numel() != size or tap.probe.device != p.device:
                tap.probe = torch.zeros(size, dtype=_wide(p), device=p.device, requires_grad=True)
                tap.probe.register_post_accumulate_grad_hook(fired)

    def end_pass(self) -> None:
        """Forget the batch whose backward has ended."""
        self.forwards, self.weights = 0, None
        if not self.rooted:
            self.batch = None

    def clear(self) -> None:
        """Forget everything learnt since the last optimizer step."""
        self.end_pass()
        self.deferred.clear()
        for tap in self.layers:
            tap.reason, tap.probe.grad = None, None

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Learn the batch from the arguments of the model's forward."""
        self.active, self.rooted = self.wanted, True
        if not self.wanted:
            return
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        sizes = [t.shape[self.batch_dim] for t in tensors if t.ndim > self.batch_dim]
        self.batch = _most_common(sizes)
        self.inner = tuple(t.shape[1 - self.batch_dim] for t in tensors if _is_sequence(t))
        ids = [t for t in tensors if t.ndim == 2 and not t.is_floating_point()]
        self.tokens = ids[0].numel() if ids else None
        self.forwards += 1
        if not torch.compiler.is_compiling():
            self.serial += 1
        if self.weigh is not None:
            self.weights = self.weigh(*args, **kwargs)

    def layout(self, tap: LayerTap, x: Sequence[Tensor], output: Tensor) -> Layout | None:
        """Whose example each row of `output` is; None, with the reason on `tap`, if unknown."""
        dim = self.batch_dim
        if self.batch is None:  # the layer was called without its model's forward
            self.batch = output.shape[dim]
        batch, sizes = self.batch, tuple(output.shape)
        if len(sizes) > dim and sizes[dim] == batch:
            flat = x[0].ndim == (2 if x[0].is_floating_point() else 1)
            if flat and batch in self.inner:
                tap.reason = (
                    f"{tap.path}: fed {batch} rows, and {batch} is both the batch size and the "
                    "sequence length: examples or positions? Use another (micro)batch size"
                )
                return None
            if len(sizes) == 3 and sizes[1 - dim] not in self.inner:
                self.inner = (*self.inner, sizes[1 - dim])
            return Layout(batch, dim)
        rows = sizes[0] // batch if sizes and sizes[0] % batch == 0 else 0
        if rows in self.inner and rows > 1:
            return Layout(batch, dim, rows)
        tap.reason = (
            f"{tap.path}: output has shape {list(sizes)}, expected {batch} examples on axis {dim}; "
            "its batch axis is lost (summed, or merged with another in an unknown order)"
        )
        return None


class _Begin:
    """The hook that tells `Taps` of a forward of the whole model."""

    def __init__(self, taps: Taps):
        self.taps = taps

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is self.taps.model and torch.is_grad_enabled():
            self.taps.begin(args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Inert, ()


class _Inert:
    """What a copy of a tapped model has in place of hooks: it must not feed this monitor."""

    def __call__(self, *_: Any) -> None:
        return None


def _most_common(sizes: list[int]) -> int | None:
    """The first of the most common sizes; in words that torch.compile can trace."""
    best, votes = None, 0
    for size in sizes:
        count = len([other for other in sizes if other == size])
        if count > votes:
            best, votes = size, count
    return best


def _wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _signs(p: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs [elements behind the first axis of p]."""
    size = (max(p[0].numel(), 1) if p.ndim else 1,)
    bits = torch.randint(0, 2, size, generator=generator)
    return (2 * bits - 1).to(p.device, _wide(p))


def _is_sequence(t: Tensor) -> bool:
    return t.ndim in (3, 5) if t.is_floating_point() else t.ndim == 2


def _tensors(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, ...]:
    """The tensors given to forward, in the order of its signature."""
    values = list(args)
    if kwargs:
        values += [kwargs[name] for name in _parameter_names(type(module)) if name in kwargs]
    return tuple(v for v in values if isinstance(v, Tensor))


@lru_cache
def _parameter_names(kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)
