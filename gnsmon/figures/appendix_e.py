"""Figure 6: all four quantities with the big norm by appendix E too, over a small model's training.

Appendix E of the paper makes |G_big|^2 from the same scaled output gradients as the small norm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gnsmon.demo.data import topics, windows
from gnsmon.demo.models import CharGPT
from gnsmon.estimators import Estimator, NormPair
from gnsmon.estimators.values import Array
from gnsmon.figures.page import Page, Rows, number
from gnsmon.figures.training import loss_of
from gnsmon.norms.contractions import outer_sq_norms, sogns_big_sq_norm, sogns_sq_norms, square_sum

TITLE = "Small norm, big norm by appendix E, |G|² and S in training"
SOURCES = ("exact", "SOGNS small, exact big", "SOGNS small, appendix E big")
QUANTITIES = ("small_sq_norm", "big_sq_norm", "grad_sq_norm", "tr_sigma")
LABELS = ("small squared norm", "big squared norm", "|G|²", "S")


@dataclass(frozen=True)
class Settings:
    """How the model is trained."""

    steps: int = 400
    batch: int = 16
    context: int = 64
    width: int = 64
    lr: float = 3e-3
    decay: float = 0.95
    seed: int = 0


QUICK = Settings(steps=60, batch=8, context=32, width=32)


@dataclass(frozen=True)
class Numbers:
    """Averaged quantities, [steps, sources] each."""

    settings: Settings
    small_sq_norm: Array
    big_sq_norm: Array
    grad_sq_norm: Array
    tr_sigma: Array

    @property
    def b_simple(self) -> Array:
        """S / |G|^2; NaN where either is not positive."""
        known = (self.grad_sq_norm > 0) & (self.tr_sigma > 0)
        nothing = np.full_like(self.tr_sigma, np.nan)
        return np.divide(self.tr_sigma, self.grad_sq_norm, out=nothing, where=known)


def measure(settings: Settings) -> Numbers:
    """Train a character GPT and take the norms of its blocks' linear layers at every step."""
    s = settings
    torch.manual_seed(s.seed)
    text = topics()
    model = CharGPT(len(text.vocabulary), context=s.context, width=s.width, dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr)
    generator = torch.Generator().manual_seed(s.seed)
    batches = windows(text.train, s.batch, s.context, generator)
    estimator = Estimator(len(SOURCES), decay=s.decay)
    found = []
    for _, batch in zip(range(s.steps), batches, strict=False):
        with factors(model.blocks) as layers:
            loss_of(model, batch).backward()
        estimator.update(norms(layers, s.batch))
        optimizer.step()
        optimizer.zero_grad()
        g, v = estimator.grad_sq_norm, estimator.tr_sigma
        found.append([g + v, g + v / s.batch, g, v])  # E |G_b|^2 = |G|^2 + S/b, b = 1 and batch
    return Numbers(s, *np.stack(found, axis=1))


@contextmanager
def factors(root: nn.Module) -> Iterator[dict[nn.Linear, tuple[Tensor, Tensor]]]:
    """Output gradients and inputs, [B, 1, T, .] each, of the linear layers in one backward."""
    found: dict[nn.Linear, tuple[Tensor, Tensor]] = {}

    def remember(module: nn.Linear, args: tuple[Any, ...], output: Tensor) -> None:
        x = args[0].detach()[:, None]

        def keep(dy: Tensor) -> None:
            found[module] = dy.detach()[:, None], x

        output.register_hook(keep)

    linear = [module for module in root.modules() if isinstance(module, nn.Linear)]
    hooks = [module.register_forward_hook(remember) for module in linear]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def norms(layers: dict[nn.Linear, tuple[Tensor, Tensor]], batch: int) -> NormPair:
    """Norms of the layers' weights together by each of `SOURCES`, for a loss that is a mean.

    Each example's share in the mean is its part u_j, so that eta^2 and n^2 are |u_j|^2.
    """
    big, appendix_e, exact, sogns = (
        sum(float(fn(layer, *dy_x)) for layer, dy_x in layers.items())
        for fn in (
            lambda layer, *_: square_sum(layer.weight.grad),
            lambda _, dy, x: sogns_big_sq_norm(dy, x),
            lambda _, dy, x: outer_sq_norms(dy, x, path="direct").sum(),
            lambda _, dy, x: sogns_sq_norms(dy, x).sum(),
        )
    )
    whole, parts = np.array([big, big, appendix_e]), np.array([exact, sogns, sogns])
    return NormPair(whole, parts, 1 / batch, batch)


def page(numbers: Numbers) -> Page:
    """The figure."""
    s, later = numbers.settings, slice(numbers.settings.steps // 5, None)

    def off(key: str, source: int) -> str:
        values = getattr(numbers, key)[later]
        ratio = values[:, source] / values[:, 0]
        known = ratio[~np.isnan(ratio)]
        return number(float(np.median(known)) if len(known) else math.nan)

    negative = [float(np.mean(numbers.grad_sq_norm[later, i] <= 0)) for i in (1, 2)]
    text = (
        f"The weights of the linear layers in the blocks of a character GPT (2 layers, width "
        f"{s.width}, sequences of {s.context} characters, no dropout), trained by AdamW at "
        f"{s.lr:g} on {s.batch} sequences a step; all {s.steps} steps measured, averages with "
        f"decay {s.decay:g}. Norms are of gradients of the mean loss.",
        f"After the first fifth of the steps, in the median over them: the small norm by SOGNS is "
        f"{off('small_sq_norm', 1)} times the exact one and the big norm by appendix E "
        f"{off('big_sq_norm', 2)} times. From the approximate small and the exact big norm |G|² "
        f"becomes {off('grad_sq_norm', 1)} times what it is (below zero in {negative[0]:.0%} of "
        f"the steps) and S {off('tr_sigma', 1)} times, so that b_simple, where there is one, is "
        f"{off('b_simple', 1)} times the exact one. From both approximations |G|² becomes "
        f"{off('grad_sq_norm', 2)} times (below zero in {negative[1]:.0%}), S "
        f"{off('tr_sigma', 2)} times and b_simple {off('b_simple', 2)} times.",
    )
    return Page("6", TITLE, text, _rows(numbers), partial(plot, numbers))


def _rows(numbers: Numbers) -> Rows:
    rows: Rows = [("step", "source", *LABELS, "b_simple")]
    steps = len(numbers.tr_sigma)
    for i in np.unique(np.linspace(0, steps - 1, 7).astype(int))[1:]:
        for k, source in enumerate(SOURCES):
            own = (float(getattr(numbers, key)[i, k]) for key in (*QUANTITIES, "b_simple"))
            rows.append((str(i + 1), source, *map(number, own)))
    return rows


def plot(numbers: Numbers, path: Path) -> None:
    """Draw the four quantities over the steps."""
    from gnsmon.figures.drawing import APPROXIMATE, EXACT, THIRD, canvas

    step = np.arange(1, len(numbers.tr_sigma) + 1)
    with canvas(path, TITLE, rows=2, columns=2, size=(9.6, 6.6)) as panels:
        for axes, key, label in zip(panels, QUANTITIES, LABELS, strict=True):
            values = getattr(numbers, key)
            for k, colour in enumerate((EXACT, APPROXIMATE, THIRD)):
                same = (key, k) in (("big_sq_norm", 1), ("small_sq_norm", 2))  # as the one before
                style = {"ls": (0, (3, 3)) if same else "-", "lw": 1.3 if k else 2.2}
                axes.plot(step, values[:, k], color=colour, label=SOURCES[k], **style)
            if (values[len(values) // 5 :] <= 0).any():
                least = float(np.abs(np.median(values, axis=0)).min())
                axes.set_yscale("symlog", linthresh=least)
                axes.axhline(0, color="#b5b5b5", lw=1)
            else:
                axes.set_yscale("log")
            axes.set(xlabel="optimizer step", ylabel=label)
        panels[0].legend(loc="best")
