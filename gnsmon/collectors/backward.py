"""When a backward begins and has ended, and whether the gradients before it were thrown away."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gnsmon.collectors.shards import local
from gnsmon.collectors.step import Skipped
from gnsmon.norms.inputs import without_autocast


class Backwards:
    """Watches the backwards between two optimizer steps, for a collector whose hooks fire in them.

    Args:
        model: whose `.grad` are watched.
        ended: called when an outermost backward has ended: `.grad` is then whole, and neither
            clipped nor unscaled.
        discarded: called when the gradients of the backwards so far turn out to be thrown away.
        strict: raise what goes wrong instead of keeping it as the `fault` of the measurement.
    """

    own: ClassVar[set[int]] = set()  # graph tasks of the backwards that a collector itself runs

    def __init__(
        self,
        model: nn.Module,
        *,
        ended: Callable[[], None],
        discarded: Callable[[], None],
        strict: bool,
    ):
        self._device, self._strict = device_of(model), strict
        self._ended, self._discarded = ended, discarded
        self._sentinel = _Sentinel(model)
        self.clear()

    def clear(self) -> None:
        """Forget everything since the last optimizer step."""
        self.fault: Skipped | None = None
        self.tasks: set[int] = set()
        self._running: set[int] = set()
        self._forwards = 0
        self._sentinel.forget()

    def under_way(self, forwards: int) -> bool:
        """A hook fired in a backward, after so many forwards; whether it is one of training."""
        task = torch._C._current_graph_task_id()
        if task in self.own:
            return False
        if task in self._running:
            return True
        if self._running and forwards > self._forwards:
            self._running.clear()
            self.fault = Skipped("backward failed", "a backward pass ended in an exception")
        if not self._running:
            self.guarded(self._look_back)
        self._forwards = forwards
        self._running.add(task)
        self.tasks.add(task)
        # A queued callback may run before those of DDP; one that it queues runs after them.
        queue = torch.autograd.Variable._execution_engine.queue_callback
        try:
            queue(lambda: queue(lambda: self._end(task)))
        except (AssertionError, RuntimeError) as error:  # compiled autograd has no such queue
            self.fault = Skipped("fault", f"the end of backward cannot be seen: {error}")
        return True

    def guarded(self, fn: Callable[..., None], *args: Any) -> None:
        """`fn(*args)`, exactly and surviving."""
        with self.surviving(), self.exactly():
            fn(*args)

    @contextmanager
    def exactly(self) -> Iterator[None]:
        """Without gradients, and without the autocast that the training loop may be inside of."""
        with torch.no_grad(), without_autocast(self._device):
            yield

    @contextmanager
    def surviving(self) -> Iterator[None]:
        """Unless strict, a failure is kept and does not reach the user."""
        try:
            yield
        except Exception as error:
            if self._strict:
                raise
            self.fault = Skipped("fault", f"{type(error).__name__}: {error}")

    def _end(self, task: int) -> None:
        """A reentrant checkpoint ends a backward of its own inside the outer one: not the end."""
        self._running.discard(task)
        if not self._running:
            self.guarded(self._whole)

    def _look_back(self) -> None:
        """Asked where a backward begins: at its end DDP may have moved `.grad` into its buckets."""
        if self._sentinel.was_thrown_away():
            self._discarded()

    def _whole(self) -> None:
        self._ended()
        self._sentinel.remember()


def device_of(model: nn.Module) -> torch.device:
    """That of its first parameter, or the CPU without one."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


Fingerprint = tuple[int, int] | None


def fingerprint(grad: Tensor | None) -> Fingerprint:
    """Another one after anything was added to `grad`, in place or not."""
    return None if grad is None else (id(grad), grad._version)


class _Sentinel:
    """Watches one small `.grad` to tell whether all were thrown away between two backwards."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._watched: nn.Parameter | None = None
        self.forget()

    def forget(self) -> None:
        """Watch nothing."""
        self._seen: tuple[nn.Parameter, Tensor, int] | None = None

    def remember(self) -> None:
        """Take note of the smallest gradient as it is now."""
        if self._watched is None or not _is_dense(self._watched):
            dense = [p for p in self._model.parameters() if _is_dense(p)]
            self._watched = min(dense, key=lambda p: p.numel(), default=None)
        p = self._watched
        self._seen = None if p is None or p.grad is None else (p, p.grad, p.grad._version)

    def was_thrown_away(self) -> bool:
        """Whether zero_grad() came since, of either kind, before anything was added."""
        if self._seen is None:
            return False
        p, seen, version = self._seen
        if p.grad is not seen:  # the same values elsewhere: DDP has rebuilt its buckets
            return p.grad is None or not torch.equal(local(p.grad), local(seen))
        return seen._version != version and not bool(local(seen).any())


def _is_dense(p: nn.Parameter) -> bool:
    """Whether it has a gradient with a number in it, here and not sparse."""
    return p.grad is not None and p.grad.layout == torch.strided and bool(local(p.grad).numel())
