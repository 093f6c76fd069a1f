from pathlib import Path

import pytest
from torch import nn

import gnsmon
from gnsmon.config import MonitorConfig, load, parse_half_life

CONFIGS = Path(__file__).parents[1] / "configs"


def test_the_documented_file_holds_the_defaults():
    documented = load(MonitorConfig, CONFIGS / "monitor.toml").model_dump()
    assert documented.pop("decay") == 0.99  # what None stands for
    assert documented == {k: v for k, v in MonitorConfig().model_dump().items() if k != "decay"}


def test_the_documented_file_names_every_setting():
    lines = (CONFIGS / "monitor.toml").read_text().splitlines()
    named = {line.lstrip("# ").partition("=")[0].strip() for line in lines}
    assert MonitorConfig.model_fields.keys() <= named


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"evry": 3}, "unknown setting 'evry'; did you mean 'every'?"),
        ({"zzzzzz": 3}, "unknown setting 'zzzzzz'; known: method, calibrate_every"),
        ({"every": 0}, 'every: expected "auto" or a number of steps, 1 or more; got 0'),
        (
            {"every": "often"},
            "every: expected \"auto\" or a number of steps, 1 or more; got 'often'",
        ),
        ({"overhead": 1.0}, "overhead: Input should be less than 1, got 1.0"),
        ({"every": 5, "overhead": 0.1}, 'overhead is for every="auto", and every is 5'),
        ({"decay": 1.0}, "decay: Input should be less than 1, got 1.0"),
        ({"method": "pepgn"}, "expected one of pepgns, sketch, sogns, norm_layers, microbatch"),
        (
            {"method": "pepgns+sogns"},
            "a plus between one of pepgns, sketch, sogns and one of",
        ),
        ({"method": "microbatch+pepgns"}, "got 'microbatch+pepgns'"),
        ({"calibrate_every": 5}, "calibrate_every is for sogns and norm_layers, and method is"),
        ({"method": ["sogns", "sogns"]}, "method names a source twice"),
        ({"method": []}, "method: List should have at least 1 item"),
        ({"decay": 0.9, "window": 5}, "decay and window are set; the averages take one of them"),
        ({"half_life": "20 parsecs"}, "half_life: expected a number and a unit such as"),
        ({"half_life": "0 steps"}, "half_life: expected a positive amount"),
        ({"groups": "layers"}, 'groups: expected "layer", "kind", "total"'),
        ({"diagnostics": True, "clip": float("inf")}, "clip: expected a finite norm, got inf"),
        ({"diagnostics": True, "clip": float("nan")}, "clip: Input should be greater than 0"),
        ({"diagnostics": True, "norm_bound": float("inf")}, "norm_bound: expected a finite norm"),
        ({"grad_memory": float("inf")}, "grad_memory: Input should be a finite number, got inf"),
        ({"batch_dim": 2}, "batch_dim: Input should be less than or equal to 1"),
    ],
)
def test_impossible_settings_name_the_key(settings, words):
    with pytest.raises(ValueError, match=".*") as caught:
        gnsmon.attach(nn.Linear(2, 2), **settings)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_errors_of_a_file_name_the_file(tmp_path):
    path = tmp_path / "gns.toml"
    path.write_text("evry = 3")
    with pytest.raises(ValueError, match=r"gns\.toml: unknown setting 'evry'"):
        gnsmon.attach(nn.Linear(2, 2), config=path)
    path.write_text("every = ")
    with pytest.raises(ValueError, match=r"gns\.toml: Invalid value"):
        gnsmon.attach(nn.Linear(2, 2), config=path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        gnsmon.attach(nn.Linear(2, 2), config=tmp_path / "nowhere.toml")


def test_settings_in_a_dict_are_keywords():
    with pytest.raises(
        ValueError, match=r"config: expected a MonitorConfig or .* got \{'every': 3\}"
    ):
        gnsmon.attach(nn.Linear(2, 2), config={"every": 3})


def test_keywords_stand_over_the_file(tmp_path):
    path = tmp_path / "gns.toml"
    path.write_text('every = 3\nmethod = "sogns"\n')
    with gnsmon.attach(nn.Linear(2, 2), config=path, every=5) as gns:
        assert (gns.config.every, gns.config.method) == (5, ["sogns"])


def test_a_config_object_may_replace_one_memory_by_another():
    with gnsmon.attach(nn.Linear(2, 2), config=MonitorConfig(window=9), every=5) as gns:
        assert (gns.config.window, gns.config.decay, gns.config.every) == (9, None, 5)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("500 steps", (500, "steps")),
        ("1e6 examples", (1e6, "examples")),
        ("2,000 examples", (2000, "examples")),
        ("1.5k tokens", (1500, "tokens")),
        ("20Mtokens", (20e6, "tokens")),
    ],
)
def test_half_lives(text, value):
    assert parse_half_life(text) == value
