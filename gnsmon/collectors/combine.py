"""Two sources in one measurement: the second fills in what the first leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from gnsmon.collectors.step import Skipped, StepNorms


def combined(first: StepNorms, rest: StepNorms, names: Sequence[str]) -> StepNorms | Skipped:
    """`first`, and of the parameters that it misses what `rest` measured.

    The parts of the two differ, examples here and microbatches there, and with them p. But
    E A = |G|² + V and E q = p |G|² + V for any parts, so the rest's unbiased |G|² = (A - q)/(1 - p)
    tells what q would be expected of the first's parts, A - (1 - p_first) |G|², and the totals
    stay sums over parameters, unbiased.

    Args:
        first: usually of examples.
        rest: of the same step.
        names: of the columns of both.
    """
    if first.examples != rest.examples:
        return Skipped(
            "several passes",
            f"one source saw {first.examples} examples in this step, the other {rest.examples}",
        )
    if rest.sum_sq_weights == 1:
        return Skipped("one part", "the source for the rest had a single part in this step")
    filled = np.array([name in first.missing and name not in rest.missing for name in names])
    signal = (rest.big_sq_norm - rest.parts_sq_norm) / (1 - rest.sum_sq_weights)
    as_if = rest.big_sq_norm - (1 - first.sum_sq_weights) * signal
    big = np.where(filled, rest.big_sq_norm, first.big_sq_norm)
    shares = [n.big_sq_norm.sum() / n.norm_fraction for n in (first, rest) if n.norm_fraction]
    return replace(
        first,
        big_sq_norm=big,
        parts_sq_norm=np.where(filled, as_if, first.parts_sq_norm),
        missing={name: why for name, why in first.missing.items() if name in rest.missing},
        norm_fraction=float(big.sum() / shares[0]) if shares else None,
    )
