"""Whose example each row of a layer's input is."""

from __future__ import annotations

from itertools import accumulate
from operator import mul
from typing import NamedTuple

from torch import Tensor, nn

from gnsmon.norms.replay import Call

# Layers whose batch axis is always the first; others work on the last axis, whatever leads.
BATCH_FIRST = (
    nn.modules.conv._ConvNd,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,
    nn.PReLU,
    nn.EmbeddingBag,
)
# Layers that say themselves which axis is the batch's.
TOLD_BATCH_FIRST = (nn.MultiheadAttention, nn.RNNBase)
VIEWS = ("ViewBackward0", "ReshapeAliasBackward0", "UnsafeViewBackward0")


class Layout(NamedTuple):
    """How the rows of a layer's input belong to the examples of the batch."""

    batch: int
    batch_dim: int = 0
    rows_per_example: int = 1
    serial: int = 0  # of the forward pass
    call: Call | None = None  # of a layer without a rule

    def batch_first(self, tensor: Tensor) -> Tensor:
        """`tensor` with the rows of one example adjacent on the leading axis."""
        if self.batch_dim == 0:
            return tensor
        if self.rows_per_example == 1:
            return tensor.movedim(self.batch_dim, 0)
        rows = tensor.unflatten(0, (self.rows_per_example, self.batch))
        return rows.transpose(0, 1).flatten(0, 1)


def flattened_from(x: Tensor, batch: int, rows: int) -> int | None:
    """The batch's axis, 0 or 1, in the tensor of which x is a view with its first axes merged.

    None where that cannot be seen: the order of the rows is then anybody's guess.
    """
    if rows == batch:
        return None
    total, node, sizes = batch * rows, x.grad_fn, None
    while node is not None and node.name() in VIEWS:
        sizes = tuple(node._saved_self_sym_sizes)  # of the view's argument
        if sizes[:1] != (total,):
            break
        node = node.next_functions[0][0]  # a view that left the first axis alone
    base = x._base if x.grad_fn is None else None
    if base is not None and x.is_contiguous() and base.is_contiguous():
        sizes = tuple(base.shape)
    if not sizes:
        return None
    if sizes[:2] == (rows, batch):
        return 1
    merged = list(accumulate(sizes, mul))  # examples, then windows in two axes, as Swin has them
    among = merged.index(total) if total in merged else 0
    return 0 if among and sizes[0] == batch and batch not in sizes[1 : among + 1] else None


def leading(t: Tensor, axis: int | None, layout: Layout) -> Tensor:
    """`t` with the examples, or the rows of one example after the other, on the first axis."""
    if axis is None:
        return t
    return layout.batch_first(t) if layout.rows_per_example > 1 else t.movedim(axis, 0)
