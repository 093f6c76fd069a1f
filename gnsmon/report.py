"""A run's log as a report that a person reads, in the terminal or as a page with a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gnsmon.advice import Advice
from gnsmon.estimators.values import Reading
from gnsmon.sinks.jsonl import Log, read_log
from gnsmon.sinks.wording import (
    approximation,
    interval,
    layer_health,
    noise_scale,
    number,
    verdict,
)

MOST_GROUPS = 12
Rows = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Section:
    """A heading, its sentences and a table; the first row names the columns."""

    title: str
    text: tuple[str, ...] = ()
    rows: Rows = ()


@dataclass(frozen=True)
class Report:
    """What a log says about its run."""

    path: Path
    reading: Reading  # the primary method's last
    sections: tuple[Section, ...]


def summarise(log: Log) -> Report:
    """What the log says; ValueError before its first reading."""
    reading = log.latest()
    if reading is None:
        every = log.header.get("every", 10)
        expected = "in some" if every == "auto" else f"every {every}"
        raise ValueError(
            f"{log.path} has a header and no reading yet: expected one {expected} optimizer steps, "
            "let the run go on"
        )
    sections = (
        _run(log),
        _now(log, reading),
        _trend(log),
        _gaps(log, reading),
        _groups(log, reading),
        _health(log),
        Section("Advice", tuple(log.advice[-1]["text"].split("\n\n")) if log.advice else ()),
    )
    return Report(log.path, reading, tuple(s for s in sections if s.text or s.rows))


def render(console: Console, report: Report) -> None:
    """Print the report."""
    console.print(f"[bold]Gradient noise scale[/]  {escape(str(report.path))}", highlight=False)
    for section in report.sections:
        console.print(f"\n[bold cyan]{escape(section.title)}[/]")
        for line in section.text:
            console.print(escape(line), highlight=False)
        if section.rows:
            table = Table(box=None, pad_edge=False, header_style="dim")
            table.show_header = any(section.rows[0])
            for name in section.rows[0]:
                table.add_column(name, overflow="fold")
            for row in section.rows[1:]:
                table.add_row(*map(escape, row))
            console.print(table)


def markdown(report: Report, picture: str | None = None) -> str:
    """The report as a Markdown page, with a link to a picture."""
    parts = ["# Gradient noise scale"] + ([f"![noise scale]({picture})"] if picture else [])
    for section in report.sections:
        parts += [f"## {section.title}", *section.text]
        if section.rows:
            head, *rows = [[c.replace("|", "\\|") for c in row] for row in section.rows]
            lines = [head, ["---"] * len(head), *rows]
            parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(parts) + "\n"


def write_report(run: str | Path | Log) -> Path:
    """The path of `report.md`, written with `gns.png` beside the log of a run folder, or `run`.

    Without matplotlib the page has no picture and says how to get one. Errors as in `read_log` and
    `summarise`.
    """
    log = run if isinstance(run, Log) else read_log(run)
    report = summarise(log)
    folder = log.path.parent
    picture: str | None = "gns.png"
    missing = ""
    try:
        from gnsmon.plots import plot_run

        plot_run(log, folder / "gns.png")
    except ImportError as error:
        picture, missing = None, f"\nNo picture: {error}\n"
    page = folder / "report.md"
    page.write_text(markdown(report, picture) + missing, encoding="utf-8")
    return page


def curve_table(advice: Advice) -> Table:
    """Steps against examples over batch sizes, as multiples of the fewest."""
    table = Table(box=None, pad_edge=False, header_style="dim", title_justify="left")
    points = advice.curve()
    priced = any(point.cost is not None for point in points)
    cost_name = "time" if advice.goal.in_seconds else "cost"
    for name in ("batch", "steps", "examples", *[cost_name] * priced, ""):
        table.add_column(name, justify="left" if not name else "right")
    cheapest = min((point.cost for point in points if point.cost is not None), default=None)
    for point in points:
        kept = "present and suggested" if advice.batch_size == advice.present else "present"
        marks = {advice.batch_size: "suggested", advice.present: kept}
        cost = [f"{point.cost / cheapest:.3g}"] if point.cost and cheapest else []
        row = (f"{point.batch_size:,}", f"{point.steps:.3g}", f"{point.examples:.3g}", *cost)
        table.add_row(*row, marks.get(point.batch_size, ""))
    return table


def _run(log: Log) -> Section:
    header = log.header
    skip = {"schema", "kind", "wall", "coverage", "step"}
    known = {k: v for k, v in header.items() if k not in skip and v is not None and v != []}
    rows = [(k.replace("_", " "), _flat(v)) for k, v in known.items()]
    resumed = ", ".join(f"{h['step']:,}" for h in log.headers[1:])
    text = (f"Resumed at step {resumed}.",) if resumed else ()
    return Section("Run", text, (("", ""), *rows))


def _now(log: Log, reading: Reading) -> Section:
    lines = [f"Step {reading.step:,}: {noise_scale(reading, log.level)}; {verdict(reading)}."]
    if reading.status in ("wide", "lower_bound") and reading.reason:
        lines.append(f"Status {reading.status}: {reading.reason}.")
    if reading.suggested_batch_size:
        lines.append(f"Suggested batch size: {reading.suggested_batch_size:,}.")
    lines.append(f"Averaged over about {reading.n_eff:.0f} measured steps{_spacing(log)}.")
    if reading.overhead is not None:
        lines.append(f"Cost of measuring: {reading.overhead:.1%} of the training time.")
    if known := approximation(reading):
        lines.append(f"Its source is approximate: {known}.")
    lines += [_by(r, log.level) for r in map(log.latest, log.methods[1:]) if r]
    return Section("Now", tuple(lines))


def _spacing(log: Log) -> str:
    """How many steps lie between the last twenty readings, on average."""
    steps = [record["step"] for record in log.of()[-21:]]
    if len(steps) < 2:
        return ""
    return f", of late one step in {number((steps[-1] - steps[0]) / (len(steps) - 1))}"


def _by(reading: Reading, level: float) -> str:
    known = approximation(reading)
    return f"By {reading.method}: {noise_scale(reading, level)}" + (f"; {known}." if known else ".")


def _trend(log: Log) -> Section:
    records = log.of()
    names = {1: ("so far",), 2: ("start", "end")}.get(len(records), ("start", "middle", "end"))
    parts = np.array_split(np.arange(len(records)), len(names))
    rows = (_part(n, records[p]) for n, p in zip(names, parts, strict=True))
    return Section("Trend", (), (("", "steps", "median noise scale", "measurable"), *rows))


def _part(name: str, records: NDArray[np.void]) -> tuple[str, ...]:
    values = records["b_simple"][~np.isnan(records["b_simple"])]
    steps = f"{records['step'][0]:,}-{records['step'][-1]:,}"
    median = number(float(np.median(values))) if len(values) else "-"
    return (name, steps, median, f"{len(values) / len(records):.0%}")


def _gaps(log: Log, reading: Reading) -> Section:
    lines = [f"Measured: {reading.coverage:.1%} of the trainable parameters."]
    if reading.skipped:
        counts = ", ".join(f"{reason} ({n:,})" for reason, n in reading.skipped.items())
        lines.append(f"Measurements dropped: {counts}.")
    if log.unreadable:
        lines.append(f"Lines of the log torn and left out: {log.unreadable:,}.")
    by_reason: dict[str, list[str]] = {}
    for name, reason in (log.header.get("coverage") or {}).get("missing", {}).items():
        by_reason.setdefault(reason, []).append(name)
    rows = [(_names(names), reason) for reason, names in by_reason.items()]
    return Section("Coverage", tuple(lines), (("left out", "why"), *rows) if rows else ())


def _names(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _groups(log: Log, reading: Reading) -> Section:
    noise = {name: max(g.tr_sigma or 0.0, 0.0) for name, g in reading.groups.items()}
    total = sum(noise.values())
    if not total:
        return Section("Layers")
    ranked = sorted(noise, key=noise.__getitem__, reverse=True)[:MOST_GROUPS]
    shown = ((name, f"{noise[name] / total:.1%}", reading.groups[name]) for name in ranked)
    rows = ((name, share, number(g.b_simple), interval(g)) for name, share, g in shown)
    text = (f"The {len(ranked)} noisiest of {len(noise)}.",) if len(noise) > len(ranked) else ()
    columns = ("layer", "share of noise", "noise scale", f"{log.level * 100:g}%")
    return Section("Layers", text, (columns, *rows))


def _health(log: Log) -> Section:
    health = log.latest_health()
    if health is None:
        return Section("Layer health")
    groups = health.groups
    ranked = sorted(groups, key=lambda name: -groups[name].grad_norm)[:MOST_GROUPS]
    shown = [name for name in groups if name in ranked]  # in the order of the layers
    columns: dict[str, list[str]] = {
        "layer": shown,
        "gradient norm": [number(groups[n].grad_norm) for n in shown],
        "share of its square": [_percent(groups[n].grad_share) for n in shown],
    }
    if health.clip is not None:
        columns["clipped by"] = [number(groups[n].clip_factor) for n in shown]
        columns["in steps"] = [_percent(groups[n].clip_share) for n in shown]
    if health.relative_change is not None:
        columns["mean |dw/w|"] = [number(groups[n].relative_change) for n in shown]
    most = (f"The {len(shown)} of the largest gradients of {len(groups)}.",)
    text = (*layer_health(health), *(most if len(shown) < len(groups) else ()))
    return Section("Layer health", text, (tuple(columns), *zip(*columns.values(), strict=True)))


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_flat(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(_flat, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
