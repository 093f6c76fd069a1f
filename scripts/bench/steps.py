"""Training steps that also find the examples' gradient norms: bare, by gnsmon, and by its peers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import gnsmon
from bench.workloads import Batch, Workload
from gnsmon.norms.contractions import square_sum

UNMEASURED = 10**9  # as every=: one step in this many is measured, the first


@dataclass(frozen=True)
class Norms:
    """What a step has found."""

    mean: float  # over the examples, of the squared norm
    covered: list[str]  # parameters in it


@dataclass(frozen=True)
class Step:
    """zero_grad, forward, backward, SGD; and what the last one found, None without examples."""

    run: Callable[[], None]
    norms: Callable[[], Norms | None]
    model: nn.Module


def bare(load: Workload, *, microbatches: int = 1) -> Step:
    """The training step alone."""
    model, batch = load.build()
    return Step(_training(load, model, batch, microbatches), lambda: None, model)


def monitored(load: Workload, *, microbatches: int = 1, **settings: Any) -> Step:
    """The step under gnsmon, which measures each one unless the settings say otherwise."""
    model, batch = load.build()
    optimizer = _sgd(model)
    settings = {"every": 1, "run_dir": tempfile.mkdtemp(prefix="gnsmon-bench-"), **settings}
    gns = gnsmon.attach(model, optimizer, **settings)

    def norms() -> Norms | None:
        reading = gns.reading
        if gns.config.every == UNMEASURED:
            return None
        if reading is None or (gns.config.every == 1 and reading.step != gns.step - 1):
            raise RuntimeError(f"the last step was not measured: {dict(gns.skipped)}")
        if abs(reading.examples * reading.raw.sum_sq_weights - 1) > 1e-6:
            return None  # the parts are microbatches
        return Norms(reading.raw.parts_sq_norm * reading.examples, gns.coverage().covered)

    run = _training(load, model, batch, microbatches, optimizer=optimizer, losses=gns.losses)
    return Step(run, norms, model)


class _Squares(torch.autograd.Function):
    """The identity on a layer's output; adds |x|² and |dy|² to `found`, as scalars."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, found: list[Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.found = found
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        ctx.found += [square_sum(t) for t in (*ctx.saved_tensors, dy) if t.is_floating_point()]
        return dy, None, None


def hooks_alone(load: Workload) -> Step:
    """A floor: all that any method reads, once, and nothing made of it."""
    model, batch = load.build()
    found: list[Tensor] = []
    for layer in model.modules():
        if any(True for _ in layer.parameters(recurse=False)):
            layer.register_forward_hook(lambda _, x, y: _Squares.apply(y, x[0], found))
    training = _training(load, model, batch)

    def run() -> None:
        training()
        torch.stack(found).sum().item()
        found.clear()

    return Step(run, lambda: None, model)


def opacus(load: Workload) -> Step:
    """The first pass of ghost clipping, without the second."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    model, batch = load.build()
    for layer in model.modules():
        if isinstance(layer, nn.Embedding):  # Opacus calls view() on the indices
            layer.register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
    wrapped = GradSampleModuleFastGradientClipping(model, loss_reduction="mean")
    training = _training(load, wrapped, batch)

    def run() -> None:
        training()
        wrapped.get_norm_sample()

    def norms() -> Norms:
        each = wrapped.per_sample_gradient_norms.double()
        return Norms(each.square().mean().item(), [n for n, _ in model.named_parameters()])

    return Step(run, norms, model)


def backpack(load: Workload) -> Step:
    """BatchL2Grad, on the layers that it has."""
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    model, batch = load.build()
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.Embedding)):
            extend(layer)
    optimizer = _sgd(model)

    def run() -> None:
        optimizer.zero_grad()
        loss = load.losses(model, batch).mean()
        with backpack(BatchL2Grad()):
            loss.backward()
        optimizer.step()

    def norms() -> Norms:
        found = {n: p.batch_l2 for n, p in model.named_parameters() if hasattr(p, "batch_l2")}
        total = sum(l2.double().sum().item() for l2 in found.values())
        return Norms(total * len(batch[0]), list(found))  # of g_b / B each

    return Step(run, norms, model)


def per_example_vmap(load: Workload) -> Step:
    """torch.func: vmap of grad, every example's gradient in memory."""
    model, batch = load.build()
    optimizer = _sgd(model)
    parameters = dict(model.named_parameters())
    found: list[Tensor] = []

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        def call(x: Tensor) -> Tensor:
            return functional_call(model, values, (x,))

        return load.losses(call, (x[None], y[None]))[0]

    of_each = vmap(grad(loss), in_dims=(None, 0, 0))

    def run() -> None:
        optimizer.zero_grad()
        grads = of_each({n: p.detach() for n, p in parameters.items()}, *batch)
        found[:] = [g.square().flatten(1).sum(1) for g in grads.values()]  # [B] each
        for name, p in parameters.items():
            p.grad = grads[name].mean(0)
        optimizer.step()

    def norms() -> Norms:
        return Norms(torch.stack(found).double().sum(0).mean().item(), list(parameters))

    return Step(run, norms, model)


def one_by_one(load: Workload) -> Step:
    """A loop over the batch: microbatches of one example."""
    model, batch = load.build()
    optimizer = _sgd(model)
    parameters = dict(model.named_parameters())
    found: list[Tensor] = []
    examples = len(batch[0])

    def run() -> None:
        optimizer.zero_grad()
        found.clear()
        for x, y in zip(*batch, strict=True):
            loss = load.losses(model, (x[None], y[None])).mean()
            grads = torch.autograd.grad(loss / examples, list(parameters.values()))
            found.extend(g.square().sum() for g in grads)
            for p, g in zip(parameters.values(), grads, strict=True):
                p.grad = g if p.grad is None else p.grad.add_(g)
        optimizer.step()

    def norms() -> Norms:
        return Norms(torch.stack(found).double().sum().item() * examples, list(parameters))

    return Step(run, norms, model)


PEERS: dict[str, tuple[Callable[[Workload], Step], str]] = {  # with the package that it is from
    "Opacus, ghost norms": (opacus, "opacus"),
    "BackPACK, BatchL2Grad": (backpack, "backpack-for-pytorch"),
    "torch.func, vmap(grad)": (per_example_vmap, "torch"),
    "loop of size 1": (one_by_one, "torch"),
}


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    """With a learning rate of 0: the work is the same, and so are the norms of every step."""
    return torch.optim.SGD(model.parameters(), lr=0.0)


def _training(
    load: Workload,
    model: nn.Module,
    batch: Batch,
    microbatches: int = 1,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    losses: Callable[[Tensor], None] = lambda losses: None,
) -> Callable[[], None]:
    optimizer = optimizer or _sgd(model)
    pieces = list(zip(*(t.chunk(microbatches) for t in batch), strict=True))
    # Else a graph that was compiled without hooks is taken for a model that has some.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    called = torch.compile(model) if load.compiled else model

    def run() -> None:
        optimizer.zero_grad()
        for piece in pieces:
            of_each = load.losses(called, piece)
            losses(of_each)
            (of_each.mean() / microbatches).backward()
        optimizer.step()

    return run
