import itertools
import os
import signal
import subprocess
import sys
from io import StringIO

import pytest
import torch
from rich.console import Console

from gnsmon.cli import main
from gnsmon.demo.models import CharGPT, DigitsCNN
from gnsmon.demo.progress import Ticker
from gnsmon.sinks import read_log

pytest.importorskip("sklearn")
pytest.importorskip("tensorboard")
pytest.importorskip("matplotlib")

SHORT = {
    "digits": ["--steps", "14", "--batch-size", "16"],
    "text": ["--steps", "12", "--batch-size", "16"],
}


@pytest.fixture(scope="module", params=["digits", "text"])
def short_run(request, tmp_path_factory):
    """A folder written by a demo of a dozen steps, and what it printed."""
    folder = tmp_path_factory.mktemp(request.param)
    printed = StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", printed)
        with pytest.raises(SystemExit) as stop:
            main(["demo", "--task", request.param, "--run-dir", str(folder), *SHORT[request.param]])
    assert stop.value.code == 0
    return folder, printed.getvalue(), int(SHORT[request.param][1])


def test_both_methods_are_logged_at_every_step_with_the_loss(short_run):
    folder, _, steps = short_run
    log = read_log(folder)
    counts = {method: len(log.of(method)) for method in log.methods}
    in_metric = counts.pop("pepgns_preconditioned_factored", None)
    assert counts == {"pepgns": steps, "sogns": steps}
    # Under AdamW alone, and from the second step on: before the first it has no moments.
    assert in_metric == (steps - 1 if log.header["optimizer"] == ["AdamW"] else None)
    assert len(log.losses) == steps
    assert log.losses[-1]["loss"] < log.losses[0]["loss"]
    last = log.latest()
    assert last.examples == 16 and last.coverage == 1
    assert last.status != "undefined" and last.tr_sigma > 0
    assert len(log.advice) == 1


def test_tensorboard_and_the_report_hold_the_run(short_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _, steps = short_run
    events = EventAccumulator(str(folder)).Reload()
    assert len(events.Scalars("gns/tr_sigma")) == steps
    assert (folder / "gns.png").stat().st_size > 10_000
    assert "Advice" in (folder / "report.md").read_text()


def test_a_person_reads_losses_advice_and_paths_without_control_codes(short_run):
    folder, printed, steps = short_run
    assert f"step 1/{steps}  loss" in printed and f"step {steps}/{steps}  loss" in printed
    assert "noise scale" in printed and "validation" in printed and "Advice" in printed
    assert f"tensorboard --logdir {folder}" in printed.replace("\n", "")
    assert "\x1b" not in printed
    assert len(printed.splitlines()) < 60


@pytest.mark.parametrize("command", ["report", "advise"])
def test_the_log_is_read_without_torch(short_run, command):
    folder, *_ = short_run
    code = (
        "import sys, gnsmon.cli\n"
        "try:\n"
        f"    gnsmon.cli.main(['{command}', {str(folder)!r}])\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "examples" in done.stdout


def test_ctrl_c_finishes_the_step_in_hand_and_ends_the_run():
    before = signal.getsignal(signal.SIGINT)
    seen = []
    with Ticker(Console(file=StringIO()), 100) as ticker:
        for step, _ in ticker.track(itertools.count()):
            if step == 3:
                os.kill(os.getpid(), signal.SIGINT)
            seen.append(step)
    assert seen == [1, 2, 3]
    assert ticker.interrupted and ticker.done == 3
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_stops_at_once():
    with Ticker(Console(file=StringIO()), 100) as ticker, pytest.raises(KeyboardInterrupt):
        for _ in ticker.track(itertools.count()):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)


def test_track_asks_for_no_more_batches_than_steps():
    batches = iter(range(5))
    with Ticker(Console(file=StringIO()), 3) as ticker:
        assert [step for step, _ in ticker.track(batches)] == [1, 2, 3]
    assert next(batches) == 3
    assert not ticker.interrupted


def test_a_terminal_shows_every_method_beside_the_loss():
    console = Console(file=StringIO(), force_terminal=True, width=80)
    with Ticker(console, 2) as ticker:
        for step, _ in ticker.track(range(2)):
            ticker.show(step, 0.25, {})
    assert "2/2" in console.file.getvalue() and "0.250" in console.file.getvalue()


def test_the_cnn_has_a_million_parameters_and_the_transformer_a_tied_head():
    cnn, gpt = DigitsCNN(), CharGPT(103)
    assert sum(p.numel() for p in cnn.parameters()) == pytest.approx(1e6, rel=0.01)
    assert gpt.lm_head.weight is gpt.wte.weight
    assert cnn(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert gpt(torch.zeros(2, 7, dtype=torch.long)).shape == (2, 7, 103)


def test_the_transformer_does_not_see_the_future():
    torch.manual_seed(0)
    gpt = CharGPT(11, context=8, width=16, layers=2, heads=2).eval()
    one = torch.randint(11, (1, 8))
    other = one.clone()
    other[0, 5:] = (other[0, 5:] + 1) % 11
    torch.testing.assert_close(gpt(one)[:, :5], gpt(other)[:, :5])
    assert not torch.allclose(gpt(one)[:, 5:], gpt(other)[:, 5:])
