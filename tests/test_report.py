"""Reports and pictures of logs made of real readings."""

from __future__ import annotations

import io
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from gnsmon.estimators.values import GroupReading, Raw, Reading
from gnsmon.plots import plot_run
from gnsmon.report import render, summarise, write_report
from gnsmon.sinks import Jsonl, read_log

RAW = Raw(1.0, 2.0, 1 / 64, 0.1, 0.2)
HEADER = {
    "model": "GPT [small]",
    "parameters": 10_788_096,
    "optimizer": ["AdamW"],
    "window": None,
    "level": 0.9,
    "methods": ["pepgns", "sogns"],
    "every": 10,
    "versions": {"torch": "2.13"},
    "coverage": {"fraction": 0.97, "missing": {"head.scale": "no rule for MyScale | yet"}},
}


def group(k: int) -> GroupReading:
    return GroupReading("ok", None, 100.0 * k, 80.0 * k, 130.0 * k, 1e-3, 0.1 * k, RAW)


def reading(i: int, n: int) -> Reading:
    b = 40 * math.exp(3 * i / n)
    values = {"status": "ok", "reason": None, "b_simple": b, "low": b / 2, "high": b * 2}
    nothing = {"b_simple": None, "low": None, "high": None}
    if i < n // 10:
        values = {"status": "undefined", "reason": "4 effective steps so far", **nothing}
    elif i < n // 5 or i == n // 2:
        values = {"status": "lower_bound", "reason": "|G|² near zero", **nothing, "low": b / 2}
    elif i < n // 3:
        values |= {"status": "wide", "reason": "|G|² is known to 30%", "low": 0.0}
    return Reading(
        step=10 * (i + 1),
        examples=64,
        tokens=None,
        method="pepgns",
        **values,
        grad_sq_norm=1e-3,
        tr_sigma=0.4,
        raw=RAW,
        n_eff=min(i, 39),
        coverage=0.97,
        overhead=0.013,
        skipped={"overflow": 2},
        suggested_batch_size=256,
        groups={f"blocks.{k}": group(k) for k in range(1, 15)},
    )


def a_log(folder: Path, n: int = 60, *, losses: bool = True) -> Path:
    sink = Jsonl(folder / "gns.jsonl")
    sink.start(HEADER, 0)
    for i in range(n):
        sink(reading(i, n))
        sink(replace(reading(i, n), method="sogns", groups={}))
        if losses:
            sink.loss(10 * i, 4 - i / n if i else math.nan)
    sink.advise("Batch 64 is too small.\nUse 256.", 256)
    sink.close()
    return folder


def test_the_report_says_what_the_log_holds(tmp_path):
    log = read_log(a_log(tmp_path))
    report = summarise(log)
    assert report.reading == log.latest()
    assert [s.title for s in report.sections] == [
        *("Run", "Now", "Trend", "Coverage", "Layers", "Advice")
    ]
    out = io.StringIO()
    render(Console(file=out, width=100), report)
    said = out.getvalue()
    for expected in (
        "GPT [small]",
        "10,788,096",
        "Step 600: noise scale 764 (90%: 382-1,528); batch 64: too small by 12x.",
        "Suggested batch size: 256.",
        "By sogns: noise scale 764",
        "measured steps, of late one step in 10.",
        "1.3% of the training time",
        "97.0% of the trainable parameters",
        "overflow (2)",
        "no rule for MyScale",
        "The 12 noisiest of 14.",
        "Batch 64 is too small.\nUse 256.",
    ):
        assert expected in said
    assert "window" not in said


def test_the_trend_is_over_the_readings_that_have_a_value(tmp_path):
    (trend,) = (s for s in summarise(read_log(a_log(tmp_path))).sections if s.title == "Trend")
    assert [row[0] for row in trend.rows[1:]] == ["start", "middle", "end"]
    assert [row[3] for row in trend.rows[1:]] == ["40%", "95%", "100%"]
    medians = [float(row[2].replace(",", "")) for row in trend.rows[1:]]
    assert medians == sorted(medians)


def test_shares_of_noise_are_of_the_total(tmp_path):
    (layers,) = (s for s in summarise(read_log(a_log(tmp_path))).sections if s.title == "Layers")
    assert layers.rows[1] == ("blocks.14", "13.3%", "1,400", "1,120-1,820")


def test_a_short_log_is_reported_too(tmp_path):
    for n in (1, 2):
        sink = Jsonl(tmp_path / str(n) / "gns.jsonl")
        sink.start({}, 0)
        for i in range(n):
            sink(reading(i, 100))
        sink.close()
        page = write_report(tmp_path / str(n)).read_text()
        assert "not measurable yet: 4 effective steps so far" in page
        assert page.count("| 0% |") == n


def test_a_resumed_and_damaged_log_says_so(tmp_path):
    a_log(tmp_path)
    sink = Jsonl(tmp_path / "gns.jsonl")
    sink.start(HEADER, 400)
    sink.close()
    with (tmp_path / "gns.jsonl").open("a") as file:
        file.write('{"schema": 1, "ki')
    page = write_report(tmp_path).read_text()
    assert "Resumed at step 400." in page
    assert "torn and left out: 1." in page
    assert "## Advice" not in page


def test_write_report_makes_a_page_with_a_picture(tmp_path):
    page = write_report(a_log(tmp_path))
    assert page == tmp_path / "report.md"
    text = page.read_text()
    assert "![noise scale](gns.png)" in text
    assert "| head.scale | no rule for MyScale \\| yet |" in text
    picture = (tmp_path / "gns.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_without_matplotlib_the_page_says_how_to_get_the_picture(tmp_path, monkeypatch):
    for name in [m for m in sys.modules if m.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = write_report(a_log(tmp_path)).read_text()
    assert 'pip install "gnsmon[report]"' in text
    assert "gns.png" not in text


@pytest.mark.parametrize("losses", [True, False])
def test_a_plot_with_and_without_losses(tmp_path, losses):
    log = read_log(a_log(tmp_path, losses=losses))
    assert plot_run(log, tmp_path / "a.png").stat().st_size > 10_000
    given = plot_run(log, tmp_path / "b.png", loss=[(0, 3.0), (300, 2.0), (600, 1.5)])
    assert given.read_bytes() != (tmp_path / "a.png").read_bytes()


def test_a_plot_leaves_pyplot_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    plot_run(read_log(a_log(tmp_path)), tmp_path / "a.png")
    assert dict(matplotlib.rcParams) == before
    assert (
        "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    )


def test_errors_say_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such run folder"):
        write_report(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="no gns.jsonl"):
        write_report(tmp_path)
    sink = Jsonl(tmp_path / "gns.jsonl")
    sink.start(HEADER, 0)
    sink.close()
    with pytest.raises(ValueError, match="no reading yet.*every 10 optimizer steps"):
        write_report(tmp_path)
    sink.start({**HEADER, "every": "auto"}, 1)
    sink.close()
    with pytest.raises(ValueError, match="no reading yet: expected one in some optimizer steps"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="no readings to plot"):
        plot_run(read_log(tmp_path), tmp_path / "a.png")
