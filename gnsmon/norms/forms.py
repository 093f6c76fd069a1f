"""Per-example gradients in factored form: what every layer rule returns.

`Outer`, `Rows` and `Dense` hold the gradient of one parameter for each example of a batch; `+`
joins the uses of a parameter that is used more than once. All methods trace under torch.compile.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from math import inf, prod
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from gnsmon.norms import contractions, kernels, plans
from gnsmon.norms.contractions import per_example, squares, wide
from gnsmon.norms.plans import Plan

Shape = tuple[int, ...]
Some = slice | Tensor | None  # rows of a parameter: a block, indices, all


class Form(Protocol):
    """The gradients of one parameter for each example of a batch, not necessarily materialised."""

    shape: Shape  # of the parameter

    @property
    def batch(self) -> int:
        """Number of examples."""
        ...

    def __add__(self, other: Form) -> Joined:
        """The form of a parameter that is used twice: gradients add before they are squared."""
        return Joined((*self.uses(), *other.uses()))

    def uses(self) -> tuple[Form, ...]:
        """The forms that are joined when this one is added to another."""
        return (self,)

    def sq_norms(self) -> Tensor:
        """Exact squared norm of each example's gradient, [B], float32 or wider."""
        ...

    @property
    def adds_norms(self) -> bool:
        """Whether `sum_sq_norms` is the sum of `sq_norms` to the last bit."""
        return True

    def sum_sq_norms(self) -> Tensor:
        """Their sum over the examples, a scalar."""
        return self.sq_norms().sum()

    def sogns_sq_norms(self, *, unit_variance: bool = False) -> Tensor:
        """Squared norms [B] as SOGNS approximates them: see `contractions.sogns_sq_norms`.

        Only an `Outer` is approximated. The uses of a joined parameter add without cross terms,
        as the method's assumption of independent zero-mean activations has it.
        """
        ...

    def sum(self, weights: Tensor | None = None) -> Tensor:
        """Sum over the batch, weighted by `weights` [B], in the parameter's shape.

        Without weights it equals `.grad`; in the factors' dtype or wider.
        """
        ...

    def sum_along(self, direction: Tensor, rows: Some = None) -> Tensor:
        """`sum().flatten(1)[rows] @ direction` without forming the sum, float32 or wider.

        `direction` is [prod(shape[1:])]; of a parameter with one axis or none it is [1]. `rows` are
        a block of shape[0], or indices into it; all without.
        """
        ...

    def project(self, w: Tensor) -> Tensor:
        """Each gradient, as a matrix [shape[0], n], times w: [B, shape[0], r], float32 or wider.

        `w` is [n, r], or [B, n, r] with a matrix for each example; n = prod(shape[1:]).
        """
        ...

    def project_back(self, f: Tensor) -> Tensor:
        """Each gradient's transpose times f [B, shape[0], r]: [B, n, r], float32 or wider."""
        ...

    def regroup(self, batch: int) -> Form:
        """The form of `batch` examples, each the sum of as many consecutive ones of this form.

        For layers whose leading axis is batch * positions. Raises ValueError if it does not divide.
        """
        ...

    def dense(self) -> Tensor:
        """The gradients themselves, [B, *shape]."""
        ...


@dataclass(frozen=True, eq=False)
class Outer(Form):
    """Sums of outer products over positions t, as Linear and convolution give them.

    Example b has the blocks sum_t left[b, g, t] (x) right[b, g, t], stacked over the groups g to
    [G * m, n] and viewed as `shape`.

    Args:
        left: [B, G, T, m], or [B, T, m] for one group, as it is then kept.
        right: [B, G, T, n], or [B, T, n].
        shape: of the parameter, [G * m, ...] with n numbers behind; (G * m, n) if not given.
        inputs: which factor holds the layer's activations; only SOGNS, which takes them for noise,
            wants to know. "left" for weights laid out [in, out], as in ConvTranspose.
        summed: the other factor, the output gradients, summed over positions, [B, G * size], where
            a bias has it ready; for SOGNS too.
    """

    left: Tensor
    right: Tensor
    shape: Shape | None = None
    inputs: Literal["left", "right"] = "right"
    summed: Tensor | None = None

    plans: ClassVar[Mapping[str, Plan]]

    def __post_init__(self) -> None:
        both = self.left, self.right
        left, right = (t[:, 0] if t.ndim == 4 and t.shape[1] == 1 else t for t in both)
        if left.ndim not in (3, 4) or left.shape[:-1] != right.shape[:-1]:
            raise ValueError(
                "Outer: expected left [B, T, m] and right [B, T, n], or [B, G, T, m] and "
                f"[B, G, T, n]; got {list(self.left.shape)} and {list(self.right.shape)}"
            )
        groups = left.shape[1] if left.ndim == 4 else 1
        matrix = (groups * left.shape[-1], right.shape[-1])
        shape = matrix if self.shape is None else tuple(self.shape)
        if (prod(shape[:1]), prod(shape[1:])) != matrix:
            raise ValueError(
                f"Outer: the factors give a gradient {list(matrix)}, which cannot be viewed as a "
                f"parameter of shape {list(shape)}"
            )
        if left.dtype != right.dtype:
            dtype = torch.promote_types(left.dtype, right.dtype)
            left, right = left.to(dtype), right.to(dtype)
        object.__setattr__(self, "left", left)
        object.__setattr__(self, "right", right)
        object.__setattr__(self, "shape", shape)

    @property
    def batch(self) -> int:  # noqa: D102
        return self.left.shape[0]

    @property
    def groups(self) -> int:
        """Blocks that an example's gradient has."""
        return self.left.shape[1] if self.left.ndim == 4 else 1

    def grouped(self) -> tuple[Tensor, Tensor]:
        """Both factors with an axis of groups, [B, G, T, m] and [B, G, T, n]."""
        left, right = (t if t.ndim == 4 else t[:, None] for t in (self.left, self.right))
        return left, right

    def _plan(self) -> Plan:
        return self.plans["direct"] if self.positions == 1 else plans.chosen(self)

    def sq_norms(self) -> Tensor:  # noqa: D102
        return self._plan().sq_norms(self)

    @property
    def adds_norms(self) -> bool:  # noqa: D102
        few = self.positions > 1 and self.batch * prod(self.shape) <= contractions.FEW
        return not few or self._plan() is not self.plans["direct"]

    def sum_sq_norms(self) -> Tensor:  # noqa: D102
        if self.adds_norms:
            return self.sq_norms().sum()
        return contractions.square_sum(contractions.outer_products(self.left, self.right))

    @property
    def signature(self) -> Hashable:  # noqa: D102
        positions, m = self.left.shape[-2:]
        sizes = self.groups, plans.bucket(positions), m, self.right.shape[-1]
        return *sizes, self.left.dtype, self.left.device

    @property
    def positions(self) -> int:
        """Positions that share the parameter."""
        return self.left.shape[-2]

    @property
    def sum_work(self) -> float:  # noqa: D102
        return self.positions * prod(self.shape)

    def sogns_sq_norms(self, *, unit_variance: bool = False) -> Tensor:  # noqa: D102
        dy, x = self.left, self.right
        if self.inputs == "left":
            dy, x = x, dy
        summed = self.summed
        if summed is not None and dy.ndim == 4:
            summed = summed.unflatten(1, (self.groups, -1))
        return contractions.sogns_sq_norms(dy, x, unit_variance=unit_variance, summed=summed)

    def sum(self, weights: Tensor | None = None) -> Tensor:  # noqa: D102
        left = self.left if weights is None else self.left * per_example(weights, self.left)
        left, right = _over_batch(left), _over_batch(self.right)
        return (left.mT @ right).reshape(self.shape)

    def sum_along(self, direction: Tensor, rows: Some = None) -> Tensor:  # noqa: D102
        along = _over_batch(wide(self.right)) @ wide(direction)  # [B * T] or [G, B * T]
        left = _over_batch(self.left)
        if left.ndim == 2:
            return wide(chosen(left, rows, 1)).mT @ along
        return chosen((wide(left).mT @ along[..., None]).flatten(), rows)

    def project(self, w: Tensor) -> Tensor:  # noqa: D102
        left, right = self.grouped()
        along = wide(right) @ (w if w.ndim == 2 else w[:, None])
        return (wide(left).mT @ along).flatten(1, 2)

    def project_back(self, f: Tensor) -> Tensor:  # noqa: D102
        left, right = self.grouped()
        along = wide(left) @ f.unflatten(1, (self.groups, -1))
        return (wide(right).mT @ along).sum(1)

    def regroup(self, batch: int) -> Outer:  # noqa: D102
        factors = (_regrouped(t, batch) for t in (self.left, self.right))
        if self.left.ndim == 4:
            factors = (t.transpose(1, 2) for t in factors)
        return Outer(*(t.flatten(-3, -2) for t in factors), self.shape, self.inputs)

    def dense(self) -> Tensor:  # noqa: D102
        return contractions.outer_products(self.left, self.right).reshape(-1, *self.shape)


def _directly(form: Outer) -> Tensor:
    return contractions.outer_sq_norms(form.left, form.right, path="direct")


def _by_gram(form: Outer) -> Tensor:
    return contractions.outer_sq_norms(form.left, form.right, path="gram")


def _gram_work(form: Outer) -> float:
    positions, m = form.left.shape[-2:]
    return form.groups * positions**2 * (m + form.right.shape[-1])


def _summed_too(form: Outer) -> tuple[Tensor, Tensor]:
    total, norms = contractions.outer_sum_and_sq_norms(form.left, form.right)
    return total.reshape(form.shape), norms


def _by_kernel(form: Outer) -> tuple[Tensor, Tensor]:
    total, norms = kernels.outer_sum_and_sq_norms(form.left, form.right)
    return total.reshape(form.shape), norms


def _kernel_work(form: Outer) -> float:
    """A little less than without a kernel, where there is one."""
    able = form.left.is_cuda and form.groups == 1 and form.left.dtype != torch.float64
    return 0.95 * form.sum_work if able and kernels.available(form.left.device) else inf


Outer.plans = {
    "direct": Plan(lambda form: form.sum_work, _directly, _summed_too),
    "gram": Plan(_gram_work, _by_gram),
    "kernel": Plan(_kernel_work, lambda form: _by_kernel(form)[1], _by_kernel),
}


@dataclass(frozen=True, eq=False)
class Rows(Form):
    """A few rows of a table, as Embedding gives them: row index[b, t] gets value[b, t].

    Args:
        index: integers [B, T] below shape[0]; equal ones in one example add.
        value: [B, T, d] with d = prod(shape[1:]).
        shape: of the parameter.
    """

    index: Tensor
    value: Tensor
    shape: Shape

    def __post_init__(self) -> None:
        if tuple(self.value.shape) != (*self.index.shape, prod(self.shape[1:])):
            raise ValueError(
                f"Rows: expected index [B, T] and value [B, T, {prod(self.shape[1:])}] for a "
                f"parameter of shape {list(self.shape)}; got {list(self.index.shape)} and "
                f"{list(self.value.shape)}"
            )
        object.__setattr__(self, "index", self.index.long())
        object.__setattr__(self, "shape", tuple(self.shape))

    @property
    def batch(self) -> int:  # noqa: D102
        return self.index.shape[0]

    def sq_norms(self) -> Tensor:  # noqa: D102
        return contractions.row_sq_norms(self.index, self.value)

    def sogns_sq_norms(self, *, unit_variance: bool = False) -> Tensor:  # noqa: D102
        return self.sq_norms()

    def sum(self, weights: Tensor | None = None) -> Tensor:  # noqa: D102
        value = wide(self.value)
        if weights is not None:
            value = value * per_example(weights, value)
        return _scattered(self.index, value, self.shape[0]).reshape(self.shape)

    def sum_along(self, direction: Tensor, rows: Some = None) -> Tensor:  # noqa: D102
        every = _scattered(self.index, wide(self.value) @ wide(direction), self.shape[0])
        return chosen(every, rows)

    def project(self, w: Tensor) -> Tensor:  # noqa: D102
        along = wide(self.value) @ w
        rows = along.new_zeros(len(along), self.shape[0], along.shape[2])
        return rows.scatter_add(1, self.index[..., None].expand_as(along), along)

    def project_back(self, f: Tensor) -> Tensor:  # noqa: D102
        at = self.index[..., None].expand(-1, -1, f.shape[2])
        return wide(self.value).mT @ f.gather(1, at)

    def regroup(self, batch: int) -> Rows:  # noqa: D102
        index, value = (_regrouped(t, batch).flatten(1, 2) for t in (self.index, self.value))
        return Rows(index, value, self.shape)

    def dense(self) -> Tensor:  # noqa: D102
        batch, rows = len(self.index), self.shape[0]
        at = self.index + rows * torch.arange(batch, device=self.index.device)[:, None]
        return _scattered(at, self.value, batch * rows).reshape(batch, *self.shape)


@dataclass(frozen=True, eq=False)
class Dense(Form):
    """The gradients themselves, [B, *shape]: for biases, scales and other small parameters."""

    grad: Tensor

    @property
    def shape(self) -> Shape:  # type: ignore[override]  # noqa: D102
        return tuple(self.grad.shape[1:])

    @property
    def batch(self) -> int:  # noqa: D102
        return self.grad.shape[0]

    def sq_norms(self) -> Tensor:  # noqa: D102
        return squares(self.grad[:, None].flatten(1), 1)

    @property
    def adds_norms(self) -> bool:  # noqa: D102
        return False

    def sum_sq_norms(self) -> Tensor:  # noqa: D102
        return contractions.square_sum(self.grad)

    def sogns_sq_norms(self, *, unit_variance: bool = False) -> Tensor:  # noqa: D102
        return self.sq_norms()

    def sum(self, weights: Tensor | None = None) -> Tensor:  # noqa: D102
        grad = wide(self.grad)
        return (grad if weights is None else grad * per_example(weights, grad)).sum(0)

    def sum_along(self, direction: Tensor, rows: Some = None) -> Tensor:  # noqa: D102
        every = self.sum().reshape(prod(self.shape[:1]), prod(self.shape[1:]))
        return chosen(every, rows) @ wide(direction)

    def project(self, w: Tensor) -> Tensor:  # noqa: D102
        return self._matrices() @ w

    def project_back(self, f: Tensor) -> Tensor:  # noqa: D102
        return self._matrices().mT @ f

    def _matrices(self) -> Tensor:  # [B, shape[0], n]
        return wide(self.grad).reshape(self.batch, prod(self.shape[:1]), prod(self.shape[1:]))

    def regroup(self, batch: int) -> Dense:  # noqa: D102
        return Dense(wide(_regrouped(self.grad, batch)).sum(1))

    def dense(self) -> Tensor:  # noqa: D102
        return self.grad


@dataclass(frozen=True, eq=False)
class Joined(Form):
    """The uses of one parameter, whose gradients add; made by `+`."""

    parts: tuple[Form, ...]

    def __post_init__(self) -> None:
        if len({part.shape for part in self.parts}) > 1:
            raise ValueError(
                "forms of one parameter must have its shape; got "
                + " and ".join(f"{type(p).__name__} {list(p.shape)}" for p in self.parts)
            )

    @property
    def shape(self) -> Shape:  # type: ignore[override]  # noqa: D102
        return self.parts[0].shape

    @property
    def batch(self) -> int:  # noqa: D102
        return self.parts[0].batch

    def uses(self) -> tuple[Form, ...]:  # noqa: D102
        return self.parts

    def sq_norms(self) -> Tensor:  # noqa: D102
        parts = _merged(self.parts)
        squared = [part.sq_norms() for part in parts]
        crossed = [2 * inner(a, b) for i, a in enumerate(parts) for b in parts[i + 1 :]]
        return torch.stack(squared + crossed).sum(0)  # unlike +, refuses another number of examples

    def sogns_sq_norms(self, *, unit_variance: bool = False) -> Tensor:  # noqa: D102
        parts = [part.sogns_sq_norms(unit_variance=unit_variance) for part in self.parts]
        return torch.stack(parts).sum(0)

    def sum(self, weights: Tensor | None = None) -> Tensor:  # noqa: D102
        return sum(part.sum(weights) for part in self.parts)

    def sum_along(self, direction: Tensor, rows: Some = None) -> Tensor:  # noqa: D102
        return sum(part.sum_along(direction, rows) for part in self.parts)

    def project(self, w: Tensor) -> Tensor:  # noqa: D102
        return sum(part.project(w) for part in _merged(self.parts))

    def project_back(self, f: Tensor) -> Tensor:  # noqa: D102
        return sum(part.project_back(f) for part in _merged(self.parts))

    def regroup(self, batch: int) -> Joined:  # noqa: D102
        return Joined(tuple(part.regroup(batch) for part in self.parts))

    def dense(self) -> Tensor:  # noqa: D102
        return sum(part.dense() for part in self.parts)


def chosen(t: Tensor, rows: Some, axis: int = 0) -> Tensor:
    """`rows` of an axis of t."""
    if rows is None:
        return t
    if isinstance(rows, slice):
        return t[(slice(None),) * axis + (rows,)]
    return t.index_select(axis, rows)


def inner(a: Form, b: Form) -> Tensor:
    """<a_b, b_b> for each example, [B], of the forms of one parameter; differentiable in both."""
    (a,), (b,) = a.uses(), b.uses()
    if isinstance(b, Outer) and not isinstance(a, Outer):
        a, b = b, a
    if isinstance(a, Outer) and isinstance(b, Outer) and a.groups == b.groups:
        return contractions.outer_inner(*a.grouped(), *b.grouped())
    if isinstance(a, Outer) and isinstance(b, Rows) and a.groups == 1:
        return contractions.outer_rows_inner(a.left, a.right, b.index, b.value)
    if isinstance(a, Rows) and isinstance(b, Rows):
        return contractions.rows_inner(a.index, a.value, b.index, b.value)
    product = wide(a.dense()) * wide(b.dense())
    return product.reshape(len(product), -1).sum(1)


def _merged(parts: tuple[Form, ...]) -> list[Form]:
    """The same gradients with one `Outer` (for each number of groups), one `Rows` and one `Dense`.

    Joining along the positions is exact, and cheaper than the cross terms that it saves.
    """
    outers, rows, dense = ([p for p in parts if isinstance(p, k)] for k in (Outer, Rows, Dense))
    merged: list[Form] = []
    for groups in sorted({p.groups for p in outers}):
        uses = [p for p in outers if p.groups == groups]
        factors = torch.cat([p.left for p in uses], -2), torch.cat([p.right for p in uses], -2)
        merged.append(Outer(*factors, uses[0].shape))
    if rows:
        index, value = torch.cat([p.index for p in rows], 1), torch.cat([p.value for p in rows], 1)
        merged.append(Rows(index, value, rows[0].shape))
    if dense:
        merged.append(Dense(torch.stack([wide(p.grad) for p in dense]).sum(0)))
    return merged + [p for p in parts if not isinstance(p, (Outer, Rows, Dense))]


def _over_batch(t: Tensor) -> Tensor:  # [B, T, m] -> [B * T, m], [B, G, T, m] -> [G, B * T, m]
    return t.flatten(0, 1) if t.ndim == 3 else t.transpose(0, 1).flatten(1, 2)


def _regrouped(t: Tensor, batch: int) -> Tensor:  # [N, ...] -> [batch, N / batch, ...]
    if len(t) % batch:
        raise ValueError(f"{len(t)} rows cannot be shared out equally among {batch} examples")
    return t.unflatten(0, (batch, -1))


def _scattered(index: Tensor, value: Tensor, rows: int) -> Tensor:
    """Sum over [B, T] of `value` [B, T, ...] into `rows` rows."""
    value = value.flatten(0, 1)
    return value.new_zeros(rows, *value.shape[1:]).index_add(0, index.flatten(), value)
