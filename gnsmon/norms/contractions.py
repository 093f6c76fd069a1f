"""Squared norms of factored per-example gradients, by the cheapest contraction that fits memory."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

WIDE = (torch.float32, torch.float64)
FEW = 2**16  # numbers whose sum of squares is right in float32 whatever the order
ALL = slice(None)
IN_CACHE = 2**18  # numbers that one pass should take at a time
CHUNK_BYTES = 64 * 2**20  # what one contraction may hold beside its arguments


def outer_sq_norms(left: Tensor, right: Tensor, *, path: Literal["direct", "gram"]) -> Tensor:
    """Exact |sum_t left_bgt (x) right_bgt|^2 summed over groups g, [B], float32 or wider.

    "direct" forms the [m, n] gradient in T m n multiply-adds per example and group, in the dtype of
    the arguments as autograd does; "gram" is <L L', R R'> in T^2 (m + n), always in float32 or
    wider. At T = 1 either is |left|^2 |right|^2 (Goodfellow 2015).

    Args:
        left: [B, G, T, m], with T the positions that share the parameter; [B, T, m] for one group.
        right: [B, G, T, n], or [B, T, n].
        path: which contraction; `Outer.plans` have the choice.
    """
    (batch, *groups, positions, m), n = left.shape, right.shape[-1]
    axes = tuple(range(1, left.ndim))
    if positions == 1:
        return (squares(left, -1) * squares(right, -1)).sum(axes[:-1])

    def direct(examples: slice, rows: slice) -> Tensor:
        return squares(outer_products(_part(left, examples, rows), _part(right, examples)), axes)

    def gram(examples: slice, rows: slice) -> Tensor:
        a, b = wide(_part(left, examples)), wide(_part(right, examples))
        return ((a[..., rows, :] @ a.mT) * (b[..., rows, :] @ b.mT)).sum(axes)

    # Per row of the result: it and its float32 square, or two Gram matrices and their product.
    size = prod(groups) * _itemsize(left)
    if path == "direct":
        return _chunked(direct, batch, m, row_bytes=2 * size * n)
    return _chunked(gram, batch, positions, row_bytes=3 * size * positions)


def outer_products(left: Tensor, right: Tensor) -> Tensor:
    """sum_t left_bgt (x) right_bgt, [B, G, m, n] or [B, m, n]; matmul takes twice a small bmm's."""
    return (torch.bmm if left.ndim == 3 else torch.matmul)(left.mT, right)


def outer_sum_and_sq_norms(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """sum_bt left_bgt (x) right_bgt, [G, m, n], and the squared norms [B] of its examples' terms.

    Example by example, so that each gradient is squared and added while it is in cache: the work of
    the sum alone, and one square-sum of m n numbers an example. Shapes as in `outer_sq_norms`, the
    sum [m, n] where there is no axis of groups; in float32 or wider.
    """
    if right.shape[-1] > FEW > left.shape[-1]:  # whose norms are taken by rows
        total, norms = outer_sum_and_sq_norms(right, left)
        return total.mT, norms
    # A compiled graph would hold the loop unrolled, once more for each number of examples.
    in_turn = _in_turn_op if torch.compiler.is_compiling() else _in_turn
    return in_turn(left, right)


def _in_turn(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    total, product = _total(left, right), torch.bmm if left.ndim == 4 else torch.mm
    norms = total.new_empty(left.shape[0], *total.shape[:-1])
    if not left.shape[0]:  # as a compiled graph of any batch may be given
        total.zero_()
    gradient = torch.empty_like(total, dtype=left.dtype)
    whole = gradient.dtype == total.dtype  # the first is the sum so far, unless it has less digits
    of_each = zip(left.mT.unbind(), right.unbind(), norms.unbind(), strict=True)
    for i, (x, y, rows) in enumerate(of_each):
        into = gradient if i or not whole else total
        product(x, y, out=into)
        torch.linalg.vector_norm(wide(into), dim=-1, out=rows)
        if into is gradient:
            total.add_(gradient) if i else total.copy_(gradient)
    return total, norms.square_().flatten(1).sum(1)


_in_turn_op = torch.library.custom_op(
    "gnsmon::outer_in_turn",
    _in_turn,
    mutates_args=(),
    schema="(Tensor left, Tensor right) -> (Tensor, Tensor)",
)


@_in_turn_op.register_fake
def _(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    total = _total(left, right)
    return total, total.new_empty(left.shape[0])


def _total(left: Tensor, right: Tensor) -> Tensor:
    shape = *left.shape[1:-2], left.shape[-1], right.shape[-1]
    return left.new_empty(shape, dtype=wider(left.dtype))


def row_sq_norms(index: Tensor, value: Tensor) -> Tensor:
    """Exact squared norms [B] of sparse gradients whose rows `index` [B, T] hold `value` [B, T, d].

    Rows of one example that meet at one index add before they are squared. Equal indices are
    brought together by sorting, at O(T log T + T d) and with static shapes throughout.
    """
    batch, positions, width = value.shape
    order = index.argsort(1)
    rank = F.pad((index.gather(1, order).diff(dim=1) != 0).long(), (1, 0)).cumsum(1)
    slot = torch.zeros_like(index).scatter(1, order, rank)  # distinct index -> a slot below T
    slot = slot + positions * torch.arange(batch, device=index.device)[:, None]
    rows = torch.zeros(batch * positions, width, dtype=wider(value.dtype), device=value.device)
    rows = rows.index_add(0, slot.flatten(), wide(value).flatten(0, 1))
    return squares(rows.view(batch, positions, width), (1, 2))


def outer_rows_inner(left: Tensor, right: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """<sum_s left_bs (x) right_bs, sum_t e_index_bt (x) value_bt> for each example, [B].

    The cross term of a head tied to its embedding: left [B, S, m], right [B, S, n], index [B, T]
    below m, value [B, T, n]; sum_ts left[s, index_t] <value_t, right_s> forms nothing of size m n.
    """
    positions = left.shape[1]

    def part(examples: slice, rows: slice) -> Tensor:
        at = index[examples, None, rows].expand(-1, positions, -1)
        gathered = wide(left[examples].gather(2, at))
        return (gathered * (wide(right[examples]) @ wide(value[examples, rows]).mT)).sum((1, 2))

    row_bytes = 3 * positions * _itemsize(left)
    return _chunked(part, len(index), index.shape[1], row_bytes=row_bytes)


def outer_inner(left: Tensor, right: Tensor, left2: Tensor, right2: Tensor) -> Tensor:
    """<sum_s left_bgs (x) right_bgs, sum_t left2_bgt (x) right2_bgt> summed over g, [B].

    left [B, G, S, m], right [B, G, S, n], left2 [B, G, T, m], right2 [B, G, T, n]; by whichever is
    smaller, two gradients [m, n] or two Gram matrices [S, T]. It is there to be differentiated,
    which keeps them, so that pieces would save nothing.
    """
    left, right, left2, right2 = (wide(t) for t in (left, right, left2, right2))
    if left.shape[2] * left2.shape[2] < left.shape[3] * right.shape[3]:
        return ((left @ left2.mT) * (right @ right2.mT)).sum((1, 2, 3))
    return ((left.mT @ right) * (left2.mT @ right2)).sum((1, 2, 3))


def rows_inner(index: Tensor, value: Tensor, index2: Tensor, value2: Tensor) -> Tensor:
    """<sum_s e_index_bs (x) value_bs, sum_t e_index2_bt (x) value2_bt> for each example, [B].

    index [B, S], value [B, S, n], index2 [B, T], value2 [B, T, n], at S T n.
    """
    meet = index[:, :, None] == index2[:, None]
    return ((wide(value) @ wide(value2).mT) * meet).sum((1, 2))


def sogns_sq_norms(
    left: Tensor, right: Tensor, *, unit_variance: bool = False, summed: Tensor | None = None
) -> Tensor:
    """SOGNS approximation of `outer_sq_norms`, [B], at one pass over each factor.

    eta_b^2 = I sigma_b^2 |sum_t dy_bt|^2 with sigma_b^2 = sum_ti x_bti^2 / (T I), per group, for
    dy = left [B, G, T, K] and x = right [B, G, T, I], or without the axis of groups where there is
    one (Gray, Samar & Hestness 2023, section 3.1).
    It takes the activations for independent zero-mean normals, is exact at T = 1 or one input at
    all positions, and biased by tens of percent on real networks: to be calibrated.

    Args:
        left: gradients at the output.
        right: activations at the input.
        unit_variance: their "naive" variant with sigma_b = 1 (appendix D).
        summed: `left` summed over positions, [B, G, K] or [B, K], if that is known.
    """
    scale = _sigma_sq(right) if not unit_variance else right.shape[-1]
    norms = scale * squares(_summed(left) if summed is None else summed, -1)
    return norms if norms.ndim == 1 else norms.sum(1)


def sogns_big_sq_norm(left: Tensor, right: Tensor) -> Tensor:
    """SOGNS approximation of the batch gradient's squared norm, a scalar.

    |G_big|^2 ~ sum_k (sum_b omega_bk)^2 with omega_bk = sqrt(I) sigma_b sum_t dy_btk, shapes as in
    `sogns_sq_norms` (Gray, Samar & Hestness 2023, appendix E).
    """
    return (_sigma_sq(right).sqrt()[..., None] * _summed(left)).sum(0).square().sum()


def squares(t: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Sum of squares over `dim`, in float32 or wider.

    Over 16M float32 numbers on the CPU `vector_norm() ** 2`, which needs no copy, is off by 1e-3,
    and over 64 thousand by 1e-6; the sum of squares by 2e-9. The last of `dim` is the last axis.
    """
    *axes, last = (dim,) if isinstance(dim, int) else dim
    if t.shape[last] > FEW:
        return wide(t).square().sum(dim)
    rows = torch.linalg.vector_norm(wide(t), dim=last).square()
    return rows.sum(axes) if axes else rows


def square_sum(t: Tensor) -> Tensor:
    """The sum of all squares, a scalar in float32 or wider.

    On the CPU by norms of rows and by dot products, which need no copy; a dot product of more than
    2^20 float32 numbers would be off by up to 1e-4.
    """
    if t.is_cuda or not t.is_contiguous():
        return wide(t).square().sum()
    flat = wide(t)
    if t.ndim > 1 and t.numel() > FEW and 64 <= t.numel() // t.shape[0] <= FEW:  # by all threads
        flat = torch.linalg.vector_norm(flat.flatten(1), dim=1)
    flat = flat.view(-1)
    if flat.shape[0] <= 2**18:
        return torch.dot(flat, flat)
    pieces = flat.split(2**18)
    return torch.stack([torch.dot(piece, piece) for piece in pieces]).sum()


def wide(t: Tensor) -> Tensor:
    """`t` in float32, or as it is if already float32 or float64."""
    return t if t.dtype in WIDE else t.to(wider(t.dtype))


def cast_like(t: Tensor, other: Tensor) -> Tensor:
    """`t` in the dtype of `other`; `to` takes a while to see that there is nothing to do."""
    return t if t.dtype == other.dtype else t.to(other.dtype)


def wider(dtype: torch.dtype) -> torch.dtype:
    """float32, or `dtype` if that is wider."""
    return dtype if dtype in WIDE else torch.promote_types(dtype, torch.float32)


def per_example(weights: Tensor, like: Tensor) -> Tensor:
    """`weights` [B] with axes of size one behind, in the dtype of `like`."""
    return weights.to(like.dtype).reshape(-1, *(1,) * (like.ndim - 1))


def _itemsize(t: Tensor) -> int:
    return wider(t.dtype).itemsize


def _sigma_sq(x: Tensor) -> Tensor:
    return squares(x, (x.ndim - 2, -1)) / x.shape[-2]  # I sigma_b^2, [B, G] or [B]


def _summed(dy: Tensor) -> Tensor:
    return dy.sum(-2, dtype=wider(dy.dtype))  # [B, G, K] or [B, K]


def _part(t: Tensor, examples: slice, columns: slice = ALL) -> Tensor:
    """Some of the examples, and of the last axis; `ALL` itself takes all and costs nothing."""
    return t if examples is ALL and columns is ALL else t[examples, ..., columns]


def _chunked(
    part: Callable[[slice, slice], Tensor], batch: int, rows: int, *, row_bytes: int
) -> Tensor:
    """`part(examples, rows)` [examples], rows summed, in pieces of at most CHUNK_BYTES."""
    if batch * rows * row_bytes <= CHUNK_BYTES:
        return part(ALL, ALL)
    examples = max(1, CHUNK_BYTES // (rows * row_bytes))
    step = max(1, min(rows, CHUNK_BYTES // row_bytes))
    return torch.cat(
        [
            sum(part(slice(i, i + examples), slice(j, j + step)) for j in range(0, rows, step))
            for i in range(0, batch, examples)
        ]
    )
