"""Figures 2a and 2b: SOGNS beside exact norms while a transformer trains, over steps and loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import gnsmon
from gnsmon.demo.data import topics, windows
from gnsmon.demo.models import CharGPT
from gnsmon.estimators.values import Array
from gnsmon.figures.page import Page, Rows, number
from gnsmon.sinks import Log, read_log

METHODS = ("pepgns", "sogns")
BLOCKS = "blocks"  # the group of the layers that SOGNS approximates; little of the whole norm
POINTS = 50  # steps drawn over the loss
PROBLEMS = {"text-adam": "Adam", "text-sgd": "SGD"}  # of docs/validation.md
TITLE_A = "Noise scale of a character GPT in training: SOGNS beside exact norms"
TITLE_B = "Noise scale against the loss of the same run"


@dataclass(frozen=True)
class Settings:
    """How the transformer is trained."""

    steps: int = 600
    batch: int = 16
    context: int = 128
    width: int = 128
    layers: int = 2
    lr: float = 3e-3
    decay: float = 0.95  # of the averages, the loss's too
    seed: int = 0


QUICK = Settings(steps=80, batch=8, context=64, width=64)


@dataclass(frozen=True)
class Trained:
    """A training run: its log, and its last checkpoint."""

    settings: Settings
    log: Log
    model: CharGPT


def train(
    settings: Settings, folder: Path, *, say: Callable[[str], None] = lambda _: None
) -> Trained:
    """Train with AdamW at a constant rate, measuring every step; gns.jsonl, model.pt in `folder`.

    No dropout, so that the noise is the data's alone.
    """
    torch.manual_seed(settings.seed)
    text = topics()
    model = _model(settings, len(text.vocabulary))
    generator = torch.Generator().manual_seed(settings.seed)
    batches = windows(text.train, settings.batch, settings.context, generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr)
    with gnsmon.attach(
        model,
        optimizer,
        method=list(METHODS),
        every=1,
        decay=settings.decay,
        groups=lambda name: BLOCKS if name.startswith("blocks.") else "other",
        run_dir=folder,
    ) as gns:
        for step, (x, y) in zip(range(1, settings.steps + 1), batches, strict=False):
            loss = loss_of(model, (x, y))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            gns.log_loss(loss.item())
            if step % 100 == 0:
                say(f"trained {step} of {settings.steps} steps, loss {loss.item():.3f}")
    torch.save(model.state_dict(), folder / "model.pt")
    (folder / "settings.json").write_text(json.dumps(asdict(settings)))
    return load(folder)


def load(folder: Path) -> Trained:
    """What `train` left in `folder`."""
    settings = Settings(**json.loads((folder / "settings.json").read_text()))
    model = _model(settings, len(topics().vocabulary))
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    return Trained(settings, read_log(folder), model)


def _model(settings: Settings, vocabulary: int) -> CharGPT:
    size = {"context": settings.context, "width": settings.width, "layers": settings.layers}
    return CharGPT(vocabulary, **size, dropout=0.0)


def loss_of(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy in nats a character."""
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


@dataclass(frozen=True)
class Course:
    """One method's readings, step by step; NaN where there is no number."""

    b_simple: Array  # [steps]
    low: Array  # [steps]
    high: Array  # [steps]
    parts: Array  # [steps] sum of the parts' squared norms in that step alone
    in_blocks: Array  # [steps] that of the blocks' parameters


@dataclass(frozen=True)
class Measured:
    """A critical batch found by training at many batch sizes, and the noise scale there."""

    problem: str
    loss: float
    b_crit: float
    low: float
    high: float
    b_simple: float
    b_simple_low: float
    b_simple_high: float


COLUMNS = tuple(field.name for field in fields(Measured))[1:]


@dataclass(frozen=True)
class Numbers:
    """What both figures are made of."""

    settings: Settings
    step: Array  # [steps]
    loss: Array  # [steps] exponential average, nats a character
    courses: dict[str, Course]
    measured: list[Measured]

    @property
    def parts_ratio(self) -> Array:
        """SOGNS over exact sum of squared norms, in each step alone."""
        return self.courses["sogns"].parts / self.courses["pepgns"].parts

    @property
    def blocks_ratio(self) -> Array:
        """The same of the blocks' parameters alone."""
        return self.courses["sogns"].in_blocks / self.courses["pepgns"].in_blocks


def measure(trained: Trained, *, validation: Path | None = None) -> Numbers:
    """The run's readings, and the measured critical batches of `validation` if it exists."""
    log = trained.log
    courses = {}
    for method in METHODS:
        own = log.of(method)
        courses[method] = Course(
            *(np.array(own[name], dtype=float) for name in ("b_simple", "low", "high")),
            parts=log.column("raw", "parts_sq_norm", method=method),
            in_blocks=log.column("groups", BLOCKS, "raw", "parts_sq_norm", method=method),
        )
    step = np.array(log.of("pepgns")["step"], dtype=float)
    loss = _average(np.array(log.losses["loss"]), trained.settings.decay)
    at = np.searchsorted(log.losses["step"], step)
    return Numbers(trained.settings, step, loss[at], courses, critical_batches(validation))


def _average(values: Array, decay: float) -> Array:
    """Exponential average with normalised weights, as the readings have it."""
    total, weight, found = 0.0, 0.0, []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        found.append(total / weight)
    return np.array(found)


def critical_batches(file: Path | None) -> list[Measured]:
    """Those of the text problems in a file as scripts/ write it; none without the file.

    Raises:
        ValueError: on a file of another shape.
    """
    if file is None or not file.exists():
        return []
    try:
        problems = json.loads(file.read_text(encoding="utf-8"))["problems"]
        return [
            Measured(name, *(_number(target[key]) for key in COLUMNS))
            for name in PROBLEMS
            for target in problems.get(name, {}).get("targets", [])
        ]
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f'{file}: expected {{"problems": {{name: {{"targets": [...]}}}}}}, each target with '
            f"{', '.join(COLUMNS)}; got something else ({error!r}); write it anew or name no file"
        ) from error


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def page_a(numbers: Numbers) -> Page:
    """The figure over steps."""
    s, share = numbers.settings, numbers.courses["pepgns"]
    known = {name: float(np.mean(np.isfinite(c.b_simple))) for name, c in numbers.courses.items()}
    text = (
        f"A character transformer ({s.layers} layers, width {s.width}, sequences of {s.context} "
        f"characters, no dropout) on the text of Python's manual, AdamW at {s.lr:g}, "
        f"{s.batch} sequences a step, every one of {s.steps} steps measured by both methods in "
        f"one pass; averages with decay {s.decay:g}. The band is the 95 % interval of exact norms.",
        f"SOGNS' sum of per-example squared norms is {_between(numbers.parts_ratio)} times the "
        f"exact one (median and quartiles over the steps); of the blocks' parameters alone, "
        f"{_between(numbers.blocks_ratio)} times, but those are "
        f"{np.median(share.in_blocks / share.parts):.0%} of the sum in the median: the rest is "
        "embeddings and norm layers, which SOGNS takes exactly but for the tied head. A noise "
        "scale could be read from exact norms in "
        f"{known['pepgns']:.0%} of the steps, from SOGNS, uncalibrated as here, in "
        f"{known['sogns']:.0%}. (SOGNS' own interval does not know of its bias.)",
    )
    return Page("2a", TITLE_A, text, _rows(numbers), partial(plot_a, numbers))


def page_b(numbers: Numbers) -> Page:
    """The figure over the loss."""
    if numbers.measured:
        points = ", ".join(
            f"{PROBLEMS[m.problem]} {number(m.b_crit)} against {number(m.b_simple)} at loss "
            f"{m.loss:.3g}"
            for m in numbers.measured
        )
        crit = (
            "Right: the critical batch found by training at many batch sizes, beside b_simple "
            f"averaged along the best run to the same loss ({points}). That is another, smaller "
            "model on sequences of 32 characters (docs/validation.md), whose numbers are to be "
            "compared with one another, not with those on the left."
        )
    else:
        crit = (
            "The critical batch measured by training at many batch sizes is not drawn: there was "
            "no docs/validation.json when this was made."
        )
    text = (
        f"The run of figure 2a against its training loss, averaged alike: {POINTS} steps evenly "
        "through the run, bars the 95 % interval of exact norms.",
        crit,
    )
    return Page("2b", TITLE_B, text, _rows(numbers), partial(plot_b, numbers))


def _between(values: Array) -> str:
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def _rows(numbers: Numbers) -> Rows:
    head = ("step", "loss", "exact", "95 % interval", "SOGNS", "small norms: SOGNS / exact")
    head = (*head, "in the blocks")
    exact, sogns = (numbers.courses[name] for name in METHODS)
    rows = [head]
    for i in np.unique(np.linspace(0, len(numbers.step) - 1, 13).astype(int))[1:]:
        interval = f"{number(exact.low[i])} to {number(exact.high[i])}"
        shown = number(exact.b_simple[i]), interval, number(sogns.b_simple[i])
        ratios = (f"{x[i]:.2f}" for x in (numbers.parts_ratio, numbers.blocks_ratio))
        rows.append((f"{numbers.step[i]:.0f}", f"{numbers.loss[i]:.3f}", *shown, *ratios))
    return rows


def plot_a(numbers: Numbers, path: Path) -> None:
    """Draw the noise scales above, the norms' ratio below."""
    from gnsmon.figures.drawing import (
        APPROXIMATE,
        EXACT,
        FAINT,
        THIRD,
        canvas,
        plain_numbers,
        truth_line,
    )

    with canvas(path, TITLE_A, rows=2, size=(9.6, 6.0)) as (above, below):
        above.get_subplotspec().get_gridspec().set_height_ratios([2.2, 1])
        exact = numbers.courses["pepgns"]
        above.fill_between(numbers.step, exact.low, exact.high, color=EXACT, alpha=0.16, lw=0)
        _courses(above, numbers, numbers.step, "-")
        batch = numbers.settings.batch
        above.axhline(batch, color=FAINT, lw=1.2, ls=(0, (5, 3)), label=f"batch ({batch})")
        above.set_ylabel("noise scale (sequences)")
        above.legend(loc="upper left", ncols=4)
        above.sharex(below)
        above.tick_params(labelbottom=False)
        below.plot(numbers.step, numbers.parts_ratio, color=APPROXIMATE, lw=1, label="whole model")
        below.plot(numbers.step, numbers.blocks_ratio, color=THIRD, lw=1, label="blocks alone")
        truth_line(below)
        below.legend(loc="upper right", ncols=2)
        below.set(yscale="log", xlabel="optimizer step", ylabel="small norms:\nSOGNS / exact")
        plain_numbers(below.yaxis, subs=(0.5, 1, 1.5, 2, 3, 4, 6))


def plot_b(numbers: Numbers, path: Path) -> None:
    """Draw the noise scales over the loss, which falls to the right, and the measured ones."""
    from gnsmon.figures.drawing import EXACT, canvas

    columns = 1 + bool(numbers.measured)
    with canvas(path, TITLE_B, columns=columns, size=(5.4 + 4.2 * columns, 4.8)) as (axes, *rest):
        shown = np.unique(np.linspace(0, len(numbers.loss) - 1, POINTS).astype(int))
        exact = numbers.courses["pepgns"]
        x, low, high = (values[shown] for values in (numbers.loss, exact.low, exact.high))
        axes.vlines(x, low, high, color=EXACT, alpha=0.25, lw=2.5)
        _courses(axes, numbers, numbers.loss, ".", shown)
        axes.invert_xaxis()
        axes.set(xlabel="training loss, averaged (nats a character)")
        axes.set_ylabel("noise scale (sequences)")
        axes.legend(loc="upper left")
        for other in rest:
            _measured(other, numbers.measured)


def _measured(axes: Any, measured: list[Measured]) -> None:
    """Draw the measured critical batches and the noise scales that belong to them."""
    from gnsmon.figures.drawing import FOURTH, THIRD, plain_numbers

    for (name, label), colour in zip(PROBLEMS.items(), (THIRD, FOURTH), strict=True):
        own = [m for m in measured if m.problem == name]
        for what, low, high, style in (
            ("b_crit", "low", "high", "D-"),
            ("b_simple", "b_simple_low", "b_simple_high", "o--"),
        ):
            values = {k: np.array([getattr(m, k) for m in own]) for k in ("loss", what, low, high)}
            y = values[what]
            ends = np.maximum(np.nan_to_num([y - values[low], values[high] - y]), 0)
            kind: dict[str, Any] = {"fmt": style, "ms": 6, "capsize": 3, "color": colour, "lw": 1}
            axes.errorbar(values["loss"], y, ends, **kind, label=f"{what}, {label}")
    axes.set_yscale("log")
    axes.invert_xaxis()
    axes.set(xlabel="held-out loss of a smaller model", ylabel="examples")
    axes.legend(loc="lower right", ncols=2)
    plain_numbers(axes.yaxis, subs=(1, 2, 5))


def _courses(axes: Any, numbers: Numbers, x: Array, style: str, at: Any = slice(None)) -> None:
    from gnsmon.figures.drawing import APPROXIMATE, EXACT, plain_numbers

    exact, sogns = (numbers.courses[name] for name in METHODS)
    for course, colour, label in (
        (exact, EXACT, "exact (pepgns)"),
        (sogns, APPROXIMATE, "SOGNS, as published"),
    ):
        axes.plot(x[at], course.b_simple[at], style, color=colour, lw=1.5, ms=8, label=label)
    axes.set_yscale("log")
    shown = np.concatenate([exact.b_simple, sogns.b_simple])
    shown = shown[np.isfinite(shown) & (shown > 0)]
    if len(shown):
        axes.set_ylim(shown.min() / 1.6, shown.max() * 2)
    plain_numbers(axes.yaxis, subs=(1, 2, 5))
