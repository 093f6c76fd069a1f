import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gnsmon
from gnsmon.cli import main
from gnsmon.demo.models import CharGPT
from gnsmon.figures import appendix_e, layers, make, training, variance, violations
from gnsmon.figures.page import Page, number
from gnsmon.norms.contractions import outer_sq_norms, sogns_sq_norms

TINY = training.Settings(steps=24, batch=4, context=16, width=16)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.manual_seed(0)
    return training.train(TINY, tmp_path_factory.mktemp("run"))


def is_written(page, folder):
    picture, text = page.write(folder, "gnsmon figures")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert 5_000 < picture.stat().st_size < 120_000
    lines = text.read_text(encoding="utf-8").splitlines()
    assert lines[0] == f"# Figure {page.name}: {page.title}"
    assert f"]({picture.name})" in lines[2]
    assert sum(line.startswith("| ") for line in lines) == len(page.rows) + 1
    assert {len(row) for row in page.rows} == {len(page.rows[0])}


def test_figure_1_reverses_and_is_that_of_the_closed_form(tmp_path):
    numbers = variance.measure(repeat=1500)
    for p in [*numbers.along_big, *numbers.along_small]:
        assert abs(p.simulated - p.theory.b_simple) < 4 * p.simulated_error

    def factor(points, b_simple):
        own = [p.simulated for p in points if p.b_simple == b_simple]
        return max(own) / min(own)

    assert factor(numbers.along_small, 1) > 3 * factor(numbers.along_big, 1)
    assert factor(numbers.along_big, 100) > 3 * factor(numbers.along_small, 100)
    is_written(variance.page(numbers), tmp_path)


def test_a_run_is_read_back_as_it_was_trained(trained):
    again = training.load(trained.log.path.parent)
    assert again.settings == TINY
    batch = (torch.arange(16)[None], torch.arange(16)[None])
    torch.testing.assert_close(
        training.loss_of(again.model, batch), training.loss_of(trained.model, batch)
    )
    numbers = training.measure(trained)
    assert numbers.step.tolist() == sorted(set(numbers.step)) and len(numbers.step) == TINY.steps
    first, second = trained.log.losses["loss"][:2]
    assert numbers.loss[0] == first
    assert numbers.loss[1] == pytest.approx((0.95 * first + second) / 1.95)
    assert (numbers.parts_ratio > 0).all() and (abs(numbers.parts_ratio - 1) > 1e-3).any()


def test_figure_2_with_and_without_measured_batches(trained, tmp_path):
    file = tmp_path / "validation.json"
    without = training.measure(trained, validation=file)
    assert without.measured == []
    assert "is not drawn" in training.page_b(without).text[1]
    is_written(training.page_a(without), tmp_path)
    is_written(training.page_b(without), tmp_path)
    target = {"loss": 3.5, "b_crit": 40.0, "low": 20.0, "high": None}
    target |= {"b_simple": 30.0, "b_simple_low": 25.0, "b_simple_high": 35.0}
    problems = {"text-adam": {"targets": [target]}, "digits-sgd": {"targets": [target]}}
    file.write_text(json.dumps({"problems": problems}))
    numbers = training.measure(trained, validation=file)
    (point,) = numbers.measured
    assert (point.problem, point.loss, point.b_crit, point.low) == ("text-adam", 3.5, 40.0, 20.0)
    assert math.isnan(point.high)
    page = training.page_b(numbers)
    assert "Adam 40 against 30 at loss 3.5" in page.text[1]
    is_written(page, tmp_path)


def test_a_file_of_another_shape_is_named(tmp_path):
    file = tmp_path / "validation.json"
    for content in ("[]", '{"problems": {"text-adam": {"targets": [{"loss": 1}]}}}', "{"):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"validation.json: expected .*targets"):
            training.critical_batches(file)


def test_figure_3_has_the_norms_of_the_oracle(trained, tmp_path):
    checkpoint = layers.demo(trained, batches=3)
    batches = list(checkpoint.batches)
    numbers = layers.measure(
        layers.Checkpoint(checkpoint.about, checkpoint.model, checkpoint.loss, batches)
    )
    norms = [gnsmon.per_example_sq_norms(trained.model, training.loss_of, b) for b in batches]
    for layer in numbers.layers:
        own = [n for n in norms[0] if n.rpartition(".")[0] == layer.name]
        want = float(torch.stack([sum(x[n] for n in own).mean() for x in norms]).mean())
        assert layer.exact.small_sq_norm == pytest.approx(want, rel=1e-4), layer.name
    assert numbers.total.exact.small_sq_norm == pytest.approx(
        sum(layer.exact.small_sq_norm for layer in numbers.layers), rel=1e-6
    )
    assert not numbers.left_out
    page = layers.page(numbers)
    assert len(page.rows) == len(numbers.layers) + 2
    is_written(page, tmp_path)


def test_at_one_position_every_untied_layer_is_exact():
    model = CharGPT(11, context=1, width=8, dropout=0.0)
    batches = [(torch.randint(11, (4, 1)), torch.randint(11, (4, 1))) for _ in range(2)]
    numbers = layers.measure(layers.Checkpoint("", model, training.loss_of, batches))
    for layer in numbers.layers:
        if layer.name != "wte":  # tied to the head: SOGNS adds its uses without a cross term
            assert layer.ratio == pytest.approx(1, rel=1e-4), layer.name


def test_a_hugging_face_folder(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 12, "vocab_size": 50}
    folder = tmp_path / "model"
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(folder)
    random = layers.measure(layers.hugging_face(folder, batches=2, batch=4))
    assert "of 4 sequences of 12 tokens: random tokens" in random.about
    assert random.left_out.keys() == {"transformer.wpe.weight"}
    tokens = torch.randint(50, (9, 7))
    given = layers.hugging_face(folder, tokens=tokens, batch=4)
    numbers = layers.measure(given)
    assert "on 2 batches of 4 sequences of 7 tokens: given tokens" in numbers.about
    norms = gnsmon.per_example_sq_norms(given.model.eval(), given.loss, tokens[:8])
    (qkv,) = (x for x in numbers.layers if x.name.endswith("c_attn"))
    want = sum(float(x.mean()) for n, x in norms.items() if ".c_attn." in n)
    assert qkv.exact.small_sq_norm == pytest.approx(want, rel=1e-4)
    assert "transformer.wpe.weight" in layers.page(numbers).text[-1]
    for wrong in (tokens.float(), tokens[:7], tokens[:, 0], tokens + 50):
        with pytest.raises(ValueError, match="tokens: expected"):
            layers.hugging_face(folder, tokens=wrong, batch=4)
    with pytest.raises(ValueError, match="tokens: expected at most 12 to a sequence.* got 13"):
        layers.hugging_face(folder, tokens=torch.randint(50, (8, 13)), batch=4)
    with pytest.raises(FileNotFoundError, match="config.json"):
        layers.hugging_face(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "gnsmon\[transformers\]"'):
        layers.hugging_face(folder)


def test_a_folder_with_a_tokenizer_reads_the_manual(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"?": 0, "the": 1, "a": 2}, unk_token="?")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    what, ids = layers._stream(tmp_path, 3, torch.Generator())
    assert what == "the text of Python's manual"
    assert set(ids.tolist()) == {0, 1, 2} and len(ids) > 10_000


@pytest.mark.parametrize("name", ["4", "5"])
def test_figures_4_and_5_are_those_of_the_closed_form(name, tmp_path):
    numbers = violations.measure(unit_variance=name == "4", examples=64)
    points = [*numbers.along_length, *numbers.along_shift, *numbers.along_shared]
    for p in points:
        assert abs(p.ratio - p.theory) < 4 * p.error + 1e-9, p
    page = violations.page(numbers)
    assert page.name == name and len(page.rows) == len(points) + 1
    is_written(page, tmp_path)


def test_the_closed_form_by_hand():
    ratio = violations.expected_ratio
    Setting = violations.Setting
    assert ratio(Setting(positions=1, shift=2, gradients=0.5), unit_variance=False) == 1
    assert ratio(Setting(positions=11, gradients=0.1), unit_variance=False) == 2
    one = Setting(positions=11, gradients=0.1, shift=1.0)  # m = 2, h = 1/2
    assert ratio(one, unit_variance=False) == pytest.approx(2 / 1.5)
    assert ratio(one, unit_variance=True) == pytest.approx(2 / 1.5 / 2)
    same = Setting(activations=1.0, gradients=0.5)
    assert ratio(same, unit_variance=False) == 1
    dy, x = violations.layer(same, 5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(sogns_sq_norms(dy, x), outer_sq_norms(dy, x, path="direct"))


def test_figure_6_has_the_norms_of_the_oracle_and_of_the_paper():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5, bias=False)).double()
    x, y = torch.randn(6, 7, 3, dtype=torch.float64), torch.randint(5, (6, 7))

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    with appendix_e.factors(model) as found:
        loss(model, (x, y)).backward()
    assert len(found) == 2
    pair = appendix_e.norms(found, 6)
    oracle = gnsmon.per_example_sq_norms(model, loss, (x, y), parameters=["0.weight", "2.weight"])
    exact = sum(float(n.sum()) for n in oracle.values()) / 36
    big = sum(float(m.weight.grad.square().sum()) for m in found)
    sogns = whole = 0.0
    for dy, own in found.values():  # formulas of section 3.1 and appendix E, word for word
        sigma_sq = own[:, 0].square().mean((1, 2))
        omega = (own.shape[-1] * sigma_sq).sqrt()[:, None] * dy[:, 0].sum(1)
        sogns += float(omega.square().sum())
        whole += float(omega.sum(0).square().sum())
    np.testing.assert_allclose(pair.parts_sq_norm, [exact, sogns, sogns], rtol=1e-10)
    np.testing.assert_allclose(pair.big_sq_norm, [big, big, whole], rtol=1e-10)
    assert not any(m._forward_hooks for m in found)


def test_figure_6_is_written(tmp_path):
    numbers = appendix_e.measure(appendix_e.Settings(steps=15, batch=4, context=8, width=16))
    for key in appendix_e.QUANTITIES:
        assert getattr(numbers, key).shape == (15, 3)
    np.testing.assert_allclose(numbers.big_sq_norm[:, 0], numbers.big_sq_norm[:, 1])
    is_written(appendix_e.page(numbers), tmp_path)


def test_the_command_writes_what_is_asked_for(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["figures", "--only", "1, 5", "--quick", "--out", str(tmp_path / "f")])
    assert not stop.value.code
    names = {path.name for path in (tmp_path / "f").iterdir()}
    assert names == {f"figure_{n}.{end}" for n in "15" for end in ("png", "md")}
    page = (tmp_path / "f" / "figure_5.md").read_text()
    assert page.endswith("Made by `gnsmon figures --only 5 --quick`.\n")
    assert "figure_1.png" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": ["7"]}, "expected figures among 1, 2a, 2b, 3, 4, 5, 6, got 7"),
        ({"tokens": "t.npy"}, "name its folder too"),
        ({"only": ["1", "2a"], "checkpoint": Path("m")}, "for figure 3, got figures 1, 2a alone"),
    ],
)
def test_a_mistake_is_told_before_anything_is_measured(options, message):
    with pytest.raises(ValueError, match=message):
        next(make(**options))


def test_a_checkpoint_that_is_none_is_told_before_anything_is_measured(tmp_path):
    said = []
    with pytest.raises(FileNotFoundError, match="config.json"):
        next(make(checkpoint=tmp_path, out=tmp_path / "out", say=said.append))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "t.npy").write_text("1 2 3")
    with pytest.raises(ValueError, match="expected token indices"):
        next(make(checkpoint=tmp_path, tokens=tmp_path / "t.npy", out=tmp_path, say=said.append))
    assert not said


@pytest.mark.parametrize("kind", ["uint16", "uint64", "int8", ">i4"])
def test_tokens_of_any_kind_of_integer(tmp_path, kind):
    np.save(tmp_path / "t.npy", np.arange(6).reshape(2, 3).astype(kind))
    assert layers.tokens_of(tmp_path / "t.npy").tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("kind", [np.float32, np.bool_, np.str_, np.complex64])
def test_tokens_that_are_no_integers_are_named(tmp_path, kind):
    np.save(tmp_path / "t.npy", np.ones((2, 3), kind))
    with pytest.raises(ValueError, match=r"t.npy: expected token indices .* got .* \[2, 3\]"):
        layers.tokens_of(tmp_path / "t.npy")


def test_a_file_that_is_no_npy_is_named(tmp_path):
    np.savez(tmp_path / "t.npz", a=np.ones(2))
    (tmp_path / "t.npz").rename(tmp_path / "zip.npy")
    (tmp_path / "text.npy").write_text("1 2 3")
    for name in ("zip.npy", "text.npy"):
        with pytest.raises(ValueError, match=f"{name}: expected token indices"):
            layers.tokens_of(tmp_path / name)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "gnsmon\[report\]"'):
        next(make(["1"]))


def test_numbers_in_tables():
    shown = [number(x) for x in (math.nan, 1234.5, 3.14159, 0.00012345, -2.5e7, math.inf)]
    assert shown == ["-", "1,230", "3.14", "0.000123", "-2.5e+07", "-"]


def test_bars_of_a_norm_do_not_end_a_cell(tmp_path):
    page = Page("x", "t", (), [("a", "|G|²"), ("1", "2")], lambda path: path.write_bytes(b""))
    _, text = page.write(tmp_path, "gnsmon figures")
    assert "| a | &#124;G&#124;² |\n| --- | --: |\n| 1 | 2 |" in text.read_text(encoding="utf-8")
