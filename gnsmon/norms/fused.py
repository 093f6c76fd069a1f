"""A tap that takes over its layer's backward, so that no matrix product is done twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._device import DeviceContext

from gnsmon.norms.contractions import cast_like
from gnsmon.norms.inputs import given_on, without_autocast, without_gradients
from gnsmon.norms.layout import Layout

if TYPE_CHECKING:
    from gnsmon.norms.taps import LayerTap


# Of a convolution and a norm layer, read again in its backward.
SETTINGS = (
    *("stride", "padding", "dilation", "groups", "output_padding"),
    *("normalized_shape", "num_groups", "eps"),
)

NORMS = {nn.LayerNorm: "layer_norm", nn.GroupNorm: "group_norm", nn.RMSNorm: "rms_norm"}
CONVOLUTIONS = [f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)]
OWN = ("input", "weight", "bias")  # in the order of a backward's gradients


class Taken(NamedTuple):
    """What a backward that is ours needs of the layer, and has found so far."""

    x: Tensor
    weight: Tensor
    normed: Sequence[Tensor]  # what a norm layer normalised by
    product: Callable[[], Tensor]  # the weight's gradient as autograd makes it
    gradients: dict[str, Tensor]  # by the names of `OWN`


class FusedTap(torch.autograd.Function):
    """The layer's output, whose backward is the layer's own with the statistics on top.

    Where that pays, the weight's gradient is the sum of the examples' gradients, which are squared
    on the way; else it is made as autograd makes it. Either way it is known, and need not be made
    again to be compared with `.grad`. What the layer itself had recorded for its backward is
    dropped with its output's graph: `y` comes detached. A gradient of gradients, and whatever goes
    wrong, takes the usual products.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        leaf: Tensor,
        tap: LayerTap,
        layout: Layout | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *normed: Tensor,
    ) -> Tensor:
        """`y`, which is the layer's output; then its arguments, and what it normalised by."""
        # Where autograd does not read the weight's values, they may change before the backward.
        read = torch.compiler.is_compiling() or x.requires_grad or normed
        ctx.save_for_backward(x, weight if read else None, *normed)
        ctx.tap, ctx.layout, ctx.weight_shape = tap, layout, weight.shape
        ctx.settings = {} if torch.compiler.is_compiling() else _settings(tap.module)
        ctx.set_materialize_grads(False)
        return given_on(y, alias=True)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of forward's arguments."""
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        if not ctx.settings:
            return _gradients(ctx, dy)
        with _set(ctx.tap.module, ctx.settings):
            return _gradients(ctx, dy)


def tapped(tap: LayerTap, y: Tensor, layout: Layout | None, x: Tensor) -> Tensor:
    """The layer's output `y` with its backward ours.

    Autocast has computed with copies, which it saved: what they were made of may since change.
    """
    weight, bias = tap.module._parameters["weight"], tap.module._parameters.get("bias")
    normed = tap.each.statistics(y) if tap.each is not None else ()
    x, weight = cast_like(x, y), cast_like(weight, y)
    if isinstance(tap.module, nn.Linear) and not torch.compiler.is_compiling():
        weight = weight.view_as(weight)  # as F.linear does, so that weight.data may be replaced
    bias = None if bias is None else cast_like(bias, y)
    with without_autocast(y.device):
        return FusedTap.apply(y.detach(), tap.leaf, tap, layout, x, weight, bias, *normed)


def able(tap: LayerTap, x: tuple[Tensor, ...]) -> bool:
    """Whether the backward of this call is known for sure to be that of the layer's type.

    A hook before ours, a forward set on the layer itself, or a function that was replaced may have
    changed what it computes.
    """
    module, own = tap.module, tap.module._parameters
    if tap.backward is None or len(x) != 1 or own.get("weight") is None:
        return False
    if "bias" not in own and hasattr(module, "bias"):  # pruned or parametrized, made of others
        return False
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return False
    if isinstance(getattr(module, "padding", None), str):
        return False
    if "forward" in vars(module) or "_conv_forward" in vars(module):
        return False
    first = next(iter(module._forward_hooks.values()), None)
    plain = all(type(t) in (Tensor, nn.Parameter) for t in (x[0], own["weight"]))
    usual = x[0].is_floating_point() and x[0].layout == torch.strided
    if not (first is tap and plain and usual and own["weight"].requires_grad):
        return False
    return not (nn.modules.module._global_forward_hooks or _replaced(module))


def _replaced(module: nn.Module) -> bool:
    """Whether the functions that layers call are not torch's own, as some libraries have it."""
    if isinstance(module, nn.modules.conv._ConvNd):
        if any(getattr(F, name) is not getattr(torch, name) for name in CONVOLUTIONS):
            return True
    elif kind := next((kind for kind in NORMS if isinstance(module, kind)), None):
        written = getattr(F, NORMS[kind])
        if written.__module__ != F.__name__ or hasattr(written, "__wrapped__"):
            return True
    elif F.linear is not torch._C._nn.linear:
        return True
    if torch.compiler.is_compiling():
        return False
    modes = map(torch._C._get_function_stack_at, range(torch._C._len_torch_function_stack()))
    return any(type(mode) is not DeviceContext for mode in modes)


def _settings(module: nn.Module) -> dict[str, Any]:
    own = vars(module)
    return {name: own[name] for name in SETTINGS if name in own}


@contextmanager
def _set(module: nn.Module, settings: dict[str, Any]) -> Iterator[None]:
    """The module as a call had it: a layer may be given others for each call."""
    now = _settings(module)
    vars(module).update(settings)
    try:
        yield
    finally:
        vars(module).update(now)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, *normed = ctx.saved_tensors  # which a checkpoint gives but once
    if weight is None:
        weight = dy.new_empty(1).expand(ctx.weight_shape)  # its shape alone is read
    backward = partial(ctx.tap.backward, ctx.tap.module, x, dy, weight)
    taken = Taken(x, weight, normed, lambda: backward((False, True, False))[1], {})
    statistics = None
    wanted = ctx.needs_input_grad[4:7]
    with without_autocast(dy.device):
        if ctx.layout is not None:
            with without_gradients():
                statistics = ctx.tap.statistics(ctx, dy, ctx.layout, taken)
        known = taken.gradients
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            known = {}
        missing = tuple(need and own not in known for need, own in zip(wanted, OWN, strict=True))
        usual = backward(missing) if any(missing) else (None, None, None)
    given = (known.get(own, grad) for own, grad in zip(OWN, usual, strict=True))
    given = (grad if need else None for grad, need in zip(given, wanted, strict=True))
    return None, statistics, None, None, *given, *(None,) * len(normed)
