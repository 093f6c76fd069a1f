"""The deflated sketch: unbiased squared norms of factored gradients in time linear in positions."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from gnsmon.norms import plans
from gnsmon.norms.contractions import cast_like
from gnsmon.norms.convolved import Convolved
from gnsmon.norms.forms import Form, Joined, Outer, Shape

SUBSPACE = 8  # directions in which the norm is exact
DRAWS = 16  # probes that differ: example b has that of number b % DRAWS


class Sketch:
    """The random probes and the subspace of one parameter, a matrix of `shape[0]` rows.

    For a probe v of random signs, E v v' = 1, so E |M v|² = |M|² for any gradient M. Alone it is
    noisy, for gradients have few directions; so the norm is exact on a subspace Q of the columns,
    |M|² = |M Q|² + |M (1 - Q Q')|², and only the rest is sketched. That is unbiased for any Q that
    is chosen without knowledge of v, even from the very gradients that are sketched.

    Args:
        shape: of the parameter, n numbers behind the first axis.
        dtype: float32 or float64.
        device: where its gradients are.
        generator: for the subspace to begin with.
        seed: of the probes, a stream of their own: whether others are drawn changes nothing.
        subspace: dimensions of Q.
        probes: of each example.
    """

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        device: torch.device,
        *,
        generator: torch.Generator,
        seed: int = 0,
        subspace: int = SUBSPACE,
        probes: int = 1,
    ):
        n = prod(shape[1:])
        self.columns = min(subspace, n, shape[0])
        start = torch.randn(n, self.columns, dtype=dtype, generator=generator)
        self.subspace = torch.linalg.qr(start)[0].to(device)
        self._drawing = torch.Generator(device).manual_seed(seed)
        self.probes = torch.ones(DRAWS, n, probes, dtype=dtype, device=device)
        # Multiply-adds per position, row and column: see `sq_norms`. Products with so few columns
        # run at an eighth to a third of a square one's speed (CPU, 128 to 3072 wide, torch 2.13).
        self.passes = 8 * (3 * self.columns + 2 * probes)
        self.used: bool | None = None  # whether it ever paid; unknown until it is measured

    def draw(self) -> None:
        """New probes, in place, for what a compiled graph has taken in must stay where it is."""
        self.probes.bernoulli_(0.5, generator=self._drawing).mul_(2).sub_(1)

    def track(self, grad: Tensor) -> None:
        """Turn the subspace towards the gradient's, by one subspace iteration, if it is of use.

        A gradient that is not finite leaves it alone; nothing waits for the device to find out.
        """
        if self.used is False:
            return
        matrix = cast_like(grad.reshape(len(grad), len(self.subspace)), self.subspace)
        rows = torch.linalg.qr(matrix @ self.subspace)[0]
        turned = torch.linalg.qr(matrix.mT @ rows)[0]
        self.subspace.copy_(torch.where(turned.isfinite().all(), turned, self.subspace))

    def pays(self, form: Form, *, fused: bool = False) -> bool:
        """Whether the sketch of `form` takes less time than its exact norms.

        `fused`: those may come with the sum of the gradients, which is then made anyway.
        """
        if isinstance(form, Joined):
            return any(self.pays(part) for part in form.parts)
        if not isinstance(form, (Outer, Convolved)) or form.positions == 1:
            return False
        m, n = form.shape[0], prod(form.shape[1:])
        return self.passes * (m + n) * form.positions < plans.extra_work(form, fusable=fused)

    def wanted(self, form: Form, *, fused: bool = False) -> bool:
        """Whether it pays, which is kept: a sketch that never does is neither drawn nor tracked."""
        pays = self.pays(form, fused=fused)
        if not torch.compiler.is_compiling():
            self.used = pays or bool(self.used)
        return pays

    def sq_norms(self, form: Form, *, refine: bool = True) -> tuple[Tensor, Tensor]:
        """Estimates [B] of each example's squared norm, and the variance of their sum.

        `refine` turns the subspace further towards these gradients, by one iteration of its own.
        The variance is itself estimated, from the same probes: that of v' C v is
        2 (|C|² - sum C_ii²), and E |C v|² = |C|². The diagonal is neglected, so that it is a little
        too large; it is float64, for fourth powers of gradients leave the range of float32. Without
        need of a sketch the norms are exact.
        """
        if not self.wanted(form):
            exact = form.sq_norms()
            return exact, exact.new_zeros(())
        basis = self.subspace
        if refine:
            basis = torch.linalg.qr(form.project_back(form.project(basis)).sum(0))[0]
        mine = torch.arange(form.batch, device=basis.device) % DRAWS
        rest = (self.probes - basis @ (basis.mT @ self.probes))[mine]  # [B, n, p]
        both = form.project(torch.cat([basis.expand(form.batch, -1, -1), rest], 2))
        known, drawn = both.split([self.columns, rest.shape[2]], 2)
        estimates = known.square().sum((1, 2)) + drawn.square().sum(1).mean(1)
        curved = form.project_back(drawn)
        curved = curved - basis @ (basis.mT @ curved)
        # Examples that share a probe err together.
        together = torch.zeros_like(self.probes).index_add(0, mine, curved)
        return estimates, 2 * together.double().square().sum() / rest.shape[2] ** 2
