"""What a call of the model tells of its batch, and the hooks that tell it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Batch(NamedTuple):
    """The batch in the arguments of a model's forward."""

    carriers: list[Tensor]  # inputs with an axis of examples
    size: int | None  # examples; None without a carrier
    tokens: int | None  # where the inputs are indices [batch, positions]


def read_batch(args: tuple[Any, ...], kwargs: Mapping[str, Any], batch_dim: int) -> Batch:
    """The batch, as large as the axis `batch_dim` of the first tensor that has one."""
    carriers = [t for t in tensors_in((args, kwargs)) if t.ndim > batch_dim and t.numel()]
    ids = [t for t in carriers if t.ndim == 2 and not t.is_floating_point()]
    return Batch(
        carriers,
        carriers[0].shape[batch_dim] if carriers else None,
        ids[0].numel() if ids else None,
    )


class Announce:
    """A forward (pre-)hook: tells `heard` of a training forward of `model`, not of its copies."""

    def __init__(self, model: nn.Module, heard: Callable[..., None]):
        self.model, self.heard = model, heard

    def __call__(self, module: nn.Module, *call: Any) -> None:
        """Called by the module; `call` is what the kind of hook gives."""
        if module is self.model and torch.is_grad_enabled() and not is_transformed():
            self.heard(*call)

    def __reduce__(self) -> tuple[Any, ...]:
        return Inert, ()


class Inert:
    """What a copy of a watched model has in place of hooks: it must not feed this monitor."""

    def __call__(self, *_: Any) -> None:
        """Nothing."""


def given_on(y: Tensor, *, alias: bool) -> Tensor:
    """A layer's output as the output of a tap: another tensor of the same numbers.

    With `alias` it shares its memory where that is possible, and is yet no view: that would forbid
    in-place operations on it, such as ReLU(inplace=True).
    """
    if torch.compiler.is_compiling() or not alias:
        return y.clone()
    return torch.ops.aten._unsafe_view.default(y, y.shape)


def in_backward() -> bool:
    """Whether a backward is under way in this thread."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def is_transformed() -> bool:
    """Whether a transform runs the model, under which an autograd.Function needs more rules."""
    return not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch.jit.is_tracing()
    )


_NOTHING = nullcontext()


def without_gradients() -> AbstractContextManager[Any]:
    """No gradients are recorded; as in most backwards, where to say so again would take a while."""
    record = torch.compiler.is_compiling() or torch.is_grad_enabled()
    return torch.no_grad() if record else _NOTHING


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast switched off on the device; to enter it costs more than a small layer's work."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _NOTHING


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested arguments, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.utils.rnn.PackedSequence):
        raise ValueError("examples cannot be told apart in a PackedSequence; pass padded sequences")
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))
