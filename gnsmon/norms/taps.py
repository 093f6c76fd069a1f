"""Taps: squared norms of per-example gradients, leaving backward as the gradient of a leaf."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from gnsmon.norms.forms import Form
from gnsmon.norms.inputs import Announce, Inert, in_backward, is_transformed, read_batch
from gnsmon.norms.rules import coupling, find_rule, refusal

SqNorms = Callable[[Form], Tensor]  # form -> squared norms [B]
# Layers whose batch axis is always the first; others work on the last axis, whatever leads.
BATCH_FIRST = (
    nn.modules.conv._ConvNd,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,
    nn.PReLU,
    nn.EmbeddingBag,
)
ABSENT = float("-inf")  # in place of a sum of squares: the rule gave no gradient


class _Tap(torch.autograd.Function):
    """The identity on a layer's output; its backward gives `probe` the statistics as a gradient.

    A side effect in backward would break a compiled graph; the gradient of an extra leaf does not
    (torch 2.13). `x` is saved through autograd, so that checkpointing and offloading see it.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, probe: Tensor, tap: LayerTap, layout: Layout | None, *x: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*x)
        ctx.tap, ctx.layout = tap, layout
        ctx.set_materialize_grads(False)
        if torch.compiler.is_compiling() or not tap.saves_no_output:
            return y.clone()
        # A view would forbid in-place operations on the output, such as ReLU(inplace=True).
        return torch.ops.aten._unsafe_view(y, y.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        statistics = None
        if dy is not None and ctx.layout is not None:
            with torch.no_grad(), torch.autocast(dy.device.type, enabled=False):
                statistics = ctx.tap.statistics(ctx, dy, ctx.layout)
        return dy, statistics, *(None,) * (len(ctx.needs_input_grad) - 2)


@dataclass(frozen=True)
class Layout:
    """How the rows of a layer's input belong to the examples of the batch."""

    batch: int
    batch_dim: int = 0
    rows_per_example: int = 1
    serial: int = 0  # of the forward pass

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
    parameters the sum over examples of its squared norms, `ABSENT` where the rule gives none; and
    each parameter's `Form.sum_along`, to be compared with `.grad`.
    """

    def __init__(
        self, taps: Taps, path: str, module: nn.Module, rule: Callable[..., dict[str, Form]]
    ):
        self.taps, self.path, self.module, self.rule = taps, path, module, rule
        own = dict(module.named_parameters(recurse=False))
        self.owned = list(own)
        self.names = [taps.canonical[id(p)] for p in own.values()]
        self.rows = {name: p.shape[0] if p.ndim else 1 for name, p in own.items()}
        self.shared = any(taps.uses[name] > 1 for name in self.names)
        # A layer of the user's may save its own output; an alias would hide a change in place.
        self.saves_no_output = type(module).__module__.startswith("torch.nn.")
        self.reason: str | None = None  # why this layer is left out of the present measurement
        self.half = False
        self.last_call = -1
        self._seen_apart = False  # the batch axis was once of another size than any other
        self._irregular = False  # its last rows had nothing to do with the batch
        p = next(iter(own.values()))
        size = 1 + len(taps.methods) * len(own) + sum(self.rows.values())
        self.probe = torch.zeros(size, dtype=_wide(p), device=p.device, requires_grad=True)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Tensor | None:
        """The tapped output, or None to leave the layer's output alone."""
        if module is not self.module or not torch.is_grad_enabled():
            return None
        # What is saved inside a checkpoint must be the same when it is computed again, whatever
        # has become known or been switched in between: there a tap is always set.
        always = _in_checkpoint()
        if not (always or self.taps.wanted or self.taps.active):
            return None
        if not any(p.requires_grad for p in module.parameters(recurse=False)):
            return None
        if not isinstance(output, Tensor):
            self.reason = f"{self.path}: output is a {type(output).__name__}, expected one tensor"
            return None
        if is_transformed():
            return None
        x = _tensors(module, args, kwargs)
        layout = self.taps.guarded(self._layout, x, output)
        if layout is None and not always:
            return None
        return _Tap.apply(output, self.probe, self, layout, *x)  # type: ignore[no-any-return]

    def __reduce__(self) -> tuple[Any, ...]:
        return Inert, ()

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The layer's parameters under their names in the model."""
        for own, name in self.pairs():
            if isinstance(p := getattr(self.module, own, None), nn.Parameter):
                yield name, p

    def pairs(self) -> Iterator[tuple[str, str]]:
        """The layer's own names of its parameters, each with the name in the model."""
        return zip(self.owned, self.names, strict=True)

    # How the call's rows belong to examples.

    def _layout(self, x: tuple[Tensor, ...], output: Tensor) -> Layout | None:
        """None, with the reason kept, where it is not known for sure."""
        taps = self.taps
        taps.notice_layer(output)
        if not taps.active:
            return None
        found = self._rows(x, output) if self._joinable() else None
        if found is None:
            return None
        self.half = output.dtype in (torch.float16, torch.bfloat16)
        return found

    def _rows(self, x: tuple[Tensor, ...], output: Tensor) -> Layout | None:
        taps, sizes = self.taps, tuple(output.shape)
        batch, dim = taps.batch, taps.batch_dim
        serial = 0 if torch.compiler.is_compiling() else taps.serial
        if batch is None or not batch or len(sizes) <= dim or not x:
            self.reason = f"{self.path}: output has shape {list(sizes)}, without an example"
            return None
        if sizes[dim] == batch:
            if why := self._doubt(x[0], batch):
                self.reason = f"{self.path}: {why}"
                return None
            if len(sizes) == 3 and not isinstance(self.module, BATCH_FIRST):
                taps.note_sizes(sizes[1 - dim : 2 - dim])
            return Layout(batch, dim, serial=serial)
        rows = sizes[0] // batch
        order = taps.flattened.get(rows, _flattened(x[0], batch, rows))
        if rows > 1 and rows * batch == sizes[0] and order is not None:
            taps.flattened[rows] = order
            return Layout(batch, order, rows, serial)
        self._irregular = self._irregular or not in_backward()
        self.reason = (
            f"{self.path}: output has shape {list(sizes)}, expected {batch} examples on axis "
            f"{dim}; its batch axis is lost (summed, or merged with another in an unknown order)"
        )
        return None

    def _doubt(self, x: Tensor, batch: int) -> str | None:
        """Why an axis of the batch's size may yet not be that of the batch."""
        if self._irregular:  # an expert that by chance was sent as many rows as there are examples
            self._irregular = in_backward()
            return "its last input had another number of rows than the batch has examples"
        if any(x is t for t in self.taps.inputs) or isinstance(self.module, BATCH_FIRST):
            return None
        if isinstance(x, nn.Parameter) or any(x is b for b in self.taps.buffers):
            return "its input is a parameter or buffer, not data"
        if batch not in self.taps.inner:
            self._seen_apart = self._seen_apart or bool(self.taps.inner)
            index = not x.is_floating_point() and x.ndim == 1
            if not index or self._seen_apart:
                return None
            return (
                f"fed {batch} indices that are no input of the model: examples or positions? "
                "Expand positions to [batch, positions]"
            )
        if self._seen_apart:
            return None
        return (
            f"{batch} is both the batch size and another axis's: which are the examples? "
            "Use another (micro)batch size, if only once"
        )

    def _joinable(self) -> bool:
        """Notice a second call in one forward; whether this call's statistics can be had."""
        if torch.compiler.is_compiling():
            if self.shared:
                self.reason = (
                    f"{self.path}: its parameters are used more than once, and in a compiled model "
                    "the uses cannot be joined"
                )
            return not self.shared
        if in_backward():  # a checkpoint computes again: that is not another use
            return True
        if self.last_call == self.taps.serial and not self.taps.rooted:
            self.reason = (
                f"{self.path}: called twice before a backward, without a call of its model: one "
                "batch or two? Let the loss call the attached model itself"
            )
            return False
        if self.last_call == self.taps.serial and not self.shared:
            self.shared = True
            self.reason = f"{self.path}: called twice in one forward; joined from the next step on"
        self.last_call = self.taps.serial
        return True

    # What a backward brings.

    def statistics(self, ctx: Any, dy: Tensor, layout: Layout) -> Tensor:
        """The probe's gradient: see the class."""
        if torch.compiler.is_compiling():
            return self._statistics(ctx.saved_tensors, dy, layout)
        task = torch._C._current_graph_task_id()
        self.taps.fired.add((task, layout.serial, layout.batch))
        try:
            return self._statistics(ctx.saved_tensors, dy, layout)
        except Exception as error:
            if self.taps.strict:
                raise
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
        for own, name in self.pairs():
            along = mine[own].sum_along(self.taps.directions[name]) if own in mine else None
            pieces.append(like.new_zeros(self.rows[own]) if along is None else along)
        return torch.cat([piece.to(like.dtype) for piece in pieces])


class Taps:
    """All taps on a model: which layers have one, and what one forward pass tells them.

    Args:
        model: its layers with a rule are tapped; nothing is kept on it but hooks, which `remove`
            takes away.
        methods: name -> squared norms of a form.
        batch_dim: axis of the examples in the input and output of every layer.
        weigh: gives the weights [B] of the examples from the arguments of the model's forward.
        strict: raise what goes wrong instead of leaving the layer out.
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
        if lazy := [n for n, p in model.named_parameters() if nn.parameter.is_lazy(p)]:
            raise ValueError(
                f"{lazy[0]} has no shape yet: call the model once before attach, so that its lazy "
                "layers are initialised"
            )
        self.canonical = {id(p): name for name, p in model.named_parameters()}
        self.uses = Counter(
            self.canonical[id(p)]
            for module in model.modules()
            for p in module._parameters.values()
            if p is not None
        )
        self.buffers = list(model.buffers())
        self.untapped: dict[str, str] = {}  # parameter -> why no rule gives its gradient
        self.wanted = self.active = False
        self.rooted = True  # the model's own forward is called, not only its layers'
        self.layers: list[LayerTap] = []
        self._hooks = [
            model.register_forward_pre_hook(
                Announce(model, partial(self.guarded, self.begin)), with_kwargs=True, prepend=True
            )
        ]
        for path, module in model.named_modules():
            self._tap(path, module)
        generator = torch.Generator().manual_seed(0)  # training's stream stays untouched
        self.directions = {
            name: _signs(p, generator) for tap in self.layers for name, p in tap.parameters()
        }
        self.forwards = 0  # since the last backward
        self.serial = 0  # of the present forward, eager only
        self.inputs: list[Tensor] = []
        self.clear()

    def _tap(self, path: str, module: nn.Module) -> None:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            self._hooks.append(module.register_forward_hook(_Coupled(self, path)))
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
        self.clear()
        for hook in self._hooks:
            hook.remove()

    def want(self, measure: bool) -> None:
        """Statistics from the next forward of the model on, or none."""
        self.wanted = measure
        if not self.rooted:
            self.active = measure

    def ready(self, fired: Callable[[Tensor], None]) -> None:
        """Have `fired` called whenever a probe receives its gradient."""
        for tap in self.layers:
            tap.probe.register_post_accumulate_grad_hook(fired)

    def clear(self) -> None:
        """Forget everything learnt since the last optimizer step."""
        self.end_pass()
        # Forms of shared parameters, a dict a use, each with the backward that it came from.
        self.deferred: list[tuple[int, dict[str, Form]]] = []
        self.fired: set[tuple[int, int, int]] = set()  # backward, forward, batch
        self.coupled: str | None = None  # why examples are not independent
        self.fault: str | None = None
        for tap in self.layers:
            tap.reason, tap.probe.grad = None, None

    def end_pass(self) -> None:
        """The batch has had its backward; the next forward begins another."""
        self.forwards = 0
        self.stale = True
        self.weights: Tensor | None = None

    def guarded(self, fn: Callable[..., Any], *args: Any) -> Any:
        """`fn(*args)`; a failure is kept as the fault of this measurement, and None comes back."""
        if torch.compiler.is_compiling() or self.strict:
            return fn(*args)
        try:
            return fn(*args)
        except Exception as error:
            self.fault = f"{type(error).__name__}: {error}"
            return None

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Learn the batch from the arguments of the model's forward."""
        self.active, self.rooted = self.wanted, True
        if not self.wanted:
            return
        found = read_batch(args, kwargs, self.batch_dim)
        self.inputs, self.tokens = found.inputs, found.tokens
        self._begin_pass(found.size)
        for t in found.carriers:
            sequence = t.ndim in (3, 5) if t.is_floating_point() else t.ndim == 2
            if sequence and t.shape[self.batch_dim] == self.batch:
                self.note_sizes(t.shape[1 - self.batch_dim : 2 - self.batch_dim])
        if self.weigh is not None:
            self.weights = torch.as_tensor(self.weigh(*args, **kwargs))

    def notice_layer(self, output: Tensor) -> None:
        """A layer was called; where no forward of the model announced it, begin with its batch."""
        compiling = torch.compiler.is_compiling()
        if self.wanted and self.stale and (compiling or not in_backward()):
            self.active, self.rooted, self.inputs, self.tokens = True, False, [], None
            self._begin_pass(output.shape[self.batch_dim] if output.ndim > self.batch_dim else None)
        elif self.batch is None and output.ndim > self.batch_dim:
            self.batch = output.shape[self.batch_dim]

    def _begin_pass(self, batch: int | None) -> None:
        self.stale = False
        self.batch = batch
        self.inner: tuple[int, ...] = ()  # sizes seen behind the batch: positions, features
        self.flattened: dict[int, int] = {}  # positions of [batch * positions, ...] -> batch axis
        self.forwards += 1
        if not torch.compiler.is_compiling():
            self.serial += 1

    def note_sizes(self, sizes: Sequence[int]) -> None:
        """Remember sizes of axes that are not the batch's."""
        for size in sizes:
            if size not in self.inner:
                self.inner = (*self.inner, size)


class _Coupled:
    """The hook on a layer that may normalise by the batch."""

    def __init__(self, taps: Taps, path: str):
        self.taps, self.path = taps, path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.taps.active and torch.is_grad_enabled() and (why := coupling(module)):
            self.taps.coupled = f"{self.path}: {why}"

    def __reduce__(self) -> tuple[Any, ...]:
        return Inert, ()


def _in_checkpoint() -> bool:
    """Whether a non-reentrant activation checkpoint is being computed, or computed again."""
    if torch.compiler.is_compiling():
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def _flattened(x: Tensor, batch: int, rows: int) -> int | None:
    """The batch's axis, 0 or 1, in the tensor of which x is a view with its first two axes merged.

    None where that cannot be seen: the order of the rows is then anybody's guess.
    """
    if torch.compiler.is_compiling() or rows == batch:
        return None
    sizes = getattr(x.grad_fn, "_saved_self_sym_sizes", None)  # of a view's argument
    if sizes is None and x._base is not None and x.is_contiguous() and x._base.is_contiguous():
        sizes = x._base.shape
    axes = {(batch, rows): 0, (rows, batch): 1}
    return None if sizes is None else axes.get(tuple(sizes[:2]))


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


def _wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _signs(p: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs [elements behind the first axis of p]."""
    bits = torch.randint(0, 2, (prod(p.shape[1:]),), generator=generator)
    return (2 * bits - 1).to(p.device, _wide(p))
