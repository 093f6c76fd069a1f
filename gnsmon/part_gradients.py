"""The gradient of a batch and products with its Hessian, on a model that is left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.attention import SDPBackend, sdpa_kernel

from gnsmon.collectors.shards import is_sharded
from gnsmon.norms.contractions import wide, wider
from gnsmon.norms.oracles import left_untouched, named_tensors

Loss = Callable[[Any, Any], Tensor]
Vector = list[Tensor]  # one tensor for each trainable parameter
ONCE = "torch::autograd::Error"  # the node that stands for what has no second derivative
# In PyTorch's words, the last those of compiled models.
NOT_TWICE = ("is not implemented", "twice", "double backward", "create_graph=False")


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name; raises ValueError on none, and on shards."""
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError("model: expected trainable parameters, and all of them are frozen")
    if sharded := [name for name, p in found.items() if is_sharded(p)]:
        raise ValueError(
            f"model: expected whole parameters, and {sharded[0]} is in the shards of fully_shard; "
            "measure a copy of the model in one process"
        )
    return found


def count_examples(batches: Sequence[Any]) -> list[int]:
    """The number of examples in each batch, by the first axis of its tensors.

    Raises:
        ValueError: on a batch without tensors, or whose tensors disagree.
    """
    counts = []
    for i, batch in enumerate(batches):
        sizes = {len(t) for t in named_tensors(batch).values()}
        if len(sizes) != 1 or 0 in sizes:
            raise ValueError(
                f"batch {i}: expected tensors with the examples on the first axis, all equally "
                f"many and one at least; got first axes of {sorted(sizes)}"
            )
        counts.append(sizes.pop())
    return counts


def gradient(model: nn.Module, loss: Loss, batch: Any, *, seed: int) -> Vector:
    """The gradient of `loss(model, batch)`; a forward that draws random numbers starts at `seed`.

    Raises:
        ValueError: where the loss is not a scalar with a graph, or the gradient is not finite.
    """
    of = list(trainable(model).values())
    with _evaluated(model, loss, batch, seed) as value:
        grads = torch.autograd.grad(value, of, allow_unused=True)
    return _finite(_filled(grads, of), "gradient")


def hessian_product(
    model: nn.Module, loss: Loss, batch: Any, vector: Vector, *, seed: int
) -> Vector:
    """H v, H the Hessian of `loss(model, batch)`, by a backward through the backward.

    (Pearlmutter 1994, "Fast exact multiplication by the Hessian".) Attention is asked to run its
    "math" kernel, as the others have no second derivative.

    Raises:
        ValueError: where the loss is not a scalar with a graph, or cannot be differentiated twice,
            or the product is not finite.
    """
    of = list(trainable(model).values())
    with sdpa_kernel(SDPBackend.MATH), _evaluated(model, loss, batch, seed) as value, _twice():
        # With a factor that has a gradient, what @once_differentiable gives back is told by a node
        # of the graph; without it, it is silently taken for a constant (torch 2.13).
        value = value * torch.ones_like(value, requires_grad=True)
        grads = torch.autograd.grad(value, of, create_graph=True, allow_unused=True)
        pairs = [
            (grad, v)
            for grad, v in zip(grads, vector, strict=True)
            if grad is not None and grad.requires_grad  # else that part of H is zero
        ]
        if not pairs:
            return [torch.zeros_like(p) for p in of]
        outputs, vectors = zip(*pairs, strict=True)
        if any(node.name() == ONCE for node in _nodes(outputs)):
            raise ValueError(
                "loss: expected one that can be differentiated twice, for products with its "
                "Hessian, and a torch.autograd.Function in it is marked @once_differentiable; "
                "take an implementation without it"
            )
        products = torch.autograd.grad(outputs, of, vectors, allow_unused=True)
    return _finite(_filled(products, of), "product with the Hessian")


def zeros(of: Iterable[Tensor]) -> Vector:
    """Where a sum begins, float32 or wider: one of many parts comes to rest in half precision."""
    return [torch.zeros_like(p, dtype=wider(p.dtype)) for p in of]


def inner(a: Vector, b: Vector) -> Tensor:
    """<a, b> over all parameters, in float32 or wider."""
    return torch.stack([inner_of(x, y) for x, y in zip(a, b, strict=True)]).sum()


def inner_of(x: Tensor, y: Tensor) -> Tensor:
    """<x, y> of two tensors of one shape, in float32 or wider."""
    return (wide(x) * wide(y)).sum()


@contextmanager
def _evaluated(model: nn.Module, loss: Loss, batch: Any, seed: int) -> Iterator[Tensor]:
    with left_untouched(model), torch.enable_grad():
        torch.manual_seed(seed)
        value = loss(model, batch)
        if not isinstance(value, Tensor) or value.ndim or not value.requires_grad:
            got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
            if isinstance(value, Tensor) and not value.ndim:
                got = "a tensor without a graph"
            raise ValueError(
                "loss(model, batch): expected a scalar tensor with its graph, the mean over the "
                f"batch's examples; got {got}"
            )
        yield value


@contextmanager
def _twice() -> Iterator[None]:
    """Says what to do where PyTorch cannot differentiate what is inside twice."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in NOT_TWICE):
            raise
        raise ValueError(
            "loss: expected one that can be differentiated twice, for products with its "
            f"Hessian, and PyTorch says: {error}. Of attention take the math kernel "
            "(torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or attn_implementation='eager' "
            "in transformers), of a compiled model the one before torch.compile"
        ) from error


def _finite(vector: Vector, what: str) -> Vector:
    if not all(bool(v.isfinite().all()) for v in vector):
        raise ValueError(
            f"loss(model, batch): its {what} has infinite or undefined values; leave out the "
            "batches that overflow, or measure in a wider precision"
        )
    return vector


def _nodes(outputs: Sequence[Tensor]) -> Iterator[Node]:
    """The nodes of the graph that the outputs come of."""
    stack, seen = [output.grad_fn for output in outputs], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(before for before, _ in node.next_functions)
            yield node


def _filled(grads: Sequence[Tensor | None], of: Sequence[Tensor]) -> Vector:
    return [
        torch.zeros_like(p) if g is None else g.detach().to_dense() if g.is_sparse else g.detach()
        for g, p in zip(grads, of, strict=True)
    ]
