"""Taps: squared norms of per-example gradients, leaving backward as the gradient of a leaf."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from gnsmon.norms import fused, links, plans
from gnsmon.norms.contractions import wider
from gnsmon.norms.directions import Direction, look_elsewhere, share_memory
from gnsmon.norms.forms import Dense, Form
from gnsmon.norms.inputs import (
    Announce,
    Inert,
    given_on,
    in_backward,
    is_transformed,
    read_batch,
    without_autocast,
    without_gradients,
)
from gnsmon.norms.layout import (
    BATCH_FIRST,
    TOLD_BATCH_FIRST,
    Layout,
    flattened_from,
    leading,
)
from gnsmon.norms.metric import Factored
from gnsmon.norms.plans import Plan
from gnsmon.norms.replay import (
    Call,
    bypasses,
    examples_at_a_time,
    recorded,
    refuse_replay,
    replay,
)
from gnsmon.norms.rules import coupling, find_backward, find_each, find_rule, refusal
from gnsmon.norms.sketch import SUBSPACE, Sketch
from gnsmon.norms.ways import WAYS, Help

ABSENT = float("-inf")  # in place of a sum of squares: the rule gave no gradient


class Fill(NamedTuple):
    """A piece of a vector that is known without the device: `length` times `value`."""

    value: float
    length: int

    def on(self, like: Tensor) -> Tensor:
        """The piece as a tensor."""
        return like.new_full((self.length,), float(self.value))


class Brought(NamedTuple):
    """What a tap brings in a backward of an eager model."""

    task: int  # the backward
    tap: LayerTap
    pieces: list[Tensor | Fill]  # of its vector


class Each(NamedTuple):
    """The squared norms of each example's gradient of one parameter, in a backward."""

    task: int  # the backward
    name: str  # of the parameter
    sq_norms: Tensor  # [B], or of some of them in their order


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
        return given_on(y, alias=tap.saves_no_output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        statistics = None
        if dy is not None and ctx.layout is not None:
            with without_gradients(), without_autocast(dy.device):
                statistics = ctx.tap.statistics(ctx, dy, ctx.layout)
        return dy, statistics, *(None,) * (len(ctx.needs_input_grad) - 2)


class LayerTap:
    """A forward hook on one layer; owns the probe that carries the layer's statistics out.

    Without a rule, the layer is replayed.

    What leaves is one vector: the number of examples; for each of the layer's parameters what each
    of `Taps.ways` gives, `ABSENT` where the rule gives nothing; each parameter's `Form.sum_along`,
    to be compared with `.grad`; and, as `links` tells them apart, the number of compiled uses and
    for each parameter that of the links received. In a compiled graph it is the probe's gradient;
    an eager model's is kept in `Taps.brought`, and `pulse` tells that a backward came by.
    """

    def __init__(
        self, taps: Taps, path: str, module: nn.Module, rule: Callable[..., dict[str, Form]] | None
    ):
        self.taps, self.path, self.module, self.rule = taps, path, module, rule
        own = dict(module.named_parameters(recurse=rule is None))
        self.owned = list(own)
        self.names = [taps.canonical[id(p)] for p in own.values()]
        # By the layer's own names: a name of the model's would compile each block anew.
        self.directions = {name: Direction(p, taps.generator) for name, p in own.items()}
        self.sketches = {
            name: taps.sketches[at]
            for name, at in zip(own, self.names, strict=True)
            if at in taps.sketches
        }
        self.metrics = {
            name: taps.metrics[at]
            for name, at in zip(own, self.names, strict=True)
            if at in taps.metrics
        }
        self.ways: tuple[str, ...] = ()  # that the present step asks of this layer
        self.shared = False  # whether a parameter is used more than once
        self.backward = find_backward(module) if taps.engine != "hooks" else None
        self.each = find_each(module)
        self.may_couple = isinstance(module, nn.modules.batchnorm._BatchNorm)
        # Of inputs of some shape, whether the backward was taken over: see `_takes_over`.
        self._taken: dict[tuple[Any, ...], bool] = {}
        # A layer of the user's, or cuDNN's LSTM, may save its own output; an alias would hide a
        # change in place.
        self.saves_no_output = rule is not None and type(module).__module__.startswith("torch.nn.")
        self.reason: str | None = None  # why this layer is left out of the present measurement
        self.half = False
        self.last_call = -1
        self._seen_apart = False  # the batch axis was once of another size than any other
        self._irregular = False  # its last rows had nothing to do with the batch
        self.rows = {name: direction.count for name, direction in self.directions.items()}
        self.places = list(self._places(taps.slots))
        p = next(iter(own.values()))
        size = 2 + (1 + taps.slots) * len(own) + sum(self.rows.values())
        # A sketch's variance is of fourth powers, which leave the range of float32.
        self.probe = torch.zeros(size, dtype=torch.float64, device=p.device, requires_grad=True)
        self.pulse = torch.zeros((), device=p.device, requires_grad=True)
        self._nothing = torch.zeros_like(self.pulse)  # its gradient

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """The tapped output, or None to leave the layer's output alone."""
        if module is not self.module or not torch.is_grad_enabled():
            return None
        # What is saved inside a checkpoint must be the same when it is computed again, whatever
        # has become known or been switched in between: there a tap is always set.
        always = _in_checkpoint()
        if not (always or self.ways and (self.taps.wanted or self.taps.active)):
            return None
        own = module.parameters() if self.rule is None else module._parameters.values()
        if not any(p is not None and p.requires_grad for p in own):
            return None
        if is_transformed() or self.may_couple and coupling(module):
            return None
        at, y = self._tapped(output)
        if y is None:
            return None
        call, x = None, _tensors(module, args, kwargs)
        if self.rule is None:
            if torch.compiler.is_compiling():
                return None  # a layer without a rule is not replayed in a compiled graph
            try:
                call, x = recorded(args, kwargs, at, y.device)
            except ValueError as error:
                self._leave_out(str(error))
                return None
        layout = self.taps.guarded(self._layout, x, y) if self.ways else None
        if layout is None and not always:
            return None
        if layout is not None and call is not None:
            layout = layout._replace(call=call)
        if layout is not None and links.possible(self):
            y = links.tapped(self, y, layout, x)
        elif self._takes_over(x, y, layout):
            y = fused.tapped(self, y, layout, *x)
        else:
            y = _Tap.apply(y, self.leaf, self, layout, *x)
        return y if at is None else type(output)((*output[:at], y, *output[at + 1 :]))

    def _takes_over(self, x: tuple[Tensor, ...], y: Tensor, layout: Layout | None) -> bool:
        """Whether this call's backward is to be ours: once it was for some shapes, always."""
        compiling = torch.compiler.is_compiling()
        if self.backward is None or not x:
            return False
        shapes = x[0].shape, y.shape, y.dtype
        if not compiling and self._taken.get(shapes) is False or not fused.able(self, x):
            return False
        if compiling:
            return self.each is None and layout is not None and self._pays(x, y, layout)
        # What it has saved must not be asked for where hooks took it: it may not be computed yet.
        each = self.each
        if each and (each.read and _saving() is not None or not each.able(*x, y)):
            return False
        if shapes not in self._taken:
            # Known inside a checkpoint only when it is computed again, it would save other tensors.
            if in_backward() or not self.ways:
                return False
            # What a selective checkpoint keeps is told apart by its order: the clock is no part.
            with _disable_current_modes():
                pays = layout is not None and self.taps.guarded(self._pays, x, y, layout)
            self._taken[shapes] = bool(pays)
        return self._taken[shapes]

    def _pays(self, x: tuple[Tensor, ...], y: Tensor, layout: Layout) -> bool:
        """Whether the layer's own gradients come cheaper with its statistics than beside them."""
        compiling, forced = torch.compiler.is_compiling(), self.taps.engine == "fused"
        if self.shared:
            return False
        if self.each is not None:
            if layout.rows_per_example > 1 or layout.batch_dim > 0:
                return False
            return forced or self.each.pays(*x)
        with torch.no_grad(), without_autocast(y.device):
            form = self.forms(x, y.detach(), layout)["weight"]
            if layout.rows_per_example > 1:
                form = form.regroup(layout.batch)
            if not forced and form.batch * form.sum_work < plans.SMALL:
                return False  # nothing to gain, and the gradients stay bitwise as they are
            if compiling or forced:
                return True
            if self._wants_exact:
                plans.tune(form)
            # A backward of ours costs Python; without a plan for the sum all it saves is the proof.
            return self._plan(form) is not None or x[0].numel() + y.numel() >= plans.WORTH_KNOWING

    def _plan(self, form: Form) -> Plan | None:
        """The plan by which the weight's exact norms come with the sum of the gradients, if any."""
        sketch = self.sketches.get("weight") if "exact" not in self.ways else None
        if not self._wants_exact or sketch is not None and sketch.wanted(form, fused=True):
            return None
        if self.taps.engine == "fused":
            return next((plan for plan in form.plans.values() if plan.fused), None)
        plan = plans.chosen(form, fusable=True)
        return plan if plan.fused else None

    def _tapped(self, output: Any) -> tuple[int | None, Tensor | None]:
        """The output tensor that is tapped, and where it is among several."""
        if isinstance(output, Tensor):
            return None, output
        several = self.rule is None and type(output) in (tuple, list)
        for i, t in enumerate(output if several else ()):
            if isinstance(t, Tensor) and t.requires_grad:
                return i, t
        self._leave_out(f"output is a {type(output).__name__}, expected one tensor")
        return None, None

    def __reduce__(self) -> tuple[Any, ...]:
        return Inert, ()

    @property
    def _wants_exact(self) -> bool:
        """Whether exact norms are of use in the present step; a sketch takes them, too."""
        return "exact" in self.ways or "sketch" in self.ways

    @property
    def leaf(self) -> Tensor:
        """What this call's tap gives its gradient to."""
        return self.probe if torch.compiler.is_compiling() else self.pulse

    def _places(self, slots: int) -> Iterator[tuple[str, slice, slice]]:
        """Where in the vector are each parameter's sums, and its proof; by name in the model."""
        start, first = 1, 1 + slots * len(self.owned)
        for own, name in self.pairs():
            yield name, slice(start, start + slots), slice(first, first + self.rows[own])
            start, first = start + slots, first + self.rows[own]

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
        if torch.compiler.is_compiling():
            return self._compiled_rows(x, output)
        if output.dtype in (torch.float16, torch.bfloat16):
            self.half = True
        return self._rows(x, output) if self._joinable() else None

    def _leave_out(self, why: str) -> None:
        # A compiled checkpoint forbids to change anything; its parameters are named all the same.
        if not torch.compiler.is_compiling():
            self.reason = f"{self.path}: {why}"

    def _compiled_rows(self, x: tuple[Tensor, ...], output: Tensor) -> Layout | None:
        """As `_rows`, from this call alone: what it remembered would be a guard of the graph."""
        taps = self.taps
        if output.ndim <= taps.batch_dim:
            return None
        if taps.square and not isinstance(self.module, BATCH_FIRST):
            return None
        # Sizes of tensors stay symbols; a number that was kept would be a guard.
        batch = output.shape[taps.batch_dim]
        if taps.inputs and batch != taps.inputs[0].shape[taps.batch_dim]:
            return None
        square = output.ndim > 2 and output.shape[0] == output.shape[1]
        index = x[0].ndim == 1 and not x[0].is_floating_point()
        doubtful = square or index and not any(x[0] is t for t in taps.inputs)
        if isinstance(x[0], nn.Parameter) or doubtful and not isinstance(self.module, BATCH_FIRST):
            return None
        return Layout(batch, taps.batch_dim)

    def _rows(self, x: tuple[Tensor, ...], output: Tensor) -> Layout | None:
        taps, sizes = self.taps, tuple(output.shape)
        batch, dim, serial = taps.batch, self._batch_dim(), taps.serial
        if not batch or len(sizes) <= dim or not x:
            self._leave_out(f"output has shape {list(sizes)}, without an example")
            return None
        if sizes[dim] == batch:
            if len(sizes) == 3 and not isinstance(self.module, BATCH_FIRST):
                taps.note_sizes(sizes[1 - dim : 2 - dim])
            if batch > 1 and (why := self._doubt(x[0], batch)):
                self._leave_out(why)
                return None
            return Layout(batch, dim, serial=serial)
        rows = sizes[0] // batch
        if rows * batch == sizes[0] and (order := taps.order(x[0], rows)) is not None:
            return Layout(batch, order, rows, serial)
        self._irregular = self._irregular or not in_backward()
        if sizes[dim] == 1:
            self._leave_out(
                f"output has shape {list(sizes)}, one for all {batch} examples, so its gradient "
                "comes already summed over them; give it a batch axis, as by "
                f"positions.expand({batch}, -1)"
            )
            return None
        self._leave_out(
            f"output has shape {list(sizes)}, expected {batch} examples on axis {dim}; its batch "
            "axis is lost (summed, or merged with another in an unknown order)"
        )
        return None

    def _batch_dim(self) -> int:
        told = isinstance(self.module, TOLD_BATCH_FIRST)
        return int(not self.module.batch_first) if told else self.taps.batch_dim

    def _doubt(self, x: Tensor, batch: int) -> str | None:
        """Why an axis of the batch's size may yet not be that of the batch."""
        if self._irregular:  # an expert that by chance was sent as many rows as there are examples
            self._irregular = in_backward()
            return "its last input had another number of rows than the batch has examples"
        if any(x is t for t in self.taps.inputs) or isinstance(self.module, BATCH_FIRST):
            return None
        if isinstance(self.module, TOLD_BATCH_FIRST):
            return None if x.ndim == 3 else "its input has no batch axis"
        if isinstance(x, nn.Parameter) or self.taps.is_buffer(x):
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
        if in_backward():  # a checkpoint computes again: that is not another use
            return True
        if self.last_call == self.taps.serial and not self.taps.rooted:
            self._leave_out(
                "called twice before a backward, without a call of its model: one batch or two? "
                "Let the loss call the attached model itself"
            )
            return False
        if self.last_call == self.taps.serial and not self.shared:
            self.shared = True
            self._leave_out("called twice in one forward; joined from the next step on")
        self.last_call = self.taps.serial
        return True

    # What a backward brings.

    def statistics(
        self, ctx: Any, dy: Tensor, layout: Layout, taken: fused.Taken | None = None
    ) -> Tensor | None:
        """The gradient of `leaf`: see the class; None where a backward has already been heard of.

        With `taken`, the gradients of the layer that come with it are put there.
        """
        if torch.compiler.is_compiling():
            return self.vector(self._forms_of(ctx, dy, layout, taken), layout, taken)
        taps, task = self.taps, torch._C._current_graph_task_id()
        taps.fired.add((task, layout.serial, layout.batch))
        try:
            taps.brought.append(Brought(task, self, self._statistics(ctx, dy, layout, taken)))
        except Exception as error:
            if taps.strict and self.rule is not None:
                raise
            what = "its rule" if self.rule is not None else "without a rule, and replaying it"
            self._leave_out(f"{what} failed: {type(error).__name__}: {error}")
        # A gradient would be cloned; autograd tells of its absence all the same (torch 2.13).
        return None if task in taps.heard else self._nothing

    def _statistics(
        self, ctx: Any, dy: Tensor, layout: Layout, taken: fused.Taken | None
    ) -> list[Tensor | Fill]:
        if layout.call is not None:
            return self._replayed(layout.call, ctx.saved_tensors, dy, layout)
        return self._pieces(self._forms_of(ctx, dy, layout, taken), layout, taken)

    def _forms_of(
        self, ctx: Any, dy: Tensor, layout: Layout, taken: fused.Taken | None
    ) -> dict[str, Form]:
        if taken is None:
            return self.forms(ctx.saved_tensors, dy, layout)
        if self.each is None:
            return self.forms((taken.x,), dy, layout)
        own = self.each.backward(self.module, taken.x, dy, taken.weight, *taken.normed)
        taken.gradients["input"], gradients = own
        return {name: Dense(gradient) for name, gradient in gradients.items()}

    def forms(self, x: Sequence[Tensor], dy: Tensor, layout: Layout) -> dict[str, Form]:
        """What the layer's rule gives, by the layer's own names."""
        assert self.rule is not None
        inputs = [layout.batch_first(t) if t.ndim else t for t in x]
        return self.rule(
            self.module, inputs[0] if len(inputs) == 1 else tuple(inputs), layout.batch_first(dy)
        )

    def _replayed(
        self, call: Call, x: Sequence[Tensor], dy: Tensor, layout: Layout
    ) -> list[Tensor | Fill]:
        """The statistics, which are sums over the examples, of a few examples at a time."""
        rows = layout.rows_per_example
        axis = layout.batch_dim if rows == 1 else 0
        axes = [self._axis(t, axis, layout, first=i == 0) for i, t in enumerate(x)]
        chunk = None if self.shared else rows * max(1, examples_at_a_time(self.module) // rows)
        x = [leading(t, at, layout) for t, at in zip(x, axes, strict=True)]
        dy = leading(dy, axis, layout)
        total = torch.zeros_like(self.probe)
        for forms in replay(self.module, call, x, axes, dy, axis, chunk=chunk):
            count = next(len(form.grad) for form in forms.values()) // rows
            total += self.vector(forms, layout._replace(batch=count))
        return [total]

    def _axis(self, t: Tensor, axis: int, layout: Layout, *, first: bool) -> int | None:
        """Where a layer's input has the examples; None for what they have in common."""
        if isinstance(self.module, nn.RNNBase) and not first:
            return 1  # a state, whatever batch_first says
        rows = layout.batch * layout.rows_per_example
        return next((a for a in (axis, 0) if t.ndim > a and t.shape[a] == rows), None)

    def vector(
        self, forms: Mapping[str, Form], layout: Layout, taken: fused.Taken | None = None
    ) -> Tensor:
        """The vector of the class's docstring."""
        like, pieces = self.probe, self._pieces(forms, layout, taken)
        filled = [p.on(like) if isinstance(p, Fill) else p.to(like.dtype) for p in pieces]
        return torch.cat([piece.reshape(-1) for piece in filled])

    def _pieces(
        self, forms: Mapping[str, Form], layout: Layout, taken: fused.Taken | None = None
    ) -> list[Tensor | Fill]:
        """The vector of the class's docstring, before it is put together."""
        if layout.rows_per_example > 1:
            forms = {name: form.regroup(layout.batch) for name, form in forms.items()}
        compiled = torch.compiler.is_compiling()
        deferred = self.shared and not compiled
        if deferred:
            uses = {name: forms[own] for own, name in self.pairs() if own in forms}
            self.taps.deferred.append((torch._C._current_graph_task_id(), uses))
        mine = {} if deferred else forms
        known = {} if deferred or taken is None else self._take(forms, taken)
        sums = {} if taken is None else taken.gradients
        pieces: list[Tensor | Fill] = [Fill(layout.batch, 1)]
        each = known
        if self.taps.wants_each and "exact" in self.ways and not compiled:
            each = self._each(mine, known)
        for own in self.owned:
            for name in self.taps.ways:
                way, asked = WAYS[name], name in self.ways
                if asked and own in mine:
                    given = Help(self.sketches.get(own), self.metrics.get(own))
                    norms = each if name == "exact" else known
                    pieces.append(way.sums(mine[own], given, norms.get(own)))
                else:
                    pieces.append(Fill(ABSENT if asked and not deferred else 0.0, way.width))
        for own in self.owned:
            if own not in mine:
                pieces.append(Fill(0.0, self.rows[own]))
            elif own in sums:
                pieces.append(self.directions[own].along(sums[own])[1])
            else:
                pieces.append(self.directions[own].along_sum(mine[own]))
        return [*pieces, Fill(float(compiled), 1), Fill(0.0, len(self.owned))]

    def _each(self, forms: Mapping[str, Form], known: dict[str, Tensor]) -> dict[str, Tensor]:
        """The exact norms [B] of the parameters, kept in `Taps.each`, less those not to be added.

        Their sum is made another way, and is to be the same to the last bit with or without these.
        """
        norms = {own: known[own] if own in known else f.sq_norms() for own, f in forms.items()}
        task = torch._C._current_graph_task_id()
        name = dict(self.pairs())
        self.taps.each.extend(Each(task, name[own], norms[own]) for own in norms)
        return {own: norms[own] for own, form in forms.items() if own in known or form.adds_norms}

    def _take(self, forms: Mapping[str, Form], taken: fused.Taken) -> dict[str, Tensor]:
        """Put the layer's gradients into `taken`; the exact norms [B] that came with them."""
        known, sums = {}, taken.gradients
        for own, form in forms.items():
            if self.each is not None or own != "weight":
                sums[own] = form.sum()
            elif plan := self._plan(form):
                sums[own], known[own] = plan.fused(form)
            else:
                sums[own] = taken.product()
        return known


class Taps:
    """All taps on a model: which layers have one, and what one forward pass tells them.

    Args:
        model: its layers with a rule are tapped; nothing is kept on it but hooks, which `remove`
            takes away.
        ways: of `WAYS`, those that a step may ask for.
        batch_dim: axis of the examples in the input and output of every layer.
        weigh: gives the weights [B] of the examples from the arguments of the model's forward.
        strict: raise what goes wrong instead of leaving the layer out.
        subspace, probes: see `Sketch`.
        engine: "auto", "fused" or "hooks": see `MonitorConfig`.
        seed: of the probes' random stream.
        wants_each: keep the exact norms of each example too, of an eager model.
        metrics: of each parameter, for the way "factored".
    """

    def __init__(
        self,
        model: nn.Module,
        ways: Sequence[str],
        *,
        batch_dim: int = 0,
        weigh: Callable[..., Tensor] | None = None,
        strict: bool = False,
        subspace: int = SUBSPACE,
        probes: int = 1,
        engine: str = "hooks",
        seed: int = 0,
        wants_each: bool = False,
        metrics: Mapping[str, Factored] | None = None,
    ):
        self.engine, self.wants_each, self.metrics = engine, wants_each, dict(metrics or {})
        self.model, self.ways, self.batch_dim = model, tuple(ways), batch_dim
        self.slots = sum(WAYS[way].width for way in ways)
        self.weigh, self.strict = weigh, strict
        self.tracing = links.tracer(model)
        if lazy := [n for n, p in model.named_parameters() if nn.parameter.is_lazy(p)]:
            raise ValueError(
                f"{lazy[0]} has no shape yet: call the model once before attach, so that its lazy "
                "layers are initialised"
            )
        self.canonical = {id(p): name for name, p in model.named_parameters()}
        self.generator = torch.Generator().manual_seed(0)  # training's stream stays untouched
        self.sketches = {
            name: Sketch(
                tuple(p.shape),
                wider(p.dtype),
                p.device,
                generator=self.generator,
                seed=seed * len(self.canonical) + i,  # of 32 bits, more are not looked at (CPU)
                subspace=subspace,
                probes=probes,
            )
            for i, (name, p) in enumerate(model.named_parameters())
            if "sketch" in ways and p.ndim > 1
        }
        self.untapped: dict[str, str] = {}  # parameter -> why no rule gives its gradient
        self.wanted = self.active = False
        self.rooted = True  # the model's own forward is called, not only its layers'
        self.layers: list[LayerTap] = []
        self._hooks = [
            model.register_forward_pre_hook(
                Announce(model, partial(self.guarded, self.begin)), with_kwargs=True, prepend=True
            )
        ]
        self._bypassed: set[int] = set()  # layers whose parameters another's tap looks after
        for path, module in model.named_modules():
            self._tap(path, module)
        self.uses = Counter(name for tap in self.layers for name in tap.names)
        for tap in self.layers:
            tap.shared = any(self.uses[name] > 1 for name in tap.names)
            for name in tap.names:
                # Held by a module without a tap too, as a masked language model's head does; the
                # proof against .grad shows whether that one uses it.
                self.untapped.pop(name, None)
        self.directions = {
            name: tap.directions[own] for tap in self.layers for own, name in tap.pairs()
        }
        for tap in self.layers:  # the uses of one parameter along one direction
            tap.directions = {own: self.directions[name] for own, name in tap.pairs()}
        self._chance = Random(0)  # the same on all ranks
        by_device: dict[torch.device, list[Direction]] = {}
        for direction in self.directions.values():
            if direction.blocks > 1:
                by_device.setdefault(direction.signs.device, []).append(direction)
        self._sampled = [(some, share_memory(some)) for some in by_device.values()]
        self.forwards = 0  # since the last backward
        self.serial = 0  # of the present forward, eager only
        self.square = False  # the batch is as large as another axis of the input
        self.half = False  # the forward was under autocast
        self.clear()

    def _tap(self, path: str, module: nn.Module) -> None:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            self._hooks.append(module.register_forward_hook(_Coupled(self, path)))
        own = dict(module.named_parameters(recurse=False))
        if not own or id(module) in self._bypassed:
            return
        rule, kind = find_rule(module), type(module).__name__
        why = refusal(module) or (refuse_replay(module) if rule is None else None)
        if why is not None:
            self.untapped |= {self.canonical[id(p)]: f"{path or kind}: {why}" for p in own.values()}
            return
        if rule is None and bypasses(module):
            self._bypassed |= {id(child) for child in module.modules()}
        tap = LayerTap(self, path or kind, module, rule)
        self.layers.append(tap)
        self._hooks.append(module.register_forward_hook(tap, with_kwargs=True, prepend=True))

    def remove(self) -> None:
        """Leave the model as it was."""
        self.wanted = self.active = False
        self.clear()
        for hook in self._hooks:
            hook.remove()

    def want(self, measure: bool, ways: Callable[[LayerTap], tuple[str, ...]]) -> None:
        """Statistics from the next forward of the model on, of each layer its `ways`, or none."""
        self.wanted = measure
        if not self.rooted:
            self.active = measure
        for tap in self.layers:
            tap.ways = ways(tap) if measure else ()
        if measure:
            for directions, firsts in self._sampled:
                look_elsewhere(directions, firsts, self._chance)
        self.draw()

    def draw(self) -> None:
        """New probes for the next microbatch: errors of two that share them would add up."""
        if self.wanted and any("sketch" in tap.ways for tap in self.layers):
            for sketch in self.sketches.values():
                if sketch.used is not False:
                    sketch.draw()

    def ready(self, fired: Callable[[Tensor], None]) -> None:
        """Have `fired` called whenever a probe receives its gradient."""
        for tap in self.layers:
            tap.probe.register_post_accumulate_grad_hook(fired)
            tap.pulse.register_post_accumulate_grad_hook(fired)

    def clear(self) -> None:
        """Forget everything learnt since the last optimizer step."""
        self.end_pass()
        # Forms of shared parameters, a dict a use, each with the backward that it came from.
        self.deferred: list[tuple[int, dict[str, Form]]] = []
        self.brought: list[Brought] = []
        self.each: list[Each] = []
        self.fired: set[tuple[int, int, int]] = set()  # backward, forward, batch
        self.heard: set[int] = set()  # backwards of which a pulse has told
        self.coupled: str | None = None  # why examples are not independent
        self.fault: str | None = None
        for tap in self.layers:
            tap.reason = tap.probe.grad = tap.pulse.grad = None

    def end_pass(self) -> None:
        """The batch has had its backward; the next forward begins another."""
        self.forwards = 0
        self.stale = True
        self.links: dict[str, tuple[links.Use, ...]] = {}  # in the graph being compiled
        self.inputs: list[Tensor] = []
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
        self.links = {}
        found = read_batch(args, kwargs, self.batch_dim)
        self.inputs, self.tokens = found.carriers, found.tokens
        self._begin_pass(found.size)
        for t in found.carriers:
            sequence = t.ndim in (3, 5) if t.is_floating_point() else t.ndim == 2
            if sequence and t.shape[self.batch_dim] == self.batch:
                self.note_sizes(t.shape[1 - self.batch_dim : 2 - self.batch_dim])
        self.square = self.batch in self.inner
        self.half = any(torch.is_autocast_enabled(t.device.type) for t in self.inputs[:1])
        if self.weigh is not None:
            self.weights = torch.as_tensor(self.weigh(*args, **kwargs))

    def notice_layer(self, output: Tensor) -> None:
        """A layer was called; where no forward of the model announced it, begin with its batch."""
        compiling = torch.compiler.is_compiling()
        if self.wanted and self.stale and (compiling or not in_backward()):
            self.active, self.rooted, self.inputs, self.tokens = True, False, [], None
            self._begin_pass(output.shape[self.batch_dim] if output.ndim > self.batch_dim else None)
        elif not compiling and self.batch is None and output.ndim > self.batch_dim:
            self.batch = output.shape[self.batch_dim]

    def _begin_pass(self, batch: int | None) -> None:
        self.stale = False
        self.batch = batch
        self._buffers: set[int] | None = None  # of which objects, known when asked for
        self.inner: tuple[int, ...] = ()  # sizes seen behind the batch: positions, features
        self.forwards += 1
        if not torch.compiler.is_compiling():
            self.serial += 1
            self._orders: dict[int, int | None] = {}
            # What was not taken at the end of its backward was torch.autograd.grad's.
            self.deferred.clear()
            self.brought.clear()
            self.each.clear()
            self.fired.clear()
            self.heard.clear()

    def order(self, x: Tensor, rows: int) -> int | None:
        """The batch's axis, 0 or 1, in what x [batch * rows, ...] was flattened from, or None.

        Known where x is a view that shows it, or where all the views of so many rows showed one
        order before; a single example owns all rows.
        """
        if self.batch == 1:
            return 0
        seen = flattened_from(x, self.batch or 0, rows)
        known = self._orders.get(rows, seen)
        self._orders[rows] = known if seen is None or seen == known else None
        return known if seen is None else seen

    def is_buffer(self, x: Tensor) -> bool:
        """Whether it is one of the model's."""
        if self._buffers is None:
            self._buffers = {id(b) for b in self.model.buffers()}
        return id(x) in self._buffers

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
    hooks = None if torch.compiler.is_compiling() else _saving()
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def _saving() -> tuple[Callable[..., Any], ...] | None:
    """The hooks on tensors that are being saved for a backward."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)  # type: ignore[no-any-return]


def _tensors(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, ...]:
    """The tensors given to forward, in the order of its signature, each an object of its own."""
    if len(args) == 1 and not kwargs and type(args[0]) is Tensor:
        return args
    values = list(args)
    if kwargs:
        values += [kwargs[name] for name in _parameter_names(type(module)) if name in kwargs]
    tensors: list[Tensor] = []
    for v in values:
        if isinstance(v, Tensor):
            # A compiled graph refuses to be given one tensor twice (torch 2.13).
            tensors.append(v.detach() if any(v is other for other in tensors) else v)
    return tuple(tensors)


@lru_cache
def _parameter_names(kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)
