"""One example's gradient at a time: what the batch's is made of, and where its noise comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gnsmon.checking.precision import backward
from gnsmon.norms.oracles import examples, left_untouched, named_tensors

Loss = Callable[[Any, Any], Tensor]
ROUNDING = 1e-6  # relative, of a float64 gradient that was summed in another order


def gradient_matrix(
    model: nn.Module, loss: Loss, batch: Any, *, seed: int | None = None
) -> Tensor:  # [B, n]
    """The gradient of each example in float64, all trainable parameters side by side.

    With a seed, the forward of example i draws its random numbers from `seed + i`. Clears `.grad`.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    count = len(next(iter(named_tensors(batch).values())))
    matrix = torch.zeros(count, sum(p.numel() for p in trained), dtype=torch.float64)
    for i in range(count):
        model.zero_grad()
        with left_untouched(model):
            if seed is not None:
                torch.manual_seed(seed + i)
            backward(loss(model, examples(batch, i, i + 1)))
        for p, piece in zip(trained, matrix[i].split([p.numel() for p in trained]), strict=True):
            if p.grad is not None:
                piece.copy_(p.grad.to_dense().flatten())
    model.zero_grad()
    return matrix


def batch_gradient(model: nn.Module, loss: Loss, batch: Any) -> Tensor:  # [n]
    """The gradient of the batch, as a row of `gradient_matrix`."""
    return gradient_matrix(model, lambda model, _: loss(model, batch), torch.zeros(1))[0]


@dataclass(frozen=True)
class Composition:
    """The batch's gradient as the sum of its examples' times `weights`, and what that leaves."""

    kind: Literal["mean", "multiple", "weighted", "coupled"]
    weights: Tensor  # [B]
    rest: float  # |G - sum w_j g_j| / |G|


def compose(whole: Tensor, gradients: Tensor, fewer: Tensor) -> Composition:
    """What the batch's gradient [n] is of its examples' [B, n].

    Their mean, a multiple of it (a sum, say), a sum with positive weights of their own (by least
    squares), or no such sum: then each example's gradient depends on the others, and was another
    alone. Weights belong to their examples: they must give `fewer` too, the gradient of the batch
    without its last example, but for a factor. Where the model's output is one number, no other
    sign tells them from a coupled loss, as that only scales each example's gradient.
    """
    count = len(gradients)
    scale, rest = _multiple(whole, gradients.sum(0), gradients)
    if rest < ROUNDING and scale > 0:
        mean = abs(scale * count - 1) < ROUNDING
        weights = torch.full_like(gradients[:, 0], 1 / count if mean else scale)
        return Composition("mean" if mean else "multiple", weights, rest)
    inverse = torch.linalg.pinv(gradients @ gradients.T, hermitian=True, rtol=1e-12)
    fitted = inverse @ (gradients @ whole)  # copies share their weight
    _, left = _multiple(whole, fitted @ gradients, gradients)
    _, kept = _multiple(fewer, fitted[:-1] @ gradients[:-1], gradients)
    if max(left, kept) < ROUNDING and fitted.min() > -ROUNDING:
        return Composition("weighted", fitted, left)
    return Composition("coupled", torch.full_like(gradients[:, 0], scale), rest)


def _multiple(of: Tensor, direction: Tensor, gradients: Tensor) -> tuple[float, float]:
    """The c that brings c * direction next to `of`, and how far it stays, relative.

    1 / B where both are zero, as of examples that cancel.
    """
    zero = 1e-9 * float(gradients.norm(dim=1).max())  # what is shorter is rounding's
    if max(of.norm(), direction.norm()) <= zero:
        return 1 / len(gradients), 0.0
    if direction.norm() <= zero:
        return 0.0, 1.0
    scale = of @ direction / direction.square().sum()
    return float(scale), float((of - scale * direction).norm() / of.norm().clamp(min=zero))


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


def noise_shares(
    model: nn.Module, loss: Loss, batch: Any, *, draws: int = 8, seed: int = 0
) -> NoiseShares:
    """The data's and the masks' share of S, by `draws` independent masks for each example.

    With m_i the mean of an example's K gradients and s_i^2 their variance (K - 1 in its
    denominator), E s_i^2 is the masks' noise, and the variance of the m_i is the data's plus
    E s_i^2 / K, which is taken away: both are unbiased, and `data` may come out negative.
    """
    means = gradient_matrix(model, loss, batch, seed=seed).div_(draws)
    squares = draws**2 * _square_sums(means)
    for k in range(1, draws):
        drawn = None  # the last one's memory, before the next is made
        drawn = gradient_matrix(model, loss, batch, seed=seed + 1_000_003 * k)
        squares += _square_sums(drawn)
        means.add_(drawn, alpha=1 / draws)
    gram, count = means @ means.T, len(means)
    within = (squares - draws * gram.diagonal()) / (draws - 1)  # [B]

    def shares(of: list[int], deviation: float | None) -> NoiseShares:
        masks = float(within[of].mean())
        return NoiseShares(_scatter(gram[of][:, of]) - masks / draws, masks, deviation)

    everyone = list(range(count))
    if count < 3:
        return shares(everyone, None)
    without = torch.tensor([shares([i for i in everyone if i != j], None).share for j in everyone])
    spread = (without - without.mean()).square().sum() * (count - 1) / count  # delete-1 jackknife
    return shares(everyone, float(spread.sqrt()))


def _square_sums(rows: Tensor) -> Tensor:  # [B]
    return torch.stack([row.square().sum() for row in rows])  # one row's memory


def draws_randomly(model: nn.Module, loss: Loss, batch: Any) -> bool:
    """Whether the loss depends on the random stream."""
    values = []
    for seed in range(5):  # a rarely dropped unit may survive some of them
        with left_untouched(model), torch.no_grad():
            torch.manual_seed(seed)
            values.append(loss(model, batch).double())
    first, *others = values
    return not all(torch.isclose(first, v, rtol=1e-9, atol=0, equal_nan=True) for v in others)
