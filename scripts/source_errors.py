"""Prints what each source of small-batch norms costs and how far it is off, on the text demo.

    python scripts/source_errors.py --steps 200

A character GPT is trained for `warmup` steps; from then on every step is measured by every source
at once. "of q": the source's sum of squared norms against the exact one of the same step, its root
mean square and its mean with standard error. "S", "|G|^2": the one-step estimates' mean over the
exact source's, of paired steps, and their standard deviation over the mean: what a step is worth.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer

import gnsmon
from gnsmon.demo.data import topics, windows
from gnsmon.demo.models import CharGPT

METHODS = ["pepgns", "sketch", "sogns", "norm_layers", "microbatch", "subbatch"]


def main(
    steps: Annotated[int, typer.Option(help="Measured steps.")] = 200,
    warmup: Annotated[int, typer.Option(help="Steps before them.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Examples of a step.")] = 16,
    microbatch: Annotated[int, typer.Option(help="Examples of a backward.")] = 4,
    calibrate_every: Annotated[int, typer.Option(help="Measured steps per exact one.")] = 10,
    frozen: Annotated[bool, typer.Option(help="Keep the weights still while measuring.")] = False,
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    text = topics()
    batches = windows(text.train, batch_size, 128, torch.Generator().manual_seed(0))
    model = CharGPT(len(text.vocabulary), dropout=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        for a, b in zip(x.split(microbatch), y.split(microbatch), strict=True):
            loss = F.cross_entropy(model(a).flatten(0, 1), b.flatten())
            (loss * len(a) / batch_size).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _, (x, y) in zip(range(warmup), batches, strict=False):
        step(x, y)
    if frozen:
        optimizer.param_groups[0]["lr"] = 0.0
    raw = run(model, optimizer, step, batches, steps, calibrate_every)
    print(f"{steps} steps of {batch_size} examples in microbatches of {microbatch}\n")
    print("| source | of q: rms | mean | S: mean | sd of a step | abs(G)^2: mean | sd of a step |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for method, found in raw.items():
        print(f"| {method} | {errors(found['q'], raw['pepgns']['q'])} | ", end="")
        cells = (moment(found[key], raw["pepgns"][key]) for key in ("S", "G"))
        print(" | ".join(cells), "|")


def run(model, optimizer, step, batches, steps, calibrate_every) -> dict:
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
            calibrate_every=calibrate_every,
            groups="total",
            sinks=[keep],
            run_dir=folder,
        ),
    ):
        for _, (x, y) in zip(range(steps), batches, strict=False):
            step(x, y)
    return {
        method: {
            "q": np.array([r.raw.parts_sq_norm for r in readings]),
            "S": np.array([r.raw.tr_sigma for r in readings]),
            "G": np.array([r.raw.grad_sq_norm for r in readings]),
        }
        for method, readings in kept.items()
    }


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
