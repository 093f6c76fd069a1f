"""Prints what a measured step costs, as a ratio to the bare step, on three small models.

    python scripts/bench_overhead.py --rounds 40

Bare and monitored steps alternate in one process; each round gives one ratio. "unmeasured" is a
step of a monitored run that the monitor lets pass (every=N measures one in N). "microbatch" is
measured on steps of two microbatches, against bare steps of two.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer

import gnsmon
from gnsmon.demo.models import CharGPT, DigitsCNN

Step = Callable[[], None]


def digits() -> tuple[torch.nn.Module, Callable[[torch.nn.Module], torch.Tensor]]:
    images, labels = torch.randn(64, 1, 28, 28), torch.randint(10, (64,))
    return DigitsCNN(), lambda model: F.cross_entropy(model(images), labels, reduction="none")


def text() -> tuple[torch.nn.Module, Callable[[torch.nn.Module], torch.Tensor]]:
    window = torch.randint(96, (8, 129))
    x, y = window[:, :-1], window[:, 1:]
    return CharGPT(96), lambda model: by_example(model(x), y)


def wide() -> tuple[torch.nn.Module, Callable[[torch.nn.Module], torch.Tensor]]:
    window = torch.randint(96, (4, 129))
    x, y = window[:, :-1], window[:, 1:]
    return CharGPT(96, width=768, heads=12), lambda model: by_example(model(x), y)


def by_example(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).mean(1)


def training_step(
    make: Callable[[], tuple], method: str | None, every: int, *, microbatches: int = 1
) -> Step:
    torch.manual_seed(0)
    model, losses_of = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    gns = None
    if method is not None:
        settings = {"method": method, "every": every, "run_dir": tempfile.mkdtemp()}
        gns = gnsmon.attach(model, optimizer, **settings)

    def step() -> None:
        optimizer.zero_grad()
        for _ in range(microbatches):
            losses = losses_of(model)
            if gns is not None:
                gns.losses(losses)
            losses.mean().backward()
        optimizer.step()

    return step


def seconds(step: Step) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def main(
    rounds: Annotated[int, typer.Option(help="Ratios per figure.")] = 40,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    torch.set_num_threads(threads)
    print(f"torch {torch.__version__}, CPU, {threads} threads, {rounds} rounds\n")
    print("| model | step | ratio to the bare step | quartiles |")
    print("|---|---|--:|--:|")
    for make in (digits, text, wide):
        bare = training_step(make, None, 1)
        bare_of_two = training_step(make, None, 1, microbatches=2)
        variants = {
            "measured, pepgns": (training_step(make, "pepgns", 1), bare),
            "measured, sketch": (training_step(make, "sketch", 1), bare),
            "measured, sogns": (training_step(make, "sogns", 1), bare),
            "measured, random_signs": (training_step(make, "random_signs", 1), bare),
            "measured, microbatch": (
                training_step(make, "microbatch", 1, microbatches=2),
                bare_of_two,
            ),
            "unmeasured": (training_step(make, "pepgns", 10**9), bare),
        }
        if make is not digits:  # which has no such layers
            variants["measured, norm_layers"] = (training_step(make, "norm_layers", 1), bare)
        for step in (step for pair in variants.values() for step in pair):
            for _ in range(5):
                step()
        ratios: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(rounds):
            for name, (step, plain) in variants.items():
                before, own, after = seconds(plain), seconds(step), seconds(plain)
                ratios[name].append(2 * own / (before + after))
        for name, found in ratios.items():
            low, middle, high = np.percentile(found, [25, 50, 75])
            print(f"| {make.__name__} | {name} | {middle:.2f} | {low:.2f}-{high:.2f} |")


if __name__ == "__main__":
    typer.run(main)
