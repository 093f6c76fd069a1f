"""Prints what data parallelism does to the estimates and to the network, up to thousands of ranks.

    python scripts/rank_scaling.py

Each of R ranks takes b examples whose gradients are N(G, Sigma) in `dim` dimensions with equal
variances, so that d_eff = dim. "ranks": the parts of a step are the R local gradients; "examples":
all R b of them, as pepgns has it, whose proof has a number for each row. The spread is the standard
deviation of one step's estimate over the truth, simulated by drawing every part, beside the
formula. "steps" is how many independent steps bring b_simple to a standard error of 10 %, by the
delta method. The traffic is what a rank sends in one measured step by a ring all-reduce, as a share
of what its float32 gradients take.
"""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
import typer

from gnsmon.collectors.reduction import length
from gnsmon.collectors.step import Columns
from gnsmon.estimators import NormPair, moments


def main(
    per_rank: Annotated[int, typer.Option(help="Examples of a rank.")] = 8,
    b_simple: Annotated[float, typer.Option(help="True noise scale, in examples.")] = 4096.0,
    dim: Annotated[int, typer.Option(help="Dimensions: d_eff.")] = 100,
    draws: Annotated[int, typer.Option(help="Steps simulated in each cell.")] = 400,
    parameters: Annotated[int, typer.Option(help="Tensors of the model, as of GPT-2.")] = 148,
    rows: Annotated[int, typer.Option(help="Lengths of their first axes, summed.")] = 237_000,
    numbers: Annotated[float, typer.Option(help="Numbers in them.")] = 124e6,
    most: Annotated[int, typer.Option(help="Ranks in the last row.")] = 4096,
) -> None:
    sq_norm = 1 / b_simple  # with tr(Sigma) = 1
    print(
        "| ranks | batch | parts | sd of S | formula | sd of abs(G)^2 | formula | steps |", end=""
    )
    print(" sent, kB | of the gradient's |")
    print("|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|")
    for ranks in (2**i for i in range(1, int(math.log2(most)) + 1)):
        names = [str(i) for i in range(parameters)]
        for name, examples, layout in (
            ("ranks", per_rank, Columns(names)),
            ("examples", 1, Columns(names, rows=np.zeros(rows))),
        ):
            sent = 2 * (ranks - 1) / ranks * 8 * length(layout)
            share = sent / (2 * (ranks - 1) / ranks * 4 * numbers)
            parts = ranks * per_rank // examples
            spread = simulated(parts, examples, sq_norm, dim, draws)
            wanted = formula(parts * examples, examples, sq_norm, dim)
            cells = (f"{a:.2%} | {b:.2%}" for a, b in zip(spread, wanted, strict=True))
            steps = math.ceil(sum(x * x for x in wanted) / 0.1**2)
            traffic = f"{sent / 1e3:,.1f} | {share:.1e}"
            size = f"{ranks:,} | {ranks * per_rank:,}" if name == "ranks" else " | "
            print(f"| {size} | {name} | {' | '.join(cells)} | {steps:,} | {traffic} |", flush=True)


def simulated(
    parts: int, examples: int, sq_norm: float, dim: int, draws: int
) -> tuple[float, float]:
    """Relative standard deviations of a step's S and |G|², from drawing every part's gradient."""
    rng = np.random.default_rng(0)
    mean = np.full(dim, math.sqrt(sq_norm / dim), dtype=np.float32)
    big, small = np.zeros((2, draws))
    for i in range(draws):
        noise = rng.standard_normal((parts, dim), dtype=np.float32)
        each = mean + noise / math.sqrt(dim * examples)  # mean gradients of the parts
        big[i] = np.square(each.mean(0, dtype=np.float64)).sum()
        small[i] = np.square(each, dtype=np.float64).sum() / parts**2
    found = moments(NormPair(big, small, 1 / parts, parts * examples))
    return float(found.tr_sigma.std()), float(found.grad_sq_norm.std() / sq_norm)


def formula(batch: int, examples: int, sq_norm: float, dim: int) -> tuple[float, float]:
    """The same for Gaussian gradients: docs/mathematics.md, microbatches."""
    square = 1 / dim  # tr(Sigma^2)
    of_s = 2 * square * examples / (batch - examples)
    of_g = 4 * sq_norm / dim / batch + 2 * square / (batch * (batch - examples))
    return math.sqrt(of_s), math.sqrt(of_g) / sq_norm


if __name__ == "__main__":
    typer.run(main)
