"""The benchmark script, on models of a few numbers: what it finds, not how fast."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_overhead.py"
MARKS = "before\n\n<!-- bench: {0} -->\nold\n<!-- end of bench: {0} -->\n\nafter\n"


def bench(*arguments):
    """What it prints and its results, of which the document has the tables too."""
    part = "scaling" if "--scaling" in arguments else "cpu"
    document = Path("document.md")
    document.write_text(MARKS.format(part))
    printed = run(SCRIPT, *arguments, "--out", "out.json", "--markdown", str(document))
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert printed.strip() in text
    return printed, json.loads(Path("out.json").read_text())


def run(script, *arguments):
    """What a script prints, by one thread."""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), "--threads", "1", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_norm_layers_are_compared_with_their_rules():
    printed = run(SCRIPT.with_name("norm_backward.py"), "--rounds", "1")
    rows = [line for line in printed.splitlines() if " x " in line and "Norm" in line]
    assert len(rows) == 6
    assert all(float(cell) > 0 for line in rows for cell in line.split("│")[3:6])


def test_every_step_is_compared_and_the_exact_ones_are_exact():
    methods = "bare,a floor,pepgns,sogns,not measured,torch.func,loop of size 1"
    workloads = "cnn,gpt,resnet"
    printed, results = bench("--tiny", "--only", workloads, "--methods", methods)
    rows = {(row["workload"], row["step"]): row for row in results["rows"]}
    assert all(row["ratio"] > 0 for row in rows.values())
    for workload in workloads.split(","):
        assert f"\n**{workload}**: a bare step takes" in printed
        for step in ("pepgns", "torch.func, vmap(grad)", "loop of size 1"):
            row = rows[workload, step]
            assert abs(row["error"]) < 1e-5 and row["rms"] < 1e-5
            assert row["parameters"] == pytest.approx(1) and row["sq_norm"] == pytest.approx(1)
        assert rows[workload, "not measured"]["error"] is None
        assert rows[workload, "a floor, hooks alone"]["parameters"] is None
    assert abs(rows["resnet", "sogns"]["error"]) > 1e-2  # else the column could not tell


def test_what_does_not_run_says_why_and_results_can_be_joined():
    once, found = bench("--tiny", "--only", "mlp,gpt2", "--methods", "norm_layers,sketch")
    assert "| norm_layers | does not run: method 'norm_layers': the model has no norm" in once
    of_tied = next(r for r in found["rows"] if (r["workload"], r["step"]) == ("gpt2", "sketch"))
    assert abs(of_tied["error"]) < 1e-2  # bfloat16
    Path("one.json").write_text(json.dumps(found))
    printed, twice = bench("--load", "one.json", "--load", "one.json")
    assert twice["rows"] == 2 * found["rows"] and once.splitlines()[-1] in printed


def test_scaling_has_every_axis_and_a_figure():
    pytest.importorskip("matplotlib")
    printed, results = bench("--tiny", "--scaling")
    assert {p["axis"] for p in results["scaling"]} == set(
        ("context", "width", "layers", "examples", "groups")
    )
    assert {p["method"] for p in results["scaling"]} == {"pepgns", "sketch", "sogns"}
    assert "| positions T | 32 |" in printed
    assert Path("figures/cost.png").stat().st_size > 1000
