"""A parameter that is used more than once in a compiled graph is measured, or left out and named.

Never in between: a cross term that is missing would show in no proof, since the examples' sum has
none.
"""

import os
import subprocess
import sys
from contextlib import contextmanager
from copy import deepcopy
from functools import partial

import cases
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gnsmon
from gnsmon.collectors.per_example import PerExample
from gnsmon.collectors.step import Skipped
from gnsmon.demo.models import CharGPT
from gnsmon.norms import links, rules
from gnsmon.norms.forms import Dense, Outer, Rows, inner

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:torch", "ignore:The .grad attribute"
)
D = torch.float64
compile_whole = partial(torch.compile, backend="aot_eager", fullgraph=True)


@contextmanager
def collecting(model, methods=("pepgns", "sogns"), **options):
    """`step(call, *microbatches)` gives the norms of a step, strictly."""
    collector = PerExample(model, list(methods), strict=True, **options)

    def step(call, *batches):
        model.zero_grad()
        collector.arm(True)
        for batch in batches:
            (cases.energy(call, batch) / len(batches)).backward()
        return collector.close()

    yield step
    collector.remove()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def assert_right(model, norms, *batches, missing=()):
    assert not isinstance(norms, Skipped), norms
    norms = norms["pepgns"]
    assert set(norms.missing) == set(missing), norms.missing
    size = sum(len(b[0] if isinstance(b, tuple) else b) for b in batches)
    expected = dict.fromkeys(dict(model.named_parameters()), 0.0)
    unwatched = deepcopy(model)
    for batch in batches:
        for name, v in gnsmon.per_example_sq_norms(unwatched, cases.energy, batch).items():
            if name not in missing:
                expected[name] += float(v.sum()) / size**2
    got = dict(zip(expected, norms.parts_sq_norm, strict=True))
    assert got == pytest.approx(expected, rel=1e-9, abs=1e-18 * sum(expected.values()))


class Times(nn.Module):
    """A layer called several times."""

    def __init__(self, layer, times):
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, x):
        for _ in range(self.times):
            x = self.layer(x).tanh()
        return x.cumsum(1)


class Chain(nn.Module):
    """Layers one after the other, all with the first one's weight."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        for layer in layers[1:]:
            layer.weight = layers[0].weight

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x.cumsum(1)


class HeadFirst(nn.Module):
    """The head's product comes before the look-up of the same table."""

    def __init__(self):
        super().__init__()
        self.head, self.table = nn.Linear(5, 7, bias=False), nn.Embedding(7, 5, padding_idx=2)
        self.table.weight = self.head.weight

    def forward(self, x, index):
        return self.head(x).softmax(-1)[..., :5].cumsum(1) * self.table(index)


def tiny_gpt():
    return CharGPT(11, context=6, width=8, layers=2, heads=2, dropout=0.0)


def real(*shape):
    return torch.randn(*shape, dtype=D)


def ids(high, *shape):
    return torch.randint(high, shape)


TIED = {
    "language model": lambda: (tiny_gpt(), ids(11, 3, 6)),
    "more tokens than words": lambda: (cases.Language(6), ids(6, 3, 9)),
    "padding": lambda: (cases.Language(6, padding_idx=0), ids(6, 3, 9)),
    "one token": lambda: (cases.Language(6), ids(6, 3, 1)),
    "biases of their own": lambda: (cases.TiedLinears(), real(3, 6, 5)),
    "encoder and decoder": lambda: (cases.TiedEmbeddings(), (ids(5, 3, 6), ids(5, 3, 7))),
    "autoencoder": lambda: (cases.TiedConvs(), real(3, 2, 5, 7)),
    "three, long": lambda: (Chain(*(nn.Linear(2, 2) for _ in range(3))), real(3, 9, 2)),
    "four": lambda: (Chain(*(nn.Linear(5, 5) for _ in range(4))), real(3, 2, 5)),
    "no positions": lambda: (Chain(nn.Linear(4, 4), nn.Linear(4, 4)), real(3, 4)),
    "groups": lambda: (
        Chain(*(nn.Conv1d(4, 4, 3, groups=2, padding=1) for _ in range(2))),
        real(3, 4, 6),
    ),
    "scales": lambda: (Chain(*(nn.LayerNorm(4) for _ in range(2))), real(3, 5, 4)),
    "slopes": lambda: (Chain(nn.PReLU(), nn.PReLU()), real(3, 5, 4)),
    "head first": lambda: (HeadFirst(), (real(3, 4, 5), ids(7, 3, 4))),
}
CALLED_AGAIN = {
    "linear, twice": lambda: (Times(nn.Linear(4, 4), 2), real(3, 5, 4)),
    "linear, three times": lambda: (Times(nn.Linear(4, 4), 3), real(3, 5, 4)),
    "groups, twice": lambda: (Times(nn.Conv1d(4, 4, 3, groups=2, padding=1), 2), real(3, 4, 6)),
    "norm, twice": lambda: (Times(nn.LayerNorm(4), 2), real(3, 5, 4)),
    "prelu, twice": lambda: (Times(nn.PReLU(4), 2), real(3, 4, 5)),
}


@pytest.mark.parametrize("name", TIED)
def test_tied_weights_are_exact_in_one_graph(name):
    model, batch = TIED[name]()
    model = model.to(D)
    torch._dynamo.utils.counters.clear()
    with collecting(model) as step:
        eager = step(model, batch)
        compiled = compile_whole(model)
        for _ in range(3):
            norms = step(compiled, batch)
            assert_right(model, norms, batch)
        assert norms["sogns"].parts_sq_norm == pytest.approx(eager["sogns"].parts_sq_norm, rel=1e-9)
        assert graphs() == 1


@pytest.mark.parametrize("name", CALLED_AGAIN)
def test_a_layer_called_again_is_exact_from_the_next_step_on(name):
    """As without compiling: that it is called again is known only when it has been."""
    model, batch = CALLED_AGAIN[name]()
    model = model.to(D)
    torch._dynamo.utils.counters.clear()
    with collecting(model) as step:
        compiled = compile_whole(model)
        first = step(compiled, batch)
        assert isinstance(first, Skipped)
        assert "joined from the next step on" in first.detail
        for _ in range(3):
            norms = step(compiled, batch)
            assert_right(model, norms, batch)
        assert graphs() == 2
        eager = step(model, batch)
        assert norms["sogns"].parts_sq_norm == pytest.approx(eager["sogns"].parts_sq_norm, rel=1e-9)


def test_inductor():
    model, batch = TIED["language model"]()
    model = model.to(D)
    torch._dynamo.utils.counters.clear()
    with collecting(model) as step:
        compiled = torch.compile(model, fullgraph=True)
        for _ in range(2):
            assert_right(model, step(compiled, batch), batch)
    assert graphs() == 1


ADDED_BY_TWO_THREADS = """
import torch
from torch import nn
from gnsmon.collectors.per_example import PerExample

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(32, 16), nn.Embedding(8, 16)
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        places = torch.arange(8).expand(len(ids), -1)
        return self.head((self.words(ids) + self.places(places)).tanh())

torch.set_num_threads(2)
torch.manual_seed(0)
model, ids = Tied(), torch.randint(32, (4, 8))
collector = PerExample(model, ["pepgns"], strict=True)
found = []
for call in model, torch.compile(model, fullgraph=True):
    model.zero_grad()
    collector.arm(True)
    call(ids).logsumexp(2).square().sum().backward()
    gradients = [p.grad for p in model.parameters()]
    norms = torch.tensor(collector.close()["pepgns"].parts_sq_norm)
    found.append({"norms": norms, "gradients": gradients})
torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
"""


@pytest.mark.slow
def test_inductor_with_two_threads():
    """In a process of its own, and in float32: what goes wrong here corrupts the heap."""
    done = subprocess.run(
        [sys.executable, "-c", ADDED_BY_TWO_THREADS],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_sogns_alone_needs_no_cross_terms():
    model, batch = TIED["language model"]()
    model = model.to(D)
    with collecting(model, ["sogns"]) as step:
        want = step(model, batch)
        got = step(compile_whole(model), batch)
    assert not got["sogns"].missing
    assert got["sogns"].parts_sq_norm == pytest.approx(want["sogns"].parts_sq_norm, rel=1e-9)


def test_microbatches():
    model, batches = cases.TiedLinears().to(D), [real(3, 6, 5), real(3, 6, 5)]
    with collecting(model) as step:
        compiled = compile_whole(model)
        for _ in range(2):
            assert_right(model, step(compiled, *batches), *batches)


def test_more_calls_than_before_are_named_and_fewer_are_right():

    class Some(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
            self.times = 1

        def forward(self, x):
            for _ in range(self.times):
                x = self.layer(x).tanh()
            return self.other(x).cumsum(1)

    model, batch = Some().to(D), real(3, 5, 4)
    with collecting(model) as step:
        compiled = compile_whole(model)
        for times, missing in ((2, True), (2, False), (3, True), (3, False), (1, False)):
            model.times = times
            names = ["layer.weight", "layer.bias"] if missing else []
            assert_right(model, step(compiled, batch), batch, missing=names)


def test_lengths_and_batches_that_vary_do_not_compile_anew():
    model = cases.Language(6).to(D)
    torch._dynamo.utils.counters.clear()
    with collecting(model) as step:
        compiled = compile_whole(model)
        for i in range(8):
            batch = ids(6, 12 + i % 5, 10 - i % 3)
            assert_right(model, step(compiled, batch), batch)
    assert graphs() <= 3


def test_examples_on_the_second_axis():
    class Columns(Chain):
        def forward(self, x):
            return self.layers[1](self.layers[0](x).tanh())

    def loss(call, batch):
        return cases.energy(lambda x: call(x.transpose(0, 1)).transpose(0, 1), batch)

    model, batch = Columns(nn.Linear(4, 4), nn.Linear(4, 4)).to(D), real(3, 5, 4)
    collector = PerExample(model, ["pepgns"], strict=True, batch_dim=1)
    collector.arm(True)
    loss(compile_whole(model), batch).backward()
    norms = collector.close()["pepgns"]
    collector.remove()
    want = gnsmon.per_example_sq_norms(model, loss, batch)
    expected = [float(want[name].sum()) / 9 for name, _ in model.named_parameters()]
    assert not norms.missing
    assert norms.parts_sq_norm == pytest.approx(expected, rel=1e-9)


class Branches(nn.Module):
    """Two layers with one weight of which the second's, or the first's, output is not used."""

    def __init__(self, used):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.two.weight, self.used = self.one.weight, used

    def forward(self, x):
        return (self.one(x), self.two(x.sin()))[self.used].cumsum(1)


@pytest.mark.parametrize("used", [0, 1])
def test_a_use_whose_output_is_not_used(used):
    model, batch = Branches(used).to(D), real(3, 5, 4)
    with collecting(model) as step:
        assert_right(model, step(compile_whole(model), batch), batch)


def test_a_layer_that_is_not_called():
    model, batch = Chain(nn.Linear(4, 4), nn.Linear(4, 4, bias=False)).to(D), real(3, 5, 4)
    model.layers = model.layers[:1].append(nn.Tanh())
    model.idle = nn.Linear(4, 4, bias=False)
    model.idle.weight = model.layers[0].weight
    with collecting(model) as step:
        compiled = compile_whole(model)
        for _ in range(2):
            assert_right(model, step(compiled, batch), batch)


def test_a_compiled_loss_calls_the_model():
    model, batch = cases.Language(6).to(D), ids(6, 3, 9)
    collector = PerExample(model, ["pepgns"], strict=True)
    loss = compile_whole(lambda x: cases.energy(model, x))
    for _ in range(2):
        model.zero_grad()
        collector.arm(True)
        loss(batch).backward()
        assert_right(model, collector.close(), batch)
    collector.remove()


class Aside(nn.Module):
    """A branch, with a layer before it, whose output is not used."""

    def __init__(self):
        super().__init__()
        self.before, self.one, self.two = (nn.Linear(4, 4) for _ in range(3))
        self.two.weight = self.one.weight

    def forward(self, x):
        self.one(self.before(x))
        return self.two(x).cumsum(1)


def test_a_link_brings_no_gradient_to_the_model():
    """Not even one of zeros, in place of none: an optimizer would decay the weight."""
    model, batch = Aside().to(D), real(3, 5, 4)
    with collecting(model) as step:
        for _ in range(2):
            norms = step(compile_whole(model), batch)
            unused = {"before.weight", "before.bias", "one.bias"}
            assert {n for n, p in model.named_parameters() if p.grad is None} == unused
            assert_right(model, norms, batch, missing=unused)


class Checkpointed(nn.Module):
    """A tied head outside of checkpointed blocks; these may share a weight."""

    def __init__(self, sharing):
        super().__init__()
        self.gpt, self.sharing = tiny_gpt(), sharing
        if sharing:
            self.gpt.blocks[1].up.weight = self.gpt.blocks[0].up.weight

    def forward(self, indices):
        x = self.gpt.wte(indices)
        for block in self.gpt.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.gpt.lm_head(self.gpt.norm(x))


@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_nothing_is_linked_inside_a_checkpoint(sharing, backend):
    """Compiled, its graph may change nothing outside."""
    model, batch = Checkpointed(sharing).to(D), ids(11, 3, 6)
    model.gpt.wpe.requires_grad_(False)
    torch._dynamo.utils.counters.clear()
    with collecting(model) as step:
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for _ in range(2):
            norms = step(compiled, batch)
            assert_right(model, norms, batch, missing=["gpt.blocks.0.up.weight"] * sharing)
            assert all("checkpoint" in why for why in norms["pepgns"].missing.values())
        assert graphs() == 1


@pytest.mark.parametrize("whole", [False, True])
def test_uses_in_different_graphs_are_named(whole):
    """Each layer compiled by itself, or one of them alone."""
    model, batch = tiny_gpt().to(D), ids(11, 3, 6)
    with collecting(model) as step:
        model.wte.compile(backend="aot_eager")
        step(model, batch)
        if whole:
            model.lm_head.compile(backend="aot_eager")
        for _ in range(2):
            norms = step(model, batch)
            assert_right(model, norms, batch, missing=["wte.weight"])


def test_a_graph_break_between_the_uses():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = (nn.Linear(4, 4) for _ in range(3))
            self.two.weight = self.one.weight

        def forward(self, x):
            x = self.one(x).tanh()
            torch._dynamo.graph_break()
            return self.two(self.three(x)).cumsum(1)

    model, batch = Broken().to(D), real(3, 5, 4)
    with collecting(model) as step:
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(3):
            assert_right(model, step(compiled, batch), batch, missing=["one.weight"])


def test_two_forwards_before_one_backward():
    model, batch = tiny_gpt().to(D), ids(11, 3, 6)
    with collecting(model) as step:
        compiled = compile_whole(model)
        step(compiled, batch)
        skipped = step(lambda x: compiled(x) + compiled(x).sin(), batch)
        assert isinstance(skipped, Skipped)
        assert skipped.reason == "several passes"
        assert_right(model, step(compiled, batch), batch)


class Doubled(nn.Linear):
    """A layer of the user's, with a rule of the user's."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_the_rule_of_a_user_is_not_differentiated(monkeypatch):
    """It may detach what it is given, and no proof would tell."""
    monkeypatch.setattr(rules, "_TABLE", dict(rules._TABLE))
    gnsmon.rule(Doubled)(lambda module, x, dy: {"weight": Outer(2 * dy.detach(), x)})
    model, batch = Chain(Doubled(4, 4, bias=False), Doubled(4, 4, bias=False)), real(3, 5, 4)
    model.layers.append(nn.Linear(4, 4))
    model = model.to(D)
    with collecting(model) as step:
        norms = step(compile_whole(model), batch)
        assert_right(model, norms, batch, missing=["layers.0.weight"])


def test_gradients_are_those_without_a_monitor():
    batch, found = ids(11, 3, 6), []
    for watched in (False, True):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = tiny_gpt()
        with collecting(model) as step:
            if watched:
                step(compile_whole(model), batch)
                step(compile_whole(model), batch)
            else:
                cases.energy(compile_whole(model), batch).backward()
        found.append([p.grad for p in model.parameters()])
    for bare, tapped in zip(*found, strict=True):
        assert torch.equal(bare, tapped)


def test_nothing_is_kept_after_the_forward():
    model, batch = tiny_gpt().to(D), ids(11, 3, 6)
    collector = PerExample(model, ["pepgns"], strict=True)
    compiled = compile_whole(model)
    for _ in range(2):
        collector.arm(True)
        loss = cases.energy(compiled, batch)
        assert not collector.taps.links
        loss.backward()
        collector.close()
    collector.remove()


def test_where_the_compiler_does_not_say_where_it_is(monkeypatch):
    """What tells a checkpoint is private to torch: without it parameters are left out."""
    assert not links.tracer(nn.Linear(1, 1))()  # there is no compiler to ask
    monkeypatch.setattr(links, "tracer", lambda model: lambda: False)
    model, batch = cases.Language(6).to(D), ids(6, 3, 9)
    with collecting(model) as step:
        norms = step(compile_whole(model), batch)
        assert_right(model, norms, batch, missing=["tokens.weight"])


def forms(positions, seed):
    """One parameter [4, 3] used by three kinds of layer."""
    torch.manual_seed(seed)
    return [
        Outer(real(2, positions, 4), real(2, positions, 3)),
        Outer(real(2, 2, positions, 2), real(2, 2, positions, 3)),
        Rows(ids(4, 2, positions), real(2, positions, 3), (4, 3)),
        Dense(real(2, 4, 3)),
    ]


@pytest.mark.parametrize("positions", [(1, 1), (2, 3), (9, 11)])
def test_inner_products_of_all_forms(positions):
    for a in forms(positions[0], 0):
        for b in forms(positions[1], 1):
            want = (a.dense() * b.dense()).flatten(1).sum(1)
            torch.testing.assert_close(inner(a, b), want, rtol=1e-12, atol=1e-12)
