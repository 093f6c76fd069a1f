"""Slow, obvious per-example gradients, and the random-sign estimate: what every rule must equal."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gnsmon.norms.contractions import wide

Loss = Callable[[Any, Any], Tensor]


def per_example_sq_norms(
    model: nn.Module, loss: Loss, batch: Any, *, parameters: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Squared norm of every example's gradient, parameter name -> [B] in float64, one by one.

    Args:
        model: left as it is: gradients, buffers, random streams and modes.
        loss: `loss(model, batch)` -> scalar, called on batches of one example.
        batch: a tensor or nested tuples, lists and mappings of tensors, examples on the first axis;
            anything else, scalar tensors included, is passed on as it is.
        parameters: names of `model.named_parameters()`; all trainable ones by default. A tied
            parameter has its first name only.

    Raises:
        ValueError: when tensors of the batch disagree on its size, or a name is unknown or frozen.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
        >>> per_example_sq_norms(model, lambda model, x: model(x).mean(), x)
        {'weight': tensor([ 1., 25.], dtype=torch.float64)}
    """
    rows = [
        {name: grad.double().square().sum() for name, grad in grads.items()}
        for grads in per_example_gradients(model, loss, batch, parameters=parameters)
    ]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def per_example_gradients(
    model: nn.Module,
    loss: Loss,
    batch: Any,
    *,
    parameters: Collection[str] | None = None,
    seed: int | None = None,
) -> Iterator[dict[str, Tensor]]:
    """One example after the other, its gradient: parameter name -> tensor of its shape.

    Arguments and errors as `per_example_sq_norms`. Every example sees the same random stream; with
    a seed, example i that of `seed + i`.
    """
    chosen = _trainable(model, parameters)
    sizes = {len(t) for t in named_tensors(batch).values()}
    if len(sizes) != 1:
        raise ValueError(
            "expected tensors with the examples on the first axis, all equally many; got first "
            f"axes of {sorted(sizes)}"
        )
    for i in range(sizes.pop()):
        with left_untouched(model):
            if seed is not None:
                torch.manual_seed(seed + i)
            grads = _gradients(loss(model, examples(batch, i, i + 1)), chosen)
        yield grads


def random_sign_sq_norms(
    model: nn.Module, losses: Tensor, *, generator: torch.Generator, weights: Tensor | None = None
) -> dict[str, Tensor]:
    """Unbiased estimate of sum_j |w_j g_j|^2, parameter name -> scalar, by one more backward.

    |z|^2 of z = grad of sum_j e_j w_j loss_j with independent signs e_j = +-1: E e_i e_j = 0 takes
    away the cross terms, for any architecture. The relative standard deviation is about
    sqrt(2 / d_eff), d_eff = tr(Sigma)^2 / tr(Sigma^2).

    Args:
        model: its trainable parameters are estimated; their `.grad` stays as it is.
        losses: the loss of each example, [B], with its graph, which is kept.
        generator: draws the signs, so that training's random stream does not notice.
        weights: w [B]; ones by default.
    """
    signs = random_signs(losses, generator)
    return signed_sq_norms(model, losses, signs if weights is None else signs * weights)


def random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent +1 and -1, equally likely, of the shape and type of `like`."""
    signs = torch.randint(2, like.shape, generator=generator, device=generator.device) * 2 - 1
    return signs.to(like)


def signed_sq_norms(model: nn.Module, losses: Tensor, signs: Tensor) -> dict[str, Tensor]:
    """|grad of sum_j signs_j losses_j|^2, parameter name -> scalar, in float32 or wider."""
    if losses.ndim != 1:
        raise ValueError(f"expected the loss of each example, [B]; got shape {list(losses.shape)}")
    grads = _gradients((signs * losses).sum(), _trainable(model, None), retain_graph=True)
    return {name: wide(grad).square().sum() for name, grad in grads.items()}


def _gradients(loss: Tensor, of: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    grads = torch.autograd.grad(loss, list(of.values()), allow_unused=True, **options)
    return {
        name: torch.zeros_like(p) if grad is None else grad.to_dense() if grad.is_sparse else grad
        for (name, p), grad in zip(of.items(), grads, strict=True)
    }


def _trainable(model: nn.Module, names: Collection[str] | None) -> dict[str, Tensor]:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if names is None:
        return trainable
    if unknown := [name for name in names if name not in trainable]:
        raise ValueError(f"not trainable parameters of this model: {', '.join(unknown)}")
    return {name: trainable[name] for name in names}


@contextmanager
def left_untouched(model: nn.Module) -> Iterator[None]:
    """Puts back the model's buffers and the random streams, of the CPU and of its devices."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for buffer, before in buffers:
            buffer.data.copy_(before)  # .data: a graph that has saved it is not to count a change


def named_tensors(batch: Any, path: str = "") -> dict[str, Tensor]:
    """The batch's tensors with a first axis, by their keys and places: `labels`, `0.mask`."""
    if isinstance(batch, Tensor):
        return {path: batch} if batch.ndim else {}
    if isinstance(batch, (tuple, list)):
        batch = dict(enumerate(batch))
    found: dict[str, Tensor] = {}
    for key, item in batch.items() if isinstance(batch, Mapping) else ():
        found |= named_tensors(item, f"{path}.{key}" if path else str(key))
    return found


def examples(batch: Any, start: int, stop: int) -> Any:
    """Examples of the batch, as a smaller batch."""
    return map_tensors(lambda t: t[start:stop], batch)


def map_tensors(fn: Callable[[Tensor], Any], batch: Any) -> Any:
    """The batch with `fn` of each tensor that has a first axis in its place."""
    if isinstance(batch, Tensor):
        return fn(batch) if batch.ndim else batch
    if isinstance(batch, Mapping):
        return {key: map_tensors(fn, item) for key, item in batch.items()}
    if isinstance(batch, (tuple, list)):
        items = [map_tensors(fn, item) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return batch
