"""One example's gradient at a time: what the batch's is made of, and where its noise comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gnsmon.norms.oracles import left_untouched, per_example_gradients

Loss = Callable[[Any, Any], Tensor]
ROUNDING = 1e-6  # relative, of a float64 gradient that was summed in another order


def gradient_matrix(
    model: nn.Module, loss: Loss, batch: Any, *, seed: int | None = None
) -> Tensor:  # [B, n]
    """The gradient of each example in float64, all trainable parameters side by side.

    With a seed, the forward of example i draws its random numbers from `seed + i`.
    """
    rows = per_example_gradients(model, loss, batch, seed=seed)
    return torch.stack([torch.cat([g.double().flatten() for g in row.values()]) for row in rows])


@dataclass(frozen=True)
class Composition:
    """The batch's gradient as the sum of its examples' times `weights`, and what that leaves."""

    kind: Literal["mean", "multiple", "weighted", "coupled"]
    weights: Tensor  # [B]
    rest: float  # |G - sum w_j g_j| / |G|


def compose(whole: Tensor, gradients: Tensor) -> Composition:
    """What the batch's gradient [n] is of its examples' [B, n].

    Their mean, a multiple of it (a sum, say), a sum with positive weights of their own (by least
    squares), or no such sum at all: then each example's gradient depends on the others, and has
    been taken alone.
    """
    count, size = gradients.shape
    total = gradients.sum(0)
    scale = whole @ total / total.square().sum() if total.any() else whole.new_zeros(())
    weights = scale.expand(count)
    rest = _rest(whole, gradients, weights)
    if rest < ROUNDING:
        if abs(float(scale) * count - 1) < ROUNDING:
            return Composition("mean", torch.full_like(weights, 1 / count), rest)
        return Composition("multiple", weights, rest)
    if count < size:  # fewer numbers than examples are always some sum of theirs
        inverse = torch.linalg.pinv(gradients @ gradients.T, hermitian=True, rtol=1e-12)
        fitted = inverse @ (gradients @ whole)  # copies share their weight
        if (left := _rest(whole, gradients, fitted)) < ROUNDING and fitted.min() > -ROUNDING:
            return Composition("weighted", fitted, left)
        rest = min(rest, left)
    return Composition("coupled", weights, rest)


def _rest(whole: Tensor, gradients: Tensor, weights: Tensor) -> float:
    length = float(whole.norm())
    return float((whole - weights @ gradients).norm()) / length if length else 0.0


def covariance_trace(gradients: Tensor) -> float:
    """Unbiased S = tr Sigma of the examples' gradients [B, n]."""
    return _scatter(gradients @ gradients.T)


def _scatter(gram: Tensor) -> float:
    """Unbiased trace of the covariance of the vectors with these inner products [B, B]."""
    count = len(gram)
    return float(gram.trace() - gram.sum() / count) / (count - 1)


@dataclass(frozen=True)
class NoiseShares:
    """Where the noise of an example's gradient comes from while the forward draws masks."""

    data: float  # tr Cov over the examples of each one's mean over masks
    masks: float  # mean over the examples of each one's tr Cov over masks
    deviation: float | None  # standard error of `share`; None with fewer than three examples

    @property
    def total(self) -> float:
        """S as it is measured in training: both add up."""
        return self.data + self.masks

    @property
    def share(self) -> float:
        """The masks' share of S."""
        return self.masks / self.total if self.total else 0.0


def noise_shares(model: nn.Module, loss: Loss, batch: Any, *, draws: int = 8) -> NoiseShares:
    """The data's and the masks' share of S, by `draws` independent masks for each example.

    With m_i the mean of an example's K gradients and s_i^2 their variance (K - 1 in its
    denominator), E s_i^2 is the masks' noise, and the variance of the m_i is the data's plus
    E s_i^2 / K, which is taken away: both are unbiased, and `data` may come out negative.
    """
    means, squares = torch.zeros(()), torch.zeros(())
    for k in range(draws):
        drawn = None  # the last one's memory, before the next is made
        drawn = gradient_matrix(model, loss, batch, seed=1_000_003 * k)
        means, squares = means + drawn / draws, squares + drawn.square().sum(1)
    within = (squares - draws * means.square().sum(1)) / (draws - 1)  # [B]
    gram, count = means @ means.T, len(means)

    def shares(of: list[int], deviation: float | None) -> NoiseShares:
        masks = float(within[of].mean())
        return NoiseShares(_scatter(gram[of][:, of]) - masks / draws, masks, deviation)

    everyone = list(range(count))
    if count < 3:
        return shares(everyone, None)
    without = torch.tensor([shares([i for i in everyone if i != j], None).share for j in everyone])
    spread = (without - without.mean()).square().sum() * (count - 1) / count  # delete-1 jackknife
    return shares(everyone, float(spread.sqrt()))


def draws_randomly(model: nn.Module, loss: Loss, batch: Any) -> bool:
    """Whether the loss depends on the random stream."""
    values = []
    for seed in range(5):  # a rarely dropped unit may survive some of them
        with left_untouched(model), torch.no_grad():
            torch.manual_seed(seed)
            values.append(loss(model, batch).double())
    first, *others = values
    return not all(torch.isclose(first, v, rtol=1e-9, atol=0, equal_nan=True) for v in others)
