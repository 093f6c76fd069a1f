"""Taps give every layer's norms as one example at a time does, and say what they cannot give."""

import cases
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

import gnsmon
from gnsmon.collectors.per_example import PerExample
from gnsmon.collectors.step import Skipped


def collect(model, loss, batch, before=False, method="pepgns", **options):
    """The norms of a step; `before` it there is another, on two examples of the batch.

    That one finds layers that are called twice, and shows which axis is the batch's.
    """
    collector = PerExample(model, ["pepgns", "sogns"], strict=True, **options)
    for part in [tree_map(lambda t: t[:2], batch), batch] if before else [batch]:
        model.zero_grad()
        collector.arm(True)
        loss(model, part).backward()
        norms = collector.close()
    collector.remove()
    return collector, norms if isinstance(norms, Skipped) else norms[method]


def assert_equal(model, case, batch, norms, collector):
    expected = gnsmon.per_example_sq_norms(model, case.loss, batch)
    unused = {n for n, p in model.named_parameters() if p.grad is None}
    assert norms.missing.keys() <= unused
    whole = sum(float(v.sum()) for v in expected.values())
    for i, name in enumerate(collector.names):
        want = float(expected[name].sum()) / cases.B**2 if name in expected else 0.0
        got = norms.parts_sq_norm[i]
        assert got == pytest.approx(want, rel=1e-10, abs=1e-20 * whole), name
        grad = dict(model.named_parameters())[name].grad
        big = 0.0 if grad is None else float(grad.to_dense().square().sum())
        assert norms.big_sq_norm[i] == pytest.approx(big, rel=1e-10), name
    assert max(collector.gaps.values()) < 1e-10


@pytest.mark.parametrize("case", cases.CASES, ids=lambda c: c.name)
def test_every_case_through_taps(case):
    model, batch = case.make()
    collector, norms = collect(model, case.loss, batch, before=True)
    assert_equal(model, case, batch, norms, collector)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda c: c.name)
def test_sogns_is_exact_where_it_approximates_nothing(case):
    """For all but the products of activations and output gradients over several positions."""
    model, batch = case.make()
    collector, norms = collect(model, case.loss, batch, before=True)
    _, approximate = collect(model, case.loss, batch, before=True, method="sogns")
    for i, name in enumerate(collector.names):
        exact, sogns = norms.parts_sq_norm[i], approximate.parts_sq_norm[i]
        assert sogns >= 0
        if name.endswith("bias"):
            uses = collector._taps_of[name][0].shared
            assert uses or sogns == pytest.approx(exact, rel=1e-12)


class Trunk(nn.Module):
    """Its own forward is never called: the loss uses the parts."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(3, 4)
        self.two = nn.Linear(4, 2)


def parts_only(model, batch):
    return model.two(model.one(batch).tanh()).square().sum(1).mean()


def test_layers_may_be_called_without_their_model():
    model, batch = Trunk().double(), torch.randn(cases.B, 3, dtype=torch.float64)
    case = cases.Case("trunk", lambda: (model, batch), parts_only)
    collector, norms = collect(model, parts_only, batch, before=True)
    assert_equal(model, case, batch, norms, collector)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_in_training_mode_leaves_no_measurement(affine):
    def norm():
        return nn.BatchNorm1d(4, affine=affine)

    case = cases.case("bn", lambda: nn.Sequential(nn.Linear(3, 4), norm()), cases.reals(3))
    model, batch = case.make()
    _, skipped = collect(model, case.loss, batch)
    assert isinstance(skipped, Skipped)
    assert skipped.detail.startswith("1: batch statistics make each example's loss depend")
    assert "GroupNorm" in skipped.detail
    model.eval()
    collector, norms = collect(model, case.loss, batch)
    assert_equal(model, case, batch, norms, collector)


def test_old_weight_norm_is_left_out_and_named():
    with pytest.warns(FutureWarning):
        model = torch.nn.utils.weight_norm(nn.Linear(3, 2)).double()
    _, norms = collect(model, cases.energy, torch.randn(cases.B, 3, dtype=torch.float64))
    assert norms.missing.keys() == {"weight_g", "weight_v"}
    assert "gives it no gradient" in norms.missing["weight_g"]


def test_parametrized_weights_are_left_out_and_named():
    model = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)).double()
    _, norms = collect(model, cases.energy, torch.randn(cases.B, 3, dtype=torch.float64))
    assert [n for n in norms.missing if n.startswith("parametrizations.weight.original")]
    assert "bias" not in norms.missing


def test_windows_of_two_axes_are_regrouped():
    case = cases.case("windows", cases.Windows, cases.reals(4, 10, 3))
    model, batch = case.make()
    collector, norms = collect(model, case.loss, batch)
    assert_equal(model, case, batch, norms, collector)
    assert not norms.missing


def test_windows_in_an_order_that_cannot_be_seen_are_left_out():
    model = cases.Windows(torch.randperm(10 * cases.B).tolist()).double()
    _, norms = collect(model, cases.energy, cases.reals(4, 10, 3)())
    assert norms.missing.keys() == {"layer.weight", "layer.bias"}
    assert "merged with another in an unknown order" in norms.missing["layer.weight"]


def test_a_table_for_all_examples_is_left_out_with_advice():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places = nn.Embedding(9, 4), nn.Embedding(7, 4)

        def forward(self, ids):
            return self.words(ids) + self.places(torch.arange(ids.shape[1])[None])

    _, norms = collect(Positions().double(), cases.energy, cases.ids(9, 7)())
    assert norms.missing.keys() == {"places.weight"}
    assert "one for all 4 examples" in norms.missing["places.weight"]
    assert "positions.expand(4, -1)" in norms.missing["places.weight"]


def test_inputs_by_keyword():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Bilinear(3, 4, 2)

        def forward(self, *, a, b):
            return self.mix(input2=b, input1=a)

    model = Keywords().double()
    batch = tuple(torch.randn(cases.B, d, dtype=torch.float64) for d in (3, 4))

    def loss(model, batch):
        return model(a=batch[0], b=batch[1]).sin().sum(1).mean()

    case = cases.Case("keywords", lambda: (model, batch), loss)
    collector, norms = collect(model, loss, batch)
    assert_equal(model, case, batch, norms, collector)


class Squared(nn.Module):
    """One tensor given twice to one layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Bilinear(5, 5, 3)

    def forward(self, x):
        return self.layer(x, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_one_tensor_given_twice(backend):
    torch._dynamo.reset()
    model, batch = Squared().double(), torch.randn(cases.B, 5, dtype=torch.float64)
    collector = PerExample(model, ["pepgns"], strict=True)
    call = torch.compile(model, backend=backend, fullgraph=True) if backend else model
    collector.arm(True)
    cases.energy(call, batch).backward()
    norms = collector.close()["pepgns"]
    collector.remove()
    case = cases.Case("squared", lambda: (model, batch), cases.energy)
    assert_equal(model, case, batch, norms, collector)
