"""Float64 for all that a forward does, also where it creates or casts to something narrower."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CASTS = {Tensor.float, Tensor.half, Tensor.bfloat16}
IN_PLACE = re.compile(r"__set(item)?__|__i\w+__|\w*[^_]_").fullmatch  # a copy would be changed


@contextmanager
def in_float64() -> Iterator[None]:
    """New tensors, casts and mixed arguments are float64 inside; nothing outside is changed."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widened():
            yield
    finally:
        torch.set_default_dtype(before)


def backward(loss: Tensor) -> None:
    """`loss.backward()` with `in_float64` in force where layers run again in it.

    The public functions call the engine with every mode put aside (torch 2.13).
    """
    if loss.requires_grad:
        engine: Any = torch.autograd.Variable._execution_engine
        ones = (torch.ones_like(loss),)
        engine.run_backward(
            (loss,), ones, False, False, (), allow_unreachable=True, accumulate_grad=True
        )


class _Widened(TorchFunctionMode):
    """Float32 would hide an error behind its rounding, and layers refuse mixed types."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        if func.__name__ == "__get__":  # an attribute; most calls are
            return func(*args, **named)
        floats = {t.dtype for t in _tensors([*args, *named.values()]) if t.is_floating_point()}
        mixed = len(floats) > 1 and torch.float64 in floats and not IN_PLACE(func.__name__)
        func = Tensor.double if func in CASTS else func
        return func(
            *(_wide(x, tensors=mixed) for x in args),
            **{name: _wide(x, tensors=mixed) for name, x in named.items()},
        )


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    for x in arguments:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from _tensors(x)


def _wide(x: Any, *, tensors: bool) -> Any:
    if isinstance(x, torch.dtype):
        return torch.float64 if x.is_floating_point else x
    if tensors and isinstance(x, Tensor):
        return x.double() if x.is_floating_point() else x
    if tensors and type(x) in (list, tuple):
        return type(x)(_wide(item, tensors=True) for item in x)
    return x
