"""Prints how far each source of small-batch norms is off, on the text demo's model in training.

    python scripts/source_errors.py

A character GPT is trained for `warmup` steps; from then on every step is measured by every source
at once. "q": the source's sum of squared norms against the exact one of the same step, as root mean
square and mean, and the standard error that its readings say (root mean square); for sources whose
parts are the examples. (Layers are sketched here however narrow they are.) "S", "|G|^2": mean of
the one-step estimates over that of the exact source, from paired steps. "one step": standard
deviation of one step's estimate over its mean, the exact source's own being what the batch itself
brings. "b_simple": the last reading over the exact source's.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer

import gnsmon
from gnsmon.demo.data import topics, windows
from gnsmon.demo.models import CharGPT

BY_EXAMPLE = ["pepgns", "sketch", "sogns", "random_signs"]
METHODS = [*BY_EXAMPLE, "norm_layers", "microbatch", "subbatch"]
Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]
Values = dict[str, np.ndarray]


def main(
    steps: Annotated[int, typer.Option(help="Measured steps.")] = 200,
    warmup: Annotated[int, typer.Option(help="Steps before them.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Examples of a step.")] = 16,
    microbatch: Annotated[int, typer.Option(help="Examples of a backward.")] = 4,
    calibrate_every: Annotated[int, typer.Option(help="Measured steps per exact one.")] = 10,
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    text = topics()
    batches = windows(text.train, batch_size, 128, torch.Generator().manual_seed(0))
    model = CharGPT(len(text.vocabulary), dropout=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    train(model, optimizer, batches, warmup, microbatch)
    found = measured(model, optimizer, batches, steps, microbatch, calibrate_every)
    print(f"{steps} steps of {batch_size} examples in microbatches of {microbatch};", end=" ")
    print(f"sogns and norm_layers calibrated by one measured step in {calibrate_every or 'none'}\n")
    print("| source | q: rms | q: mean | q: said | S | one step | abs(G)^2 | one step | b_simple |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    exact = found["pepgns"]
    for method, own in found.items():
        q = errors(own["q"], exact["q"]) if method in BY_EXAMPLE else " | "
        claim = "" if np.isnan(own["said"]).any() else f"{math.sqrt((own['said'] ** 2).mean()):.1%}"
        moments = " | | | "
        if method != "norm_layers":
            moments = " | ".join(moment(own[key], exact[key]) for key in ("S", "G"))
        print(f"| {method} | {q} | {claim} | {moments} | {own['b'][-1] / exact['b'][-1]:.2f} |")


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    steps: int,
    microbatch: int,
    losses_of_examples: Callable[[torch.Tensor], None] = lambda _: None,
) -> None:
    for _, (x, y) in zip(range(steps), batches, strict=False):
        for a, b in zip(x.split(microbatch), y.split(microbatch), strict=True):
            each = F.cross_entropy(model(a).flatten(0, 1), b.flatten(), reduction="none")
            losses = each.view(b.shape).mean(1)
            losses_of_examples(losses)
            (losses.sum() / len(x)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def measured(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    steps: int,
    microbatch: int,
    calibrate_every: int,
) -> dict[str, Values]:
    kept: dict[str, list[gnsmon.Reading]] = {}

    def keep(reading: gnsmon.Reading) -> None:
        kept.setdefault(reading.method, []).append(reading)

    with (
        tempfile.TemporaryDirectory() as folder,
        gnsmon.attach(
            model,
            optimizer,
            method=METHODS,
            every=1,
            calibrate_every=calibrate_every or None,
            groups="total",
            sinks=[keep],
            run_dir=folder,
        ) as gns,
    ):
        for collector, _ in gns._sources:
            for sketch in collector.taps.sketches.values() if hasattr(collector, "taps") else ():
                sketch.passes = 0  # or layers as narrow as these would be exact, as it is cheaper
        train(model, optimizer, batches, steps, microbatch, gns.losses)
    return {
        method: {
            "q": np.array([r.raw.parts_sq_norm for r in readings]),
            "S": np.array([r.raw.tr_sigma for r in readings]),
            "G": np.array([r.raw.grad_sq_norm for r in readings]),
            "b": np.array([math.nan if r.b_simple is None else r.b_simple for r in readings]),
            "said": np.array([said(r) for r in readings]),
        }
        for method, readings in kept.items()
    }


def said(reading: gnsmon.Reading) -> float:
    known = reading.approximation
    error = None if known is None or known.exact_steps else known.standard_error
    return math.nan if error is None else error


def errors(q: np.ndarray, exact: np.ndarray) -> str:
    relative = q / exact - 1
    mean = f"{relative.mean():+.1%} ± {relative.std() / math.sqrt(len(q)):.1%}"
    return f"{np.sqrt((relative**2).mean()):.1%} | {mean}"


def moment(values: np.ndarray, exact: np.ndarray) -> str:
    ratio = values.mean() / exact.mean()
    error = (values - ratio * exact).std() / math.sqrt(len(values)) / exact.mean()
    return f"{ratio:.3f} ± {error:.3f} | {values.std() / abs(values.mean()):.0%}"


if __name__ == "__main__":
    typer.run(main)
