"""What belongs beside a picture: what it shows, the numbers drawn, the command that made it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Rows = list[tuple[str, ...]]


@dataclass(frozen=True)
class Page:
    """One figure: its picture, and the words and numbers beside it."""

    name: str  # "2a"
    title: str
    text: tuple[str, ...]  # paragraphs
    rows: Rows  # the first one names the columns
    draw: Callable[[Path], None]

    def write(self, folder: Path, command: str) -> list[Path]:
        """The picture and the page beside it, written into `folder`."""
        picture, page = (folder / f"figure_{self.name}{end}" for end in (".png", ".md"))
        self.draw(picture)
        head, *rows = self.rows
        lines = [head, ("---", *["--:"] * (len(head) - 1)), *rows]
        table = "\n".join(f"| {' | '.join(c.replace('|', '&#124;') for c in r)} |" for r in lines)
        title = f"# Figure {self.name}: {self.title}"
        picture_line = f"![{self.title}]({picture.name})"
        parts = [title, picture_line, *self.text, table, f"Made by `{command}`."]
        page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        return [picture, page]


def number(x: float, digits: int = 3) -> str:
    """A measured number, or a dash where there is none."""
    if not math.isfinite(x):
        return "-"
    if 1 <= abs(x) < 1e6:
        return f"{float(f'{x:.{digits}g}'):,g}"
    return f"{x:.{digits}g}"


def percent(x: float) -> str:
    """A share in percent, to three digits."""
    return f"{number(100 * x)} %" if math.isfinite(x) else "-"
