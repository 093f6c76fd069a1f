"""The look that all figures share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gnsmon.plots import FAINT, INK, MAIN, OTHERS, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXACT, APPROXIMATE, THIRD, FOURTH = MAIN, *OTHERS[:3]
DPI = 110


@contextmanager
def canvas(
    path: Path, title: str, *, rows: int = 1, columns: int = 1, size: tuple[float, float]
) -> Iterator[list[Axes]]:
    """The panels of a picture, row by row, which is saved at the end.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('a figure needs matplotlib: pip install "gnsmon[report]"') from error
    with rc_context({**STYLE, "axes.titlesize": 11, "axes.titlelocation": "left"}):
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        yield list(figure.subplots(rows, columns, squeeze=False).flat)
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, color=INK)
        figure.savefig(path)
    _shrink(path)


def _shrink(path: Path) -> None:
    """The same picture in 128 colours, which takes a third of the room."""
    from PIL import Image  # matplotlib needs it too

    with Image.open(path) as picture:
        few = picture.convert("RGB").quantize(128)
    few.save(path, optimize=True)


def plain_numbers(axis: Any, *, base: float = 10.0, subs: tuple[float, ...] = (1,)) -> None:
    """Ticks of a log axis at base^n times `subs`, as people write them: 0.5, 20, 1,000."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(base=base, subs=subs, numticks=99))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda x, _: f"{x:,.0f}" if x >= 10 else f"{x:g}")


def truth_line(axes: Axes, y: float = 1.0) -> None:
    """Where an approximation would be exact."""
    axes.axhline(y, color=FAINT, lw=1, ls=(0, (4, 3)), zorder=1)
