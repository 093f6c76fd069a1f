"""The noise scale with the Hessian in it, B_noise = tr(H Sigma) / G'HG, measured on demand."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from gnsmon.estimators.pairs import (
    delete_one,
    form_moments,
    form_moments_without_each,
    ratio_interval_of_either_sign,
)
from gnsmon.estimators.values import Array, Status
from gnsmon.part_gradients import (
    Loss,
    Vector,
    count_examples,
    gradient,
    hessian_product,
    inner,
    trainable,
    zeros,
)

MIN_PARTS = 3  # of which one is left out at a time, and two make an estimate
HESSIAN_SHARE = 4  # one batch in so many is for H alone, where none are given


@dataclass(frozen=True)
class FullNoiseScale:
    """B_noise with its error; batch sizes in examples, None where the data do not determine one."""

    status: Status
    reason: str | None
    b_noise: float | None  # tr(H Sigma) / G'HG
    low: float | None
    high: float | None
    standard_error: float | None  # of b_noise
    trace_h_sigma: float  # unbiased; negative if the noise meets negative curvature
    g_h_g: float  # unbiased; negative if the loss curves downward along G
    b_simple: float | None  # of the same parts
    b_simple_standard_error: float | None
    parts: int  # batches that gave the gradients
    hessian_parts: int  # batches that gave H
    examples: int  # in the parts together

    def __str__(self) -> str:
        of = (
            f"{self.parts} batches, {self.examples} examples; H of {self.hessian_parts} other"
            f"{'' if self.hessian_parts == 1 else 's'}"
        )
        simple = "not measurable"
        if self.b_simple is not None and self.b_simple_standard_error is not None:
            simple = f"{self.b_simple:.4g} (standard error {self.b_simple_standard_error:.2g})"
        if self.b_noise is None or self.low is None or self.high is None:
            return f"B_noise undefined: {self.reason}. b_simple {simple}. ({of})"
        doubt = f"; {self.reason}" if self.reason else ""
        return (
            f"B_noise {self.b_noise:.4g} examples, {self.low:.3g} to {self.high:.3g} "
            f"(standard error {self.standard_error:.2g}){doubt}. b_simple {simple}. ({of})"
        )


def full_noise_scale(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    *,
    hessian_batches: Iterable[Any] | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> FullNoiseScale:
    """B_noise = tr(H Sigma) / G'HG of the model as it is (McCandlish et al. 2018, 2.8).

    The batches are parts u_j = w_j m_j of one gradient, w_j their share of the examples. In any
    fixed quadratic form H the sums u_j'H u_j and (sum u_j)'H(sum u_j) give unbiased tr(H Sigma) and
    G'HG (`estimators.pairs.form_moments`). H has to be independent of the parts: it is the mean
    Hessian of `hessian_batches`, by Hessian-vector products, and never formed. The errors are
    delete-1 jackknives, over the parts and, from two of them on, over the Hessian's batches, whose
    variances add.

    It takes a gradient twice and a Hessian-vector product for each part and Hessian batch (about
    four gradients), and the memory of four gradients beside a backward through a backward. A
    monitor on the model takes no notice.

    Args:
        model: left as it is: gradients, buffers, random streams and modes.
        loss: `loss(model, batch)` -> scalar, the mean over the examples, whose gradients are
            independent of one another; differentiable twice.
        batches: each a tensor or nested tuples, lists and mappings of tensors, examples on the
            first axis. Three or more parts; 20 and more make a good error.
        hessian_batches: other batches, for H. Without them every fourth of `batches` (the fourth,
            the eighth, ...; at least the last) is taken for H alone, and the others are the parts.
        level: of the interval.
        seed: part i draws its random numbers (dropout) from `seed + i`, the Hessian's batches from
            the seeds after those.

    Raises:
        ValueError: on too few batches, an impossible level, a loss that is no scalar, or one that
            cannot be differentiated twice, or whose gradient is not finite.
    """
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")
    parts, for_h = _split(list(batches), hessian_batches)
    products = _products(model, loss, parts, for_h, seed)
    counts = np.array(count_examples(parts))
    examples, weights = int(counts.sum()), counts / counts.sum()
    counts_h = np.array(count_examples(for_h))
    simple = _ratio(products.plain[None], weights, examples, np.ones(1), level)
    full = _ratio(products.curved, weights, examples, counts_h / counts_h.sum(), level)
    status, reason = _judged(full)
    known = status != "undefined"
    return FullNoiseScale(
        status=status,
        reason=reason,
        b_noise=(full.corrected if status == "ok" else full.ratio) if known else None,
        low=full.low if known else None,
        high=full.high if known else None,
        standard_error=full.error if known else None,
        trace_h_sigma=full.s,
        g_h_g=full.g,
        b_simple=simple.corrected if simple.g > 0 and simple.low is not None else None,
        b_simple_standard_error=simple.error if simple.g > 0 and simple.low is not None else None,
        parts=len(parts),
        hessian_parts=len(for_h),
        examples=examples,
    )


def _split(
    batches: list[Any], hessian_batches: Iterable[Any] | None
) -> tuple[list[Any], list[Any]]:
    """The parts, and the batches for H."""
    if hessian_batches is None:
        first = HESSIAN_SHARE - 1
        parts = [b for i, b in enumerate(batches) if i % HESSIAN_SHARE != first]
        for_h = batches[first::HESSIAN_SHARE]
    else:
        parts, for_h = batches, list(hessian_batches)
        if any(h is b for h in for_h for b in batches):
            raise ValueError(
                "hessian_batches: expected batches that are not among `batches`, whose noise the "
                "Hessian would share; take others, or leave it out"
            )
    if len(parts) < MIN_PARTS or not for_h:
        raise ValueError(
            f"expected {MIN_PARTS} batches or more for the gradients and one for the Hessian, got "
            f"{len(parts)} and {len(for_h)}; a single batch has no noise to be seen, so divide it"
        )
    return parts, for_h


class _Products(NamedTuple):
    plain: Array  # [2, n]: |u_j|² and <u_j, g>
    curved: Array  # [m, 2, n]: u_j'H u_j and u_j'H g for each Hessian batch


def _products(
    model: nn.Module, loss: Loss, parts: list[Any], for_h: list[Any], seed: int
) -> _Products:
    weights = torch.tensor(count_examples(parts)).double()
    weights /= weights.sum()

    def part(j: int) -> Vector:
        w = float(weights[j])
        return [w * grad for grad in gradient(model, loss, parts[j], seed=seed + j)]

    whole = zeros(trainable(model).values())
    for j in range(len(parts)):
        whole = [g.add_(u) for g, u in zip(whole, part(j), strict=True)]
    plain, curved = [], []
    for j in range(len(parts)):  # anew, so that no more than one is held
        u = part(j)
        plain.append(torch.stack([inner(u, u), inner(u, whole)]))
        rows = []
        for h, batch in enumerate(for_h):
            hu = hessian_product(model, loss, batch, u, seed=seed + len(parts) + h)
            rows.append(torch.stack([inner(hu, u), inner(hu, whole)]))
        curved.append(torch.stack(rows))
    return _Products(
        plain=torch.stack(plain, -1).double().cpu().numpy(),
        curved=torch.stack(curved, -1).double().cpu().numpy(),
    )


class _Ratio(NamedTuple):
    s: float
    g: float
    g_error: float
    ratio: float
    corrected: float  # less its bias of order 1/n
    error: float
    low: float | None
    high: float | None
    wide: bool


def _ratio(
    products: Array, weights: Array, examples: int, weights_h: Array, level: float
) -> _Ratio:
    """The ratio s / g of s = tr(H Sigma) and g = G'HG, from products [m, 2, n] of `_Products`."""
    own, with_sum = np.einsum("h,hxn->xn", weights_h, products)
    whole = form_moments(own, with_sum, weights, examples)
    without = form_moments_without_each(own, with_sum, weights, examples)
    deleted = delete_one(_with_ratio(whole), _with_ratio(without), weights)
    covariance = deleted.covariance
    if len(weights_h) > 1:
        each = form_moments(products[:, 0], products[:, 1], weights, examples)  # [2, m]
        without = (whole[:, None] - weights_h * each) / (1 - weights_h)
        covariance = (
            covariance + delete_one(_with_ratio(whole), _with_ratio(without), weights_h).covariance
        )
    (s, g), ratio = whole, _with_ratio(whole)[2]
    interval = ratio_interval_of_either_sign(
        s, g, covariance[:2, :2], freedom=len(weights) - 1, level=level
    )
    return _Ratio(
        s=float(s),
        g=float(g),
        g_error=math.sqrt(covariance[1, 1]),
        ratio=float(ratio),
        corrected=float(ratio - deleted.bias[2]),
        error=math.sqrt(covariance[2, 2]),
        low=interval.low,
        high=interval.high,
        wide=interval.wide,
    )


def _with_ratio(moments: Array) -> Array:  # [2, ...] -> [3, ...]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.concatenate([moments, moments[:1] / moments[1:]])


def _judged(of: _Ratio) -> tuple[Status, str | None]:
    if of.s == of.g == 0:
        return "undefined", "all products with the Hessian are zero: the loss is linear"
    if of.low is None or of.high is None:
        return "undefined", (
            f"G'HG is {of.g:.3g} with a standard error of {of.g_error:.2g}, not distinguishable "
            "from zero; more batches tell, unless the curvature along the gradient is none"
        )
    if of.g < 0:
        return "undefined", (
            f"G'HG is negative ({of.g:.3g}, standard error {of.g_error:.2g}): H is indefinite and "
            "the loss curves downward along the gradient, where no step is the best one"
        )
    if of.high <= 0:
        return "undefined", (
            f"tr(H Sigma) is negative ({of.s:.3g}): H is indefinite and the noise meets more "
            "negative than positive curvature"
        )
    if of.s <= 0:
        return "undefined", (
            f"tr(H Sigma) is {of.s:.3g}, not distinguishable from zero; B_noise is below "
            f"{of.high:.3g}"
        )
    if of.wide:
        return "wide", f"G'HG is known to {of.g_error / of.g:.0%} only; more batches narrow it"
    return "ok", None
