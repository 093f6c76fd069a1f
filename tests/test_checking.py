import cases
import pytest
import torch
from torch import nn

import gnsmon
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


def sum_of(model, batch):
    return cases.energy(model, batch) * len(batch)


def coupled(model, batch):
    y = model(batch)
    return (y @ y.mT).logsumexp(1).mean()


@pytest.mark.parametrize("loss", [sum_of, coupled])
def test_losses_that_are_no_mean_are_refused(loss):
    with pytest.raises(ValueError, match="expected a loss whose gradient is the mean"):
        gnsmon.check(nn.Linear(3, 2), loss, torch.randn(4, 3))


def test_nothing_covered_fails():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.by = nn.Parameter(torch.ones(3))
            self.table = nn.Linear(1, 1)  # never called

        def forward(self, x):
            return x * self.by

    with pytest.raises(ValueError, match=r"write a rule with @gnsmon\.rule\(Scaled\)"):
        gnsmon.check(Scaled(), cases.energy, torch.randn(4, 3))


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
