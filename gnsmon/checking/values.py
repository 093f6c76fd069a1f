"""What a check found: rows by parameter, the noise scale of the batch, findings, a verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from rich.console import Console, RenderableType

from gnsmon.checking.findings import Finding
from gnsmon.estimators.values import Moments

TOLERANCE = 1e-8  # relative, in float64, of what is exact
EXACT = {"pepgns", "norm_layers"}  # methods that are, where they cover
TOTAL = "total"


class Norms(NamedTuple):
    """Squared norms of some parameters' gradient, and of the examples' parts of it, summed."""

    whole: float
    exact: float  # of the parts, by brute force
    found: float  # of the parts, by the method
    sogns: float
    floor: float  # rounding's share: what is smaller is zero

    @property
    def error(self) -> float:
        """Relative, of `found`."""
        gap = abs(self.found - self.exact)
        return gap / max(self.exact, self.floor) if gap else 0.0


@dataclass(frozen=True)
class Row:
    """What was found of one trainable parameter, or of several together."""

    name: str
    module: str  # its path in the model
    layer: str  # its type
    numbers: int
    covered: int  # of the numbers
    norms: Norms | None  # of what is covered; None where there was nothing to compare with
    sum_error: float | None  # relative, of the examples' sum along a random direction against .grad
    reason: str | None  # why it is left out

    @property
    def error(self) -> float | None:
        """Relative, of the sum of squared norms against brute force."""
        return self.norms.error if self.norms else None

    @property
    def sogns(self) -> float | None:
        """SOGNS over exact."""
        known = self.norms is not None and self.norms.exact > self.norms.floor
        return self.norms.sogns / self.norms.exact if self.norms and known else None


def together(rows: list[Row], name: str) -> Row:
    """One row for several: their norms are added, then compared."""
    norms = [row.norms for row in rows if row.norms]
    sums = [row.sum_error for row in rows if row.sum_error is not None]
    modules, layers = {row.module for row in rows}, {row.layer for row in rows}
    return Row(
        name=name,
        module=rows[0].module if len(modules) == 1 else "",
        layer=rows[0].layer if len(layers) == 1 else "",
        numbers=sum(row.numbers for row in rows),
        covered=sum(row.covered for row in rows),
        norms=Norms(*np.sum(norms, 0)[:-1].tolist(), norms[0].floor) if norms else None,
        sum_error=max(sums, default=None),
        reason=next((row.reason for row in rows if row.reason), None),
    )


@dataclass(frozen=True)
class Check:
    """The proof's outcome; prints as a table by layer, findings and a verdict."""

    rows: list[Row]  # by parameter
    examples: int
    method: str
    findings: list[Finding]
    whole: Moments | None  # of all trainable parameters in this batch, by brute force
    truth: Moments | None  # of the covered ones, by brute force
    read: Moments | None  # of the covered ones, by the method's norms

    @property
    def max_error(self) -> float:
        """The largest relative error of a covered parameter; 0 where none is covered."""
        found = [e for row in self.rows for e in (row.error, row.sum_error) if e is not None]
        return max(found, default=0.0)

    @property
    def fraction(self) -> float:
        """Covered share of the numbers in trainable parameters."""
        return sum(row.covered for row in self.rows) / sum(row.numbers for row in self.rows)

    @property
    def passed(self) -> bool:
        """Whether something is covered, all of it is right, and no finding is an error.

        An approximate method is right where the examples' sum is.
        """
        return self._failure is None

    @property
    def total(self) -> Row:
        """All parameters together."""
        return together(self.rows, TOTAL)

    @property
    def b_simple(self) -> float | None:
        """That of the covered in this batch, by brute force; None where |G|² came out negative.

        Of few examples it tells the order of magnitude at best.
        """
        return _ratio(self.truth)

    @property
    def amplification(self) -> float | None:
        """1 + b_simple/B: by how much |G|² is more wrong than the small norms it is made from."""
        return None if self.b_simple is None else 1 + self.b_simple / self.examples

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self._failure:
            return f"FAILED: {self._failure}"
        covered = f"passed: {self.fraction:.2%} of the trainable parameters are covered"
        left_out = "" if self.fraction == 1 else f"; the others are left out{self._difference}"
        if self.method in EXACT:
            right = f" and right to {self.max_error:.1e} over {self.examples} examples"
            return f"{covered}{right}{left_out}"
        return f"{covered}{left_out}; {self._approximation}"

    @property
    def _difference(self) -> str:
        """What it makes to the noise scale that some parameters are left out."""
        here, whole = self.b_simple, _ratio(self.whole)
        if here is None or whole is None:
            return ""
        return f" (in this batch, b_simple is {here:.3g} without them and {whole:.3g} with them)"

    @property
    def _failure(self) -> str | None:
        if not self.fraction:
            return "no parameter is covered" + "".join(
                f" ({f.title})" for f in self.findings if f.severity == "error"
            )
        exact = self.method in EXACT

        def error(row: Row) -> float:
            return max((row.error or 0) if exact else 0, row.sum_error or 0)

        worst = max(self.rows, key=error)
        if not error(worst) < TOLERANCE:
            return f"{worst.name} is off by {error(worst):.1e}, allowed {TOLERANCE:.0e}"
        errors = [f.title for f in self.findings if f.severity == "error"]
        return "; ".join(errors) or None

    @property
    def _approximation(self) -> str:
        """What an approximate method makes of this batch."""
        total = self.total.norms
        assert total is not None and self.truth is not None and self.read is not None
        off = f"{self.method} is off by {total.found / total.exact - 1:+.1%} in the small norms"
        truth, read = (float(m.grad_sq_norm[0]) for m in (self.truth, self.read))
        if self.b_simple is None:
            return f"{off}; |G|² came out negative, so what that does to it cannot be told here"
        now = _ratio(self.read)
        reads = "cannot be read, |G|² being negative" if now is None else f"reads {now:.3g}"
        return (
            f"{off}, which becomes {read / truth - 1:+.1%} in |G|² (amplification "
            f"{self.amplification:.3g}); on this batch b_simple is {self.b_simple:.3g} and {reads}"
        )

    def __rich__(self) -> RenderableType:
        from gnsmon.checking.page import page

        return page(self)

    def __str__(self) -> str:
        console = Console(width=100, no_color=True)
        with console.capture() as captured:
            console.print(self)
        return captured.get()


def _ratio(of: Moments | None) -> float | None:
    known = of is not None and of.grad_sq_norm[0] > 0
    return float(of.tr_sigma[0] / of.grad_sq_norm[0]) if of and known else None
