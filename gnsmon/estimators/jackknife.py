"""Ratio of means, its bias and its variance from recorded moments: jackknives, block Fieller."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gnsmon.estimators.columns import Ratios
from gnsmon.estimators.interval import fieller
from gnsmon.estimators.values import Array


class Jackknife(NamedTuple):
    """Per group; not finite where a sum of g, whole or less one step, is zero."""

    ratio: Array  # [n_groups] sum s / sum g
    corrected: Array  # [n_groups] less its bias of order 1/n
    variance: Array  # [n_groups] of either


def jackknife(s: Array, g: Array) -> Jackknife:
    """Delete-1 jackknife of sum s / sum g, for independent steps.

    With r_i the ratio without step i: corrected = n r - (n - 1) mean r_i and
    variance = (n - 1)/n sum (r_i - mean r_i)² (Tukey 1958). Centred on the mean of r_i; the
    listing of Gray et al. 2023 centres on the corrected ratio, which is too wide.

    Args:
        s: [n_steps, n_groups] or [n_steps], tr Σ of each step, two steps or more.
        g: |G|² of each step, same shape.

    Example:
        >>> import numpy as np
        >>> r = jackknife(np.array([3.0, 5, 4, 6]), np.array([1.0, 2, 1.5, 2.5]))
        >>> [round(float(x), 7) for x in r]
        [2.5714286, 2.5516234, 0.0116167]
    """
    return weighted_jackknife(s, g, np.full(len(s), 1 / len(s)))


def weighted_jackknife(s: Array, g: Array, w: Array) -> Jackknife:
    """Jackknife of sum w s / sum w g, for independent steps that weigh w [n_steps], sum w = 1.

    Step t left out moves the ratio by d_t / (1 - w_t): corrected = r - sum d_t and
    variance = sum (d_t - w_t sum d)² / (1 - sum w²), which at w = 1/n is delete-1 exactly.

    Raises:
        ValueError: unless there are two steps or more and the weights add up to 1.
    """
    if len(w) < 2 or not np.isclose(w.sum(), 1):
        raise ValueError(
            f"expected two or more weights that add up to 1, got {len(w)} that add up to "
            f"{w.sum():.6g}; divide them by their sum"
        )
    w = w.reshape(-1, *[1] * (s.ndim - 1))
    ws, wg = w * s, w * g
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = ws.sum(0) / wg.sum(0)
        d = (1 - w) * ((ws.sum(0) - ws) / (wg.sum(0) - wg) - ratio)
    bias = d.sum(0)
    return Jackknife(ratio, ratio - bias, ((d - w * bias) ** 2).sum(0) / (1 - (w**2).sum()))


def block_jackknife(s: Array, g: Array, block: int) -> Jackknife:
    """Jackknife that leaves out runs of about `block` steps, for steps correlated over fewer.

    Raises:
        ValueError: unless two blocks or more fit.
    """
    return weighted_jackknife(*_blocks(s, g, block))


def block_fieller(s: Array, g: Array, block: int, level: float = 0.95) -> Ratios:
    """Fieller's interval from means over runs of about `block` steps, [n_steps, n_groups].

    Ten blocks or more make a reading; they stand in for the effective number of steps.

    Raises:
        ValueError: unless two blocks or more fit.
    """
    s, g, w = _blocks(s, g, block)
    x = np.stack([s, g])  # [2, n_blocks, n_groups]
    mean = np.einsum("t,xtg->xg", w, x)
    dx = w[:, None] * (x - mean[:, None])
    variance = np.einsum("xtg,ytg->xyg", dx, dx) / (1 - (w**2).sum())
    return fieller(mean, variance, n_eff=len(w), level=level)


def _blocks(s: Array, g: Array, block: int) -> tuple[Array, Array, Array]:
    """Means of s and g over consecutive blocks that differ by one step at most, and weights."""
    n = len(s) // block
    if n < 2:
        raise ValueError(f"expected two blocks of {block} steps or more, got {len(s)} steps")
    starts = np.linspace(0, len(s), n, endpoint=False).astype(int)
    sizes = np.diff(starts, append=len(s))
    column = sizes.reshape(-1, *[1] * (s.ndim - 1))
    s, g = (np.add.reduceat(x, starts, axis=0) / column for x in (s, g))
    return s, g, sizes / sizes.sum()
