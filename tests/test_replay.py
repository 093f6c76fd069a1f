"""Layers without a rule: replayed for each example, or left out with the reason."""

import cases
import pytest
import torch
from test_taps import assert_equal, collect
from torch import nn

import gnsmon
from gnsmon.norms import replay

X = cases.reals(5, 4)
replayed = pytest.mark.parametrize("case", cases.REPLAYED, ids=lambda case: case.name)


@replayed
@pytest.mark.parametrize("bytes_", [1, 2**28])
def test_every_case_without_a_rule(case, bytes_, monkeypatch):
    monkeypatch.setattr(replay, "CHUNK_BYTES", bytes_)  # one example at a time, or all
    model, batch = case.make()
    collector, norms = collect(model, case.loss, batch, before=True)
    assert_equal(model, case, batch, norms, collector)
    assert all(p.grad is None or n in collector.gaps for n, p in model.named_parameters())


@replayed
@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")  # torch's, in forward
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_is_bitwise_the_same(case, dtype):
    grads = []
    for monitored in (False, True):
        model, batch = case.make()
        model, batch = model.to(dtype), batch.to(dtype)
        state = torch.get_rng_state()
        if monitored:
            _, norms = collect(model, case.loss, batch, before=True)
            assert not norms.missing  # other kernels run in float32
        else:
            case.loss(model, batch).backward()
        assert torch.equal(torch.get_rng_state(), state)
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(map(torch.equal, *grads))


def left_out(layer, x=None, loss=cases.energy, **options):
    """The reasons that the layer's parameters have in a model that trains on."""
    model = layer if isinstance(layer, cases.First) else cases.First(layer)
    model = model.double()
    collector, norms = collect(model, loss, X() if x is None else x, **options)
    assert not [name for name in norms.missing if name.startswith("inside")]
    assert set(norms.missing) == {n for n, _ in model.named_parameters() if n.startswith("layer")}
    return set(norms.missing.values())


class Custom(nn.Module):
    """Multiplies by a parameter, in the way that `how` says."""

    def __init__(self, how):
        super().__init__()
        self.scale, self.how, self.seen = nn.Parameter(torch.rand(4)), how, None
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, *more):
        return self.how(self, x * self.scale)


def test_random_numbers():
    def drops(layer, y):
        return nn.functional.dropout(y, 0.5)

    (why,) = left_out(Custom(drops))
    assert "draws random numbers, such as dropout in training mode" in why
    (why,) = left_out(cases.Attends(nn.MultiheadAttention(4, 2, 0.1, batch_first=True)))
    assert why.startswith("layer: ")
    assert "draws random numbers" in why
    (why,) = left_out(nn.LSTM(4, 4, 2, dropout=0.5, batch_first=True))
    assert "draws random numbers" in why


@pytest.mark.parametrize("grad", [True, False])
def test_a_buffer_that_changes(grad):
    def counts(layer, y):
        with torch.set_grad_enabled(grad):
            layer.calls += 1
        return y

    layer = Custom(counts)
    (why,) = left_out(layer)
    assert "its forward changes a buffer" in why
    assert layer.calls == 1


def test_examples_that_depend_on_each_other():
    (why,) = left_out(Custom(lambda layer, y: y - y.mean(0)))
    assert "do not add up to .grad" in why


def test_two_outputs_that_both_have_a_gradient():
    def loss(model, x):
        y, z = model.layer(model.inside(x))
        return cases.energy(lambda _: y + z.sin(), x)

    (why,) = left_out(Custom(lambda layer, y: (y, y.square())), loss=loss)
    assert "do not add up to .grad" in why


def test_outputs_and_inputs_that_are_no_tensors():
    class Gives(cases.First):
        def call(self, x):
            return self.layer(x, object())

    (why,) = left_out(Gives(Custom(lambda layer, y: y)))
    assert why == "layer: it is given a object, which a replay would use again"

    class Reads(cases.First):
        def call(self, x):
            return self.layer(x)["y"]

    (why,) = left_out(Reads(Custom(lambda layer, y: {"y": y})))
    assert why == "layer: output is a dict, expected one tensor"


def test_control_flow_that_depends_on_the_data():
    (why,) = left_out(Custom(lambda layer, y: y if y.sum() > 0 else -y))
    assert "without a rule, and replaying it failed: RuntimeError: vmap" in why


def test_layers_that_are_too_large(monkeypatch):
    monkeypatch.setattr(replay, "LARGEST", 3)
    (why,) = left_out(Custom(lambda layer, y: y))
    assert why == "layer: Custom has no rule and is too large to replay; write one with " + (
        "@gnsmon.rule(Custom)"
    )


def test_a_module_with_layers_of_its_own():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.linear = nn.Parameter(torch.rand(4)), nn.Linear(4, 4)

        def forward(self, x):
            return self.gate * self.linear(x)

    _, norms = collect(Gated().double(), cases.energy, X())
    assert norms.missing.keys() == {"gate"}
    assert (
        "layers of its own that a replay would run again; move the parameter"
        in (norms.missing["gate"])
    )


def test_a_bias_that_the_head_uses_itself_is_found_out():
    class Head(cases.NamedByTwo):
        def forward(self, x):
            return super().forward(x) + self.bias

    _, norms = collect(Head().double(), cases.energy, X())
    assert "do not add up to .grad" in norms.missing["bias"]


def test_what_forward_keeps_on_the_module_stays_readable():
    def keeps(layer, y):
        layer.seen = y
        return y

    model = cases.First(Custom(keeps)).double()
    collect(model, cases.energy, X())
    assert torch.isfinite(model.layer.seen).all()
    assert float(model.layer.seen.detach().sum()) is not None


def test_hooks_run_once_and_count():
    model, calls = cases.First(Custom(lambda layer, y: y)).double(), []
    model.layer.register_forward_hook(lambda module, args, y: calls.append(1) or 2 * y)
    model.layer.register_forward_pre_hook(lambda module, args: (args[0].tanh(),))
    x = X()
    case = cases.Case("hooked", lambda: (model, x))
    collector, norms = collect(model, cases.energy, x)
    assert len(calls) == 1
    assert_equal(model, case, x, norms, collector)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_the_forward(half):
    model, x = cases.First(nn.MultiheadAttention(4, 2, batch_first=True)), X().float()
    model.call = lambda x: model.layer(x, x, x)

    def loss(model, x):
        with torch.autocast("cpu", half):
            y = model(x)
        return cases.energy(lambda _: y.float(), x)

    _, norms = collect(model, loss, x)
    assert not norms.missing


def test_the_whole_monitor_on_stock_attention():
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Linear(4, 4), layer).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gnsmon.attach(model, optimizer, every=1, strict=True) as gns:
        x = X()
        expected = gnsmon.per_example_sq_norms(model, cases.energy, x)
        cases.energy(model, x).backward()
        optimizer.step()
        total = sum(float(v.sum()) for v in expected.values()) / cases.B**2
        assert gns.reading.raw.parts_sq_norm == pytest.approx(total, rel=1e-10)
        assert gns.coverage().fraction == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compiled_models_leave_it_out():
    model = cases.First(cases.ScaledTanh()).double()
    collector = gnsmon.collectors.per_example.PerExample(model, ["pepgns"])
    compiled = torch.compile(model, backend="aot_eager")
    collector.arm(True)
    cases.energy(compiled, X()).backward()
    norms = collector.close()["pepgns"]
    assert norms.missing.keys() == {"layer.scale", "layer.shift"}
    assert "not replayed in a compiled model" in norms.missing["layer.scale"]
