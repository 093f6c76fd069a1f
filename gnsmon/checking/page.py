"""How a check looks on a terminal."""

from __future__ import annotations

import re
from collections.abc import Callable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gnsmon.checking.findings import Finding
from gnsmon.checking.values import TOTAL, Check, Row, together

MOST_ROWS = 24  # of the table, before layers that differ in a number are put together
COLOURS = {"error": "red", "warning": "yellow", "note": "cyan"}


def page(check: Check) -> RenderableType:
    """A table by layer, what is left out and why, the findings and the verdict."""
    parts: list[RenderableType] = [_table(check), Text(_legend(check), style="dim")]
    parts += [Text(line) for line in _left_out(check)]
    parts += [_shown(finding) for finding in check.findings]
    parts.append(Text(f"\n{check.verdict}", "bold green" if check.passed else "bold red"))
    return Group(*parts)


def _table(check: Check) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("layer", overflow="fold")
    table.add_column("type", overflow="fold")
    for heading in ("numbers", "covered", "error", "sum", "SOGNS"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = by_layer(check.rows)
    for row in rows if len(rows) == 1 else [*rows, check.total]:
        table.add_row(
            row.name,
            "" if row.name == TOTAL else row.layer,
            f"{row.numbers:,}",
            _covered(row),
            _error(row.error),
            _error(row.sum_error),
            "" if row.sogns is None else f"{row.sogns:.2f}",
            style="bold" if row.name == TOTAL else "",
        )
    return table


def by_layer(rows: list[Row], most: int = MOST_ROWS) -> list[Row]:
    """A row for each layer; if these are more than `most`, one for those that differ in a number.

    `blocks.0.norm` and `blocks.1.norm` become `blocks.*.norm` then. If there are still too many,
    those that are left out and those with the largest errors stay, and the rest is one row.
    """
    layers = _grouped(rows, lambda row: row.module or "(model)")
    if len(layers) > most:
        layers = _grouped(rows, lambda row: re.sub(r"(?<!\w)\d+(?!\w)", "*", row.module))
    if len(layers) <= most:
        return layers
    worst = sorted(layers, key=lambda row: (row.covered / row.numbers, -(row.error or 0)))
    kept, rest = worst[:most], worst[most:]
    return [*(row for row in layers if row in kept), together(rest, f"({len(rest)} more)")]


def _grouped(rows: list[Row], key: Callable[[Row], str]) -> list[Row]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((key(row), row.layer), []).append(row)
    return [together(group, name) for (name, _), group in groups.items()]


def _legend(check: Check) -> str:
    text = (
        f"\nerror: {check.method}'s squared norms against one example at a time, over "
        f"{check.examples} examples. sum: the examples' sum against .grad. SOGNS: what that "
        "approximation gives, over the exact value. "
    )
    if check.b_simple is not None:
        return text + (
            f"This batch alone has b_simple = {check.b_simple:.3g}, so an error in the small norms "
            f"is amplified about 1 + b_simple/B = {check.amplification:.3g} times in |G|²."
        )
    if check.truth is not None:
        return text + "|G|² of this batch alone came out negative: no b_simple, no amplification."
    return text


def _covered(row: Row) -> str:
    if row.covered in (0, row.numbers):
        return f"{row.covered / row.numbers:.0%}"
    return f"{min(row.covered / row.numbers, 0.999):.1%}"  # never "100%" of what is not whole


def _error(error: float | None) -> str:
    if error is None or error == 0:
        return "" if error is None else "0"
    return f"{error:.0e}" if error < 1e-3 else f"{error:.1%}"


def _left_out(check: Check) -> list[str]:
    """One line for each reason, the parameters with the most numbers first."""
    by_reason: dict[str, list[Row]] = {}
    for row in check.rows:
        if row.reason:
            by_reason.setdefault(row.reason, []).append(row)
    lines = []
    for reason, rows in by_reason.items():
        more = f" and {len(rows) - 2} more" if len(rows) > 2 else ""
        lines.append(f"\nleft out: {', '.join(row.name for row in rows[:2])}{more}: {reason}")
    return lines


def _shown(finding: Finding) -> RenderableType:
    head = Text(f"\n{finding.severity}: ", COLOURS[finding.severity])
    return Text.assemble(head, (f"{finding.title}. ", "bold"), finding.text)
