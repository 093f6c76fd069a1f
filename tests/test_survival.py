"""What a model or a loop may do: training goes on as it would, and no number is silently wrong."""

import warnings

import cases
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gnsmon
from gnsmon.norms import rules

D = torch.float64


def watch(model, optimizer=None, **settings):
    return gnsmon.attach(model, optimizer, **{"every": 1, **settings})


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.0)


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).to(D)


def batch(n, d=4):
    return torch.randn(n, d, dtype=D)


def brute(model, x, missing=()):
    norms = gnsmon.per_example_sq_norms(model, cases.energy, x)
    return sum(float(v.sum()) for n, v in norms.items() if n not in missing) / len(x) ** 2


def assert_right(gns, model, x, missing=()):
    assert gns.reading.examples == len(x)
    assert gns.reading.raw.parts_sq_norm == pytest.approx(brute(model, x, missing), rel=1e-9)
    assert set(gns.coverage().missing) == set(missing)


@pytest.mark.parametrize("size", [3, 24])
def test_another_forward_between_forward_and_backward(size):
    model, x = mlp(), batch(6)
    optimizer = sgd(model)
    with watch(model, optimizer, strict=True) as gns:
        loss = cases.energy(model, x)
        model(batch(size)).detach()
        loss.backward()
        optimizer.step()
        assert_right(gns, model, x)


class Shared(nn.Module):
    """Every parameter is shared."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.wte.weight

    def encode(self, ids):
        return self.head(self.wte(ids).cumsum(1).tanh())

    def forward(self, ids):
        return self.encode(ids)


@pytest.mark.parametrize("rooted", [True, False])
def test_two_forwards_in_one_backward_of_a_model_all_shared(rooted):
    model = Shared().to(D)
    call = model if rooted else model.encode
    optimizer = sgd(model)
    ids = torch.randint(7, (2, 6, 5))
    with watch(model, optimizer) as gns:
        with pytest.warns(RuntimeWarning) as said:
            (cases.energy(call, ids[0]) + cases.energy(call, ids[1])).backward()
            optimizer.step()
        assert gns.reading is None
        assert "several" in str(said[0].message) or "called twice" in str(said[0].message)


def test_a_batch_thrown_away_whose_parameters_the_next_one_does_not_use():
    class Tasks(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 3)

        def forward(self, x, task):
            return getattr(self, task)(self.trunk(x).tanh())

    model, x = Tasks().to(D), batch(6)
    optimizer = sgd(model)
    with watch(model, optimizer, strict=True) as gns:
        cases.energy(lambda x: model(x, "a"), batch(6)).backward()
        optimizer.zero_grad()
        cases.energy(lambda x: model(x, "b"), x).backward()
        optimizer.step()
        assert gns.reading.examples == 6
        norms = gnsmon.per_example_sq_norms(
            model, lambda m, x: cases.energy(lambda x: m(x, "b"), x), x
        )
        expected = sum(float(v.sum()) for v in norms.values()) / 36
        assert gns.reading.raw.parts_sq_norm == pytest.approx(expected, rel=1e-9)
        assert set(gns.coverage().missing) == {"a.weight", "a.bias"}


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.rand(4, dtype=D))

    def forward(self, x):
        return torch.sigmoid(x * self.by)  # which saves its own output


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(rules, "_TABLE", dict(rules._TABLE))


def test_a_rule_that_gives_a_gradient_only_sometimes(table):
    calls = []

    @gnsmon.rule(Scale)
    def _(module, x, dy):
        calls.append(1)
        y = torch.sigmoid(x * module.by)
        return {"by": gnsmon.Dense(dy * x * y * (1 - y))} if len(calls) == 1 else {}

    model = nn.Sequential(nn.Linear(4, 4).to(D), Scale())
    optimizer = sgd(model)
    with pytest.warns(RuntimeWarning, match="gives it no gradient"):
        gns = watch(model, optimizer, strict=True)
        for _ in range(2):
            (cases.energy(model, batch(3)) / 2).backward()
        optimizer.step()
        gns.close()
    assert set(gns.coverage().missing) == {"1.by"}


def test_a_change_in_place_of_a_saved_output_is_still_an_error(table):
    @gnsmon.rule(Scale)
    def _(module, x, dy):
        return {}

    model = nn.Sequential(nn.Linear(4, 4).to(D), Scale())
    with watch(model):
        y = model(batch(3)).clone()
        y.mul_(3).sum().backward()  # of a copy: fine
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            nn.Sequential(model[0], Scale())(batch(3)).mul_(3).sum().backward()


def test_batch_norm_switched_to_eval_before_backward():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).to(D)
    optimizer = sgd(model)
    with watch(model, optimizer) as gns, pytest.warns(RuntimeWarning, match="batch statistics"):
        loss = cases.energy(model, batch(6))
        model.eval()
        loss.backward()
        optimizer.step()
    assert gns.skipped == {"coupled examples": 1}


def test_batch_norm_that_is_not_called_does_not_matter():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).to(D)
    x = batch(6)
    optimizer = sgd(model)
    with watch(model, optimizer) as gns, pytest.warns(RuntimeWarning, match="1.weight: 1: batch"):
        cases.energy(model[0], x).backward()
        optimizer.step()
    assert gns.reading.examples == 6
    assert gns.reading.raw.parts_sq_norm == pytest.approx(brute(model[0], x), rel=1e-9)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.norm, self.mix = nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, ids):
        x = self.wte(ids)
        h = self.mix(x)
        x += h  # autograd saved a half-precision copy of x, so this is fine
        return self.norm(x)


def trained(model, ids, monitored):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gns = watch(model, optimizer) if monitored else None
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = model(ids)
        y.float().sin().sum().backward()
        optimizer.step()
    if gns:
        gns.close()
    return gns, [p.detach().clone() for p in model.parameters()]


def test_a_residual_added_in_place_under_autocast():
    ids = torch.randint(9, (4, 3))
    torch.manual_seed(1)
    _, bare = trained(Residual(), ids, monitored=False)
    torch.manual_seed(1)
    with pytest.warns(RuntimeWarning, match="mix: its rule failed.*inplace operation"):
        gns, monitored = trained(Residual(), ids, monitored=True)
    assert all(map(torch.equal, bare, monitored))
    assert set(gns.coverage().missing) == {"mix.weight", "mix.bias"}


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, dtype=D), nn.Linear(4, 4, dtype=D)

    def forward(self, x):
        return self.b(checkpoint(lambda z: self.a(z).tanh(), x, use_reentrant=False))


def test_checkpoints_computed_again_after_another_batch():
    model = Checkpointed()
    optimizer = sgd(model)
    with watch(model, optimizer) as gns, pytest.warns(RuntimeWarning, match="several forward"):
        (cases.energy(model, batch(6)) + cases.energy(model, batch(18))).backward()
        optimizer.step()
    assert gns.reading is None


def test_checkpoints_computed_again_after_the_step_that_was_measured():
    model, x = Checkpointed(), batch(6)
    with watch(model, every=2) as gns:
        for _ in range(4):
            early = cases.energy(model, x)
            cases.energy(model, x).backward()
            gns.commit()
            early.backward()
            model.zero_grad()
        assert gns.reading.step == 2


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_transforms_of_the_model():
    model, x = mlp(), batch(6)
    optimizer = sgd(model)
    tangent = torch.ones_like(x)
    runs = {
        "vmap": lambda: torch.func.vmap(torch.func.grad(lambda z: model(z).sum()))(x),
        "jvp": lambda: torch.func.jvp(model, (x,), (tangent,))[1],
        "trace": lambda: torch.jit.trace(model, x)(x),
    }
    expected = {name: run() for name, run in runs.items()}
    with watch(model, optimizer) as gns:
        for name, run in runs.items():
            assert torch.allclose(run(), expected[name])
        cases.energy(model, x).backward()
        optimizer.step()
        assert_right(gns, model, x)


def test_weights_that_fail():
    model = mlp()
    optimizer = sgd(model)

    def fails(x):
        raise KeyError("lengths")

    with watch(model, optimizer, weights=fails) as gns:
        with pytest.warns(RuntimeWarning, match="KeyError: 'lengths'"):
            for _ in range(4):
                cases.energy(model, batch(6)).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert gns.skipped == {"fault": 3}  # and then it is off


def test_an_empty_batch():
    model = mlp()
    optimizer = sgd(model)
    with watch(model, optimizer) as gns:
        with pytest.warns(RuntimeWarning, match="is not measured"):
            model(batch(0)).sum().backward()
            optimizer.step()
        optimizer.zero_grad()
        x = batch(6)
        cases.energy(model, x).backward()
        optimizer.step()
        assert_right(gns, model, x)


def test_an_empty_tensor_before_the_batch():
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, cache, x):
            return self.net(x)

    model, x = Cached(), batch(6)
    optimizer = sgd(model)
    with watch(model, optimizer, strict=True) as gns:
        cases.energy(lambda x: model(torch.empty(0, 3), x), x).backward()
        optimizer.step()
        assert gns.reading.examples == 6


def test_warnings_as_errors_do_not_stop_training(caplog):
    model = mlp()
    optimizer = sgd(model)
    with watch(model, optimizer) as gns, warnings.catch_warnings():
        warnings.simplefilter("error")
        cases.energy(model, batch(1)).backward()
        optimizer.step()
    assert gns.skipped == {"one part": 1}
    assert "step 0 is not measured" in caplog.text


def test_parameters_that_come_and_go():
    model, x = mlp(), batch(6)
    optimizer = sgd(model)
    with watch(model, optimizer) as gns:
        model[0].bias = None
        model.add_module("3", nn.Linear(2, 2, dtype=D))
        with pytest.warns(RuntimeWarning, match="added to the model after attach"):
            cases.energy(model, x).backward()
            optimizer.step()
        assert_right(gns, model, x, missing={"3.weight", "3.bias"})


def test_a_gradient_of_zero_is_a_measurement():
    model = mlp()
    optimizer = sgd(model)
    with watch(model, optimizer, strict=True) as gns:
        (0 * cases.energy(model, batch(6))).backward()
        optimizer.step()
        assert gns.reading.raw.big_sq_norm == 0
        assert gns.reading.status == "undefined"


def test_a_forward_for_its_shape_and_then_only_the_parts():
    model, x = mlp(), batch(10)
    optimizer = sgd(model)
    with watch(model, optimizer) as gns:
        model(batch(2))
        with pytest.warns(RuntimeWarning, match="step 0 is not measured: 0: output has shape"):
            for _ in range(3):
                optimizer.zero_grad()
                cases.energy(lambda x: model[2](model[0](x).tanh()), x).backward()
                optimizer.step()
        assert_right(gns, model, x)


def test_positions_that_happen_to_be_as_many_as_examples():
    class Vision(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.pos = nn.Conv2d(3, 8, 4, 4), nn.Embedding(16, 8)

        def forward(self, x):
            return self.patch(x).flatten(2).mT + self.pos(torch.arange(16))

    model = Vision().to(D)
    x = torch.randn(16, 3, 16, 16, dtype=D)
    optimizer = sgd(model)
    with watch(model, optimizer) as gns:
        with pytest.warns(RuntimeWarning, match="pos: fed 16 indices that are no input"):
            cases.energy(model, x).backward()
            optimizer.step()
        assert_right(gns, model, x, missing={"pos.weight"})


def test_a_state_beside_the_batch():
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x, state):
            return self.net(x)

    model, x = Stateful(), torch.randn(16, 8, 4, dtype=D)
    optimizer = sgd(model)
    state = tuple(torch.zeros(2, 16, 4) for _ in range(2))
    with watch(model, optimizer, strict=True) as gns:
        cases.energy(lambda x: model(x, state), x).backward()
        optimizer.step()
        assert gns.reading.examples == 16


def test_what_is_no_optimizer_is_named():
    with pytest.raises(ValueError, match="expected a torch.optim.Optimizer or several, got 'adam'"):
        gnsmon.attach(mlp(), "adam")


def test_lazy_layers_are_named():
    with pytest.raises(ValueError, match=r"0\.weight has no shape yet: call the model once"):
        gnsmon.attach(nn.Sequential(nn.LazyLinear(3)))


class Reads(nn.Module):
    """A layer that is fed the rows of [B, T, d] as `arrange` lays them out."""

    def __init__(self, arrange):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)
        self.arrange = arrange

    def forward(self, x):
        return self.second(self.arrange(self.first(x).tanh()))


def gathered(h):
    rows = torch.arange(h.shape[1]).repeat_interleave(len(h))
    return h[torch.arange(len(h)).repeat(h.shape[1]), rows]


def windows(h):  # [B, 6, 4] as two windows of three positions, each window a row
    return h.view(len(h), 3, 2, 4).permute(0, 2, 1, 3).contiguous().view(-1, 3, 4)


@pytest.mark.parametrize(
    ("arrange", "known"),
    [
        (lambda h: h.reshape(-1, 4), True),
        (lambda h: h.transpose(0, 1).reshape(-1, 4), True),
        (windows, True),
        (gathered, False),
        (lambda h: h.index_select(0, torch.arange(len(h)).repeat(6))[:, 0], False),
        (lambda h: h.reshape(-1, 4) * 2, False),
    ],
)
def test_rows_are_dealt_out_by_what_a_view_shows(arrange, known):
    model = Reads(arrange).to(D)
    x = torch.randn(5, 6, 4, dtype=D)

    def loss(model, x):
        y = model(x)
        return y.sin().sum() * (1.0 / len(x))

    optimizer = sgd(model)
    with watch(model, optimizer) as gns, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loss(model, x).backward()
        optimizer.step()
    missing = set() if known else {"second.weight", "second.bias"}
    assert bool(said) != known
    assert set(gns.coverage().missing) == missing
    norms = gnsmon.per_example_sq_norms(model, loss, x)
    expected = sum(float(v.sum()) for n, v in norms.items() if n not in missing) / 25
    assert gns.reading.raw.parts_sq_norm == pytest.approx(expected, rel=1e-9)


def test_two_orders_of_rows_in_one_forward():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            h = self.a(x.reshape(-1, 4)).tanh().view(x.shape)
            h = self.b(h.transpose(0, 1).reshape(-1, 4)).view(x.shape[1], len(x), 4)
            return h.transpose(0, 1)

    model = Both().to(D)
    x = torch.randn(5, 6, 4, dtype=D, requires_grad=True)
    optimizer = sgd(model)
    with watch(model, optimizer, strict=True) as gns:
        cases.energy(model, x).backward()
        optimizer.step()
        assert_right(gns, model, x.detach())


def test_a_microbatch_of_one_owns_every_row():
    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.ada, self.mix, self.pos = nn.Linear(4, 4), nn.Linear(4, 4), nn.Embedding(6, 4)

        def forward(self, x):
            h = self.mix(x + self.ada(x[:, 0].tanh())[:, None])
            return self.mix(h.flatten(0, 1)).view(x.shape) + self.pos(torch.arange(x.shape[1]))

    model = Conditioned().to(D)
    x = torch.randn(5, 6, 4, dtype=D)
    optimizer = sgd(model)
    with watch(model, optimizer) as gns:
        for _ in range(2):
            optimizer.zero_grad()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the layer that is called twice
                for i in range(5):
                    (cases.energy(model, x[i : i + 1]) / 5).backward()
                optimizer.step()
        assert_right(gns, model, x)


def test_first_layers_fed_positions_first_with_as_many_positions_as_examples():
    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.norm = nn.Conv2d(1, 4, 4, 4), nn.LayerNorm(4)

        def forward(self, x):
            return self.norm(self.patch(x).flatten(2).permute(2, 0, 1)).transpose(0, 1)

    model = Patches().to(D)
    x = torch.randn(4, 1, 8, 8, dtype=D)
    optimizer = sgd(model)
    with watch(model, optimizer) as gns, pytest.warns(RuntimeWarning, match="which are the exam"):
        cases.energy(model, x).backward()
        optimizer.step()
    assert_right(gns, model, x, missing={"norm.weight", "norm.bias"})


def test_gradients_asked_for_between_steps_leave_nothing_behind():
    model = Shared().to(D)
    ids = torch.randint(7, (6, 5))
    optimizer = sgd(model)
    with watch(model, optimizer, strict=True) as gns:
        for _ in range(5):
            torch.autograd.grad(cases.energy(model, ids), list(model.parameters()))
        taps = gns._sources[0][0].taps
        assert len(taps.deferred) <= 2 and len(taps.fired) <= 1
        cases.energy(model, ids).backward()
        optimizer.step()
        assert not taps.inputs and not taps.deferred and not taps.fired
        assert_right(gns, model, ids)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x):
        return x + self.mix(self.norm(x)).tanh()


class Deep(nn.Module):
    def __init__(self, blocks=2, checkpointed=False):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.checkpointed = checkpointed

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore:The .grad attribute")
def test_blocks_compiled_one_by_one_share_their_graph():
    model, x = Deep(10).to(D), torch.randn(5, 6, 4, dtype=D)
    optimizer = sgd(model)
    torch._dynamo.utils.counters.clear()
    with watch(model, optimizer, strict=True) as gns:
        for block in model.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
        cases.energy(model, x).backward()
        optimizer.step()
        assert graphs() <= 2
        assert_right(gns, model, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_checkpoints_in_a_compiled_model():
    model, x = Deep(checkpointed=True).to(D), torch.randn(5, 6, 4, dtype=D)
    optimizer = sgd(model)
    with watch(model, optimizer, strict=True) as gns:
        cases.energy(torch.compile(model, backend="aot_eager", fullgraph=True), x).backward()
        optimizer.step()
        assert_right(gns, model, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_lengths_and_batches_that_vary_do_not_compile_anew():
    model = Deep().to(D)
    optimizer = sgd(model)
    torch._dynamo.utils.counters.clear()
    with watch(model, optimizer, every=2, strict=True) as gns:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for i in range(24):
            x = torch.randn(3 + i % 5, 9 + i % 7, 4, dtype=D)
            optimizer.zero_grad()
            cases.energy(compiled, x).backward()
            optimizer.step()
            if i % 2 == 0:
                assert_right(gns, model, x)
        assert graphs() <= 6


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_compiled_square_batch_is_refused():
    model, x = Deep().to(D), torch.randn(6, 6, 4, dtype=D)
    optimizer = sgd(model)
    with watch(model, optimizer) as gns, pytest.warns(RuntimeWarning, match="is not measured"):
        cases.energy(torch.compile(model, backend="aot_eager", fullgraph=True), x).backward()
        optimizer.step()
    assert gns.reading is None


class Recommends(nn.Module):
    """Indices [B] that are inputs, beside a table looked up by position."""

    def __init__(self):
        super().__init__()
        self.user, self.item, self.rank = (nn.Embedding(9, 4) for _ in range(3))

    def forward(self, user, item):
        return self.user(user) * self.item(item) + self.rank(torch.arange(6))[:6]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("compiled", [False, True])
def test_indices_are_of_examples_where_they_are_inputs(compiled):
    model = Recommends().to(D)
    x = torch.randint(9, (6, 2))
    optimizer = sgd(model)
    call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    with watch(model, optimizer) as gns, pytest.warns(RuntimeWarning, match="rank"):
        cases.energy(lambda x: call(x[:, 0].clone(), x[:, 1].clone()), x).backward()
        optimizer.step()
    assert set(gns.coverage().missing) == {"rank.weight"}
