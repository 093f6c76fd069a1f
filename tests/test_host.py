"""What the host pays: calls do not grow with the groups, memory grows with the numbers kept."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_sinks import GROUP, HEADER, OK, RAW, written
from torch import nn

import gnsmon
from gnsmon.estimators import Groups, Reading
from gnsmon.estimators.values import Approximation
from gnsmon.monitor import Monitor
from gnsmon.sinks import Jsonl, read_log

APPROXIMATE = Approximation(1.5, None, 0.1, 3, None)
MIXED = {
    "a": GROUP,
    "b": replace(GROUP, status="lower_bound", reason="above {3}", b_simple=None, high=None),
    "c": replace(GROUP, approximation=APPROXIMATE),
    "d": replace(GROUP, raw=replace(RAW, tr_sigma=-0.2), approximation=APPROXIMATE),
}


class Sum(nn.Module):
    """Layers side by side, so that each has a gradient however many there are."""

    def __init__(self, n_layers):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(1, 1) for _ in range(n_layers)])

    def forward(self, x):
        return sum(layer(x) for layer in self.layers)


def calls_of_a_step(n_groups, folder, **options):
    """Function calls, also those into C, from the norms of a step to its line in the log."""
    torch.manual_seed(0)
    model = Sum(n_groups)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options = {"groups": lambda name: name.rpartition(".")[0], **options}
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    def counted(*arguments):
        sys.setprofile(count)
        try:
            return take(*arguments)
        finally:
            sys.setprofile(None)

    take = Monitor._take
    with (
        pytest.MonkeyPatch.context() as patch,
        gnsmon.attach(
            model, optimizer, every=1, strict=True, run_dir=folder / str(n_groups), **options
        ) as gns,
    ):
        for step in range(12):
            if step == 11:  # what is done once has been done, and there are intervals
                patch.setattr(Monitor, "_take", counted)
            optimizer.zero_grad()
            model(torch.randn(4, 1)).square().mean().backward()
            optimizer.step()
        assert len(gns.reading.groups) == n_groups
        assert gns.reading.n_eff > 10
    return calls


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 15}, {"method": "sogns", "calibrate_every": 1}, {"method": "sketch"}],
    ids=str,
)
def test_calls_of_a_measured_step_do_not_grow_with_the_groups(options, tmp_path):
    few, many = (calls_of_a_step(n, tmp_path, **options) for n in (5, 300))
    assert many < few + 40  # a word here and there; one call a group would be 295


def test_groups_are_those_that_were_given():
    groups = Groups.of(MIXED)
    assert groups == MIXED
    assert groups == MIXED
    assert list(groups) == list(MIXED)
    assert repr(groups) == repr(MIXED)
    assert Groups.of(groups) is groups
    with pytest.raises(KeyError):
        groups["e"]
    assert Groups.of({}) == {}


def test_some_of_the_groups():
    groups = Groups.of(MIXED)
    for which, names in ((slice(1, None), "bcd"), (np.array([0, 3]), "ad")):
        assert groups.take(which) == {name: MIXED[name] for name in names}


@pytest.mark.parametrize("groups", [MIXED, {"a": GROUP}, {}])
def test_groups_go_through_any_json(groups):
    reading = replace(OK, groups=groups)
    assert Reading.from_json(json.loads(json.dumps(reading.to_json()))) == reading
    assert reading.to_json() == replace(OK, groups=Groups.of(groups)).to_json()


def test_as_many_reasons_as_groups():
    groups = {str(i): replace(GROUP, reason=f"reason {i}") for i in range(300)}
    assert Groups.of(groups) == groups


def test_a_line_of_the_log_says_all_by_itself(tmp_path):
    """What docs/log.md tells users of jq."""
    path = written(tmp_path / "gns.jsonl", range(1))
    groups = json.loads(path.read_text().splitlines()[1])["groups"]
    assert groups["name"] == ["blocks.0", "head"]
    assert groups["b_simple"] == [90.0, None]
    assert groups["status"] == ["ok", "ok"]
    assert groups["raw"]["tr_sigma"] == [0.2, 0.2]
    assert [groups["reasons"][i] for i in groups["reason"]] == [None, None]


def test_columns_of_any_field_of_the_log(tmp_path):
    log = read_log(written(tmp_path / "gns.jsonl", range(3)))
    assert log.column("groups", "head", "raw", "big_sq_norm").tolist() == [1, 1, 1]
    assert log.column("skipped", "overflow").tolist() == [2, 2, 2]
    for absent in (("groups", "nowhere", "low"), ("groups", "head", "approximation", "factor")):
        assert np.isnan(log.column(*absent)).tolist() == [True] * 3


@pytest.mark.parametrize("cut", [0.1, 0.2, 0.3, 0.5, 0.7, 0.9])
def test_a_torn_line_is_torn_wherever_it_ends(tmp_path, cut):
    path = written(tmp_path / "gns.jsonl", range(3))
    lines = path.read_text().splitlines(keepends=True)
    torn = lines[1][: int(len(lines[1]) * cut)]
    path.write_text("".join([lines[0], torn, *lines[1:], torn]))
    log = read_log(path)
    assert log.unreadable == 2
    assert log.column("step").tolist() == [1, 2]


def memory(path):
    """Bytes that reading the log takes: at most, and for good."""
    tracemalloc.start()
    try:
        log = read_log(path)
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(log.readings)
    return np.array([most, kept])


def test_a_record_takes_the_memory_of_its_numbers(tmp_path):
    path = written(tmp_path / "gns.jsonl", range(1))
    header, *records = path.read_text().splitlines(keepends=True)
    found = []
    for n in (10_000, 20_000):
        path.write_text(header + "".join(records) * n)
        found.append(memory(path))
    most, kept = (found[1] - found[0]) / 10_000
    assert kept < 100  # nine numbers of a reading and two of a loss
    assert most < 250


def test_a_line_that_orjson_does_not_take_is_written_all_the_same(tmp_path):
    header = {**HEADER, "seeds": {1: 2**70}, "name": "a\ud800"}
    sink = Jsonl(tmp_path / "gns.jsonl")
    sink.start(header, 0)
    sink.close()
    found = read_log(tmp_path).header
    assert found["seeds"] == {"1": 2**70}
    assert found["name"] == "a?"


def loaded_after(code):
    """Names of the modules that a fresh interpreter has loaded after `code`."""
    code += "\nimport sys; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_attaching_loads_little_beside_torch():
    own = loaded_after("import gnsmon; gnsmon.attach") - loaded_after("import torch")
    slow = {"scipy", "pydantic", "rich", "typer", "numpy.f2py", "wandb", "matplotlib"}
    assert not own & slow


def test_help_loads_nothing_that_computes():
    code = "import gnsmon.cli\ntry: gnsmon.cli.main(['report', '--help'])\nexcept SystemExit: pass"
    assert not loaded_after(code) & {"torch", "numpy", "scipy", "matplotlib"}
