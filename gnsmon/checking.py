"""Proof on the user's own model: its layers' norms against one example at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from gnsmon.collectors.per_example import PerExample
from gnsmon.collectors.step import Skipped
from gnsmon.norms.oracles import per_example_gradients
from gnsmon.norms.rules import coupling

TOLERANCE = 1e-8  # relative, in float64


@dataclass(frozen=True)
class Row:
    """What was found of one trainable parameter."""

    name: str
    layer: str  # type of the module that owns it
    numbers: int
    error: float | None  # relative, of the sum of squared norms against brute force
    sum_error: float | None  # relative, of the examples' sum along a random direction against .grad
    sogns: float | None  # SOGNS over exact
    reason: str | None  # why it is left out


@dataclass(frozen=True)
class Check:
    """The proof's outcome; prints as a table and a verdict."""

    rows: list[Row]
    examples: int

    @property
    def max_error(self) -> float:
        """The largest relative error of a covered parameter; 0 where none is covered."""
        found = [e for row in self.rows for e in (row.error, row.sum_error) if e is not None]
        return max(found, default=0.0)

    @property
    def fraction(self) -> float:
        """Covered share of the numbers in trainable parameters."""
        covered = sum(row.numbers for row in self.rows if row.reason is None)
        return covered / max(sum(row.numbers for row in self.rows), 1)

    @property
    def passed(self) -> bool:
        """Whether something is covered and all that is covered is right."""
        return self.fraction > 0 and self.max_error < TOLERANCE

    @property
    def verdict(self) -> str:
        """One sentence."""
        if not self.fraction:
            return "FAILED: no parameter is covered"
        if not self.passed:
            worst = max(self.rows, key=lambda row: max(row.error or 0, row.sum_error or 0))
            return f"FAILED: {worst.name} is off by {self.max_error:.1e}, allowed {TOLERANCE:.0e}"
        left_out = "" if self.fraction == 1 else "; the others are left out of both norms"
        return (
            f"passed: {self.fraction:.2%} of the trainable parameters are covered and right to "
            f"{self.max_error:.1e} over {self.examples} examples{left_out}"
        )

    def __rich__(self) -> RenderableType:
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("parameter", overflow="fold")
        table.add_column("layer")
        for heading in ("numbers", "error", "sum", "SOGNS"):
            table.add_column(heading, justify="right")
        for row in self.rows:
            table.add_row(
                row.name,
                row.layer,
                f"{row.numbers:,}",
                *("" if e is None else f"{e:.0e}" for e in (row.error, row.sum_error)),
                "" if row.sogns is None else f"{row.sogns:.2f}",
            )
        legend = (
            "\nerror: squared norms against one example at a time. sum: the examples' sum against "
            ".grad.\nSOGNS: what the approximation gives, over the exact value, on this batch.\n"
        )
        left_out = "".join(
            f"left out: {row.name}: {row.reason}\n" for row in self.rows if row.reason
        )
        style = "bold green" if self.passed else "bold red"
        return Group(table, Text(legend, style="dim"), Text(left_out), Text(self.verdict, style))

    def __str__(self) -> str:
        console = Console(width=160, no_color=True)
        with console.capture() as captured:
            console.print(self)
        return captured.get()


def check(model: nn.Module, loss: Callable[[Any, Any], Tensor], batch: Any) -> Check:
    """Every covered parameter's squared norms against one example at a time, in float64.

    Works on a copy of the model, in its modes but without dropout, whose masks would differ.

    Args:
        model: any module.
        loss: `loss(model, batch)`, a scalar: the mean over the batch, each example alike.
        batch: nested tuples, lists and mappings of tensors, examples on the first axis; a few
            examples are enough, two at least.

    Raises:
        ValueError: where the loss is not such a mean, a layer couples the examples, or nothing
            could be measured.
    """
    model, batch = copy.deepcopy(model).double(), tree_map(_double, batch)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
        elif isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
            module.dropout = 0.0
    for path, module in model.named_modules():
        if why := coupling(module):
            raise ValueError(f"{path}: {why}")
    gradients = list(per_example_gradients(model, loss, batch))
    collector = PerExample(model, ["pepgns", "sogns"], strict=True)
    try:
        # Two examples first: that finds layers that are called twice, and shows the batch's axis.
        for part in (tree_map(_first_two, batch), batch):
            collector.arm(True)
            model.zero_grad()
            loss(model, part).backward()
            norms = collector.close()
    finally:
        collector.remove()
    if norms is None or isinstance(norms, Skipped):
        raise ValueError(f"nothing could be measured: {norms.detail if norms else 'no step'}")
    _expect_mean(model, gradients)
    owner = {id(p): type(m).__name__ for m in model.modules() for p in m._parameters.values()}
    noise = 1e-24 * max(max(of.parts_sq_norm) for of in norms.values())  # rounding's share
    missing = norms["pepgns"].missing
    rows = []
    for i, (name, p) in enumerate(model.named_parameters()):
        if not p.requires_grad:
            continue
        exact = sum(float(g[name].square().sum()) for g in gradients) / len(gradients) ** 2
        reason = missing.get(name)
        found = {method: of.parts_sq_norm[i] for method, of in norms.items()}
        rows.append(
            Row(
                name=name,
                layer=owner[id(p)],
                numbers=p.numel(),
                error=None if reason else abs(found["pepgns"] - exact) / max(exact, noise),
                sum_error=collector.gaps.get(name),
                sogns=None if reason or exact <= noise else found["sogns"] / exact,
                reason=reason,
            )
        )
    return Check(rows, len(gradients))


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _first_two(value: Any) -> Any:
    return value[:2] if isinstance(value, Tensor) and value.ndim else value


def _expect_mean(model: nn.Module, gradients: list[dict[str, Tensor]]) -> None:
    """Raise unless the batch's gradient is the mean of the examples'."""
    gap = whole = 0.0
    for name, p in model.named_parameters():
        if p.requires_grad:
            mean = torch.stack([g[name] for g in gradients]).mean(0)
            grad = torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
            gap += float((grad - mean).square().sum())
            whole += float(grad.square().sum())
    if gap > 1e-12 * whole:
        raise ValueError(
            "expected a loss whose gradient is the mean over the examples of the batch, got one "
            f"that is off by {(gap / whole) ** 0.5:.1%}: it sums, weighs examples unequally, or "
            "couples them (BatchNorm in training mode, in-batch negatives)"
        )
