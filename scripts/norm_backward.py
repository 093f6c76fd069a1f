"""Prints what a norm layer's examples cost with its backward, and beside it.

The table of docs/mathematics.md#plans:

    python scripts/norm_backward.py

In multiples of torch's own backward, medians of alternating calls: the backward that gives each
example's gradients, and the layer's rule, which normalises again and comes on top of torch's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from gnsmon.norms.rules import find_each, find_rule

LAYERS = {
    "LayerNorm": (nn.LayerNorm(256), (8, 256, 256)),
    "LayerNorm, wide": (nn.LayerNorm(768), (8, 1024, 768)),
    "RMSNorm": (nn.RMSNorm(256), (8, 256, 256)),
    "RMSNorm, wide": (nn.RMSNorm(768), (8, 1024, 768)),
    "GroupNorm": (nn.GroupNorm(32, 64), (32, 64, 32, 32)),
    "GroupNorm, deep": (nn.GroupNorm(32, 512), (32, 512, 8, 8)),
}


def main(
    rounds: Annotated[int, typer.Option(help="Calls of each.")] = 50,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    torch.set_num_threads(threads)
    table = Table("layer", "shape", "torch's own, ms", "with the examples'", "the rule, on top")
    for name, (layer, shape) in LAYERS.items():
        own, *others = (1e3 * np.median(t) for t in seconds(layer, shape, rounds))
        ratios = (f"{t / own:.2f}" for t in others)
        table.add_row(name, " x ".join(map(str, shape)), f"{own:.2f}", *ratios)
    Console().print(table)


def seconds(layer: nn.Module, shape: tuple[int, ...], rounds: int) -> list[list[float]]:
    """Of torch's backward, of that with the examples' gradients, and of the rule, [rounds] each."""
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)
    y = layer(x)
    each, rule = find_each(layer), find_rule(layer)
    found = each.statistics(y)
    weight = layer.weight.detach()
    x_alone = x.detach()

    def usual() -> None:
        torch.autograd.grad(y, [x, *layer.parameters()], dy, retain_graph=True)

    @torch.no_grad()
    def with_examples() -> Tensor:
        return each.backward(layer, x_alone, dy, weight, *found)[0]

    @torch.no_grad()
    def beside() -> object:
        return rule(layer, x_alone, dy)

    steps: list[Callable[[], object]] = [usual, with_examples, beside]
    times: list[list[float]] = [[] for _ in steps]
    for i in range(rounds + 3):
        for step, own in zip(steps, times, strict=True):
            begin = time.perf_counter()
            step()
            if i >= 3:
                own.append(time.perf_counter() - begin)
    return times


if __name__ == "__main__":
    typer.run(main)
