"""Every finding has a model or a batch that brings it about, and a healthy one that does not."""

from __future__ import annotations

from math import factorial

import cases
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gnsmon
from gnsmon.checking import brute
from gnsmon.checking.findings import chance_of_order, of_batch, random_layers


def mean(model, batch):
    return model(batch).square().mean()


def titles(model, batch, loss=mean):
    return [f.title for f in gnsmon.check(model, loss, batch).findings]


def the(result, title):
    (found,) = [f for f in result.findings if f.title == title]
    return found


def reals(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).double()


def test_a_healthy_model_has_no_finding():
    assert titles(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), reals(6, 3)) == []


# BatchNorm.


def test_batch_norm_in_training_mode_is_an_error_and_the_rest_is_checked():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    result = gnsmon.check(model, mean, reals(6, 3))
    found = the(result, "BatchNorm in training mode")
    assert found.severity == "error"
    assert found.text.startswith("In 1, ")
    assert "eval mode" in found.text
    assert result.verdict == "FAILED: BatchNorm in training mode"
    assert not result.passed
    assert result.fraction == 1
    assert result.max_error < 1e-10
    assert model[1].training
    assert titles(model.eval(), reals(6, 3)) == []


def test_batch_norm_without_running_statistics_leaves_nothing_to_compare():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False))
    result = gnsmon.check(model, mean, reals(6, 3))
    assert "Nothing could be compared" in the(result, "BatchNorm in training mode").text
    assert not result.passed
    assert all(row.error is None and "batch statistics" in row.reason for row in result.rows)


# Dropout.


class Dropped(nn.Module):
    """A linear model with dropout on its input: an example's gradient is mask * x / (1 - p)."""

    def __init__(self, p, functional=False):
        super().__init__()
        self.p, self.functional = p, functional
        self.drop = nn.Identity() if functional else nn.Dropout(p)
        self.linear = nn.Linear(5, 1, bias=False)

    def forward(self, x):
        x = F.dropout(x, self.p, self.training) if self.functional else self.drop(x)
        return self.linear(x)


def plain(model, batch):
    return model(batch).mean()


@pytest.mark.parametrize("functional", [False, True])
def test_the_shares_of_dropout_are_those_of_the_closed_form(functional):
    p, x = 0.3, reals(100, 5) + 1
    model = Dropped(p, functional).double()
    found = brute.noise_shares(model, plain, x, draws=4)
    masks, data = float(x.square().sum(1).mean() * p / (1 - p)), float(x.var(0).sum())
    share = masks / (masks + data)
    assert 0.005 < found.deviation < 0.05
    assert abs(found.share - share) < 3 * found.deviation
    assert found.masks == pytest.approx(masks, rel=0.2)
    assert found.data == pytest.approx(data, rel=0.2)


def test_the_shares_are_unbiased_and_their_deviation_is_theirs():
    """Few examples and draws, anew each time: x is normal about 1, so E |x|^2 = 10."""
    model, generator = Dropped(0.5).double(), torch.Generator().manual_seed(0)
    found = []
    for k in range(300):
        x = 1 + torch.randn(10, 5, generator=generator, dtype=torch.float64)
        found.append(brute.noise_shares(model, plain, x, draws=2, seed=100 * k))
    for name, truth in (("masks", 10.0), ("data", 5.0)):
        values = torch.tensor([getattr(f, name) for f in found])
        assert abs(float(values.mean()) - truth) < 3.5 * float(values.std()) / len(values) ** 0.5
    deviation = torch.tensor([f.deviation for f in found]).mean()
    assert float(deviation / torch.tensor([f.share for f in found]).std()) == pytest.approx(1, 0.2)


def test_dropout_is_named_with_its_share_and_the_norms_are_proven_without():
    result = gnsmon.check(Dropped(0.3), plain, reals(20, 5) + 1)
    text = the(result, "dropout").text
    assert "drop p=0.3" in text
    assert "Without dropout, as in the table" in text
    assert result.passed
    assert result.findings[0].severity == "note"
    assert titles(Dropped(0.3).eval(), reals(20, 5), plain) == []
    assert titles(Dropped(0.0), reals(20, 5), plain) == []


def test_layers_that_do_not_drop_are_not_named():
    drops = nn.ModuleDict({"on": nn.Dropout(0.3), "off": nn.Dropout(0.3).eval()})
    assert random_layers(drops) == {"on": 0.3}
    assert random_layers(nn.ModuleList([nn.LSTM(2, 2, dropout=0.0), nn.Dropout(0.0)])) == {}


def test_functional_dropout_is_found_by_its_randomness():
    result = gnsmon.check(Dropped(0.3, functional=True), plain, reals(20, 5) + 1)
    assert "In eval mode, as in the table" in the(result, "random forward").text
    assert result.passed


def test_a_layer_that_only_dropout_leaves_out_is_named():
    class Attends(nn.Module):
        def __init__(self, dropout):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, dropout=dropout, batch_first=True)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0])

    result = gnsmon.check(Attends(0.5), mean, reals(5, 3, 4))
    assert "random numbers" in the(result, "left out in training mode").text
    assert result.passed
    assert titles(Attends(0.0), reals(5, 3, 4)) == []


def test_a_recurrent_layers_dropout_counts():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(3, 4, num_layers=2, dropout=0.5, batch_first=True)

        def forward(self, x):
            return self.lstm(x)[0]

    assert "lstm p=0.5" in the(gnsmon.check(Recurrent(), mean, reals(5, 6, 3)), "dropout").text


def test_a_loss_that_is_random_in_eval_mode_cannot_be_proven():
    def noisy(model, x):
        return model(x + torch.randn_like(x)).square().mean()

    result = gnsmon.check(nn.Linear(3, 2), noisy, reals(4, 3))
    assert result.verdict == "FAILED: the loss is random in eval mode too"
    assert all(row.error is None and row.sum_error < 1e-10 for row in result.rows)


# The loss.


def test_a_sum_is_harmless_and_the_table_stays_right():
    def total(model, batch):
        return model(batch).square().sum(1).sum()

    def average(model, batch):
        return model(batch).square().sum(1).mean()

    model, x = nn.Linear(3, 2), reals(5, 3)
    result, as_mean = (gnsmon.check(model, loss, x) for loss in (total, average))
    assert the(result, "the loss is no mean").severity == "note"
    assert "It sums over the examples" in the(result, "the loss is no mean").text
    assert result.passed
    assert result.max_error < 1e-10
    assert result.b_simple == pytest.approx(as_mean.b_simple)
    halved = gnsmon.check(model, lambda m, x: average(m, x) * (0.5 if len(x) == 5 else 1), x)
    assert "It is 0.5 times the mean" in the(halved, "the loss is no mean").text


def token_mean(model, batch):
    x, mask = batch
    losses = model(x).square().sum(-1)
    return (losses * mask).sum() / mask.sum()


def test_a_mean_over_tokens_has_its_weights_recovered():
    lengths = torch.tensor([2, 7, 4, 1])
    mask = (torch.arange(7) < lengths[:, None]).double()
    model, batch = nn.Linear(3, 2).double(), (reals(4, 7, 3), mask)
    gradients = brute.gradient_matrix(model, token_mean, batch)
    whole = brute.batch_gradient(model, token_mean, batch)
    fewer = brute.batch_gradient(model, token_mean, (batch[0][:3], mask[:3]))
    found = brute.compose(whole, gradients, fewer)
    assert found.kind == "weighted"
    torch.testing.assert_close(found.weights, lengths / lengths.sum().double(), atol=1e-6, rtol=0)
    result = gnsmon.check(model, token_mean, batch)
    assert result.passed
    assert result.max_error < 1e-8
    text = the(result, "the examples weigh unequally").text
    assert "0.143, 0.500, 0.286, 0.071" in text
    assert "attach(..., weights=...)" in text
    assert f"0.250 for {70 / 14**2:.3f}" in text
    even = (batch[0], torch.ones_like(mask))
    assert titles(model, even, token_mean) == []


def contrastive(model, batch):
    a, b = F.normalize(model(batch), dim=2).unbind(1)
    return F.cross_entropy(a @ b.mT / 0.1, torch.arange(len(a)))


def batch_normalised(model, batch):
    y = model(batch).squeeze(1)
    return ((y - y.mean()) ** 2).mean() + y.mean()


@pytest.mark.parametrize(
    ("loss", "batch"),
    [(contrastive, reals(5, 2, 6) + 1), (batch_normalised, reals(5, 6))],
)
def test_a_loss_that_couples_examples_is_an_error(loss, batch):
    model = nn.Linear(6, 4 if loss is contrastive else 1)
    result = gnsmon.check(model, loss, batch)
    found = the(result, "the loss couples the examples")
    assert found.severity == "error"
    assert "method='microbatch'" in found.text
    assert result.verdict == "FAILED: the loss couples the examples"
    assert all(row.error is None and row.sum_error < 1e-10 for row in result.rows)


def test_weights_are_positive_and_stay_with_their_examples():
    gradients, weights = reals(4, 9), torch.tensor([0.1, 0.4, 0.2, 0.3]).double()

    def kind(of, of_fewer):
        return brute.compose(of @ gradients, gradients, of_fewer @ gradients[:3]).kind

    assert kind(weights, weights[:3] / 0.7) == "weighted"
    assert kind(weights, weights[:3].flip(0)) == "coupled"
    signed = weights * torch.tensor([1, -1, 1, 1])
    assert kind(signed, signed[:3]) == "coupled"


def test_more_examples_than_numbers_are_not_taken_for_weights():
    gradients = reals(6, 3)
    assert brute.compose(reals(7, 3)[6], gradients, reals(8, 3)[7]).kind == "coupled"


def test_an_example_without_a_finite_gradient_is_an_error():
    x = reals(4, 3)
    x[2, 0] = torch.inf
    result = gnsmon.check(nn.Linear(3, 2), mean, x)
    assert "Of example 2 of the batch" in the(result, "non-finite gradients").text
    assert not result.passed


# Parameters.


class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(6, 6).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)

    def forward(self, x):
        return self.base(x) + self.lora_B(self.lora_A(x))


def test_adapters_and_frozen_parameters_are_noted():
    text = the(gnsmon.check(Adapted(), mean, reals(5, 6)), "adapters").text
    assert "Trained are 36 % of the numbers" in text
    assert "lora_A.weight" in text
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    text = the(gnsmon.check(model, mean, reals(5, 3)), "frozen parameters").text
    assert "0.weight, 0.bias: 50 % of the numbers" in text


def test_half_precision_is_noted():
    model = nn.Linear(3, 2).bfloat16()
    assert titles(model, reals(5, 3)) == ["half precision"]


# Coverage.


class Positions(nn.Module):
    def __init__(self, expand):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 8), nn.Embedding(7, 8)
        self.expand = expand

    def forward(self, ids):
        at = torch.arange(7).expand(len(ids) if self.expand else 1, -1)
        return self.tokens(ids) + self.positions(at)


def test_a_lost_batch_axis_is_named_with_the_cure():
    ids = torch.randint(11, (5, 7), generator=torch.Generator().manual_seed(1))
    result = gnsmon.check(Positions(expand=False), mean, ids)
    found = the(result, "the batch axis is missing")
    assert found.text.startswith("positions.weight: 39 % of the trainable numbers")
    assert "expand(batch, -1)" in found.text
    coverage = the(result, "coverage").text
    assert coverage.startswith("39 % of the trainable numbers, ")
    assert result.passed
    assert "left out: positions.weight: positions: output has shape" in " ".join(
        str(result).split()
    )
    assert titles(Positions(expand=True), ids) == []


# The batch.


def test_a_tensor_without_batch_axis_is_given_to_each_example():
    def loss(model, batch):
        return (model(batch["x"]) * batch["scale"]).square().mean()

    model, batch = nn.Linear(3, 2), {"x": reals(5, 3), "scale": reals(2)}
    result = gnsmon.check(model, loss, batch)
    assert "batch[scale] [2]" in the(result, "no batch axis").text
    assert result.passed
    assert result.max_error < 1e-10


def test_copies_are_counted():
    x = reals(6, 3)
    x[4] = x[1]
    x[5] = x[1]
    text = the(gnsmon.check(nn.Linear(3, 2), mean, x), "repeated data").text
    assert text.startswith("2 of the 6 examples are copies")


def found_in(config=None, **tensors):
    return [f.title for f in of_batch(tensors, {}, config)]


class Config:
    eos_token_id, pad_token_id = 2, 0


def test_packed_rows_are_noted():
    restart = torch.tensor([[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4]])
    whole = torch.arange(7).repeat(2, 1)
    padded = torch.tensor([[0, 1, 2, 3, 0, 0, 0], [0, 0, 0, 1, 2, 3, 4]])
    several = torch.tensor([[5, 6, 2, 7, 8, 9, 2], [9, 2, 4, 6, 2, 8, 3]])
    one = torch.tensor([[5, 6, 7, 7, 2, 2, 2], [2, 2, 4, 6, 8, 8, 2]])
    assert found_in(input_ids=reals(2, 7), position_ids=restart) == ["packed sequences"]
    assert found_in(input_ids=reals(2, 7), position_ids=whole) == []
    assert found_in(input_ids=reals(2, 7), position_ids=padded) == []
    assert found_in(Config, input_ids=several) == ["packed sequences"]
    assert found_in(Config, input_ids=one) == []
    assert found_in(input_ids=several) == []


def test_a_batch_in_order_is_a_warning():
    lengths = torch.tensor([3, 4, 6, 7, 8, 9, 10, 12])
    mask = (torch.arange(12) < lengths[:, None]).long()
    ids = 1 + torch.randint(50, (8, 12), generator=torch.Generator().manual_seed(0))
    x, labels = reals(12, 3), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3])
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    (found,) = of_batch({"x": x, "labels": labels}, {})
    assert (found.severity, found.title) == ("warning", "a batch in order")
    assert f"once in {factorial(12) // (2 * 6**4):,}" in found.text
    assert found_in(x=x, labels=labels.flip(0)) == ["a batch in order"]
    assert found_in(x=x, labels=labels[shuffled]) == []
    assert found_in(x=x, index=torch.arange(12)) == []
    assert found_in(ids=ids, attention_mask=mask) == ["a batch in order"]
    assert found_in(ids=ids * mask) == ["a batch in order"]
    assert found_in(Config, input_ids=ids * mask) == ["a batch in order"]
    assert found_in(ids=ids, labels=ids.masked_fill(mask == 0, -100)) == ["a batch in order"]
    assert found_in(ids=(ids * mask)[shuffled[shuffled < 8]]) == []
    assert found_in(ids=ids) == []


def test_the_chance_of_an_order_is_counted():
    assert chance_of_order([1, 2, 3]) == pytest.approx(2 / 6)
    assert chance_of_order([2, 1, 1]) == pytest.approx(4 / 6)
    assert chance_of_order([1, 3, 2]) == chance_of_order([4, 4]) == chance_of_order([]) == 1


def test_random_batches_raise_no_alarm():
    generator = torch.Generator().manual_seed(0)
    alarms = 0
    for _ in range(1000):
        ids = torch.randint(100, (8, 16), generator=generator)
        lengths = torch.randint(1, 17, (8, 1), generator=generator)
        alarms += bool(
            found_in(
                Config,
                tokens=ids * (torch.arange(16) < lengths),
                labels=torch.randint(10, (8,), generator=generator),
                noise=torch.randn(8, 3, generator=generator),
            )
        )
    assert alarms <= 3


def test_the_cases_of_the_rules_have_few_findings():
    allowed = {"frozen parameters", "coverage"}  # a layer that is not called
    for case in cases.CASES:
        model, batch = case.make()
        result = gnsmon.check(model, case.loss, batch)
        assert {f.title for f in result.findings} <= allowed, case.name
