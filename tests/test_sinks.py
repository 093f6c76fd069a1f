"""Every sink against real files, read back by the tool that reads them in life."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import signal
import struct
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rich.console

from gnsmon.estimators.values import GroupReading, Raw, Reading
from gnsmon.sinks import Jsonl, SinkSet, open_sink, read_log
from gnsmon.sinks.base import PATIENCE
from gnsmon.sinks.console import Console
from gnsmon.sinks.csv import Csv
from gnsmon.sinks.keys import scalars
from gnsmon.sinks.wording import noise_scale, verdict

RAW = Raw(1.0, 2.0, 1 / 64, 0.1, 0.2)
GROUP = GroupReading("ok", None, 90.0, 80.0, 100.0, 0.1, 9.0, RAW)
OK = Reading(
    step=0,
    examples=64,
    tokens=None,
    method="pepgns",
    status="ok",
    reason=None,
    b_simple=340.0,
    low=290.0,
    high=410.0,
    grad_sq_norm=0.1,
    tr_sigma=34.0,
    raw=RAW,
    n_eff=39.0,
    coverage=1.0,
    overhead=None,
    skipped={"overflow": 2},
    suggested_batch_size=256,
    groups={"blocks.0": GROUP, "head": replace(GROUP, b_simple=None)},
)
NOTHING = {"b_simple": None, "low": None, "high": None, "suggested_batch_size": None}
UNDEFINED = replace(OK, status="undefined", reason="4 effective steps so far", **NOTHING)
BOUND = replace(OK, status="lower_bound", reason="|G|² is not distinguishable", **NOTHING)
BOUND = replace(BOUND, low=800.0)
HEADER = {"model": "GPT", "methods": ["pepgns", "sogns"], "every": 10}


def at(step: int, reading: Reading = OK) -> Reading:
    return replace(reading, step=step)


def written(path: Path, steps: range, *, start: int = 0) -> Path:
    sink = Jsonl(path)
    sink.start(HEADER, start)
    for step in steps:
        sink(at(step))
        sink.loss(step, 2.0 - step / 100)
    sink.close()
    return path


# the set


class Broken:
    """Fails, except at every `rest`-th call."""

    def __init__(self, rest: int = 10**9) -> None:
        self.calls = 0
        self.rest = rest

    def __call__(self, reading: Reading) -> None:
        self.calls += 1
        if self.calls % self.rest:
            raise OSError("disk full")


def test_a_broken_sink_leaves_the_others_alone_and_is_switched_off():
    before, broken, after = [], Broken(), []
    sinks = SinkSet([before.append, broken, after.append])
    with pytest.warns(RuntimeWarning) as caught:
        for step in range(6):
            sinks(at(step))
    assert [r.step for r in before] == [r.step for r in after] == list(range(6))
    assert broken.calls == PATIENCE
    said = [str(w.message) for w in caught]
    assert len(said) == 2
    assert "Broken failed with OSError: disk full" in said[0]
    assert "Switched off" in said[1]
    assert sinks.failures == {"Broken": PATIENCE}


def test_failures_apart_from_each_other_do_not_switch_a_sink_off():
    flaky = Broken(rest=PATIENCE)
    sinks = SinkSet([flaky])
    with pytest.warns(RuntimeWarning, match="disk full") as caught:
        for step in range(3 * PATIENCE):
            sinks(at(step))
    assert flaky.calls == 3 * PATIENCE
    assert len(caught) == 1


def test_strict_raises():
    with pytest.raises(OSError, match="disk full"):
        SinkSet([Broken()], strict=True)(OK)


def test_interrupts_are_never_swallowed():
    def interrupted(reading: Reading) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SinkSet([interrupted])(OK)


def test_events_reach_the_sinks_that_have_them():
    class Full:
        def __init__(self) -> None:
            self.seen: list[object] = []

        def __call__(self, reading):
            self.seen.append(reading.step)

        def start(self, header, step):
            self.seen.append(("start", header["model"], step))

        def loss(self, step, value):
            self.seen.append(("loss", step, value))

        def advise(self, text, suggested):
            self.seen.append((text, suggested))

        def close(self):
            self.seen.append("close")

    full, plain = Full(), []
    sinks = SinkSet([plain.append, full])
    sinks.start(HEADER, 5)
    sinks(at(5))
    sinks.loss(5, 1.5)
    sinks.advise("larger", 256)
    sinks.close()
    sinks.close()
    assert full.seen == [("start", "GPT", 5), 5, ("loss", 5, 1.5), ("larger", 256), "close"]
    assert plain == [at(5)]


# specs


def test_specs_open_their_sinks(tmp_path):
    readings: list[Reading] = []
    assert open_sink(readings.append) == readings.append
    assert open_sink("jsonl", tmp_path).path == tmp_path / "gns.jsonl"
    assert open_sink(f"jsonl:{tmp_path}/x.jsonl").path == tmp_path / "x.jsonl"
    assert open_sink(f"csv:{tmp_path}/v1.5").path == tmp_path / "v1.5" / "gns.csv"
    assert isinstance(open_sink("console"), Console)


@pytest.mark.parametrize("spec", ["tensorbord", "", "jsonl:", "console:5", 3])
def test_a_wrong_spec_says_what_was_expected(spec, tmp_path):
    with pytest.raises(ValueError, match="expected") as error:
        open_sink(spec, tmp_path)
    assert repr(spec) in str(error.value)


def test_a_sink_without_a_place_asks_for_one():
    with pytest.raises(ValueError, match="csv:PATH"):
        open_sink("csv")


@pytest.mark.parametrize(
    ("spec", "package"), [("wandb:p", "wandb"), ("tensorboard", "torch.utils.tensorboard")]
)
def test_a_missing_package_names_its_extra(spec, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'"gnsmon\[{spec.partition(":")[0]}\]"'):
        open_sink(spec, tmp_path)


def test_neither_sinks_nor_report_load_torch_or_an_optional_package():
    code = """
        import sys
        import gnsmon.sinks, gnsmon.report, gnsmon.plots
        import gnsmon.sinks.console, gnsmon.sinks.tensorboard, gnsmon.sinks.wandb
        print([m for m in ("torch", "wandb", "tensorboard", "matplotlib") if m in sys.modules])
    """
    assert python(code).strip() == "[]"


def python(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **env},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# jsonl


def test_jsonl_gives_back_what_was_written(tmp_path):
    path = tmp_path / "new" / "gns.jsonl"
    sink = Jsonl(path)
    sink.start(HEADER, 0)
    sogns = replace(BOUND, method="sogns")
    for step in (0, 10):
        sink(at(step))
        sink(at(step, sogns))
    sink.loss(10, 1.5)
    sink.advise("use 256", 256)
    lines = path.read_text().splitlines()  # before close: every line is there already
    assert [json.loads(line)["kind"] for line in lines] == [
        *("header", "reading", "reading", "reading", "reading", "loss", "advice")
    ]
    assert all(abs(json.loads(line)["wall"] - time.time()) < 60 for line in lines)
    sink.close()

    log = read_log(tmp_path / "new")
    assert log.header.items() >= HEADER.items()
    assert log.methods == ["pepgns", "sogns"]
    assert log.latest() == at(10)
    assert log.latest("sogns") == at(10, sogns)
    assert log.column("step").tolist() == [0, 10]
    assert log.column("raw", "tr_sigma").tolist() == [0.2, 0.2]
    assert log.column("groups", "blocks.0", "b_simple").tolist() == [90, 90]
    assert np.isnan(log.column("b_simple", method="sogns")).all()
    assert [(r["step"], r["loss"]) for r in log.losses] == [(10, 1.5)]
    assert log.advice[0]["text"] == "use 256"
    assert log.advice[0]["step"] == 10


def test_jsonl_never_holds_a_number_that_is_not_one(tmp_path):
    path = tmp_path / "gns.jsonl"
    sink = Jsonl(path)
    sink.start({"lr": math.inf, "seen": (np.float32("nan"), np.int64(3)), "at": tmp_path}, 0)
    sink(replace(OK, tr_sigma=math.nan, raw=replace(RAW, tr_sigma=np.float64("inf"))))
    sink(replace(OK, step=np.int64(7), b_simple=np.float32(2.5)))
    sink.loss(1, math.nan)
    sink.close()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    header, bad, good, loss = (
        json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()
    )
    assert header["lr"] is None
    assert header["seen"] == [None, 3]
    assert header["at"] == str(tmp_path)
    assert bad["tr_sigma"] is bad["raw"]["tr_sigma"] is loss["loss"] is None
    assert bad["b_simple"] == 340
    assert (good["step"], good["b_simple"]) == (7, 2.5)


def test_a_torn_last_line_is_left_out_and_cut_on_resume(tmp_path):
    path = written(tmp_path / "gns.jsonl", range(5))
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[-1][:40])
    log = read_log(path)
    assert log.unreadable == 1
    assert log.column("step").tolist() == list(range(5))

    written(path, range(5, 6), start=5)
    log = read_log(path)
    assert log.unreadable == 0
    assert log.column("step").tolist() == list(range(6))


def test_resume_drops_what_will_be_written_again(tmp_path):
    path = written(tmp_path / "gns.jsonl", range(10))
    written(path, range(6, 12), start=6)
    written(path, range(4, 8), start=4)  # back behind the first resume
    log = read_log(path)
    assert log.column("step").tolist() == list(range(8))
    assert [r["step"] for r in log.losses] == list(range(8))
    assert [h["step"] for h in log.headers] == [0, 4]
    assert [p.name for p in tmp_path.iterdir()] == ["gns.jsonl"]


def test_a_fresh_run_keeps_the_log_of_the_earlier_one(tmp_path):
    path = written(tmp_path / "gns.jsonl", range(3))
    for n in (1, 2):
        with pytest.warns(UserWarning, match=rf"now gns\.{n}\.jsonl"):
            written(path, range(n))
    assert len(read_log(tmp_path / "gns.1.jsonl").readings) == 3
    assert len(read_log(tmp_path / "gns.2.jsonl").readings) == 1
    assert len(read_log(tmp_path).readings) == 2


def test_the_log_of_a_killed_process_is_readable(tmp_path):
    code = f"""
        import os, signal, sys
        sys.path[:0] = {[str(Path(__file__).parent)]!r}
        from test_sinks import HEADER, Jsonl, at
        sink = Jsonl({str(tmp_path / "gns.jsonl")!r})
        sink.start(HEADER, 0)
        for step in range(50):
            sink(at(step))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    root = {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env={**os.environ, **root}, timeout=50
    )
    assert done.returncode == -signal.SIGKILL
    assert len(read_log(tmp_path).readings) == 50


@pytest.mark.parametrize(
    "damage",
    [
        ["\0" * 50],
        [""],
        ["{}", '{"schema": 1}', "3"],
        ['{"schema": 1, "kind": "loss", "step": [1', "2]}"],  # valid, were they one line
        ["1, 2"],
    ],
)
def test_damage_in_the_middle_costs_only_its_lines(tmp_path, damage):
    path = written(tmp_path / "gns.jsonl", range(3))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], *damage, *lines[3:]]) + "\n")
    log = read_log(path)
    assert log.unreadable == len(damage)
    assert (len(log.readings), len(log.losses)) == (3, 3)


def test_reading_a_log_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such run folder"):
        read_log(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="holds no gns.jsonl"):
        read_log(tmp_path)
    written(tmp_path / "a" / "gns.jsonl", range(1))
    with pytest.raises(FileNotFoundError, match="did you mean .*a/gns.jsonl"):
        read_log(tmp_path)
    path = tmp_path / "gns.jsonl"
    path.touch()
    with pytest.raises(ValueError, match="empty file"):
        read_log(tmp_path)
    path.write_text("not a log\n")
    with pytest.raises(ValueError, match="no readable line"):
        read_log(tmp_path)
    for schema, what in ((3, "--upgrade"), (1, "read it with that one, or log the run anew")):
        path.write_text(f'{{"schema": {schema}, "kind": "header"}}\n')
        with pytest.raises(ValueError, match=f"expected schema 2, got {schema}.*{what}"):
            read_log(tmp_path)


def test_a_log_of_many_lines_is_read_fast(tmp_path):
    path = written(tmp_path / "gns.jsonl", range(1))
    header, reading = path.read_text().splitlines(keepends=True)[:2]
    path.write_text(header + reading * 20_000)
    begin = time.process_time()
    log = read_log(path)
    assert log.column("b_simple").sum() == 340 * 20_000
    assert time.process_time() - begin < 2  # a million in 10 s, and as much for a busy machine


def test_writing_before_start_says_what_to_do(tmp_path):
    for sink in (Jsonl(tmp_path / "a.jsonl"), Csv(tmp_path / "a.csv")):
        with pytest.raises(ValueError, match="start"):
            sink(OK)


# csv


def test_csv_rows_and_resume(tmp_path):
    path = tmp_path / "gns.csv"
    wordy = replace(UNDEFINED, reason="a, b\nand c")
    for start, steps in ((0, range(4)), (2, range(2, 5))):
        sink = open_sink("csv", tmp_path)
        sink.start(HEADER, start)
        for step in steps:
            sink(at(step, wordy if step == 3 else OK))
        sink.close()
        with path.open("a") as file:
            file.write("5,pepg")  # torn
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))[:-1]
    assert [int(row["step"]) for row in rows] == list(range(5))
    assert (rows[0]["b_simple"], rows[0]["skipped_steps"]) == ("340.0", "2")
    assert rows[0]["overhead"] == rows[3]["b_simple"] == ""
    assert rows[3]["reason"] == "a, b and c"


# words and the console


@pytest.mark.parametrize(
    ("reading", "said", "of_the_batch"),
    [
        (OK, "noise scale 340 (95%: 290-410)", "batch 64: too small by 5.3x"),
        (replace(OK, examples=1024), "noise scale 340", "larger than needed by 3x"),
        (replace(OK, examples=300), "noise scale 340", "about right"),
        (replace(OK, status="wide", low=0.0), "roughly 340 (95%: 0-410)", "too early to say"),
        (BOUND, "not measurable yet: at least 800", "too small by at least 12x"),
        (replace(BOUND, low=70.0), "at least 70", "batch 64"),
        (replace(BOUND, low=None), "not measurable yet: -", "batch 64"),
        (replace(OK, b_simple=0.0, low=0.0, high=2.0), "0-2", "larger than needed"),
        (UNDEFINED, "not measurable yet: 4 effective steps so far", "batch 64"),
    ],
)
def test_a_reading_in_words(reading, said, of_the_batch):
    assert said in noise_scale(reading)
    assert verdict(reading).endswith(of_the_batch)


def test_the_console_prints_the_first_and_the_last_and_little_between():
    out = io.StringIO()
    sink = Console(rich.console.Console(file=out, width=40), every=3600)
    sink.start(HEADER, 0)
    for step in (1000, 1100, 1200):
        sink(at(step))
        sink(at(step, replace(BOUND, method="sogns", coverage=0.73)))
    assert out.getvalue().count("\n") == 2
    sink.close()
    sink.close()
    lines = out.getvalue().splitlines()
    assert lines[0] == (
        "step 1,000  noise scale 340 (95%: 290-410)  batch 64: too small by 5.3x  | suggested 256"
    )
    assert [line.split()[1] for line in lines] == ["1,000", "1,000", "1,200", "1,200"]
    assert "[sogns] noise scale not measurable yet: at least 800" in lines[3]
    assert lines[3].endswith("| 73% covered")


def test_the_console_prints_advice_after_the_reading_that_it_is_on():
    out = io.StringIO()
    sink = Console(rich.console.Console(file=out), every=3600)
    for step in range(3):
        sink(at(step))
    sink.advise("use 256", 256)
    sink.close()
    assert [line.split()[:2] for line in out.getvalue().splitlines()] == [
        ["step", "0"],
        ["step", "2"],
        ["use", "256"],
    ]


def test_the_console_goes_on_once_its_time_has_passed():
    out = io.StringIO()
    sink = Console(rich.console.Console(file=out), every=0)
    for step in range(4):
        sink(at(step))
    sink.advise("use [256]", 256)
    assert out.getvalue().count("step") == 4
    assert "use [256]" in out.getvalue()


# dashboards


def test_absent_numbers_have_no_key():
    values = scalars(replace(UNDEFINED, tr_sigma=math.nan))
    assert values == {
        "gns/grad_sq_norm": 0.1,
        "gns/batch_size": 64,
        "gns/coverage": 1.0,
        "gns/skipped_steps": 2,
        "gns/layer/blocks.0/b_simple": 90.0,
    }


def events(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def steps(folder: Path, tag: str) -> list[int]:
    return [event.step for event in events(folder).Scalars(tag)]


def test_tensorboard_scalars_margin_and_text(tmp_path):
    sink = open_sink("tensorboard", tmp_path)
    sink.start(HEADER, 0)
    for step in (0, 10):
        sink(at(step))
        sink(at(step, replace(OK, method="sogns", b_simple=500.0)))
    sink(at(20, UNDEFINED))
    sink(at(30, BOUND))
    sink.loss(20, 1.5)
    sink.loss(21, math.nan)
    sink.advise("use 256\nnow", 256)
    sink.close()
    sink.close()

    read = events(tmp_path)
    tags = set(read.Tags()["scalars"])
    assert {k: read.Scalars(k)[0].value for k in scalars(OK)} == pytest.approx(scalars(OK))
    assert {"gns/sogns/b_simple", "gns/sogns/layer/blocks.0/b_simple", "train/loss"} <= tags
    assert not {"gns/overhead", "gns/layer/head/b_simple"} & tags
    assert [e.value for e in read.Scalars("gns/sogns/b_simple")] == [500.0, 500.0]
    assert steps(tmp_path, "gns/b_simple") == [0, 10]
    assert steps(tmp_path, "gns/tr_sigma") == [0, 10, 20, 30]
    assert steps(tmp_path, "gns/b_simple_low") == [0, 10, 30]
    assert steps(tmp_path, "train/loss") == [20]
    (text,) = read.Tensors("gns/advice/text_summary")
    assert text.tensor_proto.string_val[0] == b"use 256  \nnow"
    assert text.step == 30
    (layout,) = read.Tensors("custom_scalars__config__")
    for tag in ("b_simple", "low", "high"):  # of equal steps, or TensorBoard draws no chart
        assert f"gns/margin/{tag}".encode() in layout.tensor_proto.string_val[0]
        assert steps(tmp_path, f"gns/margin/{tag}") == [0, 10]
    assert all(p.name.endswith(".gnsmon") for p in tmp_path.iterdir())


def resumed(folder: Path, monkeypatch) -> None:
    clock = time.time  # files of one folder are read in the order of the seconds in their names
    for n, (start, upto) in enumerate(((0, 6), (4, 8))):
        monkeypatch.setattr(time, "time", lambda n=n: clock() + 2 * n)
        sink = open_sink("tensorboard", folder)
        sink.start(HEADER, start)
        for step in range(start, upto):
            sink(at(step))
        sink.close()


def test_tensorboard_resumes_without_duplicates(tmp_path, monkeypatch):
    resumed(tmp_path, monkeypatch)
    assert steps(tmp_path, "gns/b_simple") == list(range(8))
    assert len(events(tmp_path).Tensors("custom_scalars__config__")) == 1


def test_tensorboard_never_purges_what_the_users_writer_wrote(tmp_path, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as theirs:
        for step in range(8):
            theirs.add_scalar("train/accuracy", 0.5, step)
    resumed(tmp_path, monkeypatch)
    assert steps(tmp_path, "train/accuracy") == list(range(8))
    assert set(steps(tmp_path, "gns/b_simple")) == set(range(8))


def test_tensorboard_leaves_a_writer_that_is_not_ours_open(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    from gnsmon.sinks.tensorboard import TensorBoard

    writer = SummaryWriter(str(tmp_path))
    sink = TensorBoard(writer=writer)
    sink.start(HEADER, 0)
    sink(OK)
    sink.close()
    assert steps(tmp_path, "gns/b_simple") == [0]
    writer.add_scalar("train/accuracy", 0.5, 0)
    writer.close()
    assert len(list(tmp_path.iterdir())) == 1  # a closed writer would have begun a second file
    with pytest.raises(ValueError, match="got both"):
        TensorBoard(tmp_path, writer=writer)


def wandb_records(folder: Path):
    """The records of an offline run: a LevelDB log, which wandb 0.31 no longer reads in Python."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.rglob("*.wandb")
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # a block's tail too small for a header is padding
            at += 32768 - at % 32768
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # complete, or the last part
            yield Record.FromString(whole)
            whole = b""


def wandb_run(folder: Path, body: str) -> tuple[list[dict], list[tuple[str, str]], dict]:
    """History, metrics and what `body` leaves in `summary`, of an offline run in a process."""
    (folder / "wandb").mkdir()
    code = f"""
import json, sys, wandb
sys.path[:0] = [{str(Path(__file__).parent)!r}]
from test_sinks import HEADER, OK, UNDEFINED, at, open_sink, replace
{textwrap.dedent(body)}
print("SUMMARY", json.dumps(summary))
"""
    out = python(code, WANDB_MODE="offline", WANDB_DIR=str(folder), WANDB_SILENT="true")
    rows, metrics = [], []
    for record in wandb_records(folder):  # once wandb's own process has ended and flushed
        for_key = {i.key or "/".join(i.nested_key): i for i in record.history.item}
        if for_key:
            rows.append({key: json.loads(item.value_json) for key, item in for_key.items()})
        metrics.append((record.metric.glob_name, record.metric.step_metric))
    return rows, metrics, json.loads(out.partition("SUMMARY ")[2])


def test_wandb_run_of_our_own(tmp_path):
    rows, metrics, summary = wandb_run(
        tmp_path,
        f"""
        sink = open_sink("wandb:gns", {str(tmp_path)!r})
        sink.start(HEADER, 0)
        run = wandb.run
        assert run.project == "gns" and run.config["gnsmon"]["model"] == "GPT"
        for step in (0, 10):
            sink(at(step))
            sink(at(step, replace(OK, method="sogns", b_simple=500.0)))
        sink(at(20, UNDEFINED))
        sink.advise("use 256", 256)
        summary = {{k: run.summary[k] for k in ("gns/suggested_batch_size", "gns/advice")}}
        sink.close()
        assert wandb.run is None
        """,
    )
    assert ("gns/*", "gns/step") in metrics
    assert [r["gns/step"] for r in rows if "gns/b_simple" in r] == [0, 10]
    assert [r["gns/sogns/b_simple"] for r in rows if "gns/sogns/b_simple" in r] == [500, 500]
    assert rows[0]["gns/layer/blocks.0/b_simple"] == 90
    assert rows[-1]["gns/step"] == 20
    assert "gns/b_simple" not in rows[-1]
    assert summary == {"gns/suggested_batch_size": 256, "gns/advice": "use 256"}


def test_wandb_never_overtakes_the_users_own_steps(tmp_path):
    rows, _, summary = wandb_run(
        tmp_path,
        """
        run = wandb.init(project="theirs")
        sink = open_sink("wandb")
        sink.start(HEADER, 0)
        for epoch in range(3):
            for step in range(5 * epoch, 5 * epoch + 5):
                sink(at(step))
            run.log({"accuracy": 0.5}, step=epoch)
        sink.close()
        assert wandb.run is run
        summary = {"suggested": run.summary["gns/suggested_batch_size"]}
        run.finish()
        """,
    )
    assert [r["_step"] for r in rows if "accuracy" in r] == [0, 1, 2]
    assert [r["gns/step"] for r in rows if "gns/b_simple" in r] == [9, 14]
    assert summary == {"suggested": 256}


def test_wandb_without_a_run_says_what_to_do():
    sink = open_sink("wandb")
    with pytest.raises(ValueError, match=r"wandb\.init.*wandb:my-project"):
        sink.start(HEADER, 0)
