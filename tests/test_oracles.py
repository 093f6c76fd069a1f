"""The oracles: one example at a time, and random signs."""

from __future__ import annotations

from collections import namedtuple
from itertools import product

import pytest
import torch
from cases import B, by_name
from torch import nn

from gnsmon.norms.oracles import (
    per_example_gradients,
    per_example_sq_norms,
    random_sign_sq_norms,
    signed_sq_norms,
)

NAMES = ["network", "tied, more tokens", "twice, linear", "embedding, sparse", "frozen", "unused"]
EXACT = {"rtol": 1e-10, "atol": 1e-14}


def losses_of(case, model, batch):
    return torch.stack([case.loss(model, batch[i : i + 1]) for i in range(B)])


@pytest.mark.parametrize("name", NAMES)
def test_random_signs_are_unbiased_over_all_of_them(name):
    case = by_name(name)
    model, batch = case.make()
    losses, weights = losses_of(case, model, batch), torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    every = [
        signed_sq_norms(model, losses, weights * torch.tensor(signs).double())
        for signs in product((-1, 1), repeat=B)
    ]
    for key, sq_norms in per_example_sq_norms(model, case.loss, batch).items():
        mean = torch.stack([each[key] for each in every]).mean()
        torch.testing.assert_close(mean, (weights**2 * sq_norms).sum(), **EXACT)


def test_random_signs_come_from_their_generator_alone():
    case = by_name("network")
    model, batch = case.make()
    losses, weights = losses_of(case, model, batch), torch.arange(1.0, 5).double()
    before = torch.get_rng_state()
    first, again = (
        random_sign_sq_norms(model, losses, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    generator = torch.Generator().manual_seed(3)
    seen = [random_sign_sq_norms(model, losses, generator=generator) for _ in range(40)]
    weighted = random_sign_sq_norms(model, losses, generator=generator, weights=weights)
    signs = [torch.tensor(s).double() for s in product((-1, 1), repeat=B)]
    every = [[signed_sq_norms(model, losses, w * s) for s in signs] for w in (1, weights)]
    assert first == again == seen[0]
    assert all(any(_near(draw, one) for one in every[0]) for draw in seen)
    assert len({float(draw["0.weight"]) for draw in seen}) > 1
    assert any(_near(weighted, one) for one in every[1])
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match=r"the loss of each example, \[B\]; got shape \[\]"):
        signed_sq_norms(model, losses.sum(), weights)


def _near(a, b):
    return all(torch.allclose(a[key], b[key], rtol=1e-10) for key in a)


def test_gradients_of_the_examples_average_to_that_of_the_batch():
    case = by_name("network")
    model, batch = case.make()
    rows = list(per_example_gradients(model, case.loss, batch))
    case.loss(model, batch).backward()
    for name, p in model.named_parameters():
        mean = torch.stack([row[name] for row in rows]).mean(0)
        torch.testing.assert_close(mean, p.grad, **EXACT)


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(
        nn.Linear(3, 4),
        nn.Dropout(0.5),
        nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    )
    model[0].bias.grad = torch.ones(4)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    batch, before = torch.randn(5, 1, 3), torch.get_rng_state()
    sq_norms = per_example_sq_norms(model, lambda m, x: m(x.expand(-1, 4, -1)).sin().sum(), batch)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert model[0].weight.grad is None
    assert torch.equal(model[0].bias.grad, torch.ones(4))
    assert model.training
    assert all(v.dtype == torch.float64 and v.shape == (5,) for v in sq_norms.values())


Pair = namedtuple("Pair", "x scale")


@pytest.mark.parametrize(
    ("batch", "parts"),
    [
        (Pair(torch.ones(3, 2), torch.arange(3.0)), lambda batch: batch),
        ({"x": torch.ones(3, 2), "more": [torch.arange(3.0), None, torch.ones(())]},
         lambda batch: (batch["x"], batch["more"][0])),
    ],
)  # fmt: skip
def test_batches_may_be_nested(batch, parts):
    def loss(model, batch):
        x, scale = parts(batch)
        assert x.shape == (1, 2)
        return (model(x)[:, 0] * scale).mean()

    sq_norms = per_example_sq_norms(nn.Linear(2, 1), loss, batch)
    assert sq_norms["weight"].tolist() == [0, 2, 8]
    assert sq_norms["bias"].tolist() == [0, 1, 4]


def test_parameters_can_be_chosen_and_tied_ones_have_one_name():
    case = by_name("tied, more tokens")
    model, batch = case.make()
    every = per_example_sq_norms(model, case.loss, batch)
    assert "tokens.weight" in every
    assert "head.weight" not in every
    some = per_example_sq_norms(model, case.loss, batch, parameters=["norm.bias"])
    assert list(some) == ["norm.bias"]
    assert torch.equal(some["norm.bias"], every["norm.bias"])
    with pytest.raises(ValueError, match="not trainable parameters of this model: head.weight"):
        per_example_sq_norms(model, case.loss, batch, parameters=["head.weight"])


def test_a_batch_of_two_sizes_is_an_error():
    with pytest.raises(ValueError, match=r"first axes of \[2, 3\]"):
        per_example_sq_norms(nn.Linear(1, 1), None, [torch.ones(2), torch.ones(3)])
