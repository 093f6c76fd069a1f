"""`gnsmon advise` on a recorded log."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from gnsmon.cli import main
from gnsmon.estimators import Raw, Reading
from gnsmon.sinks import Jsonl, read_log
from gnsmon.sinks import jsonl as module

RAW = Raw(1.0, 1.0, 0.1, 1.0, 1.0)
FIRST = Reading(
    step=0,
    examples=64,
    tokens=None,
    method="pepgns",
    status="ok",
    reason=None,
    b_simple=256.0,
    low=255.0,
    high=257.0,
    grad_sq_norm=1.0,
    tr_sigma=256.0,
    raw=RAW,
    n_eff=199.0,
    coverage=1.0,
    overhead=None,
)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """b_simple grows from 100 to 1090 at batch 64; then some steps at 128, which take longer."""
    now = [0.0]
    monkeypatch.setattr(module.time, "time", lambda: now[0])
    log = Jsonl(tmp_path / "gns.jsonl")
    log.start({"microbatch": 16, "optimizer": ["SGD"], "methods": ["pepgns"]}, 0)
    for i in range(100):
        b = 100.0 + 10 * i
        batch, seconds = (64, 0.1) if i < 90 else (128, 0.15)
        now[0] += 10 * seconds
        values = {"b_simple": b, "low": b - 1, "high": b + 1, "examples": batch}
        log(replace(FIRST, step=10 * i, **values))
    log.close()
    return tmp_path


def said(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["advise", *map(str, arguments)])
    printed = "".join(capsys.readouterr())
    assert not stop.value.code, printed
    return " ".join(printed.split())


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["advise", *map(str, arguments)])
    assert stop.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_limits_prices_and_hardware(run, capsys):
    assert "from 128 examples to 1,024 examples" in said(capsys, run)
    words = said(capsys, run, "--data-overhead", 0.5, "--workers", 2, "--largest-microbatch", 24)
    assert "to 512 examples" in words  # half of 1090
    assert "2 x 16 x 16 (workers x microbatch x accumulation)" in words
    words = said(capsys, run, "--step-price", 16, "--example-price", 1, "--batch-size", 512)
    assert "Shrink the batch from 512 examples to 128 examples" in words  # sqrt(1090 * 16) = 132
    assert "times the cost" in words
    assert "no rule" not in words
    assert "spectral norm" in said(capsys, run, "--optimizer", "Muon")


def test_the_fastest_run_by_the_logs_own_times(run, capsys):
    words = said(capsys, run, "--wall-clock")
    assert "A step of B examples takes 0.05 s + 0.000781 s x B." in words
    assert "Grow the batch from 128 examples to 256 examples" in words  # sqrt(1090 * 64) = 264
    assert "For the fastest run by these times" in words
    words = said(capsys, run, "--wall-clock", "--curve")
    assert "batch steps examples time" in words
    words = said(capsys, run, "--wall-clock", "--workers", 4)
    assert "0.05 s + 0.000195 s x B on 4 workers" in words
    assert "to 512 examples" in words


def test_step_times_leave_out_where_the_batch_changed(run):
    examples, seconds = read_log(run).step_times()
    assert len(examples) == 98
    assert seconds.tolist() == pytest.approx([0.1 if n == 64 else 0.15 for n in examples])


def test_step_times_leave_out_where_the_clock_was_set_back(tmp_path, monkeypatch):
    now = iter([0.0, 1.0, 2.0, -50.0, -49.0])
    monkeypatch.setattr(module.time, "time", lambda: next(now))
    log = Jsonl(tmp_path / "gns.jsonl")
    log.start({}, 0)
    for step in range(0, 40, 10):
        log(replace(FIRST, step=step))
    log.close()
    assert read_log(tmp_path).step_times()[1].tolist() == pytest.approx([0.1, 0.1])


def test_the_curve(run, capsys):
    words = said(capsys, run, "--curve")
    assert "batch steps examples" in words
    assert "128 9.52 1.12 present" in words  # 1 + 1090 / 128, 1 + 128 / 1090
    assert "1,024 2.06 1.94 suggested" in words
    assert "1,024 2.06 1.94 present and suggested" in said(
        capsys, run, "--curve", "--batch-size", 1024
    )


def test_the_curve_as_a_picture(run, capsys, tmp_path):
    said(capsys, run, "--plot", tmp_path / "curve.png", "--data-overhead", 0.5)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    lines = (run / "gns.jsonl").read_text().splitlines(keepends=True)
    unknown = json.loads(lines[-1]) | {"status": "undefined", "reason": "3 steps", "b_simple": None}
    unknown["groups"] = unknown.pop("groups")  # which are the last field
    (run / "gns.jsonl").write_text("".join([*lines[:-1], json.dumps(unknown) + "\n"]))
    assert "no curve to plot" in refused(capsys, run, "--plot", tmp_path / "other.png")


def test_a_warm_up_of_the_recorded_run(run, capsys, tmp_path):
    file = tmp_path / "warmup.json"
    arguments = ("--start", 16, "--largest", 256, "--dwell", 20, "--schedule", file)
    words = said(capsys, run, *arguments, "--snippet", "loop")
    stages = json.loads(file.read_text())["stages"]
    assert [stage["batch_size"] for stage in stages] == [16, 32, 64, 128, 256]
    assert [stage["accumulation"] for stage in stages] == [1, 2, 4, 8, 16]
    rates = [stage["learning_rate_factor"] for stage in stages]
    assert rates == sorted(rates)
    assert "STAGES = [" in words
    assert f"({stages[1]['examples']}, 32, 2," in words


def test_mistakes(run, capsys):
    assert "another batch size" not in said(capsys, run, "--wall-clock")
    assert "drop the others" in refused(capsys, run, "--wall-clock", "--step-price", 1)
    assert "of which the ratio counts" in refused(capsys, run, "--step-price", 1)
    assert "multiply to 100 %" in refused(
        capsys, run, "--step-overhead", 0.1, "--data-overhead", 0.1
    )
    assert "one of loop, lightning, hf" in refused(capsys, run, "--snippet", "keras")
    assert "multiple of 16" in refused(capsys, run, "--snippet", "loop", "--start", 20)


def test_a_warm_up_keeps_its_microbatch(run, capsys):
    arguments = ("--snippet", "loop", "--largest-microbatch", 32)
    assert "give that as --microbatch" in refused(capsys, run, *arguments)
    assert "(0, 64, 2, 1)," in said(capsys, run, *arguments, "--microbatch", 32)


def test_of_several_optimizers_none_is_passed_over(run, capsys):
    log = run / "gns.jsonl"
    log.write_text(log.read_text().replace('"optimizer":["SGD"]', '"optimizer":["AdamW","Muon"]'))
    words = said(capsys, run)
    assert "spectral norm" in words
    assert "learning rate times" not in words


def test_a_folder_is_no_file_to_write(run, capsys):
    assert "Is a directory" in refused(capsys, run, "--schedule", run)


def test_no_curve_without_a_noise_scale(run, capsys):
    log = Jsonl(run / "gns.jsonl")
    log.start({}, 2000)
    values = {"status": "undefined", "b_simple": None, "low": None, "high": None, "reason": "none"}
    log(replace(FIRST, step=2000, **values))
    log.close()
    assert "No curve without a noise scale." in said(capsys, run, "--curve")


def test_a_log_of_one_batch_size_says_so(run, capsys):
    lines = (run / "gns.jsonl").read_text().splitlines(keepends=True)
    (run / "gns.jsonl").write_text("".join(lines[:50]))
    assert "all have 64 examples" in refused(capsys, run, "--wall-clock")


def test_step_times_of_two_runs(run, capsys, tmp_path):
    head, *lines = (run / "gns.jsonl").read_text().splitlines(keepends=True)
    for name, some in (("a", lines[:50]), ("b", lines[90:])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "gns.jsonl").write_text("".join([head, *some]))
    words = said(capsys, tmp_path / "a", "--wall-clock", "--times", tmp_path / "b")
    assert "A step of B examples takes 0.05 s + 0.000781 s x B." in words


def test_a_batch_that_the_layout_cannot_make(run, capsys):
    words = said(capsys, run, "--workers", 3, "--batch-size", 1000)
    assert "1000 is no multiple of the smallest batch of this layout, 48" in words


def test_it_starts_without_torch(run):
    code = f"""
import sys, gnsmon.cli
try:
    gnsmon.cli.main(["advise", {str(run)!r}, "--wall-clock", "--curve", "--snippet", "hf"])
except SystemExit as stop:
    assert not stop.code
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
