"""The gradients of a convolution's weight, from its input as it is: no patches are copied."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from math import inf, prod
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gnsmon.norms import plans
from gnsmon.norms.contractions import (
    CHUNK_BYTES,
    cast_like,
    outer_sq_norms,
    per_example,
    squares,
    wide,
    wider,
)
from gnsmon.norms.forms import Form, Outer, Shape, Some, chosen
from gnsmon.norms.plans import Plan

CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
SCATTER: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


@dataclass(frozen=True, eq=False)
class Convolved(Form):
    """Sums of dy (x) patch of x over positions, group by group, as a convolution gives them.

    Args:
        x: input [B, groups * c, *size].
        dy: gradient at the output [B, groups * k, *out].
        shape: of the weight, (groups * k, c, *kernel).
        stride, padding, dilation: of the convolution, one number an axis.
        groups: of channels.
        inputs: which of the two holds the layer's activations; see `Outer`.
        summed: dy summed over positions [B, groups * k], where it is known.
    """

    x: Tensor
    dy: Tensor
    shape: Shape
    stride: Shape
    padding: Shape
    dilation: Shape
    groups: int = 1
    inputs: Literal["left", "right"] = "right"
    summed: Tensor | None = None

    plans: ClassVar[Mapping[str, Plan]]

    @property
    def batch(self) -> int:  # noqa: D102
        return self.x.shape[0]

    # The exact norms: see `plans`.

    @property
    def signature(self) -> Hashable:  # noqa: D102
        sizes = [plans.bucket(n) for n in (*self.x.shape[2:], *self.dy.shape[2:])]
        return (
            self.shape,
            self.stride,
            self.dilation,
            self.groups,
            *sizes,
            self.dy.dtype,
            self.dy.device,
        )

    @property
    def positions(self) -> int:
        """Positions of the kernel."""
        return prod(self.dy.shape[2:])

    @property
    def sum_work(self) -> float:  # noqa: D102
        return self.positions * prod(self.shape)

    def sq_norms(self) -> Tensor:  # noqa: D102
        return plans.chosen(self).sq_norms(self)

    def outer(self) -> Outer:
        """The same gradients with the patches copied, kernel-size times the input."""
        patches = _patches(
            F.pad(self.x, _widths(self.padding)), self.shape[2:], self.stride, self.dilation
        )
        factors = _grouped(self.dy, self.groups), _grouped(patches, self.groups)
        return Outer(*factors, self.shape, self.inputs)

    def uses(self) -> tuple[Form, ...]:  # noqa: D102
        return (self.outer(),)

    def sum(self, weights: Tensor | None = None) -> Tensor:  # noqa: D102
        dy = self.dy if weights is None else self.dy * per_example(weights, self.dy)
        return self._weight_gradient(self.x, dy, self.groups, self.shape)

    def _weight_gradient(self, x: Tensor, dy: Tensor, groups: int, shape: Shape) -> Tensor:
        like = dy.new_empty(1).expand(shape)  # its shape alone is read
        none = [0] * len(self.stride)
        geometry = list(self.stride), list(self.padding), list(self.dilation), False, none, groups
        mask = [False, True, False]
        return torch.ops.aten.convolution_backward(dy, x, like, None, *geometry, mask)[1]

    def dense(self) -> Tensor:  # noqa: D102
        batch, (rows, *rest) = self.batch, self.shape
        x, dy = (t.reshape(1, -1, *t.shape[2:]) for t in (self.x, self.dy))
        every = self._weight_gradient(x, dy, batch * self.groups, (batch * rows, *rest))
        return every.view(batch, *self.shape)

    def examples(self, some: slice) -> Convolved:
        """The form of some of the examples."""
        return replace(self, x=self.x[some], dy=self.dy[some], summed=None)

    # Projections: convolutions with a few filters.

    def sum_along(self, direction: Tensor, rows: Some = None) -> Tensor:  # noqa: D102
        along, dy = self._along(direction), self._by_group(self.dy)
        if self.groups == 1:
            dy, rows = chosen(dy, rows, 2), None
        return chosen((wide(dy) @ along[:, :, None].mT).sum(0).flatten(), rows)

    def _along(self, direction: Tensor) -> Tensor:
        """Patches times a direction [n]: [B, G, T]; a convolution with one filter is slow (CPU).

        Each pixel is multiplied by the kernel's every offset, and the products are added up.
        """
        c, *kernel = self.shape[1:]
        if prod(kernel) > c:
            return self._filtered(direction[:, None])[:, :, 0]
        x = cast_like(wide(self._by_group(self.x)), direction)
        products = (direction.view(c, -1).T @ x).unflatten(3, self.x.shape[2:])
        products = F.pad(products, _widths(self.padding)) if any(self.padding) else products
        every = (products[(..., i, *at)] for i, at in enumerate(self._offsets()))
        return _summed(every).flatten(2)

    def _offsets(self) -> Iterator[tuple[slice, ...]]:
        """For each position in the kernel the pixels of a padded input that meet it."""
        for offset in product(*map(range, self.shape[2:])):
            yield tuple(
                slice(o * d, o * d + s * (n - 1) + 1, s)
                for o, d, s, n in zip(
                    offset, self.dilation, self.stride, self.dy.shape[2:], strict=True
                )
            )

    def project(self, w: Tensor) -> Tensor:  # noqa: D102
        return (wide(self._by_group(self.dy)) @ self._filtered(w).mT).flatten(1, 2)

    def project_back(self, f: Tensor) -> Tensor:  # noqa: D102
        batch, groups, (_, *rest) = self.batch, self.groups, self.shape
        along = f.unflatten(1, (groups, -1)).mT @ wide(self._by_group(self.dy))  # [B, G, r, T]
        dy = along.reshape(1, -1, *self.dy.shape[2:])
        x = wide(self.x).reshape(1, -1, *self.x.shape[2:])
        rows = batch * groups * f.shape[2]
        found = self._weight_gradient(x, dy, batch * groups, (rows, *rest))
        return found.view(batch, groups, f.shape[2], -1).sum(1).mT

    def _filtered(self, w: Tensor) -> Tensor:
        """Patches times w [n, r] or [B, n, r]: [B, G, r, T]."""
        batch, groups, rest, r = self.batch, self.groups, self.shape[1:], w.shape[-1]
        filters = w.mT.reshape(-1, *rest)
        x = cast_like(wide(self.x), w)
        if w.ndim == 2:
            filters = filters.repeat(groups, *(1,) * len(rest))
        else:
            filters = filters.view(batch, 1, r, *rest).expand(-1, groups, *(-1,) * (1 + len(rest)))
            filters = filters.reshape(-1, *rest)
            x, groups = x.reshape(1, -1, *x.shape[2:]), batch * groups
        y = self._convolve(x, filters, groups)
        return y.reshape(batch, self.groups, r, -1)

    def _convolve(self, x: Tensor, filters: Tensor, groups: int) -> Tensor:
        convolve = CONV[len(self.stride)]
        return convolve(x, filters, None, self.stride, self.padding, self.dilation, groups)

    def _by_group(self, t: Tensor) -> Tensor:  # [B, G, d, T]
        return t.unflatten(1, (self.groups, -1)).flatten(3)

    def sogns_sq_norms(self, *, unit_variance: bool = False) -> Tensor:  # noqa: D102
        if self.inputs == "left" or unit_variance:
            return self.outer().sogns_sq_norms(unit_variance=unit_variance)
        # A norm over an axis that is not the last is slow (CPU, torch 2.13).
        pixels = wide(self._by_group(self.x)).square().sum(2)
        in_patches = pixels @ cast_like(self._patches_at().flatten(), pixels)  # [B, G]
        summed = self.summed
        if summed is None:
            summed = self.dy.flatten(2).sum(2, dtype=pixels.dtype)
        summed = summed.unflatten(1, (self.groups, -1))
        return (in_patches / self.positions * squares(summed, 2)).sum(1)

    def _patches_at(self) -> Tensor:
        """How many patches each pixel of the input is in."""
        shape = self.shape[2:], self.x.shape[2:], self.stride, self.padding, self.dilation
        rest = tuple(
            (n + 2 * pad - apart * (k - 1) - 1) % step
            for k, n, step, pad, apart in zip(*shape, strict=True)
        )
        ones = self.dy.new_ones(1, 1, *self.dy.shape[2:]), self.dy.new_ones(1, 1, *self.shape[2:])
        scatter = SCATTER[len(self.stride)]
        return scatter(*ones, None, self.stride, self.padding, rest, 1, self.dilation)

    def regroup(self, batch: int) -> Outer:  # noqa: D102
        return self.outer().regroup(batch)


def _pixel_gram(form: Convolved) -> Tensor:
    """sum_pq <patch_p, patch_q> <dy_p, dy_q>, the first added up from products of single pixels.

    <patch_p, patch_q> = sum over the kernel's offsets o of <x_(p+o), x_(q+o)>: each product of two
    pixels is made once, not once for each pair of patches that hold them.
    """
    x, dy = (wide(t).unflatten(1, (form.groups, -1)).flatten(0, 1) for t in (form.x, form.dy))
    x = F.pad(x, _widths(form.padding))
    size, pixels, dy = x.shape[2:], x.flatten(2), dy.flatten(2)
    of_pixels = (pixels.mT @ pixels).view(-1, *size, *size)
    of_patches = _summed(of_pixels[(slice(None), *at, *at)] for at in form._offsets())
    gram = (dy.mT @ dy).flatten(1) * of_patches.flatten(1)
    return gram.sum(1).view(form.batch, form.groups).sum(1)


def _patch_gram(form: Convolved) -> Tensor:
    outer = form.outer()
    return outer_sq_norms(outer.left, outer.right, path="gram")


def _summed(tensors: Iterator[Tensor]) -> Tensor:
    total = next(tensors).clone()
    for t in tensors:
        total.add_(t)
    return total


def _pixels(form: Convolved) -> int:
    sizes = zip(form.x.shape[2:], form.padding, strict=True)
    return prod([size + 2 * pad for size, pad in sizes])


def _of_pixels(form: Convolved) -> int:
    return form.groups * (_pixels(form) ** 2 + 2 * form.positions**2)


def _of_patches(form: Convolved) -> int:
    return form.positions * prod(form.shape[1:]) * form.groups + 3 * form.positions**2


def _pixel_gram_work(form: Convolved) -> float:
    k, c, *kernel = form.shape
    if _of_pixels(form) * 8 > CHUNK_BYTES:
        return inf
    squared = form.positions**2
    return _pixels(form) ** 2 * c * form.groups + squared * (k + prod(kernel) * form.groups)


def _patch_gram_work(form: Convolved) -> float:
    k, *rest = form.shape
    return form.positions**2 * (k + prod(rest) * form.groups)


def _in_pieces(
    norms: Callable[[Convolved], Tensor], numbers: Callable[[Convolved], int]
) -> Callable[[Convolved], Tensor]:
    """`norms` of as many examples at a time as fit CHUNK_BYTES, at `numbers` for each."""

    def run(form: Convolved) -> Tensor:
        count = max(1, CHUNK_BYTES // (numbers(form) * wider(form.dy.dtype).itemsize))
        if count >= form.batch:
            return norms(form)
        starts = range(0, form.batch, count)
        return torch.cat([norms(form.examples(slice(i, i + count))) for i in starts])

    return run


def _together(count: int, *, slow_from: int) -> Plan:
    """The gradients of `count` examples at a time, as groups of one convolution."""

    def work(form: Convolved) -> float:
        return form.sum_work * (1 if prod(form.shape) < slow_from else 8)

    def fused(form: Convolved) -> tuple[Tensor, Tensor]:
        fit = CHUNK_BYTES // (prod(form.shape) * wider(form.dy.dtype).itemsize)
        step = max(1, min(count, fit))
        total, norms = None, []
        for i in range(0, form.batch, step):
            gradients = form.examples(slice(i, i + step)).dense()
            norms.append(squares(gradients.flatten(1), 1))
            some = gradients.sum(0, dtype=wider(gradients.dtype))
            total = some if total is None else total.add_(some)
        assert total is not None
        return total, torch.cat(norms)

    return Plan(work, lambda form: fused(form)[1], fused)


Convolved.plans = {
    "pixel gram": Plan(_pixel_gram_work, _in_pieces(_pixel_gram, _of_pixels)),
    "patch gram": Plan(_patch_gram_work, _in_pieces(_patch_gram, _of_patches)),
    "two together": _together(2, slow_from=2**19),
    "many together": _together(16, slow_from=2**16),
}


def _patches(x: Tensor, kernel: Shape, stride: Shape, dilation: Shape) -> Tensor:
    """[B, C * kernel, *positions] of x [B, C, *size]."""
    n = len(kernel)
    for axis, (k, step, apart) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        x = x.unfold(axis, apart * (k - 1) + 1, step)[..., ::apart]
    return x.movedim(tuple(range(-n, 0)), tuple(range(2, 2 + n))).flatten(1, 1 + n)


def _grouped(t: Tensor, groups: int) -> Tensor:  # [B, G * d, *positions] -> [B, G, T, d]
    return t.unflatten(1, (groups, -1)).flatten(3).mT


def _widths(padding: Shape) -> list[int]:
    return [width for width in reversed(padding) for _ in range(2)]
