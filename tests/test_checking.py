from functools import partial

import cases
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn
from torch.utils.checkpoint import checkpoint

import gnsmon
from gnsmon import checking
from gnsmon.checking import brute
from gnsmon.checking.page import by_layer
from gnsmon.checking.values import EXACT
from gnsmon.collectors.per_example import METHODS
from gnsmon.demo import problems
from gnsmon.norms import rules


@pytest.mark.parametrize("problem", [problems.digits, problems.text])
def test_the_demo_models_pass_whole(problem):
    result = gnsmon.check(*problem())
    assert result.passed
    assert result.fraction == 1
    assert 0 < result.max_error < 1e-12
    assert "passed: 100.00%" in str(result)


def test_a_wrong_rule_fails_by_name(monkeypatch):
    monkeypatch.setattr(rules, "_TABLE", dict(rules._TABLE))

    @gnsmon.rule(nn.Linear)
    def _(module, x, dy):
        return {"weight": gnsmon.Outer(dy[:, None], x[:, None]), "bias": gnsmon.Dense(1.01 * dy)}

    result = gnsmon.check(nn.Linear(3, 2), cases.energy, torch.randn(4, 3))
    assert not result.passed
    reasons = {row.name: row.reason for row in result.rows}
    assert reasons["weight"] is None
    assert "do not add up to .grad (off by 1.0%)" in reasons["bias"]
    assert result.verdict.startswith("FAILED: bias is off by 1.0e-02")


def test_a_rule_wrong_in_the_norms_alone_fails(monkeypatch):
    monkeypatch.setattr(rules, "_TABLE", dict(rules._TABLE))

    @gnsmon.rule(nn.Linear)
    def _(module, x, dy):  # the right sum, dealt out to the wrong examples
        mean = dy.mean(0).expand_as(dy)
        return {"weight": gnsmon.Outer(dy[:, None], x[:, None]), "bias": gnsmon.Dense(mean)}

    result = gnsmon.check(nn.Linear(3, 2), cases.energy, torch.randn(4, 3))
    assert not result.passed
    assert result.verdict.startswith("FAILED: bias is off by")


def test_the_model_is_left_alone():
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
    result = gnsmon.check(model, cases.energy, torch.randn(4, 3))
    assert result.passed
    assert model[0].weight.dtype == torch.float32
    assert model[0].weight.grad is None
    assert model[1].training
    assert not model[0]._forward_hooks


def test_nothing_covered_fails_with_the_reasons():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.by = nn.Parameter(torch.ones(3))
            self.table = nn.Linear(1, 1)  # never called

        def forward(self, x):
            return x * self.by

    result = gnsmon.check(Scaled(), cases.energy, torch.randn(4, 3))
    assert not result.passed
    assert result.fraction == 0
    assert result.verdict == "FAILED: no parameter is covered"
    assert "write a rule with @gnsmon.rule(Scaled)" in result.rows[0].reason
    assert "write a rule with" in " ".join(str(result).split())


def test_attention_is_proven_without_its_dropout():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    result = gnsmon.check(Attends(), cases.energy, torch.randn(3, 5, 4))
    assert result.passed
    assert result.fraction == 1


def not_a_scalar(model, batch):
    return model(batch)


def constant(model, batch):
    return batch.sum()


def of_four(model, batch):
    return model(batch).view(4, 2).square().mean()


@pytest.mark.parametrize(
    ("loss", "batch", "message"),
    [
        (cases.energy, torch.randn(1, 3), "at least two examples in the batch, got 1"),
        (cases.energy, "text", "expected tensors in the batch"),
        (not_a_scalar, torch.randn(4, 3), r"a scalar tensor, got \[4, 2\]"),
        (
            of_four,
            torch.randn(4, 3),
            "not its first example: shape .* is invalid.*nodes of a",
        ),
        (constant, torch.randn(4, 3), "does not depend on the parameters"),
    ],
)
def test_a_call_that_makes_no_sense_is_refused(loss, batch, message):
    with pytest.raises(ValueError, match=message):
        gnsmon.check(nn.Linear(3, 2), loss, batch)


def test_an_unknown_method_and_a_frozen_model_are_refused():
    with pytest.raises(ValueError, match="one of pepgns, sogns.*, got 'microbatch'; other"):
        gnsmon.check(nn.Linear(3, 2), cases.energy, torch.randn(4, 3), method="microbatch")
    with pytest.raises(ValueError, match="all are frozen"):
        gnsmon.check(nn.Linear(3, 2).requires_grad_(False), cases.energy, torch.randn(4, 3))


CLASSES = torch.tensor([1.0, 1.0, 1.0])


def with_a_float32_state(model, batch):
    state = torch.zeros(1, len(batch[0]), 3)
    return model(batch[0], (state, state))[0].square().mean()


def cast_to_float32(model, batch):
    return model(batch[0].half().to(torch.float32))[0].float().square().mean()


def with_float32_class_weights(model, batch):
    return F.cross_entropy(model(batch[0])[0].mean(1), batch[1], CLASSES)


def a_mean_over_tokens_in_float32(model, batch):
    """As Hugging Face's: its rounding, of 1e-7, is not the norms'."""
    x, y = batch
    y = y[:, None].expand(-1, 5).masked_fill(torch.arange(5) > y[:, None], -100)
    return F.cross_entropy(model(x)[0].float().flatten(0, 1), y.flatten())


class CastingNorm(nn.Module):
    """As Hugging Face's RMSNorm; without a rule it is run again in the backward."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x):
        wide = x.to(torch.float32)
        return self.weight * (wide * wide.square().mean(-1, keepdim=True).rsqrt()).to(x.dtype)


@pytest.mark.parametrize("again", [False, True])
def test_a_cast_in_a_layer_is_in_float64_where_the_backward_runs_it_again(again):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), CastingNorm(), nn.Linear(3, 2))

    def loss(model, batch):
        run = partial(checkpoint, model, use_reentrant=False) if again else model
        return run(batch).square().mean()

    result = gnsmon.check(model, loss, torch.randn(7, 5, 3))
    assert result.passed, str(result)
    assert result.fraction == 1
    assert result.max_error < 1e-12


@pytest.mark.parametrize(
    "loss",
    [
        with_a_float32_state,
        cast_to_float32,
        with_float32_class_weights,
        a_mean_over_tokens_in_float32,
    ],
)
def test_what_a_loss_makes_or_casts_is_in_float64_too(loss):
    torch.manual_seed(0)
    model = nn.LSTM(3, 3, batch_first=True)
    result = gnsmon.check(model, loss, (torch.randn(7, 5, 3), torch.randint(3, (7,))))
    assert result.passed, str(result)
    assert result.max_error < 1e-11
    assert torch.get_default_dtype() == torch.float32


def test_a_loss_of_another_model_than_the_copy_it_is_given_is_refused():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    with pytest.raises(ValueError, match="which is a copy; let the loss use its first argument"):
        gnsmon.check(model, lambda _, x: model(x).square().mean(), x)


@pytest.mark.parametrize("name", [case.name for case in cases.CASES])
def test_the_exact_noise_scale_is_that_of_the_examples(name):
    case = cases.by_name(name)
    model, batch = case.make()
    result = gnsmon.check(model, case.loss, batch)
    if result.fraction < 1:
        assert all(row.reason for row in result.rows if row.error is None)
        return
    gradients = brute.gradient_matrix(model, case.loss, batch)
    noise = gradients.var(0).sum()
    torch.testing.assert_close(float(result.truth.tr_sigma[0]), float(noise), rtol=1e-8, atol=0)
    signal = float(gradients.mean(0).square().sum() - noise / len(gradients))
    assert result.b_simple == (pytest.approx(float(noise) / signal) if signal > 0 else None)


def test_an_approximate_method_passes_and_says_what_it_costs():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(8, 5, 3) + 1
    result = gnsmon.check(model, cases.energy, x, method="sogns")
    assert result.passed
    total, truth, read = result.total, result.truth.grad_sq_norm[0], result.read.grad_sq_norm[0]
    assert total.error > 0.01
    # |G|^2 = (A - q) / (1 - p): an error in q goes over as it is, whatever is left of A - q.
    q = total.norms
    assert read - truth == pytest.approx((q.exact - q.found) / (1 - 1 / 8))
    assert f"sogns is off by {q.found / q.exact - 1:+.1%} in the small norms" in result.verdict
    assert f"becomes {read / truth - 1:+.1%} in |G|²" in result.verdict
    assert result.amplification == 1 + result.b_simple / 8
    assert gnsmon.check(model, cases.energy, x).verdict.startswith("passed: 100.00%")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_that_the_collector_has_can_be_checked(method):
    result = gnsmon.check(*problems.text(), method=method)
    assert result.passed
    assert (result.fraction == 1) == (method != "norm_layers")
    assert result.max_error < 1e-10 or method not in EXACT


def test_what_is_left_out_is_in_the_noise_scale_of_the_whole():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), torch.randn(9, 3)
    part, whole = (
        gnsmon.check(model, cases.energy, x + 1, method=m) for m in ("norm_layers", "pepgns")
    )
    norm = [row for row in whole.rows if row.layer == "LayerNorm"]
    assert part.fraction == sum(r.numbers for r in norm) / sum(r.numbers for r in whole.rows)
    assert float(part.whole.tr_sigma[0]) == float(whole.truth.tr_sigma[0])
    assert part.b_simple != whole.b_simple
    shown = f"b_simple is {part.b_simple:.3g} without them and {whole.b_simple:.3g} with them"
    assert shown in part.verdict


def test_where_the_gradient_is_lost_in_noise_nothing_is_said_of_it():
    x = torch.tensor([[1.0], [-1.0], [2.0], [-2.0]])
    result = gnsmon.check(nn.Linear(1, 1, bias=False), lambda m, x: m(x).mean(), x, method="sogns")
    assert result.b_simple is result.amplification is None
    assert "cannot be told here" in result.verdict
    assert "no amplification" in str(result)


class Blocks(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(count))
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x).tanh()
        return self.head(x)


def test_the_table_is_by_layer_and_joins_blocks_where_they_are_many():
    few = gnsmon.check(Blocks(3), cases.energy, torch.randn(4, 3))
    assert [row.name for row in by_layer(few.rows)] == [*(f"blocks.{i}" for i in range(3)), "head"]
    many = gnsmon.check(Blocks(100), cases.energy, torch.randn(4, 3))
    assert [(row.name, row.numbers) for row in by_layer(many.rows)] == [
        ("blocks.*", 1200),
        ("head", 8),
    ]
    assert len(str(many).splitlines()) < 15


def test_a_table_that_stays_long_shows_the_worst():
    def row(i, error, covered):
        norms = checking.values.Norms(1.0, 1.0, 1 + error, 1.0, 0.0) if covered else None
        return checking.Row(
            f"{'a' * i}.w", "a" * i, "Linear", 1, covered, norms, 0.0, None if covered else "?"
        )

    rows = [row(i, 0.001 * i, int(i != 5)) for i in range(1, 40)]
    shown = by_layer(rows, most=4)
    assert [(r.name, r.numbers) for r in shown] == [
        ("a" * 5, 1),
        ("a" * 37, 1),
        ("a" * 38, 1),
        ("a" * 39, 1),
        ("(35 more)", 35),
    ]


@pytest.mark.parametrize("width", [80])
def test_it_prints_within_a_terminal(width):
    console = Console(width=width, no_color=True)
    with console.capture() as captured:
        console.print(gnsmon.check(*problems.text()))
    assert max(map(len, captured.get().splitlines())) <= width
    assert "…" not in captured.get()
