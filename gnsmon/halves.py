"""How far the halves of a batch ask for the same step: raw, by signs, by singular vectors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gnsmon.collectors.groups import Groups, group_of
from gnsmon.estimators.pairs import agreement, agreement_without_each, delete_one
from gnsmon.estimators.values import Array
from gnsmon.norms.contractions import wide
from gnsmon.part_gradients import Loss, count_examples, gradient, inner_of, trainable, zeros

KINDS = ("cosine", "sign", "spectral")
Steps = dict[str, dict[str, Tensor]]  # kind -> parameter -> what its optimizer would step


@dataclass(frozen=True)
class Agreement:
    """|E f(h)|² / E |f(h)|²: 1 if both halves ask for the same step f(h), 0 if noise alone does."""

    value: float | None  # None where every f(h) is zero, or there is nothing to take it of
    standard_error: float | None  # None with fewer than three halves

    def __str__(self) -> str:
        if self.value is None:
            return "-"
        error = "" if self.standard_error is None else f" ± {self.standard_error:.1g}"
        return f"{self.value:.3f}{error}"


@dataclass(frozen=True)
class GroupAlignment:
    """The three agreements of some parameters."""

    cosine: Agreement  # of the gradients, as SGD steps
    sign: Agreement  # of their signs, as sign-SGD, Lion and, about, Adam step
    spectral: Agreement  # of their matrices' U V', as Muon and Shampoo, about, step


@dataclass(frozen=True)
class Alignment(GroupAlignment):
    """The agreements of all parameters and of each group, of two halves of `examples`."""

    examples: int  # in both halves together: the batch that this is about
    halves: int  # independent ones, all pairs of which were compared
    groups: Mapping[str, GroupAlignment]

    @property
    def b_simple(self) -> float | None:
        """Examples, from the cosine, B/2 (1/cosine - 1); None where that is not positive."""
        cosine = self.cosine.value
        return None if not cosine or cosine < 0 else self.examples / 2 * (1 / cosine - 1)

    def __str__(self) -> str:
        rows = {"all": self, **self.groups}
        width = max(map(len, rows))
        lines = [
            f"two halves of {self.examples} examples ({self.halves} halves; 1: the same step, "
            "0: noise)",
            f"{'':{width}}  {'cosine':>15}  {'sign':>15}  {'spectral':>15}",
        ]
        for name, row in rows.items():
            numbers = (f"{getattr(row, kind)!s:>15}" for kind in KINDS)
            lines.append(f"{name:{width}}  {'  '.join(numbers)}")
        return "\n".join(lines)


def alignment(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    *,
    per_half: int = 1,
    groups: Groups = "layer",
    spectral: Collection[str] | None = None,
    seed: int = 0,
) -> Alignment:
    """Whether the halves of a batch agree about the step, for SGD, sign-like and spectral ones.

    With h the mean gradient of a half and f(h) the step that it asks for (h itself, sign(h), or
    msign(h) = U V' of each matrix h = U diag(s) V'), the agreement is

        <f(h1), f(h2)> averaged over pairs of different halves / |f(h)|² averaged over halves

    which estimates |E f|² / E |f|², the share of the step's squared length that is not noise. Of
    signs it is the mean of sign(h1) sign(h2) over coordinates (those that are zero left out), of
    matrices <msign(h1), msign(h2)> / rank. The cosine is 1 / (1 + b_simple / (B/2)), where B/2 is
    the examples in a half. All pairs of halves are compared, as independent of one another as the
    batches are, and the error is a delete-1 jackknife over the halves.

    It takes the gradient of each batch and the singular vectors of each half twice, and the memory
    of five gradients, in float32 or wider. A monitor on the model takes no notice.

    Args:
        model: left as it is: gradients, buffers, random streams and modes.
        loss: `loss(model, batch)` -> scalar, the mean over the examples.
        batches: each a tensor or nested tuples, lists and mappings of tensors, examples on the
            first axis, all equally many. Two halves or more; ten or more make a good error.
        per_half: how many consecutive batches make a half; those that are left over are not used.
        groups: parameters reported together, as in `gnsmon.attach`.
        spectral: names of the parameters for the third agreement; by default all with two axes or
            more (flattened to shape[0] rows). Embeddings and heads, which spectral optimizers
            usually leave to another, take longest.
        seed: batch i draws its random numbers (dropout) from `seed + i`.

    Raises:
        ValueError: on fewer than two halves, unequal batches, a loss that is no scalar or whose
            gradient is not finite, or an unknown name in `spectral`.
    """
    chosen = list(batches)
    count = len(chosen) // per_half if per_half > 0 else 0
    if count < 2:
        raise ValueError(
            f"batches: expected two halves of per_half={per_half} batches or more, got "
            f"{len(chosen)} batches; divide them, or make a half of fewer"
        )
    counts = count_examples(chosen)
    if len(set(counts)) > 1:
        raise ValueError(f"batches: expected equally many examples in each, got {counts}")
    of = trainable(model)
    if unknown := [n for n in spectral or () if n not in of or of[n].ndim < 2]:
        raise ValueError(
            f"spectral: expected trainable parameters with two axes or more, got {unknown}"
        )
    matrices = {n for n, p in of.items() if p.ndim > 1 and (spectral is None or n in spectral)}

    def steps() -> Iterator[Steps]:
        for i in range(count):
            half = dict(zip(of, zeros(of.values()), strict=True))
            for j in range(i * per_half, (i + 1) * per_half):
                part = gradient(model, loss, chosen[j], seed=seed + j)
                for mean, g in zip(half.values(), part, strict=True):
                    mean.add_(g, alpha=1 / per_half)
            yield _steps(half, matrices)

    products = _products(steps)
    group = group_of(model, groups)
    names = list(dict.fromkeys(group[n] for n in of if n in group))
    by_group = {name: _agreements(products, [n for n in of if group[n] == name]) for name in names}
    return Alignment(
        **_agreements(products, list(of)),
        examples=2 * per_half * counts[0],
        halves=count,
        groups={name: GroupAlignment(**found) for name, found in by_group.items()},
    )


def msign(matrix: Tensor) -> Tensor:
    """U V' of U diag(s) V' [m, n], over the singular values that are not zero to rounding.

    The step of a spectral optimizer: the nearest matrix whose singular values are all one, which
    Muon's Newton-Schulz iteration approximates. In float32 or wider.

    Example:
        >>> msign(torch.tensor([[3.0, 0.0], [0.0, -2.0]]))
        tensor([[ 1.,  0.],
                [ 0., -1.]])
    """
    matrix = wide(matrix)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    zero = max(matrix.shape) * torch.finfo(matrix.dtype).eps * s[:1]
    sign: Tensor = (u * (s > zero)) @ v
    return sign


def _steps(half: dict[str, Tensor], matrices: Collection[str]) -> Steps:
    """What each kind of optimizer would step, by kind and parameter."""
    return {
        "cosine": half,
        "sign": {name: h.sign() for name, h in half.items()},
        "spectral": {name: msign(half[name].flatten(1)) for name in half if name in matrices},
    }


def _products(steps: Callable[[], Iterator[Steps]]) -> dict[tuple[str, str], Array]:
    """(kind, parameter) -> [2, n], |f_j|² and <f_j, sum of f> for each half j."""
    whole: dict[tuple[str, str], Tensor] = {}
    for step in steps():
        for kind, of in step.items():
            for name, f in of.items():
                key = kind, name
                whole[key] = whole[key] + f if key in whole else f
    found: dict[tuple[str, str], list[Tensor]] = {key: [] for key in whole}
    for step in steps():  # anew, so that no more than one is held
        for key, total in whole.items():
            f = step[key[0]][key[1]]
            found[key].append(torch.stack([inner_of(f, f), inner_of(f, total)]))
    return {key: torch.stack(values, -1).double().cpu().numpy() for key, values in found.items()}


def _agreements(
    products: Mapping[tuple[str, str], Array], names: list[str]
) -> dict[str, Agreement]:
    found = {}
    for kind in KINDS:
        of = [products[kind, name] for name in names if (kind, name) in products]
        found[kind] = _agreement(np.sum(of, axis=0)) if of else Agreement(None, None)
    return found


def _agreement(products: Array) -> Agreement:  # [2, n]
    own, with_sum = products
    if not own.any():
        return Agreement(None, None)
    value, n = agreement(own, with_sum), len(own)
    if n < 3:
        return Agreement(float(value), None)
    without = agreement_without_each(own, with_sum)
    covariance = delete_one(value[None], without[None], np.full(n, 1 / n)).covariance
    error = float(np.sqrt(covariance[0, 0]))
    return Agreement(float(value), error if np.isfinite(error) else None)
