"""Layers whose backward is taken over: the same gradients, the same norms, no product repeated."""

from __future__ import annotations

import tempfile
import types
from collections import Counter
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import LAYERS, by_name, energy
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import flop_registry

import gnsmon
from gnsmon.norms import plans
from gnsmon.norms.convolved import Convolved
from gnsmon.norms.forms import Outer
from gnsmon.norms.oracles import per_example_sq_norms
from gnsmon.norms.rules import find_backward

CLOSE = {"rtol": 1e-10, "atol": 1e-13}
TAKEN = [c for c in LAYERS if any(map(find_backward, c.make()[0].modules()))]
taken = pytest.mark.parametrize("case", TAKEN, ids=lambda case: case.name)


def attach(model: nn.Module, engine: str = "fused", **settings):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    settings = {"every": 1, "strict": True, "run_dir": tempfile.mkdtemp(), **settings}
    return gnsmon.attach(model, optimizer, engine=engine, **settings), optimizer


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def taken_over(loss: Tensor) -> int:
    """How many nodes of a graph are ours."""
    seen: set[Node] = set()
    stack = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [following for following, _ in node.next_functions]
    return sum(type(node).__name__ == "FusedTapBackward" for node in seen)


def passed(model, loss_of, batch):
    """How many nodes of a backward are ours, and the gradients that it gives."""
    model.zero_grad()
    loss = loss_of(model, batch)
    nodes = taken_over(loss)
    loss.backward()
    return nodes, gradients(model)


def measured(model, loss_of, batch, engine: str = "fused"):
    """The same of a step, with its reading."""
    gns, optimizer = attach(model, engine)
    with gns:
        nodes, found = passed(model, loss_of, batch)
        optimizer.step()
        return nodes, found, gns.reading


@taken
def test_gradients_are_those_of_autograd_and_norms_those_of_brute_force(case):
    model, batch = case.make()
    want = per_example_sq_norms(model, case.loss, batch)
    case.loss(model, batch).backward()
    bare = gradients(model)
    nodes, found, reading = measured(model, case.loss, batch)
    odd = ("circular", "reflect", "replicate", "same", "valid")
    usual = any(word in case.name for word in odd) or "frozen" in case.name
    assert nodes or usual
    assert found.keys() == bare.keys()
    for name in bare:
        torch.testing.assert_close(found[name], bare[name], **CLOSE)
    total = float(sum(norms.sum() for norms in want.values())) / len(next(iter(want.values()))) ** 2
    assert reading.raw.parts_sq_norm == pytest.approx(total, rel=1e-9)
    assert reading.coverage == 1.0


@pytest.mark.parametrize("name", ["linear 3d, direct", "conv2d"])
def test_the_inputs_gradient(name):
    case = by_name(name)
    model, batch = case.make()
    given = []
    for engine in ("hooks", "fused"):
        x = batch.clone().requires_grad_()
        measured(model, case.loss, x, engine)
        given.append(x.grad)
    torch.testing.assert_close(*given, **CLOSE)


@pytest.mark.parametrize("kind", ["one group", "groups", "convolved"])
def test_all_plans_agree(kind):
    torch.manual_seed(0)
    if kind != "convolved":
        sizes = (3, 5) if kind == "one group" else (3, 2, 5)
        form = Outer(torch.randn(*sizes, 4).double(), torch.randn(*sizes, 7).double())
    else:
        x, dy = torch.randn(3, 4, 9, 8).double(), torch.randn(3, 6, 4, 6).double()
        form = Convolved(x, dy, (6, 2, 3, 2), (2, 1), (1, 0), (2, 2), groups=2)
    want = form.dense().flatten(1).square().sum(1)
    tried = 0
    for plan in form.plans.values():
        if plan.work(form) == float("inf"):
            continue
        tried += 1
        torch.testing.assert_close(plan.sq_norms(form), want, **CLOSE)
        torch.testing.assert_close(form.sum_sq_norms(), want.sum(), **CLOSE)
        if plan.fused is not None:
            total, norms = plan.fused(form)
            torch.testing.assert_close(norms, want, **CLOSE)
            torch.testing.assert_close(total, form.sum(), **CLOSE)
    assert tried >= 2


class Flops(TorchDispatchMode):
    """Counts floating-point operations; not by module, which would be a hook before ours."""

    total = 0  # of products of matrices
    vectors = 0  # of products with vectors, which torch leaves out

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op._overloadpacket is torch.ops.aten.convolution_backward:  # torch's forgets the groups
            dy, weight, mask = args[0], args[2], args[10]
            self.total += 2 * dy.numel() * weight[0].numel() * (mask[0] + mask[1])
        elif op._overloadpacket is torch.ops.aten.mv:
            self.vectors += 2 * args[0].numel()
        elif op._overloadpacket in flop_registry:
            self.total += flop_registry[op._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def flops(model, batch, optimizer) -> Flops:
    model.zero_grad()
    with Flops() as counter:
        energy(model, batch).backward()
        optimizer.step()
    return counter


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)), (4, 64, 64)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 3)), (4, 8, 16, 16)),
}


@pytest.mark.parametrize(("method", "by_hooks"), [("pepgns", 1.15), ("sogns", 1.01)])
@pytest.mark.parametrize("name", MODELS)
def test_no_product_is_repeated(name, method, by_hooks):
    """Nor is there one for the proof, of a gradient that is known."""
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model, batch = make(), torch.randn(shape)
    bare = flops(model, batch, torch.optim.SGD(model.parameters(), lr=0.0)).total
    counts = {}
    for engine in ("fused", "hooks"):
        gns, optimizer = attach(model, engine, method=method)
        with gns:
            counts[engine] = flops(model, batch, optimizer)
    assert counts["fused"].total < (1.02 if method == "pepgns" else 1.001) * bare
    assert counts["fused"].total + counts["fused"].vectors < 1.004 * bare
    assert counts["hooks"].total + counts["hooks"].vectors > by_hooks * bare


class Calls(TorchDispatchMode):
    """Counts the calls of norm layers' operators, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op._overloadpacket._qualified_op_name.removeprefix("aten::native_")
        self.counts[name] += "_norm" in name and "vector" not in name
        return op(*args, **(kwargs or {}))


CALLS = {
    "layer": (lambda: nn.LayerNorm(8), {"layer_norm": 1, "layer_norm_backward": 5}),
    "group": (lambda: nn.GroupNorm(5, 5), {"group_norm": 1, "group_norm_backward": 1}),
    "no bias": (
        lambda: nn.GroupNorm(5, 5, bias=False),
        {"group_norm": 1, "group_norm_backward": 1},
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_normalised_again(name):
    """One call a layer, or one more for each example of a layer norm, gives all gradients."""
    torch.manual_seed(0)
    make, expected = CALLS[name]
    model, x = nn.Sequential(make(), nn.Tanh()), torch.randn(4, 5, 8)
    gns, optimizer = attach(model)
    with gns:
        with Calls() as calls:
            energy(model, x).backward()
        optimizer.step()
        assert gns.reading.coverage == 1.0
    assert +calls.counts == expected


@pytest.mark.parametrize(
    ("norm", "shape", "taken"),
    [
        (nn.LayerNorm(256), (8, 128, 256), True),
        (nn.LayerNorm(256), (64, 16, 256), False),  # too many small examples
        (nn.LayerNorm(256), (4, 128, 256), False),
        (nn.GroupNorm(4, 16), (64, 16, 16, 16), True),
        (nn.GroupNorm(4, 16), (32, 16, 16, 16), False),
        (nn.RMSNorm(256), (64, 16, 256), True),
        (nn.RMSNorm(256), (63, 16, 256), False),
    ],
)
def test_large_norm_layers_are_taken_over(norm, shape, taken):
    nodes, _, reading = measured(nn.Sequential(norm), energy, torch.randn(shape), "auto")
    assert nodes == taken
    assert reading.coverage == 1.0


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool):
        super().__init__()
        self.reentrant, self.up, self.down = reentrant, nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        inside = lambda x: self.down(F.gelu(self.up(x)))  # noqa: E731
        return x + checkpoint(inside, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant):
    torch.manual_seed(0)
    model = Checkpointed(reentrant).double()
    x = torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True)
    energy(model, x).backward()
    bare = gradients(model)
    model.reentrant = False  # which wants an input with a gradient
    want = sum(n.sum() for n in per_example_sq_norms(model, energy, x.detach()).values()) / 16
    model.reentrant = reentrant
    gns, optimizer = attach(model)
    with gns:
        for _ in range(3):  # from the second step on it is known what pays
            model.zero_grad()
            energy(model, x).backward()
            for name, grad in gradients(model).items():
                torch.testing.assert_close(grad, bare[name], **CLOSE)
            optimizer.step()
            assert gns.reading.raw.parts_sq_norm == pytest.approx(float(want), rel=1e-9)


def test_switching_between_forward_and_backward_of_a_checkpoint():
    """What a checkpoint saves may not depend on whether the step is measured."""
    torch.manual_seed(0)
    model, x = Checkpointed(False), torch.randn(4, 5, 6, requires_grad=True)
    gns, optimizer = attach(model, every=2)
    with gns:
        for _ in range(5):
            loss = energy(model, x)
            gns._sources[0][0].arm(False)
            loss.backward()
            optimizer.step()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 8),
        nn.LayerNorm(6),
        nn.LayerNorm(6, bias=False),
        nn.GroupNorm(2, 4),
        nn.RMSNorm(6),
    ],
)
def test_gradients_of_gradients(layer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), layer, nn.Tanh(), nn.LazyLinear(3)).double()
    model(torch.randn(4, 4, 6, dtype=torch.float64))
    x = torch.randn(4, 4, 6, dtype=torch.float64)

    def penalised() -> dict[str, Tensor]:
        model.zero_grad()
        parameters = list(model.parameters())
        first = torch.autograd.grad(energy(model, x), parameters, create_graph=True)
        (energy(model, x) + sum(g.square().sum() for g in first)).backward()
        return gradients(model)

    bare = penalised()
    gns, _ = attach(model, strict=False)
    with gns:
        for name, grad in penalised().items():
            torch.testing.assert_close(grad, bare[name], **CLOSE)


def test_an_input_that_changes_after_autocast_copied_it():
    torch.manual_seed(0)

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x + 1
            y = self.layer(x)
            x += y  # allowed, for autocast saved a copy in bfloat16
            return x

    model, x = Residual(), torch.randn(4, 5, 8)

    def gradient() -> Tensor:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = energy(model, x)
        loss.backward()
        return model.layer.weight.grad.clone()

    bare = gradient()
    gns, optimizer = attach(model)
    with gns:
        torch.testing.assert_close(gradient(), bare, rtol=2e-2, atol=2e-2)
        optimizer.step()
        assert gns.reading.coverage == 1.0


def doubled(module, args, output):
    return 2 * output


@pytest.mark.parametrize("change", ["hook", "forward", "parametrized", "frozen"])
def test_a_layer_that_computes_something_else_keeps_its_own_backward(change):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6)), torch.randn(4, 5, 6)
    if change == "parametrized":
        nn.utils.parametrizations.weight_norm(model[0])
    if change == "frozen":
        model[0].weight.requires_grad_(False)
    if change == "forward":
        model[0].forward = lambda x: 3 * F.linear(x, model[0].weight, model[0].bias)

    def gradient() -> dict[str, Tensor]:
        model.zero_grad()
        loss = energy(model, x)
        assert not taken_over(loss)
        loss.backward()
        return gradients(model)

    with pytest.warns(RuntimeWarning) if change in ("parametrized",) else nullcontext():
        gns, optimizer = attach(model, strict=False)
        if change == "hook":
            model[0].register_forward_hook(doubled, prepend=True)
        with gns:
            monitored = gradient()
            optimizer.step() if change == "parametrized" else None
    bare = gradient()
    assert monitored.keys() == bare.keys()
    assert all(torch.equal(monitored[name], bare[name]) for name in bare)


def test_a_fault_leaves_the_gradients_alone(monkeypatch):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6)), torch.randn(4, 5, 6)
    energy(model, x).backward()
    bare = gradients(model)

    def broken(form):
        raise RuntimeError("no memory")

    plan = Outer.plans["direct"]._replace(fused=broken)
    monkeypatch.setattr(Outer, "plans", {"direct": plan})
    gns, optimizer = attach(model, strict=False)
    with gns:
        model.zero_grad()
        energy(model, x).backward()
        torch.testing.assert_close(gradients(model), bare)
        with pytest.warns(RuntimeWarning, match="no memory"):
            optimizer.step()


@pytest.mark.parametrize("engine", ["auto", "hooks"])
def test_small_layers_and_hooks_leave_gradients_bitwise_as_they_are(engine):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(8, 32, 64)
    energy(model, x).backward()
    bare = gradients(model)
    nodes, found, _ = measured(model, energy, x, engine)
    assert nodes == 0
    assert all(torch.equal(found[name], bare[name]) for name in bare)


@pytest.fixture
def untimed(monkeypatch):
    """No plan is known; the clock says what a test wants."""
    monkeypatch.setattr(plans, "_timed", {})
    seconds: dict[str, float] = {}

    def fake(run) -> float:
        fn = getattr(run, "func", run)
        return next((t for name, t in seconds.items() if name in known(fn)), 1.0)

    def known(fn) -> list[str]:
        pairs = Outer.plans.items()
        return [name for name, plan in pairs if fn in (plan.sq_norms, plan.fused)] or ["sum"]

    monkeypatch.setattr(plans, "_seconds", fake)
    return seconds


def big() -> Outer:
    return Outer(torch.randn(8, 64, 256), torch.randn(8, 64, 256))


@pytest.mark.parametrize(("gram", "wins"), [(0.3, "direct"), (0.1, "gram")])
def test_the_fastest_plan_is_taken_less_what_the_sum_costs_anyway(untimed, gram, wins):
    untimed.update(sum=1.0, direct=1.2, gram=gram)
    form = big()
    plans.tune(form)
    assert plans.chosen(form, fusable=True) is form.plans[wins]
    assert plans.chosen(Outer(form.left[:3], form.right[:3]), fusable=True) is form.plans[wins]


def test_a_clock_that_was_disturbed_once_misleads_nobody(untimed, monkeypatch):
    untimed.update(sum=1.0, direct=2.0, gram=0.5)
    fair, disturbed = plans._seconds, [9.0]
    sums = lambda run: getattr(run, "__name__", "") == "sum"  # noqa: E731
    monkeypatch.setattr(
        plans,
        "_seconds",
        lambda run: fair(run) + (disturbed.pop() if disturbed and sums(run) else 0),
    )
    form = big()
    plans.tune(form)
    assert not disturbed
    assert plans.chosen(form, fusable=True) is form.plans["gram"]


def test_a_plan_that_is_far_behind_is_timed_once(untimed, monkeypatch):
    untimed.update(sum=1.0, direct=1.2, gram=9.0)
    runs, clock = [], plans._seconds
    monkeypatch.setattr(plans, "_seconds", lambda run: runs.append(clock(run)) or runs[-1])
    plans.tune(big())
    assert (runs.count(1.0), runs.count(1.2), runs.count(9.0)) == (3, 3, 1)


def test_nothing_is_timed_where_runs_must_not_differ(untimed):
    untimed.update(sum=1.0, direct=9.0, gram=0.1)
    torch.use_deterministic_algorithms(True)
    try:
        plans.tune(big())
    finally:
        torch.use_deterministic_algorithms(False)
    assert not plans._timed


def test_a_layer_is_timed_once(untimed, monkeypatch):
    times = []
    monkeypatch.setattr(plans, "_seconds", lambda run: times.append(run) or 1.0)
    model = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256))
    gns, optimizer = attach(model, "auto")
    with gns:
        for batch in (8, 8, 6):
            model.zero_grad()
            x = torch.randn(batch, 64, 256)
            energy(model, x).backward()
            optimizer.step()
    assert len(times) == 3 * (1 + len([p for p in Outer.plans if p != "kernel"]))


class Around(nn.Module):
    """A function of layers and an input."""

    def __init__(self, call, *layers: nn.Module):
        super().__init__()
        self.call, self.layers = call, nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, *self.layers)


class Double(nn.Module):
    def forward(self, t: Tensor) -> Tensor:
        return 2 * t


def circular(module: nn.Module) -> None:
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)

    module._conv_forward = types.MethodType(forward, module)


def dilated(x: Tensor, layer: nn.Module) -> Tensor:
    outputs = []
    for d in (1, 2):
        layer.dilation = layer.padding = (d, d)
        outputs.append(d * layer(x))
    return torch.stack(outputs, 1).tanh()


def once_dilated(x: Tensor, layer: nn.Module) -> Tensor:
    usual, layer.dilation = layer.dilation, (2, 2)
    y, layer.dilation = layer(x), usual
    return y


def changed(layer: nn.Module, change) -> nn.Module:
    change(layer)
    return nn.Sequential(layer)


# What a layer may be made to do that is known neither from its type nor from its parameters.
ODD = {
    "a vector of as many outputs as examples": (
        lambda: Around(lambda x, a, b: a(x) + b(x.mean(0))[:, None], *two(3, 4)),
        (4, 6),
    ),
    "an image of as many channels as examples": (
        lambda: Around(
            lambda x, a, b: a(x) + b(x[0])[:, None], nn.Conv2d(2, 1, 3), nn.Conv2d(2, 4, 3)
        ),
        (4, 2, 5, 5),
    ),
    "output_size": (
        lambda: Around(
            lambda x, a: a(x, output_size=[17, 16]), nn.ConvTranspose2d(3, 5, 3, stride=3)
        ),
        (4, 3, 5, 5),
    ),
    "pruned bias": (
        lambda: changed(nn.Linear(6, 6), lambda a: prune.l1_unstructured(a, "bias", amount=0.5)),
        (4, 5, 6),
    ),
    "parametrized bias": (
        lambda: changed(
            nn.Linear(6, 6), lambda a: parametrize.register_parametrization(a, "bias", Double())
        ),
        (4, 5, 6),
    ),
    "a method of its own": (lambda: changed(nn.Conv2d(2, 3, 3), circular), (4, 2, 5, 5)),
    "settings of each call": (lambda: Around(dilated, nn.Conv2d(2, 3, 3)), (4, 2, 7, 7)),
    "settings of a call": (lambda: Around(once_dilated, nn.Conv2d(2, 3, 3)), (4, 2, 7, 7)),
}


def two(*outputs: int) -> list[nn.Module]:
    return [nn.Linear(6, n) for n in outputs]


@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("ignore:gnsmon")
def test_an_odd_layer_trains_as_ever(name):
    make, shape = ODD[name]
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(make().double())
    model, bare = models
    batch = torch.randn(shape, dtype=torch.float64)
    gns, optimizer = attach(model, strict=False)
    with gns:
        for _ in range(3):
            given = []
            for each in (model, bare):
                each.zero_grad()
                x = batch.clone().requires_grad_()
                energy(each, x).backward()
                given.append({**gradients(each), "input": x.grad})
            torch.testing.assert_close(*given, **CLOSE)
            optimizer.step()


def test_settings_that_change_after_the_call_are_those_of_the_call():
    torch.manual_seed(0)
    model = Around(once_dilated, nn.Conv2d(2, 3, 3)).double()
    nodes, _, reading = measured(model, energy, torch.randn(4, 2, 7, 7, dtype=torch.float64))
    assert nodes == 1
    assert reading.coverage == 1.0
    assert model.layers[0].dilation == (1, 1)


def test_a_forward_set_on_the_type_keeps_its_own_backward(monkeypatch):
    half = lambda layer, x: F.linear(x, 0.5 * layer.weight, layer.bias)  # noqa: E731
    monkeypatch.setattr(nn.Linear, "forward", half)
    model, x = nn.Sequential(nn.Linear(6, 6)), torch.randn(4, 5, 6)
    energy(model, x).backward()
    bare = gradients(model)
    gns, _ = attach(model, strict=False)
    with gns:
        model.zero_grad()
        energy(model, x).backward()
    torch.testing.assert_close(gradients(model), bare)


def test_a_weight_that_changes_where_backward_does_not_read_it():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6)), torch.randn(4, 5, 6)
    energy(model, x).backward()
    bare = gradients(model)
    gns, optimizer = attach(model)
    with gns:
        model.zero_grad()
        loss = energy(model, x)
        with torch.no_grad():
            model[0].weight.mul_(0.5)
        loss.backward()
        torch.testing.assert_close(gradients(model), bare)
        optimizer.step()
        assert gns.reading.coverage == 1.0


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d])
def test_a_weight_whose_data_is_replaced_before_the_backward(kind):
    layer = kind(4, 4) if kind is nn.Linear else kind(4, 4, 1)
    x = torch.randn(8, 4) if kind is nn.Linear else torch.randn(8, 4, 3)
    before, found = layer.weight.data, []
    for engine in (None, "fused"):
        gns = None if engine is None else attach(layer, engine)[0]
        layer.weight.data, x.grad = before, None
        loss = layer(x.requires_grad_()).square().sum()
        assert taken_over(loss) == (engine is not None)
        layer.weight.data = torch.zeros_like(before)
        loss.backward()
        found.append(x.grad)
        if gns is not None:
            gns.close()
    assert torch.allclose(*found)


def test_a_clock_that_fails_leaves_training_alone(untimed, monkeypatch):
    def fail(run):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(plans, "_seconds", fail)
    model = nn.Sequential(nn.Linear(256, 256))
    gns, optimizer = attach(model, "auto", strict=False)
    with gns:
        for step in range(2):
            model.zero_grad()
            energy(model, torch.randn(8, 64, 256)).backward()
            assert model[0].weight.grad is not None
            with pytest.warns(RuntimeWarning, match="no memory") if step == 0 else nullcontext():
                optimizer.step()
        assert gns.reading.coverage == 1.0


def test_gradients_of_several_outputs_at_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.randn(4, 5, 6, dtype=torch.float64)

    def jacobian() -> tuple[Tensor, ...]:
        outputs, each = model(x).sum((0, 1)), torch.eye(3).double()
        return torch.autograd.grad(outputs, [*model.parameters()], each, is_grads_batched=True)

    bare = jacobian()
    gns, _ = attach(model, strict=False)
    with gns:
        torch.testing.assert_close(jacobian(), bare, **CLOSE)


def save_all(context, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE


class Attention(nn.Module):
    """All that is computed in it is kept for when it is computed again."""

    def __init__(self):
        super().__init__()
        self.up, self.down = (nn.Linear(16, 16, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        keep = partial(create_selective_checkpoint_contexts, save_all)
        return checkpoint(self.inside, x, use_reentrant=False, context_fn=keep)

    def inside(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(((h @ h.mT).softmax(-1) @ h).tanh())


def test_the_clock_is_no_part_of_what_a_selective_checkpoint_keeps(monkeypatch):
    monkeypatch.setattr(plans, "_timed", {})
    monkeypatch.setattr(plans, "SMALL", 0)
    torch.manual_seed(0)
    model, x = Attention().double(), torch.randn(4, 20, 16, dtype=torch.float64)
    energy(model, x).backward()
    bare = gradients(model)
    _, found, reading = measured(model, energy, x, "auto")
    assert plans._timed
    torch.testing.assert_close(found, bare, **CLOSE)
    assert reading.coverage == 1.0


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.sent = nn.Linear(6, 6), 4

    def forward(self, x: Tensor) -> Tensor:
        some = checkpoint(self.inside, x[: self.sent], use_reentrant=False)
        return torch.cat([some, x[self.sent :]])

    def inside(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh()


@pytest.mark.filterwarnings("ignore:gnsmon")
def test_a_checkpoint_of_rows_that_were_not_understood_at_first():
    torch.manual_seed(0)
    model, x = Expert(), torch.randn(4, 6, requires_grad=True)
    gns, _ = attach(model, strict=False)
    with gns:
        model.sent = 3
        energy(model, x).backward()
        model.sent = 4  # which may be all examples or four of their rows, once more
        (energy(model, x) + energy(model, 2 * x)).backward()


def test_a_sparse_input():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 3)), torch.randn(4, 6)
    energy(model, x).backward()
    bare = gradients(model)
    gns, _ = attach(model, strict=False)
    with gns:
        model.zero_grad()
        energy(model, x.to_sparse()).backward()
    torch.testing.assert_close(gradients(model), bare)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore:The .grad attribute")
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_sizes_that_are_symbols_of_a_compiled_graph(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3) if kind == "conv" else nn.Linear(6, 3)).double()
    shapes = [(4, 2, 8, 8), (6, 2, 9, 7)] if kind == "conv" else [(4, 5, 6), (3, 7, 6)]
    bare, (gns, optimizer) = [], attach(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with gns:
        for shape in shapes:
            x = torch.randn(shape, dtype=torch.float64)
            model.zero_grad()
            energy(compiled, x).backward()
            found = gradients(model)
            optimizer.step()
            assert gns.reading.coverage == 1.0
            bare.append((x, found))
    for x, found in bare:
        model.zero_grad()
        energy(model, x).backward()
        torch.testing.assert_close(found, gradients(model), **CLOSE)


class Halved(TorchFunctionMode):
    """Layers compute with half their weights."""

    def __torch_function__(self, fn, types, args=(), kwargs=None):
        if fn in (F.linear, F.conv1d):
            args = (args[0], 0.5 * args[1], *args[2:])
        return fn(*args, **(kwargs or {}))


@pytest.mark.parametrize("how", ["patched", "mode"])
def test_functions_that_were_replaced(how, monkeypatch):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Conv1d(5, 6, 2)).double(), torch.randn(4, 5, 6)

    def found() -> dict[str, Tensor]:
        model.zero_grad()
        with Halved() if how == "mode" else nullcontext():
            energy(model, x.double()).backward()
        return gradients(model)

    if how == "patched":
        for name in ("linear", "conv1d"):
            usual = getattr(F, name)
            halved = lambda x, w, *others, fn=usual: fn(x, 0.5 * w, *others)  # noqa: E731
            monkeypatch.setattr(F, name, halved)
    bare = found()
    gns, _ = attach(model, strict=False)
    with gns:
        torch.testing.assert_close(found(), bare, **CLOSE)


def test_a_default_device_is_no_other_function():
    model, x = nn.Sequential(nn.Linear(6, 6)), torch.randn(4, 5, 6)
    gns, _ = attach(model)
    with gns, torch.device("cpu"):
        assert taken_over(energy(model, x)) == 1


NORMS = {
    "layer norm": (lambda: nn.LayerNorm(6), (4, 5, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 6), (4, 6, 5)),
    "rms norm": (lambda: nn.RMSNorm(6), (4, 5, 6)),
    "rms norm of two axes": (lambda: nn.RMSNorm((5, 6), eps=1e-3), (4, 3, 5, 6)),
}
norms = pytest.mark.parametrize("kind", NORMS)


def norm_layer(kind: str, batch: int = 4) -> tuple[nn.Module, Tensor]:
    make, (_, *sizes) = NORMS[kind]
    torch.manual_seed(0)
    layer = make().double()
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer, torch.randn(batch, *sizes, dtype=torch.float64)


@norms
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("after", [lambda y: y.sum(-1), lambda y: y.mT.contiguous()])
def test_a_norm_layers_gradient_may_come_in_any_strides(kind, batch, after):
    """As of a sum over positions, which is expanded: its operators take it for contiguous."""
    layer, x = norm_layer(kind, batch)

    def loss(layer: nn.Module, x: Tensor) -> Tensor:
        return after(layer(x)).pow(3).flatten(1).sum(1).mean()

    given = []
    for engine in ("hooks", "fused"):
        into = x.clone().requires_grad_()
        if batch > 1:
            nodes, found, reading = measured(layer, loss, into, engine)
        else:  # there is no reading of one example, but its backward is taken over
            gns, _ = attach(layer, engine, strict=False)
            with gns:
                (nodes, found), reading = passed(layer, loss, into), None
        given.append((nodes, into.grad, found, reading and reading.raw.parts_sq_norm))
    assert [nodes for nodes, *_ in given] == [0, 1]
    torch.testing.assert_close(given[1][1], given[0][1], **CLOSE)
    torch.testing.assert_close(given[1][2], given[0][2], **CLOSE)
    assert batch == 1 or given[1][3] == pytest.approx(given[0][3], rel=1e-10)


@norms
def test_a_norm_layer_is_taken_over_call_by_call(kind):
    """An input of the same shape may have other strides, which it is then left alone with."""
    layer, x = norm_layer(kind)
    gns, optimizer = attach(layer)
    nodes = []
    with gns:
        for given in (x, x.mT.contiguous().mT, x):
            layer.zero_grad()
            loss = energy(layer, given)
            nodes.append(taken_over(loss))
            loss.backward()
            found = gradients(layer)
            optimizer.step()
    layer.zero_grad()
    energy(layer, x).backward()
    torch.testing.assert_close(found, gradients(layer), **CLOSE)
    assert nodes == [1, 0, 1]


def test_a_group_norm_without_a_bias_has_each_examples_norm():
    layer = nn.Sequential(nn.GroupNorm(2, 6, bias=False)).double()
    gns, optimizer = attach(layer, diagnostics=True, norm_bound=1.0)
    with gns:
        energy(layer, torch.randn(4, 6, 5, dtype=torch.float64)).backward()
        optimizer.step()
        assert gns.reading.coverage == 1.0


@norms
def test_what_a_norm_layer_has_saved_is_not_asked_for_where_hooks_have_it(kind):
    """Those of some libraries may be asked but once."""
    layer, x = norm_layer(kind)
    asked: list[Tensor] = []

    def unpack(t: Tensor) -> Tensor:
        asked.append(t)
        return t

    gns, optimizer = attach(layer)
    with gns:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            loss = energy(layer, x)
        assert not asked
        loss.backward()
        optimizer.step()
        assert gns.reading.coverage == 1.0


@norms
def test_a_norm_function_that_was_replaced_is_not_taken_over(kind, monkeypatch):
    layer, x = norm_layer(kind)
    name = "_".join(kind.split()[:2])
    usual = getattr(F, name)
    monkeypatch.setattr(F, name, lambda x, *args, **kwargs: usual(2 * x, *args, **kwargs))
    energy(layer, x).backward()
    bare = gradients(layer)
    nodes, found, _ = measured(layer, energy, x)
    assert nodes == 0
    torch.testing.assert_close(found, bare, **CLOSE)


@norms
def test_a_norm_layers_settings_may_change_before_its_backward(kind):
    layer, x = norm_layer(kind)

    def second_order(layer: nn.Module, x: Tensor) -> Tensor:
        into, eps = x.clone().requires_grad_(), layer.eps
        layer.eps = 0.1
        loss = energy(layer, into)
        layer.eps = eps
        grad = torch.autograd.grad(loss, into, create_graph=True)[0]
        return grad.square().flatten(1).sum(1).mean()

    second_order(layer, x).backward()
    bare = gradients(layer)
    gns, _ = attach(layer, strict=False)
    with gns:
        layer.zero_grad()
        second_order(layer, x).backward()
        torch.testing.assert_close(gradients(layer), bare, **CLOSE)


@pytest.mark.parametrize("engine", ["hooks", "fused"])
def test_a_hook_that_changes_a_vectors_gradient_in_place_is_noticed(engine):
    """What the layer gives to autograd is not what it is compared with."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)).double()
    for p in model.parameters():
        p.register_hook(lambda grad: grad.mul_(2))
    gns, optimizer = attach(model, engine, strict=False)
    with gns, pytest.warns(RuntimeWarning, match="not measured"):
        energy(model, torch.randn(4, 5, 6, dtype=torch.float64)).backward()
        optimizer.step()
    assert gns.coverage().covered == []


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def test_a_scalar_parameter_whose_gradient_is_clipped_is_measured():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), Scaled(), nn.Linear(6, 3)).double()
    gns, optimizer = attach(model)
    with gns:
        energy(model, torch.randn(4, 6, dtype=torch.float64)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        assert gns.coverage().missing == {}
