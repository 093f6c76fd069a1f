"""Unbiased |G|² and tr Σ from the squared norms of one step's gradient and of its parts."""

from __future__ import annotations

import numpy as np

from gnsmon.estimators.values import Moments, NormPair


def moments(pair: NormPair) -> Moments:
    """Unbiased |G|² and S = tr Σ per example, each [n_groups] (McCandlish et al. 2018, A.1).

    With A = |Σ u_j|², q = Σ |u_j|², p = Σ w_j² and N examples::

        grad_sq_norm = (A - q) / (1 - p)        tr_sigma = N (q - p A) / (1 - p)

    Unbiased because independent parts of mean w_j G give E A = |G|² + V and E q = p |G|² + V, with
    V = tr Var(Σ u_j) = S / N whatever the noise of each part; the two lines solve for |G|² and V.

    For parts of b examples each (p = b/B, |G_b|² = q/p) these are the equations of that paper:
    |G|² = (B |G_B|² - b |G_b|²) / (B - b) and S = (|G_b|² - |G_B|²) / (1/b - 1/B).

    Raises:
        ValueError: when `obstacle` names a reason why the step has no estimate.

    Example:
        >>> import numpy as np
        >>> m = moments(NormPair(np.array([3.0]), np.array([2.0]), 0.5, 4))
        >>> m.grad_sq_norm, m.tr_sigma
        (array([2.]), array([4.]))
    """
    if reason := obstacle(pair):
        raise ValueError(f"this step has no estimate ({reason}); ask obstacle(pair) and skip it")
    a, q, p = pair.big_sq_norm, pair.parts_sq_norm, pair.sum_sq_weights
    return Moments(grad_sq_norm=(a - q) / (1 - p), tr_sigma=pair.examples * (q - p * a) / (1 - p))


def obstacle(pair: NormPair) -> str | None:
    """Why a step gives no estimate, in words to count skipped steps under; None if it does."""
    if not (np.isfinite(pair.big_sq_norm).all() and np.isfinite(pair.parts_sq_norm).all()):
        return "norm not finite"
    if not 0 < pair.sum_sq_weights <= 1 + 1e-6:
        return "weights do not add up to one"
    # The norms are sums of float32 squares: a second part lighter than this is lost in rounding.
    if 1 - pair.sum_sq_weights < 1e-6:
        return "one part"
    return None
