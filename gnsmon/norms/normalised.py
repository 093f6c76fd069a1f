"""The backward of norm layers that gives each example's gradients on the way to their sum."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gnsmon.norms.contractions import IN_CACHE, squares

SMALL = 2**18  # numbers of an input below which the layer's own backward is kept
LOOP = {"cpu": 2**15}  # numbers of an example that are worth calls of their own
LOOP_ELSEWHERE = 2**20

Gradients = tuple[Tensor, dict[str, Tensor]]  # of the input, and of each example by own name


class EachOf(NamedTuple):
    """How the backward of a type of layers gives each example's gradients of its parameters too.

    Of what the layer's own forward has found of each example it may read some, such as the mean and
    1 / deviation, from the node `node` of its output's graph, so that nothing is normalised again.
    """

    node: str
    backward: Callable[..., Gradients]  # of module, x, dy, weight and what was read
    pays: Callable[[Tensor], bool]  # for an input
    read: tuple[str, ...] = ("_saved_result1", "_saved_result2")  # of the node

    def able(self, x: Tensor, y: Tensor) -> bool:
        """Whether those of the output y of an input x can be had."""
        plain = y.dtype == x.dtype and x.dtype in (torch.float32, torch.float64)
        if not plain or not x.is_contiguous() or y.grad_fn is None:
            return False
        return y.grad_fn.name() == self.node

    def statistics(self, y: Tensor) -> tuple[Tensor, ...]:
        """What is read, of an output that has it."""
        return tuple(getattr(y.grad_fn, name) for name in self.read)


def differentiated(layer: Callable[[Any, Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """The backward of `layer(module, x, weight, bias)`, for where the examples' are not wanted.

    It can be differentiated again.
    """

    def backward(
        module: Any, x: Tensor, dy: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            own = [t.view_as(t) if again else t.detach().requires_grad_() for t in (x, weight)]
            own.append(torch.zeros_like(weight, requires_grad=True))  # whatever the bias is
            asked = [t for t, want in zip(own, wanted, strict=True) if want]
            if not asked:
                return None, None, None
            found = iter(torch.autograd.grad(layer(module, *own), asked, dy, create_graph=again))
        return tuple(next(found) if want else None for want in wanted)

    return backward


def _layer_norm(
    module: nn.LayerNorm, x: Tensor, dy: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> Gradients:
    """The input's gradient at once, the parameters' of one example after the other."""
    backward, own = torch.ops.aten.native_layer_norm_backward, (weight, module.bias)
    dy, shape = dy.contiguous(), list(module.normalized_shape)
    dx, _, _ = backward(dy, x, shape, mean, rstd, *own, [True, False, False])
    wanted = [False, True, module.bias is not None]
    found = [
        backward(dy_b, x_b, shape, *normed, *own, wanted)
        for dy_b, x_b, *normed in zip(*(t.unbind() for t in (dy, x, mean, rstd)), strict=True)
    ]
    gradients = {"weight": torch.stack([of_weight for _, of_weight, _ in found])}
    if module.bias is not None:
        gradients["bias"] = torch.stack([of_bias for *_, of_bias in found])
    return dx, gradients


def _group_norm(
    module: nn.GroupNorm, x: Tensor, dy: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> Gradients:
    """The channels of all examples as those of one."""
    batch, channels, *size = x.shape
    one = (1, batch * channels, *size)
    dx, of_weight, of_bias = torch.ops.aten.native_group_norm_backward(
        dy.contiguous().view(one),  # whose strides the operator does not look at (torch 2.13)
        x.view(one),
        mean.view(1, -1),
        rstd.view(1, -1),
        weight.repeat(batch),
        1,
        batch * channels,
        prod(size),
        batch * module.num_groups,
        [True, True, True],
    )
    gradients = {"weight": of_weight.view(batch, channels)}
    if module.bias is not None:
        gradients["bias"] = of_bias.view(batch, channels)
    return dx.view_as(x), gradients


def _rms_norm(module: nn.RMSNorm, x: Tensor, dy: Tensor, weight: Tensor) -> Gradients:
    """A few examples at a time to stay in cache; torch's own takes many passes (CPU, 2.13).

    With xhat = x / r, dgamma = sum_t dy xhat, dx = (dy gamma - xhat mean(dy gamma xhat)) / r.
    """
    n, scale, dx, found = weight.numel(), weight.reshape(-1), torch.empty_like(x), []
    eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
    shape = x.shape[0], prod(x.shape[1 : x.ndim - weight.ndim]), n
    step = max(1, IN_CACHE // max(1, n * shape[1]))
    of_some = zip(*(t.view(shape).split(step) for t in (x, dy.contiguous(), dx)), strict=True)
    for some, dy_some, dx_some in of_some:
        inverse = (squares(some, -1) / n + eps).rsqrt()[..., None]
        normalised = some * inverse
        product = dy_some * normalised
        found.append(product.sum(1))
        along = (product @ scale / n)[..., None]
        torch.addcmul(dy_some * scale, normalised, along, value=-1, out=dx_some).mul_(inverse)
    return dx, {"weight": torch.cat(found).view(x.shape[0], *weight.shape)}


def _many(x: Tensor) -> bool:
    return x.numel() >= SMALL


def _large(x: Tensor) -> bool:
    return _many(x) and x[0].numel() >= LOOP.get(x.device.type, LOOP_ELSEWHERE)


LAYER_NORM = EachOf("NativeLayerNormBackward0", _layer_norm, _large)
GROUP_NORM = EachOf("NativeGroupNormBackward0", _group_norm, _many)
# Of the several operators that it is on the CPU; on a GPU it is one, whose backward is better.
RMS_NORM = EachOf("MulBackward0", _rms_norm, _many, read=())
