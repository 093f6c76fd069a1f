"""Results as markdown: what the script prints, and what stands between the marks of a document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.scaling import AXES, BASE, METHODS, VOCABULARY, draw
from bench.steps import PEERS

Results = dict[str, Any]
Lines = list[str]
LIBRARIES = list(PEERS)[:-1]  # the loop is none
BEST, MEMORY = "best exact library", "peak memory, gpt"
TARGETS = {  # step -> column -> ratio that is aimed at; of the libraries, what an earlier study had
    BEST: {"mlp": 1.15, "cnn": 1.83, "gpt": 1.27, "resnet": 2.0, MEMORY: 1.20},
    "pepgns": {"mlp": 1.05, "cnn": 1.12, "gpt": 1.05, "resnet": 1.25, "gpt-compiled": 1.03},
    "sketch": {"mlp": 1.04, "cnn": 1.08, "gpt": 1.05, "resnet": 1.10},
    "sogns": {"mlp": 1.04, "cnn": 1.04, "gpt": 1.03, "resnet": 1.04},
    'every="auto"': {"mlp": 1.01, "cnn": 1.01, "gpt": 1.01, "resnet": 1.01},
}
OWN_MEMORY = 1.02  # of all of gnsmon's


def markdown(results: Results) -> dict[str, str]:
    """The parts of one machine's results that there are: "cpu" or "cuda", and "scaling"."""
    parts = {}
    if rows := results["rows"]:
        names = dict.fromkeys(row["workload"] for row in rows)
        tables = [_summary(rows), *(_details(rows, name) for name in names)]
        parts[results["device"]] = [results["machine"], *map("\n".join, tables)]
    if points := results["scaling"]:
        parts["scaling"] = [results["machine"], "\n".join(_scaling(points))]
    return {name: "\n\n".join(part) for name, part in parts.items()}


def write(path: Path, results: Results) -> None:
    """Put each part between its marks in the document, and the figure into `figures` beside it.

    Raises:
        ValueError: when the document has no marks for a part.
    """
    text = path.read_text()
    for name, part in markdown(results).items():
        begin, end = f"<!-- bench: {name} -->", f"<!-- end of bench: {name} -->"
        before, found, rest = text.partition(begin)
        _, ended, after = rest.partition(end)
        if not found or not ended:
            raise ValueError(f"{path}: expected the marks {begin} and {end}, found them not; add")
        if name == "scaling":
            draw(results["scaling"], path.parent / "figures" / "cost.png")
            part += "\n\n![The same as a figure](figures/cost.png)"
        text = f"{before}{begin}\n\n{part}\n\n{end}{after}"
    path.write_text(text)


def _summary(rows: list[dict[str, Any]]) -> Lines:
    columns = list(dict.fromkeys(row["workload"] for row in rows))
    values = {(row["step"], row["workload"]): row["ratio"] for row in rows}
    exact = {(r["step"], r["workload"]) for r in rows if r["step"] in LIBRARIES and _exact(r)}
    if any(row["memory"] for row in rows if row["workload"] == "gpt"):
        values |= {(r["step"], MEMORY): r["memory"] for r in rows if r["workload"] == "gpt"}
        exact |= {(step, MEMORY) for step, workload in exact if workload == "gpt"}
        columns.append(MEMORY)
    for column in columns:
        of_column = [values[cell] for cell in exact if cell[1] == column]
        values[BEST, column] = min(filter(None, of_column), default=None)
    lines = _head("ratio to the bare step (goal)", *columns)
    for step in [BEST, *dict.fromkeys(row["step"] for row in rows)]:
        targets = TARGETS.get(step, {})
        targets = (
            targets if step == BEST else {**targets, **({MEMORY: OWN_MEMORY} if targets else {})}
        )
        lines.append(_line(step, *(_aimed(values.get((step, c)), targets.get(c)) for c in columns)))
    return lines


def _exact(row: dict[str, Any]) -> bool:
    return row["rms"] is not None and row["rms"] < 1e-3 and row["parameters"] > 0.95


def _details(rows: list[dict[str, Any]], workload: str) -> Lines:
    own = [row for row in rows if row["workload"] == workload]
    seconds = [row["bare_seconds"] for row in own if row["bare_seconds"]]
    memory = [row["bare_memory"] for row in own if row["bare_memory"]]
    title = f"**{workload}**"
    if seconds:
        title += f": a bare step takes {1e3 * seconds[0]:.3g} ms"
    if memory:
        title += f" and {memory[0] / 2**20:,.0f} MiB at its peak"
    of = ["parameters", "of grad²", "error: mean", "rms", "peak memory"]
    lines = [title, "", *_head("step", "ratio", "quartiles", "rounds", *of)]
    for row in own:
        if row["note"]:
            lines.append(_line(row["step"], row["note"], *[""] * 7))
            continue
        shares = (_share(row["parameters"]), _share(row["sq_norm"]))
        errors = ("" if row[k] is None else f"{row[k]:{f}}" for k, f in _ERRORS)
        quartiles = f"{row['low']:.2f}-{row['high']:.2f}"
        cells = (_aimed(row["ratio"]), quartiles, str(row["rounds"]), *shares, *errors)
        lines.append(_line(row["step"], *cells, _aimed(row["memory"])))
    return lines


_ERRORS = (("error", "+.1e"), ("rms", ".1e"))


def _scaling(points: list[dict[str, Any]]) -> Lines:
    base = ", ".join(f"{AXES[axis][0]} {size}" for axis, size in BASE.items())
    title = (
        f"A GPT of {base}, vocabulary {VOCABULARY}, one group a layer; one size varies at a time."
    )
    lines = [title, "", *_head("size", "", "bare step, ms", *METHODS)]
    for axis, size in dict.fromkeys((p["axis"], p["size"]) for p in points):
        own = {p["method"]: p for p in points if (p["axis"], p["size"]) == (axis, size)}
        ratios = (_aimed(own[m]["ratio"]) if m in own else "" for m in METHODS)
        bare = next(iter(own.values()))["bare_seconds"]
        lines.append(_line(AXES[axis][0], str(size), f"{1e3 * bare:.3g}", *ratios))
    return lines


def _head(first: str, *columns: str) -> Lines:
    return [_line(first, *columns), f"|---|{'--:|' * len(columns)}"]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _aimed(value: float | None, target: float | None = None) -> str:
    found = "" if value is None else f"{value:.2f}"
    return found if target is None else f"{found} ({target:.2f})".strip()


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
