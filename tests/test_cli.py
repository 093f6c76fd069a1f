import subprocess
import sys
from pathlib import Path

import pytest

from gnsmon.cli import main
from gnsmon.demo.config import DigitsConfig, TextConfig, load_config

CONFIGS = Path(__file__).parents[1] / "configs"


def status_of(*arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code


@pytest.mark.parametrize("command", ["report", "advise", "demo", "check", "simulate", "figures"])
def test_help_starts_without_torch(command):
    code = (
        "import sys, gnsmon.cli\n"
        "try:\n"
        f"    gnsmon.cli.main(['{command}', '--help'])\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_version_is_that_of_the_package(capsys):
    assert status_of("--version") == 0
    assert capsys.readouterr().out.startswith("gnsmon 0.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--task", "speech"], "task: Input should be 'digits' or 'text', got 'speech'"),
        (["demo", "--steps", "0"], "steps: Input should be greater than 0, got 0"),
        (["demo", "--task", "text", "--batch-size", "12"], "a multiple of microbatch = 8, got 12"),
        (["demo", "--task", "text", "--data-dir", "d"], "unknown setting 'data_dir'; known: "),
        (["demo", "--config", "no/such.toml"], "no/such.toml"),
        (["report", "no/such/run"], "no/such/run: no such run folder"),
        (["advise", "no/such/run"], "no/such/run: no such run folder"),
        (["check", "cnn"], "expected MODULE:FACTORY, such as my_model:for_check, got 'cnn'"),
        (["check", "no_such_module:f"], "No module named 'no_such_module'"),
        (["check", "math:pi"], "math: expected a function pi, got 3.14"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(capsys, arguments, message):
    assert status_of(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_an_unknown_key_in_a_file_is_named_with_the_nearest_one(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('task = "text"\nlearning_rte = 1\nstepz = 5\n')
    with pytest.raises(ValueError) as error:
        load_config(file)
    assert str(file) in str(error.value)
    assert "'stepz'; did you mean 'steps'?" in str(error.value)


def test_options_override_the_file_and_the_file_the_defaults(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('task = "text"\nsteps = 5\nlr = 0.5\n')
    config = load_config(file, steps=7, seed=None)
    assert isinstance(config, TextConfig)
    assert (config.steps, config.lr, config.seed, config.batch_size) == (7, 0.5, 0, 16)


@pytest.mark.parametrize(("task", "kind"), [("digits", DigitsConfig), ("text", TextConfig)])
def test_the_files_in_configs_are_the_defaults(task, kind):
    assert load_config(CONFIGS / f"{task}.toml") == kind() == load_config(task=task)


@pytest.mark.parametrize("task", ["digits", "text"])
def test_the_demos_models_pass_the_check(capsys, task):
    assert status_of("check", task) == 0
    assert "passed" in capsys.readouterr().out


EXAMINED = """
import gnsmon
import torch
from torch import nn

class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x * self.weight

def loss(model, x):
    return model(x).square().mean()

x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))

def wrong():
    @gnsmon.rule(Scale)
    def scale(module, x, dy):
        shares = dy * x
        return {"weight": gnsmon.Dense(shares.mean(0).expand_as(shares))}  # the sum alone is right

    return Scale(), loss, x

def normalised():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), loss, x

def coupled():
    return nn.Linear(3, 4), lambda model, x: model(x).softmax(0).square().mean(), x

def uncovered():
    class Shapeless(nn.Module):
        def __init__(self):
            super().__init__()
            self.by, self.child = nn.Parameter(torch.ones(3)), nn.Linear(1, 1)

        def forward(self, x):
            return x * self.by

    return Shapeless(), loss, x

def dropped():
    return nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2)), loss, x

def alone():
    return nn.Linear(3, 2), loss, x[:1]
"""


@pytest.mark.parametrize(
    ("factory", "options", "status", "message"),
    [
        ("wrong", [], 1, "FAILED: weight is off by"),
        ("normalised", [], 1, "FAILED: BatchNorm in training mode"),
        ("coupled", [], 1, "FAILED: the loss couples the examples"),
        ("uncovered", [], 1, "FAILED: no parameter is covered"),
        ("dropped", [], 0, "note: dropout. Dropout (0 p=0.5) makes"),
        ("dropped", ["--method", "sogns"], 0, "sogns is off by +0.0% in the small norms"),
        ("alone", [], 2, "expected at least two examples in the batch, got 1"),
        ("dropped", ["--method", "best"], 2, "method: expected one of pepgns, sogns"),
    ],
)
def test_the_check_ends_with_a_status(
    monkeypatch, capsys, tmp_path, factory, options, status, message
):
    (tmp_path / "examined.py").write_text(EXAMINED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "examined", raising=False)
    assert status_of("check", f"examined:{factory}", *options) == status
    assert message in " ".join("".join(capsys.readouterr()).split())


def test_the_status_reaches_the_shell(tmp_path):
    (tmp_path / "examined.py").write_text(EXAMINED)
    code = "from gnsmon.cli import main; main(['check', 'examined:coupled'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert done.returncode == 1, done.stderr
