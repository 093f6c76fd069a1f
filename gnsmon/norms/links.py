"""The uses of one parameter in one compiled graph, joined by gradients that run between taps.

|F_u + F_w|^2 = |F_u|^2 + |F_w|^2 + 2 <F_u, F_w>, and the cross term is linear in dy_u, the gradient
at the output of the use u. Backward comes to the later use w first. So u has a link: zeros of its
output's shape. The tap of w takes it, and its backward returns as the link's gradient what dy_u is
to be multiplied by,

    P = d/d(dy_u) sum_b <F_u(dy_u)_b, F_w_b>,    sum_b <F_u, F_w>_b = <dy_u, P>,

by differentiating the rule of u. Autograd adds up what several later uses return. A second link, a
number whose gradient is one from each of them, counts: k uses of a parameter are joined if
k (k - 1) / 2 of them have arrived, and else the parameter is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from gnsmon.norms import rules
from gnsmon.norms.contractions import wide, wider
from gnsmon.norms.forms import Form, inner
from gnsmon.norms.inputs import without_autocast
from gnsmon.norms.layout import Layout
from gnsmon.norms.ways import WAYS

if TYPE_CHECKING:
    from gnsmon.norms.taps import LayerTap


class Use(NamedTuple):
    """A use of a parameter, as those that come later in the forward need it."""

    tap: LayerTap
    own: str  # the layer's name of the parameter
    layout: Layout
    x: tuple[Tensor, ...]
    links: tuple[Tensor, ...]  # the count's and the payload's


class _Earlier(NamedTuple):
    """An earlier use, its tensors given by their places among those of a later one."""

    own: str  # the later layer's name of the parameter
    tap: LayerTap
    own_earlier: str
    layout: Layout
    x: tuple[int, ...]
    links: tuple[int, ...]


class _Source(torch.autograd.Function):
    """Gives the links of one use; its backward brings the probe the cross terms.

    The first two outputs go to the use's own tap, which returns dy and a one for them. It is no
    part of the tap, and `like` is detached: where the layer's output is not used, what comes back
    from later uses must not reach the model, not even as a gradient of zeros in place of none.
    """

    @staticmethod
    def forward(
        ctx: Any, probe: Tensor, like: Tensor, tap: LayerTap, given: tuple[str, ...]
    ) -> tuple[Tensor, ...]:
        ctx.tap, ctx.given = tap, given
        zero = like.new_zeros((), dtype=wider(like.dtype))
        links: list[Tensor] = []
        for _ in given:
            links += [zero.clone(), zero.expand(like.shape)]
        return (zero.expand(like.shape), zero.clone(), *links)

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor, fired: Tensor, *received: Tensor
    ) -> tuple[Tensor | None, ...]:
        with torch.no_grad(), without_autocast(dy.device):
            return _crossed(ctx.tap, dy, fired, ctx.given, received), None, None, None


class _LinkedTap(torch.autograd.Function):
    """As `taps._Tap`, compiled, of a layer whose parameters may have other uses in the graph.

    `tensors` are what this call was given (`x`, their places), the two of its `_Source` if it has
    one, and links and inputs of the earlier uses; the compiler wants each but once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        probe: Tensor,
        tap: LayerTap,
        layout: Layout,
        x: tuple[int, ...],
        source: tuple[int, ...],
        earlier: tuple[_Earlier, ...],
        *tensors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.tap, ctx.layout = tap, layout
        ctx.x, ctx.source, ctx.earlier = x, source, earlier
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        tap, layout, tensors = ctx.tap, ctx.layout, ctx.saved_tensors
        with torch.no_grad(), without_autocast(dy.device):
            forms = tap.forms([tensors[i] for i in ctx.x], dy, layout)
            statistics = tap.vector(forms, layout)
            sent = _sent(tap, forms, ctx.earlier, tensors)
            if ctx.source:
                own_dy, fired = ctx.source
                sent[own_dy], sent[fired] = wide(dy), torch.ones_like(tensors[fired])
        return dy, statistics, *(None,) * 5, *sent


def possible(tap: LayerTap) -> bool:
    """Whether this call's parameters can be joined with their other uses.

    Only in the graph of the model's own forward, before which a hook clears `Taps.links`. What a
    checkpoint or another higher-order operator traces is a graph inside, from which nothing may be
    changed outside. A rule of the user's may detach what it is given; no proof would show the
    missing cross term.
    """
    taps = tap.taps
    if not torch.compiler.is_compiling() or not taps.rooted or not taps.tracing():
        return False
    return tap.shared and tap.rule is not None and tap.rule.__module__ == rules.__name__


def tapped(tap: LayerTap, y: Tensor, layout: Layout, x: tuple[Tensor, ...]) -> Tensor:
    """The layer's output `y`; its use is linked with the earlier ones of its parameters."""
    taps, tensors = tap.taps, []
    inputs = _places(x, tensors)
    earlier: list[_Earlier] = []
    awaited: list[tuple[str, str]] = []
    for own, name in tap.pairs():
        before = taps.links.get(name, ())
        for use in before:
            places = _places(use.x, tensors), _places(use.links, tensors)
            earlier.append(_Earlier(own, use.tap, use.own, use.layout, *places))
        if len(before) + 1 < taps.uses[name]:
            awaited.append((own, name))
        elif before:  # what is kept when the forward ends would be an output of the graph
            del taps.links[name]
    source: tuple[Tensor, ...] = ()
    if awaited:
        given = tuple(own for own, _ in awaited)
        outputs = _Source.apply(tap.probe, y.detach(), tap, given)
        source, links = outputs[:2], outputs[2:]
        x = tuple(t.detach() for t in x)
        for i, (own, name) in enumerate(awaited):
            use = Use(tap, own, layout, x, links[2 * i : 2 * i + 2])
            taps.links[name] = (*taps.links.get(name, ()), use)
    places = _places(source, tensors)
    return _LinkedTap.apply(y, tap.probe, tap, layout, inputs, places, tuple(earlier), *tensors)


def _places(of: Sequence[Tensor], tensors: list[Tensor]) -> tuple[int, ...]:
    """Where in `tensors` each one is; it is added if need be."""
    places = []
    for t in of:
        known = [i for i, other in enumerate(tensors) if other is t]
        places.append(known[0] if known else len(tensors))
        if not known:
            tensors.append(t)
    return tuple(places)


def _crossed(
    tap: LayerTap,
    dy: Tensor,
    fired: Tensor,
    given: tuple[str, ...],
    received: tuple[Tensor, ...],
) -> Tensor:
    """What the links add to the tap's vector: cross terms, and how many later uses sent them."""
    like = tap.probe
    zero = like.new_zeros(1)
    counts, crossed = {}, {}
    for own, count, payload in zip(given, received[::2], received[1::2], strict=True):
        counts[own] = count * fired
        crossed[own] = 2 * _inner(dy, payload)
    pieces = [zero]
    for own in tap.owned:
        for way in map(WAYS.__getitem__, tap.taps.ways):
            # A sketch adds the exact cross terms to its own estimates.
            counts_it = way.crossed and own in crossed
            pieces.append(crossed[own].reshape(1) if counts_it else zero)
            pieces.append(like.new_zeros(way.width - 1))
    pieces.append(like.new_zeros(1 + sum(tap.rows.values())))
    for own in tap.owned:
        pieces.append(counts[own].reshape(1) if own in counts else zero)
    return torch.cat([piece.to(like.dtype) for piece in pieces])


@torch.library.custom_op(
    "gnsmon::inner", mutates_args=(), schema="(Tensor dy, Tensor payload) -> Tensor"
)
def _inner(dy: Tensor, payload: Tensor) -> Tensor:
    """Their inner product, which the compiler does not look into.

    It would fuse the sum with an embedding's own backward, which reads dy too. Where the payload is
    laid out otherwise that is one 2-D tiled loop, in which, of more than one thread, torch 2.13's
    C++ adds to the wrong rows of the gradient and beyond its end (pytorch/pytorch#191837).
    """
    return (dy * payload).sum()


@_inner.register_fake
def _(dy: Tensor, payload: Tensor) -> Tensor:
    return dy.new_empty((), dtype=torch.promote_types(dy.dtype, payload.dtype))


def _sent(
    tap: LayerTap,
    forms: dict[str, Form],
    earlier: tuple[_Earlier, ...],
    tensors: tuple[Tensor, ...],
) -> list[Tensor | None]:
    """The gradients of `tensors`: of the earlier uses' links."""
    sent: list[Tensor | None] = [None] * len(tensors)
    for use in earlier:
        x, (count, payload) = [tensors[i] for i in use.x], use.links
        sent[count] = torch.ones_like(tensors[count])
        if any(WAYS[way].crossed for way in tap.ways):
            sent[payload] = _payload(use, x, tensors[payload], forms[use.own])
    return sent


def _payload(use: _Earlier, x: Sequence[Tensor], zeros: Tensor, later: Form) -> Tensor:
    """P of the module's docstring; `zeros` are of the earlier use's output."""

    def crossed(dy: Tensor) -> Tensor:
        return inner(use.tap.forms(x, dy, use.layout)[use.own_earlier], later).sum()

    return torch.func.grad(crossed)(zeros)


def tracer(model: nn.Module) -> Callable[[], bool]:
    """A function that tells, while a graph is traced, whether that is of the model's own forward.

    False too inside a checkpoint's graph and in what follows a graph break. The compiler runs the
    function where it comes to it and keeps the answer. What it looks at is private (torch 2.13).
    """
    codes, forward = [], getattr(model.forward, "__func__", model.forward)
    while forward is not None:
        codes.append(getattr(forward, "__code__", None))
        forward = getattr(forward, "__wrapped__", None)

    @torch._dynamo.assume_constant_result
    def tracing() -> bool:
        try:
            from torch._dynamo.symbolic_convert import InstructionTranslator

            output = InstructionTranslator.current_tx().output
            outermost, frame = output.current_tracer.parent is None, output.current_tx
            while frame is not None and frame.f_code not in codes:
                frame = frame.parent
            return outermost and frame is not None
        except Exception:
            return False

    return tracing
