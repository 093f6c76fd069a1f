"""A noisy quadratic, of which all that gnsmon measures is known in closed form.

    loss_i = 1/2 theta'H theta + e_i'theta        g_i = H theta + e_i        e_i ~ N(0, Sigma)

is a loss over examples whose gradients have the mean G = H theta and the covariance Sigma at every
theta. SGD on it has an exact expected loss (`expected_losses`), and so an exact number of steps to
a target at the best learning rate (`fewest_steps`) and an exact critical batch
(`critical_batch`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq  # type: ignore[import-untyped]
from torch import Tensor, nn

Array = NDArray[np.float64]
FINEST = 1e-6  # the smallest rate that is tried, of the largest
DECAYS = 60  # e-folds after which nothing changes any more


class NoisyQuadratic(nn.Module):
    """The loss of each example e_i [B, d]: 1/2 theta'H theta + e_i'theta, [B].

    theta is the weight of a `Linear`, so that a monitor sees it by a rule of its own: with
    H = sum_t s_t k_t k_t', s_t = +-1, example i is the sequence of the d vectors k_t and e_i, and
    its loss is 1/2 sum_t s_t (k_t'theta)² + e_i'theta.

    Args:
        hessian: H [d, d], or its diagonal [d]; of any signs.
        covariance: Sigma [d, d], or its diagonal [d]; positive semidefinite.
        theta: [d].

    Raises:
        ValueError: when the sizes disagree, a matrix is not symmetric or Sigma not semidefinite.

    Example:
        >>> q = NoisyQuadratic(torch.tensor([1.0, 4.0]), torch.tensor([6.0, 2.0]), torch.ones(2))
        >>> q.tr_sigma, q.grad_sq_norm, round(q.b_simple, 4), round(q.b_noise, 4)
        (8.0, 17.0, 0.4706, 0.2154)
    """

    rays: Tensor  # [d, d], a row for each k_t
    signs: Tensor  # [d]
    spread: Tensor  # [d, d], spread @ spread' = Sigma

    def __init__(self, hessian: Tensor, covariance: Tensor, theta: Tensor) -> None:
        super().__init__()
        h, sigma = _matrix("hessian", hessian, theta), _matrix("covariance", covariance, theta)
        values, vectors = torch.linalg.eigh(h)
        powers, axes = torch.linalg.eigh(sigma)
        rounding = max(1e-12, len(theta) * torch.finfo(powers.dtype).eps)  # of zero eigenvalues
        if powers.min() < -rounding * powers.abs().max():
            raise ValueError(
                "covariance: expected no negative eigenvalue, got "
                f"{float(powers.min()):.3g}; a covariance is a mean of squares"
            )
        self.register_buffer("rays", (vectors * values.abs().sqrt()).mT.contiguous())
        self.register_buffer("signs", values.sign())
        self.register_buffer("spread", axes * powers.clamp(min=0).sqrt())
        self.theta = nn.Linear(len(theta), 1, bias=False, dtype=h.dtype, device=h.device)
        self.theta.weight.data.copy_(theta)

    def forward(self, examples: Tensor) -> Tensor:  # [B, d] -> [B]
        """The loss of each example."""
        rays = self.rays.expand(len(examples), -1, -1)
        along = self.theta(torch.cat([rays, examples[:, None]], 1))[..., 0]  # [B, d + 1]
        losses: Tensor = along[:, :-1].square() @ self.signs / 2 + along[:, -1]
        return losses

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Independent examples, [count, d]."""
        spread = self.spread
        normal = torch.randn(
            count, len(spread), generator=generator, dtype=spread.dtype, device=spread.device
        )
        return normal @ spread.mT

    @property
    def hessian(self) -> Tensor:
        """H, [d, d]."""
        return (self.rays.mT * self.signs) @ self.rays

    @property
    def covariance(self) -> Tensor:
        """Sigma, [d, d]."""
        return self.spread @ self.spread.mT

    @property
    def gradient(self) -> Tensor:
        """G = H theta at the present theta, [d]."""
        return self.hessian @ self.theta.weight.detach()[0]

    @property
    def tr_sigma(self) -> float:
        """S."""
        return float(self.spread.square().sum())

    @property
    def grad_sq_norm(self) -> float:
        """|G|²."""
        return float(self.gradient.square().sum())

    @property
    def b_simple(self) -> float:
        """S / |G|², examples."""
        return self.tr_sigma / self.grad_sq_norm

    @property
    def trace_h_sigma(self) -> float:
        """tr(H Sigma)."""
        return float((self.hessian * self.covariance).sum())

    @property
    def g_h_g(self) -> float:
        """G'HG."""
        return float(self.gradient @ self.hessian @ self.gradient)

    @property
    def b_noise(self) -> float:
        """tr(H Sigma) / G'HG, examples (McCandlish et al. 2018, 2.8)."""
        return self.trace_h_sigma / self.g_h_g

    def modes(self) -> Modes:
        """Curvature, noise and distance along each eigenvector of H.

        Raises:
            ValueError: where H is not positive definite, so that there is no lowest loss.
        """
        values, vectors = torch.linalg.eigh(self.hessian.double())
        if values.min() <= 0:
            raise ValueError(
                "hessian: expected positive eigenvalues, without which SGD has no target, got "
                f"{float(values.min()):.3g}"
            )
        noise = (vectors.mT @ self.covariance.double() @ vectors).diagonal()
        distance = vectors.mT @ self.theta.weight.detach()[0].double()
        return Modes(*(t.cpu().numpy() for t in (values, noise, distance.square())))


def mean_loss(model: NoisyQuadratic, examples: Tensor) -> Tensor:
    """The mean loss of the examples, as `gnsmon.check` and its like take it."""
    loss: Tensor = model(examples).mean()
    return loss


class Modes(NamedTuple):
    """What SGD's expected loss depends on, for each eigenvector of H; [d] each."""

    curvature: Array  # h_i > 0
    noise: Array  # v_i'Sigma v_i
    distance: Array  # (v_i'theta)²

    @property
    def loss(self) -> float:
        """The loss above its minimum, 1/2 theta'H theta."""
        return float(self.curvature @ self.distance / 2)

    @property
    def b_simple(self) -> float:
        """S / |G|², examples."""
        return float(self.noise.sum() / (self.curvature**2 @ self.distance))

    @property
    def b_noise(self) -> float:
        """tr(H Sigma) / G'HG, examples."""
        return float(self.curvature @ self.noise / (self.curvature**3 @ self.distance))


class Critical(NamedTuple):
    """The ends of the trade between steps and examples, at the best learning rate for each."""

    steps: float  # S_min, of an infinite batch
    examples: float  # E_min, of a vanishing one

    @property
    def batch(self) -> float:
        """B_crit = E_min / S_min (McCandlish et al. 2018, section 2.3)."""
        return self.examples / self.steps


def expected_losses(modes: Modes, *, batch: float, lr: float, steps: Array) -> Array:
    """E loss above its minimum after each number of `steps` of SGD; the steps need not be whole.

    Along eigenvector i a step is x <- (1 - lr h) x - lr e, e of variance n/batch, so that
    m = E x² follows m <- a m + lr² n/batch, a = (1 - lr h)², whose solution is

        m_t = m_inf + (m_0 - m_inf) a^t        m_inf = lr n / (batch h (2 - lr h))

    and the loss is 1/2 sum h m. Exact for any noise of that covariance, Gaussian or not.

    Args:
        modes: of the quadratic at the start.
        batch: examples in a step; `math.inf` for no noise.
        lr: below 2 / max h, or it does not converge.
        steps: [n].
    """
    return _distances(modes, batch, lr, np.asarray(steps, dtype=float)) @ modes.curvature / 2


def after(modes: Modes, *, batch: float, lr: float, steps: float) -> Modes:
    """The quadratic as it is in expectation after so many steps; see `expected_losses`."""
    return modes._replace(distance=_distances(modes, batch, lr, np.array([steps]))[0])


def steps_to(modes: Modes, target: float, *, batch: float, lr: float) -> float:
    """Steps until E loss is at the target, 1.0 or more, not rounded; inf where it never gets there.

    Args:
        modes: of the quadratic at the start.
        target: loss above the minimum, below that at the start.
        batch: examples in a step.
        lr: constant learning rate, in (0, 2 / max h).
    """
    slowest = float(np.max(np.abs(1 - lr * modes.curvature)))
    longest = 1 + DECAYS / -np.log(slowest) / 2 if slowest else 2.0

    def above(steps: Array) -> Array:
        return expected_losses(modes, batch=batch, lr=lr, steps=steps) - target

    return _crossing(above, 1.0, longest)


def fewest_steps(modes: Modes, target: float, *, batch: float) -> tuple[float, float]:
    """The fewest steps to the target at that batch, and the constant learning rate that takes them.

    Raises:
        ValueError: on a target that is not between the minimum and the loss at the start.
    """
    _check(modes, target)
    top = 2 / modes.curvature.max()
    return _best(lambda lr: steps_to(modes, target, batch=batch, lr=lr), top)


def critical_batch(modes: Modes, target: float) -> Critical:
    """S_min, E_min and B_crit = E_min / S_min of SGD at its best constant learning rate.

    S_min is `fewest_steps` without noise. In the limit of a small batch the best learning rate is
    c batch, and what counts is the number of examples t, with dm/dt = -2 c h m + c² n: so
    m_t = m_inf + (m_0 - m_inf) exp(-2 c h t), m_inf = c n / (2 h), and E_min is the least t over c.

    Raises:
        ValueError: as `fewest_steps`.
    """
    _check(modes, target)
    h, noise, distance = modes

    def examples(rate: float) -> float:
        floor = rate * noise / (2 * h)

        def above(seen: Array) -> Array:
            left = np.exp(-2 * rate * h * seen[:, None])
            above: Array = (floor + (distance - floor) * left) @ h / 2 - target
            return above

        longest = DECAYS / (2 * rate * float(h.min()))
        return _crossing(above, longest * 1e-6, longest)

    most = 4 * target / noise.sum()  # from there on the floor, 1/2 sum h m_inf, is the target
    return Critical(
        steps=fewest_steps(modes, target, batch=np.inf)[0], examples=_best(examples, most)[0]
    )


def _distances(modes: Modes, batch: float, lr: float, steps: Array) -> Array:  # [n, d]
    h, noise, distance = modes
    floor = lr * noise / (batch * h * (2 - lr * h))
    left = ((1 - lr * h) ** 2) ** steps[:, None]
    distances: Array = floor + (distance - floor) * left
    return distances


def _check(modes: Modes, target: float) -> None:
    if not 0 < target < modes.loss:
        raise ValueError(
            f"target: expected a loss above the minimum of 0 and below the first, {modes.loss:.4g};"
            f" got {target:.4g}"
        )


def _crossing(above: Callable[[Array], Array], first: float, last: float) -> float:
    """Where `above` first comes down to zero in [first, last]; inf where it does not."""
    times: Array = np.geomspace(first, last, 400, dtype=np.float64)
    reached = np.flatnonzero(above(times) <= 0)
    if not len(reached):
        return np.inf
    i = int(reached[0])
    if i == 0:
        return first
    return float(brentq(lambda t: float(above(np.array([t]))[0]), times[i - 1], times[i]))


def _best(cost: Callable[[float], float], top: float) -> tuple[float, float]:
    """The least cost over rates below `top`, and its rate: a grid, and finer ones around it."""
    rates = np.geomspace(FINEST * top, top, 200)[:-1]
    while True:
        costs = np.array([cost(rate) for rate in rates])
        i = int(costs.argmin())
        if rates[-1] < rates[0] * (1 + 1e-4):
            return float(costs[i]), float(rates[i])
        rates = np.linspace(rates[max(i - 1, 0)], rates[min(i + 1, len(rates) - 1)], 30)


def _matrix(name: str, given: Tensor, theta: Tensor) -> Tensor:
    """A symmetric [d, d] of a matrix or of its diagonal."""
    d = len(theta)
    matrix = given.diag() if given.ndim == 1 else given
    if theta.ndim != 1 or matrix.shape != (d, d):
        raise ValueError(
            f"{name}: expected [{d}] or [{d}, {d}] for theta {list(theta.shape)}, got "
            f"{list(given.shape)}"
        )
    if not torch.allclose(matrix, matrix.mT, rtol=1e-6):
        raise ValueError(f"{name}: expected a symmetric matrix, got another; take its (M + M') / 2")
    return matrix
