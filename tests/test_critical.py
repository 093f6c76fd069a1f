"""The critical batch size: the fit on steps whose law is known, the search, and a real grid."""

import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import least_squares

from gnsmon.estimators.critical import fit_critical_batch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from critical import search  # noqa: E402
from critical.findings import findings, write  # noqa: E402
from critical.problems import PROBLEMS, Problem  # noqa: E402
from critical.runs import Crossings, Run, evaluations  # noqa: E402

SIZES = np.array([2, 4, 8, 16, 32, 64, 128], float)
LAW = Problem(
    "law",
    task="none",
    optimizer="sgd",
    batch_sizes=(2, 4, 8, 16, 32, 64, 128),
    targets=(1.0, 0.5),
    lr=1.0,
    max_steps=100_000,
)


def law(size, b_crit, s_min=50.0):
    return s_min * (1 + b_crit / size)


def noisy_steps(rng, b_crit, *, own=0.1, shared=0.0, seeds=3):
    """Sizes and steps with noise of each run and noise that the runs of one size share."""
    size = np.repeat(SIZES, seeds)
    noise = own * rng.standard_normal(len(size))
    noise += np.repeat(shared * rng.standard_normal(len(SIZES)), seeds)
    return size, law(size, b_crit) * np.exp(noise)


@pytest.mark.parametrize("b_crit", [2.5, 16.0, 100.0])
def test_steps_on_the_curve_give_it_back(b_crit):
    fit = fit_critical_batch(SIZES, law(SIZES, b_crit))
    assert fit.status == "ok" and fit.reason is None
    assert fit.b_crit == pytest.approx(b_crit, rel=1e-6)
    assert fit.s_min == pytest.approx(50, rel=1e-6)
    assert fit.e_min == pytest.approx(50 * b_crit, rel=1e-6)
    assert fit.low == pytest.approx(b_crit, rel=1e-4) == fit.high
    assert fit.scatter < 1e-6


def test_the_fit_and_both_ends_are_those_of_least_squares_by_other_means():
    size, steps = noisy_steps(np.random.default_rng(3), 20.0)
    fit = fit_critical_batch(size, steps)
    y = np.log(steps).reshape(-1, 3).mean(1)

    def residual(log_s, log_b):
        return math.sqrt(3) * (y - log_s - np.log1p(np.exp(log_b) / SIZES))

    best = least_squares(lambda x: residual(*x), [3.0, 3.0], xtol=1e-14, ftol=1e-14, gtol=1e-14)
    assert [fit.s_min, fit.b_crit] == pytest.approx(np.exp(best.x), rel=1e-5)
    t = 2.570581835636314  # Student's quantile of 0.975 at 7 - 2
    for end in (fit.low, fit.high):
        held = least_squares(lambda x, end=end: residual(x[0], math.log(end)), [3.0], xtol=1e-14)
        assert held.cost == pytest.approx(best.cost * (1 + t**2 / 5), rel=1e-5)
    assert fit.low < fit.b_crit < fit.high
    assert fit.scatter == pytest.approx(math.sqrt(2 * best.cost / 21), rel=1e-5)


@pytest.mark.parametrize("own, shared", [(0.1, 0.0), (0.05, 0.1)])
def test_the_interval_holds_the_truth_as_often_as_it_says(own, shared):
    rng, repetitions, truth = np.random.default_rng(0), 500, 20.0
    fits = [
        fit_critical_batch(*noisy_steps(rng, truth, own=own, shared=shared))
        for _ in range(repetitions)
    ]
    assert {fit.status for fit in fits} == {"ok"}
    held = np.mean([fit.low <= truth <= fit.high for fit in fits])
    assert abs(held - 0.95) < 3 * math.sqrt(0.95 * 0.05 / repetitions)
    logs = np.log([fit.b_crit for fit in fits])
    assert abs(logs.mean() - math.log(truth)) < 4 * logs.std() / math.sqrt(repetitions)


def test_outside_the_batch_sizes_there_is_a_bound_and_no_number():
    rng = np.random.default_rng(0)
    below = fit_critical_batch(*noisy_steps(rng, 0.3, own=0.02))
    assert (below.status, below.b_crit, below.low, below.e_min) == ("below", None, None, None)
    assert below.high >= 2 and below.s_min == pytest.approx(50, rel=0.1)
    assert below.reason == "the best curve has it below the smallest batch, 2"
    above = fit_critical_batch(*noisy_steps(rng, 3000.0, own=0.02))
    assert (above.status, above.b_crit, above.high, above.s_min) == ("above", None, None, None)
    assert 0 < above.low <= 128
    assert above.reason == "the best curve has it above the largest batch, 128"


def test_an_interval_that_leaves_the_batch_sizes_says_so():
    fit = fit_critical_batch(SIZES, law(SIZES, 80.0) * np.exp(0.2 * (-1.0) ** np.arange(7)))
    assert fit.status == "ok" and (fit.high is None or fit.high > 128)
    assert fit.reason == "its upper end is above the largest batch, 128"


def test_steps_of_no_such_law_are_undefined():
    fit = fit_critical_batch(SIZES, law(SIZES, 16.0) * np.exp(2 * (-1.0) ** np.arange(7)))
    assert fit.status == "undefined" and fit.b_crit is None and fit.reason
    rising = fit_critical_batch(SIZES, SIZES)
    assert rising.status == "below" and rising.b_crit is None


def test_steps_that_fit_both_limits_are_not_said_to_fit_neither():
    fit = fit_critical_batch([1, 2, 4], [30, 21, 13])
    assert fit.status == "undefined"
    assert fit.reason == "the scatter leaves open steps that stay the same and steps like 1 / B"


@pytest.mark.parametrize("level", [0, 1, 95, math.nan])
def test_a_level_is_a_share(level):
    with pytest.raises(ValueError, match="expected 0 < level < 1"):
        fit_critical_batch(SIZES, law(SIZES, 16.0), level=level)


@pytest.mark.parametrize("sizes", [[], [8], [8, 8, 8], [8, 16], [8, 8, 16, 16]])
def test_two_batch_sizes_are_too_few(sizes):
    fit = fit_critical_batch(sizes, [100.0] * len(sizes))
    assert fit.status == "undefined"
    assert fit.reason.startswith(f"{len(set(sizes))} batch sizes of which every run reached")


@pytest.mark.parametrize("missed", [math.inf, math.nan])
def test_a_run_that_did_not_arrive_leaves_its_batch_size_out(missed):
    steps = law(np.repeat(SIZES, 2), 16.0)
    steps[0], steps[1] = missed, 1.0  # the one that did is the luckier
    fit = fit_critical_batch(np.repeat(SIZES, 2), steps)
    assert fit.b_crit == pytest.approx(16, rel=1e-5)
    assert fit_critical_batch([2, 4, 8], [missed, 9, 8]).status == "undefined"


@pytest.mark.parametrize(
    "sizes, steps", [([2, 4], [1.0]), ([0, 4, 8], [1, 1, 1]), ([2, 4, 8], [1, -1, 1])]
)
def test_what_cannot_be_is_refused(sizes, steps):
    with pytest.raises(ValueError, match="expected"):
        fit_critical_batch(sizes, steps)


def crossings(curve, targets, budget=10_000):
    found = Crossings(targets)
    for step in evaluations(budget):
        found.evaluated(step, curve(step))
    return found.steps


def test_a_loss_that_falls_with_the_log_of_the_step_is_crossed_where_it_should():
    steps = crossings(lambda step: 8 - math.log(step), (3.0, 1.5, -5.0))
    assert steps[2] is None
    # The mean of three evaluations lags by one, that is by a twentieth.
    assert steps[0] == pytest.approx(math.exp(5) * 1.05, rel=5e-3)
    assert steps[1] == pytest.approx(math.exp(6.5) * 1.05, rel=5e-3)


def test_a_stretched_run_takes_as_many_times_the_steps():
    one, four = (crossings(lambda step, k=k: 8 - math.log(step / k), (3.0,))[0] for k in (1, 4))
    assert four / one == pytest.approx(4, rel=5e-3)


class Trainer:
    """Stands for the training: steps by a law with a best rate for each batch size."""

    def __init__(self, b_crit=(8.0, 20.0), fails=lambda run: False):
        self.made, self.b_crit, self.fails = [], b_crit, fails

    def __call__(self, job):
        run = job.run
        assert run not in self.made
        self.made.append(run)
        best = 3 - 2 * math.log2(1 + 20 / run.batch_size)  # half-octaves
        noise = np.random.default_rng([run.batch_size, run.rate + 99, run.seed]).standard_normal()
        slower = 1 + 0.1 * (run.rate - best) ** 2
        steps = [law(run.batch_size, b) * slower * math.exp(0.05 * noise) for b in self.b_crit]
        gone = run.rate > best + 3 or self.fails(run)
        steps = [None if gone or s > job.budget else s for s in steps]
        outcome = "diverged" if gone else "reached" if steps[-1] else "out of steps"
        record = {**vars(run), "lr": 1.0, "budget": job.budget, "outcome": outcome, "steps": steps}
        along = {"tr_sigma": 30.0, "grad_sq_norm": 2.0, "mean_reading": 16.0, "suggested": 16.0}
        return {**record, "seconds": 1.0, "along": [along, along]}


def measured(monkeypatch, trainer, path="runs.jsonl", **how):
    monkeypatch.setattr(search, "train", trainer)
    return search.measure([LAW], Path(path), workers=0, **how)


def test_the_search_brackets_the_best_rate_and_finds_the_law(monkeypatch):
    trainer = Trainer()
    records = measured(monkeypatch, trainer)
    assert set(records) == set(trainer.made) and not search.wanted(LAW, records)
    assert len(trainer.made) < 20 * len(SIZES)
    for target, truth in enumerate(trainer.b_crit):
        for size, (rate, steps) in search.fewest_steps(LAW, records, target).items():
            assert len(steps) == 3 and np.isfinite(steps).all()
            best = 3 - 2 * math.log2(1 + 20 / size)
            assert abs(rate - best) <= 1.5
            tried = {r.rate for r in records if r.batch_size == size and not r.noise}
            assert {rate - 1, rate + 1} <= tried
        found = findings(LAW, records)[target]
        assert found.fit.low < truth < found.fit.high
        assert found.noise.own.b_simple == pytest.approx(15) and found.noise.runs == 5
        assert found.noise.batch_size == {8.0: 8, 20.0: 16}[truth]
        assert found.ratio(found.noise.own) == pytest.approx(15 / found.fit.b_crit)


def test_a_stopped_measurement_goes_on_where_it_was(monkeypatch):
    whole = measured(monkeypatch, Trainer(), "whole.jsonl")

    def stop(done, total, last):
        assert done <= total
        if done == 30:
            raise KeyboardInterrupt

    trainer = Trainer()
    with pytest.raises(KeyboardInterrupt):
        measured(monkeypatch, trainer, show=stop)
    with Path("runs.jsonl").open("a") as file:
        file.write('{"kind": "run", "problem": "la')  # killed while it wrote
    assert measured(monkeypatch, trainer) == whole
    assert len(trainer.made) == len(whole)
    assert Path("runs.jsonl").read_text() == Path("whole.jsonl").read_text()


@pytest.mark.parametrize("torn", ['{"kind": "run", "problem": "la', "", "[]", '{"a": 1}'])
def test_a_torn_line_in_the_middle_is_named_and_once_removed_made_again(monkeypatch, torn):
    whole = measured(monkeypatch, Trainer())
    path = Path("runs.jsonl")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-2], torn, lines[-1]]) + "\n")
    with pytest.raises(
        ValueError, match=f"line {len(lines) - 1}: expected a run as JSON"
    ) as caught:
        measured(monkeypatch, Trainer())
    assert repr(torn) in str(caught.value) and "remove that line" in str(caught.value)
    path.write_text("\n".join([*lines[:-2], lines[-1]]) + "\n")
    again = Trainer()
    assert measured(monkeypatch, again) == whole
    assert len(again.made) == 1


def test_runs_with_other_settings_are_not_mixed(monkeypatch):
    measured(monkeypatch, Trainer())
    with pytest.raises(ValueError, match="they have other max_steps, seeds; remove the file"):
        search.load(Path("runs.jsonl"), [replace(LAW, seeds=4, max_steps=5)])


def test_a_batch_size_that_never_arrives_is_left_out_and_the_search_ends(monkeypatch):
    records = measured(monkeypatch, Trainer(fails=lambda run: run.batch_size == 4))
    steps = search.fewest_steps(LAW, records, 1)
    assert np.isinf(steps[4][1]).all()
    fit = search.fit_of(steps)
    assert fit.status == "ok" and fit.low < 20 < fit.high


def test_a_real_grid_in_small_is_measured_and_written(capsys):
    problem = replace(
        PROBLEMS["digits-sgd"],
        batch_sizes=(4, 8, 16),
        targets=(2.25, 2.2),
        lr=0.2,
        seeds=1,
        noise_seeds=2,
        max_steps=40,
    )
    records = search.measure([problem], Path("runs.jsonl"), workers=1)
    grid = [record for run, record in records.items() if not run.noise]
    assert {record["batch_size"] for record in grid} == {4, 8, 16}
    for noise in (record for run, record in records.items() if run.noise):
        run = Run(**{key: noise[key] for key in ("problem", "batch_size", "rate", "seed")})
        if run in records and records[run]["outcome"] == "reached":  # the monitor changes nothing
            assert records[run]["steps"] == noise["steps"]
        assert all(along["measured"] >= 1 for along in noise["along"] if along)
    document = Path("docs") / "page.md"
    document.parent.mkdir()
    document.write_text("a\n<!-- critical: digits-sgd -->\nold\n<!-- end: digits-sgd -->\nb\n")
    write(document, [problem], records)
    text = document.read_text()
    assert text.startswith("a\n") and text.endswith("\nb\n") and "old" not in text
    assert "| 2.2 | " in text and "\n| 16 | " in text
    assert (document.parent / "figures" / "validation_digits_sgd.png").stat().st_size > 10_000
    targets = json.loads(Path("docs/page.json").read_text())["problems"]["digits-sgd"]["targets"]
    assert [target["loss"] for target in targets] == [2.25, 2.2]
    keys = {"b_crit", "low", "high", "s_min", "b_simple", "b_simple_low", "b_simple_high"}
    assert all(keys <= set(target) for target in targets)


def test_writing_one_problem_leaves_the_numbers_of_the_others(monkeypatch):
    records, other = measured(monkeypatch, Trainer()), replace(LAW, name="other")
    names = ("law", "other")
    Path("page.md").write_text("".join(f"<!-- critical: {n} --><!-- end: {n} -->\n" for n in names))
    write(Path("page.md"), [LAW, other], records)
    before = json.loads(Path("page.json").read_text())
    write(Path("page.md"), [LAW], records)
    assert json.loads(Path("page.json").read_text()) == before
    assert set(before["problems"]) == set(names)


def test_a_worker_ends_with_its_parent():
    code = (
        "import os, sys\n"
        f"sys.path.insert(0, {str(Path(search.__file__).parents[1])!r})\n"
        "from critical import search\n"
        "if __name__ == '__main__':\n"
        "    with search.workers_of(1) as pool:\n"
        "        print(pool.submit(os.getpid).result(), flush=True)\n"
        "        os.kill(os.getpid(), 9)\n"
    )
    Path("killed.py").write_text(code)
    done = subprocess.run([sys.executable, "killed.py"], stdout=subprocess.PIPE, text=True)
    worker = int(done.stdout)
    deadline = time.monotonic() + 20
    while _runs(worker):
        assert time.monotonic() < deadline, f"{worker} still runs"
        time.sleep(0.05)


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--workers", "-1"], "workers: expected 0 (train in this process) or more, got -1"),
        (["--report"], "report: expected runs in"),
        (["--quick", "--out", "other.jsonl"], "as it is set now; they have other batch_sizes"),
    ],
)
def test_a_mistake_at_the_script_is_no_traceback(arguments, message):
    search.load(Path("other.jsonl"), [PROBLEMS["digits-sgd"]])
    script = Path(search.__file__).parents[1] / "measure_critical_batch.py"
    call = [sys.executable, str(script), "--problems", "digits-sgd", "--out", "no.jsonl"]
    done = subprocess.run([*call, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split()) and "Traceback" not in done.stderr
    assert not Path("no.jsonl").exists()
