"""Microbatches as the small batches: brute force in every loop, laws, and what is refused."""

import copy
import gc
import io
import json
from functools import partial

import cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_monitor import (
    VOCABULARY,
    B,
    Checkpointed,
    Dropping,
    Functional,
    Positions,
    Reentrant,
    Repeated,
    T,
    Tiny,
    WithCustom,
    loss_of,
    make,
    split,
    watch,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from gnsmon.collectors.microbatch import METHODS, every_part, first_part
from gnsmon.collectors.proof import Directions
from gnsmon.estimators import NormPair, moments

D = torch.float64
SIZES = [3, 1, 2]
BOTH = ["microbatch", "subbatch"]


def gradients(model, loss, parts):
    """The gradient of each part's loss, [parts, numbers], by itself."""
    model = copy.deepcopy(model)
    model.reentrant = False  # which torch.autograd.grad cannot take
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for part in parts:
        found = torch.autograd.grad(loss(model, part), parameters, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


def assert_norms(gns, u, weights, *, coverage=1.0, rtol=1e-10):
    weights = np.asarray(weights, dtype=float)
    weights = weights / weights.sum()
    squares = u.square().sum(1).numpy()
    expected = {
        "microbatch": (squares.sum(), np.square(weights).sum()),
        "subbatch": (squares[0] / weights[0], weights[0]),
    }
    for method in gns.config.method:
        raw = gns.readings[method].raw
        assert raw.big_sq_norm == pytest.approx(float(u.sum(0).square().sum()), rel=rtol)
        assert raw.parts_sq_norm == pytest.approx(expected[method][0], rel=rtol)
        assert raw.sum_sq_weights == pytest.approx(expected[method][1], rel=1e-12)
        assert gns.readings[method].coverage == coverage


def share(model, micro, loss=loss_of):
    return loss(model, micro) * len(micro[0]) / B


def assert_right(gns, model, batch, sizes=SIZES, scale=1.0, **options):
    u = gradients(model, share, split(batch, sizes))
    assert_norms(gns, scale * u, sizes, **options)
    for reading in gns.readings.values():
        assert reading.step == gns.step - 1
        assert reading.examples == sum(sizes)


def accumulate(model, batch, sizes=SIZES, scale=1.0):
    for micro in split(batch, sizes):
        (scale * share(model, micro)).backward()


def accumulation(model, optimizer, batch):
    optimizer.zero_grad()
    accumulate(model, batch)
    optimizer.step()


def clipped(model, optimizer, batch):
    optimizer.zero_grad()
    accumulate(model, batch)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()


def closure(model, optimizer, batch):
    def evaluate():
        optimizer.zero_grad()
        accumulate(model, batch)
        return 0.0

    optimizer.step(evaluate)


def discarded(model, optimizer, batch):
    accumulate(model, batch, [4, 2])
    optimizer.zero_grad()
    accumulate(model, batch)
    optimizer.step()


def discarded_in_place(model, optimizer, batch):
    accumulate(model, batch, [4, 2])
    optimizer.zero_grad(set_to_none=False)
    accumulate(model, batch)
    optimizer.step()


def zero_after_forward(model, optimizer, batch):
    loss_of(model, batch).backward()
    first, *others = split(batch, SIZES)
    loss = share(model, first)
    optimizer.zero_grad(set_to_none=False)
    loss.backward()
    for micro in others:
        share(model, micro).backward()
    optimizer.step()


def forwards_between(model, optimizer, batch):
    optimizer.zero_grad()
    for micro in split(batch, SIZES):
        model(batch[0])  # grad mode on, but no backward
        loss = share(model, micro)
        model.eval()
        with torch.no_grad():
            model(batch[0])
        model.train()
        model(batch[0])
        loss.backward()
    optimizer.step()


def gradients_for_something_else(model, optimizer, batch):
    optimizer.zero_grad()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for micro in split(batch, SIZES):
        torch.autograd.grad(loss_of(model, batch), parameters)
        share(model, micro).backward()
    torch.autograd.grad(loss_of(model, batch), parameters)
    optimizer.step()


LOOPS = [
    accumulation,
    clipped,
    closure,
    discarded,
    discarded_in_place,
    zero_after_forward,
    forwards_between,
    gradients_for_something_else,
]
KINDS = [Tiny, Checkpointed, Positions, Functional, WithCustom, Repeated]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loop", LOOPS, ids=lambda f: f.__name__)
def test_norms_are_those_of_brute_force(loop, kind):
    """Also where no layer rule helps: lost batch axes, weights used by functions, own layers."""
    model, optimizer, batch = make(kind)
    if kind is Functional:
        model.head.weight.requires_grad_(False)  # which it does not use
    with watch(model, optimizer, method=BOTH) as gns:
        for _ in range(3):
            loop(model, optimizer, batch)
            assert_right(gns, model, batch)
        assert not gns.skipped


def test_groups_add_up_and_are_those_of_brute_force():
    model, optimizer, batch = make()
    with watch(model, optimizer, method="microbatch", groups=lambda name: name) as gns:
        accumulation(model, optimizer, batch)
        groups = gns.reading.groups
        assert sum(g.tr_sigma for g in groups.values()) == pytest.approx(gns.reading.tr_sigma)
    for name, p in model.named_parameters():
        u = [torch.autograd.grad(share(model, m), p)[0].square().sum() for m in split(batch, SIZES)]
        assert groups[name].raw.parts_sq_norm == pytest.approx(float(sum(u)), rel=1e-10)
        assert groups[name].raw.big_sq_norm == pytest.approx(float(p.grad.square().sum()))


def test_mixed_with_norms_by_example():
    model, optimizer, batch = make()
    readings = []
    methods = ["microbatch", "pepgns", "sogns", "subbatch"]
    with watch(model, optimizer, method=methods, sinks=[readings.append]) as gns:
        for _ in range(2):
            accumulation(model, optimizer, batch)
        assert sorted(r.method for r in readings) == sorted(2 * methods)
        assert gns.reading.method == "microbatch"
        big = {r.raw.big_sq_norm for r in gns.readings.values()}
        assert max(big) == pytest.approx(min(big), rel=1e-12)
        per_example = gns.readings["pepgns"].raw
        assert per_example.sum_sq_weights == pytest.approx(1 / B)
        assert per_example.parts_sq_norm > gns.reading.raw.parts_sq_norm / B


def test_coverage_is_that_of_the_method():
    model, optimizer, batch = make(Positions)
    with watch(model, optimizer, method=["microbatch", "pepgns"]) as gns:
        with pytest.warns(RuntimeWarning, match="its batch axis is lost"):
            accumulation(model, optimizer, batch)
        assert gns.reading.coverage == gns.coverage().fraction == 1
        assert gns.readings["pepgns"].coverage == gns.coverage("pepgns").fraction < 1
        assert set(gns.coverage("pepgns").missing) == {"wpe.weight"}


def normalised():
    torch.manual_seed(0)
    layers = nn.Conv1d(1, 3, 2), nn.BatchNorm1d(3), nn.ReLU(), nn.Flatten(), nn.Linear(9, 2)
    return nn.Sequential(*layers).to(D)


def test_batch_norm_is_measured_where_examples_are_not():
    model, x = normalised(), torch.randn(12, 1, 4, dtype=D)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    micros = x.split([4, 3, 5])
    with watch(model, optimizer, method=["microbatch", "pepgns"]) as gns:
        with pytest.warns(RuntimeWarning, match="batch statistics"):
            for micro in micros:
                cases.energy(model, micro).backward()
            optimizer.step()
        assert list(gns.readings) == ["microbatch"]
        assert gns.skipped == {"coupled examples": 1}
    u = gradients(model, cases.energy, micros)
    assert gns.reading.raw.parts_sq_norm == pytest.approx(float(u.square().sum()), rel=1e-10)
    assert gns.reading.coverage == 1


def test_a_contrastive_loss_within_the_microbatch():
    model = nn.Linear(4, 3).to(D)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    views = torch.randn(9, 2, 4, dtype=D)

    def contrast(model, views):
        one, two = model(views).unbind(1)
        return F.cross_entropy(one @ two.T, torch.arange(len(one)), reduction="sum") / 9

    with watch(model, optimizer, method="microbatch") as gns:
        for micro in views.split(3):
            contrast(model, micro).backward()
        optimizer.step()
        assert_norms(gns, gradients(model, contrast, views.split(3)), [1, 1, 1])


def test_sparse_gradients():
    model = nn.Sequential(nn.Embedding(7, 3, sparse=True), nn.Linear(3, 2)).to(D)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    micros = torch.randint(7, (6, 4)).split(2)
    with watch(model, optimizer, method="microbatch") as gns:
        for micro in micros:
            cases.energy(model, micro).backward()
        optimizer.step()
        model[0].sparse = False
        assert_norms(gns, gradients(model, cases.energy, micros), [1, 1, 1])


def test_an_expert_that_some_microbatches_do_not_use():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))

        def forward(self, x, expert):
            return self.experts[expert](x)

    model = Experts().to(D)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    micros = [(torch.randn(3, 4, dtype=D), expert) for expert in (0, 1, 0)]
    with watch(model, optimizer, method="microbatch") as gns:
        for micro in micros:
            model(*micro).sin().sum().backward()
        optimizer.step()
        u = gradients(model, lambda m, micro: m(*micro).sin().sum(), micros)
        assert_norms(gns, u, [1, 1, 1], coverage=pytest.approx(2 / 3))


# Laws.


def test_the_loss_scale_cancels():
    ratios = []
    for scale in (1.0, 2.0**20):
        model, optimizer, batch = make()
        with watch(model, optimizer, method=BOTH) as gns:
            accumulate(model, batch, scale=scale)
            optimizer.step()
            ratios.append([r.raw.tr_sigma / r.raw.grad_sq_norm for r in gns.readings.values()])
    assert ratios[0] == ratios[1]


def test_the_order_of_microbatches_does_not_matter_but_for_the_first():
    raws = []
    for order in ([0, 1, 2], [0, 2, 1], [2, 1, 0]):
        model, optimizer, batch = make()
        micros = split(batch, SIZES)
        with watch(model, optimizer, method=BOTH) as gns:
            for i in order:
                share(model, micros[i]).backward()
            optimizer.step()
            raws.append([r.raw.parts_sq_norm for r in gns.readings.values()])
    assert [q for q, _ in raws] == pytest.approx([raws[0][0]] * 3, rel=1e-12)
    assert raws[0][1] == pytest.approx(raws[1][1], rel=1e-12)
    assert raws[0][1] != pytest.approx(raws[2][1], rel=1e-3)


def test_weights_are_those_of_the_microbatches():
    model, optimizer, (ids, targets) = make()
    lengths = torch.tensor([5, 1, 3, 2, 5, 4])
    targets = targets.masked_fill(torch.arange(T) >= lengths[:, None], -100)
    micros = split((ids, targets, lengths), SIZES)

    def loss(model, micro):
        return loss_of(model, micro[:2], "sum") / lengths.sum()

    for by_hand in (True, False):
        known = {tuple(i.flatten().tolist()): n for i, _, n in micros}
        weights = None if by_hand else (lambda i, known=known: known[tuple(i.flatten().tolist())])
        with watch(model, optimizer, method=BOTH, weights=weights) as gns:
            optimizer.zero_grad()
            for micro in micros:
                if by_hand:
                    gns.weigh(micro[2])
                loss(model, micro).backward()
            optimizer.step()
            w = [float(micro[2].sum()) for micro in micros]
            assert_norms(gns, gradients(model, loss, micros), w)
            assert (gns.reading.tokens, gns.reading.examples) == (20, B)


@pytest.mark.parametrize("fused", [False, True])
def test_loss_scaling_is_undone_and_overflows_are_dropped(fused):
    model, _, batch = make()
    model.float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    with watch(model, optimizer, scaler=scaler, method=BOTH) as gns:
        for i in range(4):
            optimizer.zero_grad()
            for micro in split(batch, SIZES):
                loss = share(model, micro) * (torch.inf if i == 2 else 1)
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            if i != 2:
                assert_right(gns, model, batch, rtol=1e-4)
        assert gns.skipped == ({"nonfinite": 1} if fused else {})  # once, of both methods


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside):
    model, _, batch = make()
    model.float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer, method="microbatch") as gns:
        for micro in split(batch, SIZES):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = share(model, micro)
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
        optimizer.step()
        assert_right(gns, model, batch, rtol=0.02)


def test_half_precision_parameters():
    model, _, batch = make()
    model.bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer, method="microbatch") as gns:
        accumulation(model, optimizer, batch)
        assert_right(gns, model.double(), batch, rtol=0.05)


def test_two_optimizers_make_one_reading_a_step():
    model, _, batch = make()
    one = torch.optim.SGD(model.up.parameters(), lr=0.0)
    other = torch.optim.SGD([p for n, p in model.named_parameters() if "up" not in n], lr=0.0)
    readings = []
    with watch(model, [one, other], method="microbatch", sinks=[readings.append]) as gns:
        for order in ((one, other), (other, one)):
            model.zero_grad()
            accumulate(model, batch)
            for optimizer in order:
                optimizer.step()
        assert_right(gns, model, batch)
        assert [r.step for r in readings] == [0, 1]
        assert not gns.skipped


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compiled_whole(backend):
    """Tied weights too, and with steps that are not measured in between."""
    model, optimizer, batch = make()
    with watch(model, optimizer, method=BOTH, every=2) as gns:
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for step in range(5):
            (accumulation, clipped)[step % 2](compiled, optimizer, batch)
            if step % 2 == 0:
                assert_right(gns, model, batch)
        assert not gns.skipped


def test_reentrant_checkpoints():
    model, optimizer, batch = make(Reentrant)
    with watch(model, optimizer, method=BOTH) as gns:
        for loop in (accumulation, clipped, discarded):
            loop(model, optimizer, batch)
            assert_right(gns, model, batch)


def test_a_layer_in_two_reentrant_checkpoints_is_left_out_and_named():
    class Twice(Tiny):
        def body(self, x):
            step = partial(checkpoint, super().body, use_reentrant=True)
            return step(step(x))

    model, optimizer, batch = make(Twice)
    with pytest.warns(RuntimeWarning, match="several pieces"):
        gns = watch(model, optimizer, method="microbatch")
        accumulation(model, optimizer, batch)
        gns.close()
    missing = gns.coverage().missing
    assert set(missing) == {f"{n}.{p}" for n in ("norm", "up", "down") for p in ("weight", "bias")}
    twin = copy.deepcopy(model)
    twin.body = lambda x: Tiny.body(twin, Tiny.body(twin, x))
    u = [torch.autograd.grad(share(twin, m), twin.wte.weight)[0] for m in split(batch, SIZES)]
    expected = float(torch.stack(u).square().sum())
    assert gns.reading.raw.parts_sq_norm == pytest.approx(expected, rel=1e-10)


# What is refused.


def test_one_microbatch_is_no_measurement():
    model, optimizer, batch = make()
    with (
        watch(model, optimizer, method="microbatch") as gns,
        pytest.warns(RuntimeWarning, match="accumulate two or more, or use method='pepgns'"),
    ):
        loss_of(model, batch).backward()
        optimizer.step()
    assert gns.skipped == {"one part": 1}


def two_forwards(model, batch):
    first, second = split(batch, [3, 3])
    (loss_of(model, first) + loss_of(model, second)).backward()


def two_backwards(model, batch):
    loss = loss_of(model, batch)
    loss.backward(retain_graph=True)
    loss.backward()


@pytest.mark.parametrize("backward", [two_forwards, two_backwards])
def test_passes_of_unknown_size_are_refused(backward):
    model, optimizer, batch = make()
    with (
        watch(model, optimizer, method="microbatch") as gns,
        pytest.warns(RuntimeWarning, match="how many examples"),
    ):
        for _ in range(2):
            backward(model, batch)
        optimizer.step()
    assert gns.skipped == {"several passes": 1}


def test_two_forwards_in_a_backward_with_their_size_given():
    model, optimizer, batch = make()
    with watch(model, optimizer, method="microbatch") as gns:
        for _ in range(2):
            gns.weigh(torch.ones(6))
            two_forwards(model, batch)
        optimizer.step()
        assert gns.reading.examples == 12
        assert gns.reading.raw.tr_sigma == pytest.approx(0, abs=1e-12)


def test_layers_called_without_their_model():
    model, optimizer, batch = make()

    def loss(micro):
        logits = model.head(model.body(model.wte(micro[0])))
        return F.cross_entropy(logits.flatten(0, 1), micro[1].flatten()) * len(micro[0]) / B

    with watch(model, optimizer, method="microbatch") as gns:
        with pytest.warns(RuntimeWarning, match="own forward was not called"):
            for micro in split(batch, SIZES):
                loss(micro).backward()
            optimizer.step()
        optimizer.zero_grad()
        for micro in split(batch, SIZES):
            gns.weigh(torch.ones(len(micro[0])))
            loss(micro).backward()
        optimizer.step()
        assert gns.skipped == {"examples unknown": 1}
        assert_right(gns, model, batch)


def test_wrong_weights_are_refused():
    model, optimizer, batch = make()
    with watch(model, optimizer, method="microbatch") as gns:
        gns.weigh(torch.ones(2))
        accumulate(model, batch)
        with pytest.raises(ValueError, match=r"one for each of the 3 examples.*got \[2\]"):
            optimizer.step()


def test_gradients_that_were_not_cleared_are_noticed():
    model, optimizer, batch = make()
    with watch(model, optimizer, method="microbatch") as gns:
        accumulation(model, optimizer, batch)
        with pytest.warns(RuntimeWarning, match="not cleared since an earlier step"):
            accumulate(model, batch)
            optimizer.step()
        assert gns.skipped == {"nothing measured": 1}


def test_a_direction_shows_an_error_by_its_size():
    """E <d, e>² = |e|², whatever the error and the shape; and d does not depend on what came."""
    names = [str(i) for i in range(2000)]
    for e in (torch.randn(3, 4, 2, dtype=D), torch.arange(5.0), torch.tensor(2.0)):
        directions = Directions(names)
        seen = torch.stack([directions.along(name, e).square() for name in names])
        assert float(seen.mean()) == pytest.approx(float(e.square().sum()), rel=0.15)
        other = Directions(names).along(names[-1], 2 * e)
        assert float(other) == 2 * float(directions.along(names[-1], e))


def test_a_hook_that_changes_a_gradient_is_noticed():
    model, optimizer, batch = make()
    with watch(model, optimizer, method="microbatch") as gns:
        handle = model.up.weight.register_hook(lambda g: g.clamp(-0.001, 0.001))
        with pytest.warns(RuntimeWarning, match="a hook changes it"):
            accumulation(model, optimizer, batch)
        assert set(gns.coverage().missing) == {"up.weight"}
        handle.remove()
        accumulation(model, optimizer, batch)
        assert_right(gns, model, batch)


def test_a_failed_backward_is_noticed_and_survived():
    model, optimizer, batch = make()

    def fails(g):
        raise MemoryError

    with watch(model, optimizer, method="microbatch") as gns:
        accumulate(model, batch, [3, 3])
        handle = model.norm.weight.register_hook(fails)
        with pytest.raises(MemoryError):
            loss_of(model, batch).backward()
        handle.remove()
        with pytest.warns(RuntimeWarning, match="ended in an exception"):
            accumulation(model, optimizer, batch)
        accumulation(model, optimizer, batch)
        assert_right(gns, model, batch)
        assert gns.skipped == {"backward failed": 1}


def test_parameters_frozen_and_thawed():
    model, optimizer, batch = make()
    model.up.weight.requires_grad_(False)
    with watch(model, optimizer, method="microbatch") as gns:
        accumulation(model, optimizer, batch)
        assert_right(gns, model, batch)
        assert "up.weight" not in gns.coverage().covered
        model.up.weight.requires_grad_(True)
        model.down.weight.requires_grad_(False)
        accumulation(model, optimizer, batch)
        model.down.weight.grad = None
        assert_right(gns, model, batch)
        assert "up.weight" in gns.coverage().covered


def test_repeated_faults_switch_off_that_method_alone(monkeypatch):
    model, optimizer, batch = make()

    def fails(sq_norms, weights):
        raise RuntimeError("broken")

    monkeypatch.setitem(METHODS, "microbatch", fails)
    with pytest.warns(RuntimeWarning) as warned:
        gns = watch(model, optimizer, method=["pepgns", "microbatch"], strict=False)
        for _ in range(5):
            accumulation(model, optimizer, batch)
        gns.close()
    assert gns.skipped == {"fault": 3}
    assert ["'microbatch' switched off after 3" in str(w.message) for w in warned] == [False, True]
    assert gns.reading.step == 4


def test_forwards_that_come_early_and_outputs_that_hide():
    """Forwards of an earlier step, and an output in a class of its own."""

    class Output:
        def __init__(self, logits):
            self.logits = logits

    class Hiding(Tiny):
        def forward(self, ids):
            return Output(super().forward(ids))

    def hidden_share(model, micro):
        logits = model(micro[0]).logits
        return F.cross_entropy(logits.flatten(0, 1), micro[1].flatten()) * len(micro[0]) / B

    model, optimizer, batch = make(Hiding)
    with watch(model, optimizer, method="microbatch") as gns:
        for micro in split(batch, SIZES):
            hidden_share(model, micro).backward()
        optimizer.step()
        assert_norms(gns, gradients(model, hidden_share, split(batch, SIZES)), SIZES)

    model, _, batch = make()
    with watch(model, None, method="microbatch") as gns:
        early = [share(model, micro) for micro in split(batch, SIZES)]
        for _ in range(2):
            late = [share(model, micro) for micro in split(batch, SIZES)]
            model.zero_grad()
            for loss in early:
                loss.backward()
            gns.commit()
            assert_right(gns, model, batch)
            early = late


def test_a_penalty_on_the_gradient_of_the_input():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(D)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def penalised(model, x):
        x = x.detach().requires_grad_()
        y = model(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y.square().sum() + slope.square().sum()

    micros = torch.randn(6, 3, dtype=D).split(2)
    with watch(model, optimizer, method="microbatch") as gns:
        for micro in micros:
            penalised(model, micro).backward()
        optimizer.step()
        assert_norms(gns, gradients(model, penalised, micros), [1, 1, 1])


def test_state_continues():
    model, optimizer, batch = make()
    settings = {"half_life": "40 examples", "every": 2, "method": ["microbatch", "pepgns"]}

    def steps(gns):
        for _ in range(3):
            accumulation(model, optimizer, batch)

    with watch(model, optimizer, **settings) as whole:
        steps(whole)
        steps(whole)
    with watch(model, optimizer, **settings) as first:
        steps(first)
    with watch(model, optimizer, **settings) as second:
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        steps(second)
    assert second.reading.step == whole.reading.step == 4
    for method, reading in whole.readings.items():
        assert second.readings[method].n_eff == pytest.approx(reading.n_eff)
        assert second.readings[method].tr_sigma == pytest.approx(reading.tr_sigma)


# What is left of it.


def train(monitored, kind, every=1):
    model, _, _ = make(kind)
    model.float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    gns = watch(model, optimizer, every=every, method=BOTH) if monitored else None
    generator = torch.Generator().manual_seed(5)
    torch.manual_seed(3)
    losses = []
    for _ in range(8):
        batch = torch.randint(0, VOCABULARY, (2, B, T), generator=generator).unbind()
        optimizer.zero_grad()
        for micro in split(batch, SIZES):
            loss = share(model, micro)
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
    if gns:
        assert gns.reading is not None
        gns.close()
    grads = [p.grad for p in model.parameters()]
    return [torch.stack(losses), torch.get_rng_state(), *grads, *model.state_dict().values()]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("kind", [Tiny, Dropping, Checkpointed])
def test_training_with_the_monitor_is_the_same_training(kind, every):
    assert all(map(torch.equal, train(False, kind), train(True, kind, every)))


def hooks_on(model):
    on_modules = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return on_modules, sum(len(p._backward_hooks or ()) for p in model.parameters())


def test_hooks_are_there_while_a_step_is_measured_only():
    model, optimizer, batch = make()
    before = {id(m): set(vars(m)) for m in model.modules()}
    gns = watch(model, optimizer, method="microbatch", every=3)
    installed = []
    for _ in range(6):
        installed.append(hooks_on(model)[1])
        accumulation(model, optimizer, batch)
    parameters = len(list(model.parameters()))
    assert installed == [parameters, 0, 0, parameters, 0, 0]
    gns.close()
    assert hooks_on(model) == (0, 0)
    assert {id(m): set(vars(m)) for m in model.modules()} == before
    assert not any(vars(p) for p in model.parameters())


def test_copies_of_the_model_do_not_feed_the_monitor():
    model, optimizer, batch = make()
    with watch(model, optimizer, method="microbatch") as gns:
        twin, saved = copy.deepcopy(model), io.BytesIO()
        torch.save(model, saved)
        saved.seek(0)
        optimizer.zero_grad()
        for other in (twin, torch.load(saved, weights_only=False)):
            loss_of(other, batch).backward()
        accumulate(model, batch)
        optimizer.step()
        assert_right(gns, model, batch)


def test_no_gradient_is_kept():
    """Between microbatches, no memory of a parameter's size is new but that of `.grad`."""
    model, optimizer, batch = make()

    def large():
        gc.collect()
        tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        return [o for o in tensors if o.numel() >= model.up.weight.numel()]

    with watch(model, optimizer, method=BOTH) as gns:
        before = large()  # those of other tests too, some without memory
        known = {id(o) for o in before}
        for micro in split(batch, SIZES):
            share(model, micro).backward()
            new = {o.data_ptr() for o in large() if id(o) not in known}
            assert new <= {p.grad.data_ptr() for p in model.parameters()}
        optimizer.step()
        assert gns.reading is not None


# Statistics.


def z_scores(method, noise_of=lambda n: 1 / n, weights_of=lambda n: n, repetitions=40_000):
    """Standard errors between mean moments and the truth, of Gaussian gradients.

    Microbatches of [n] examples whose mean gradient is N(G, noise_of(n) Sigma).
    """
    rng = np.random.default_rng(0)
    sizes = np.array([3.0, 1, 2, 6])
    w = weights_of(sizes) / weights_of(sizes).sum()
    grad, sd = np.array([0.6, -0.2, 0.3, 0.1]), np.array([1.0, 0.5, 2.0, 0.7])
    noise = sd * np.sqrt(noise_of(sizes))[:, None]
    parts = w[:, None] * (grad + noise * rng.standard_normal((repetitions, 4, 4)))
    big, squares = (parts.sum(1) ** 2).sum(-1), (parts**2).sum(-1)
    q, p = method(squares.T, w)
    m = moments(NormPair(big, q, p, int(sizes.sum())))
    truth = (grad**2).sum(), sizes.sum() * (w**2 * noise_of(sizes)).sum() * (sd**2).sum()
    return [
        float((x.mean() - t) / (x.std() / np.sqrt(repetitions)))
        for x, t in zip((m.grad_sq_norm, m.tr_sigma), truth, strict=True)
    ]


@pytest.mark.parametrize("method", [every_part, first_part])
def test_moments_are_unbiased(method):
    assert max(map(abs, z_scores(method))) < 4


def test_every_part_is_unbiased_whatever_the_noise_of_each():
    def odd(n):
        return 1 / np.sqrt(n)

    assert max(map(abs, z_scores(every_part, odd))) < 4
    assert max(map(abs, z_scores(first_part, odd))) > 10  # which needs noise as of examples


def test_that_test_catches_wrong_weights():
    assert max(map(abs, z_scores(lambda s, w: every_part(s, np.full(4, 0.25))))) > 10


def test_the_first_of_two_batches_solves_the_two_equations():
    """E |u_1|² = w² |G|² + w² S / b and E A = |G|² + S / N, with w = b / N."""
    grad, s, b, n = 3.0, 20.0, 4, 16
    w = b / n
    q, p = first_part(np.array([[w**2 * grad + w**2 * s / b]]), np.array([w]))
    m = moments(NormPair(np.array([grad + s / n]), q, p, n))
    np.testing.assert_allclose([m.grad_sq_norm[0], m.tr_sigma[0]], [grad, s], rtol=1e-12)


@pytest.mark.parametrize("parts", [2, 8])
def test_the_variance_is_that_of_the_formula(parts):
    rng, batch, repetitions = np.random.default_rng(0), 16, 100_000
    grad, sd = np.array([0.6, -0.2, 0.3, 0.1]), np.array([1.0, 0.5, 2.0, 0.7])
    b, w = batch // parts, np.full(parts, 1 / parts)
    u = (grad + sd * rng.standard_normal((parts, repetitions, 4)) / np.sqrt(b)) / parts
    big = (u.sum(0) ** 2).sum(-1)
    m = moments(NormPair(big, *every_part((u**2).sum(-1), w), batch))
    noise = 2 * (sd**4).sum()
    expected = 4 * (grad * sd) @ (grad * sd) / batch + noise / (batch * (batch - b))
    assert m.grad_sq_norm.var() == pytest.approx(expected, rel=0.03)
    assert m.tr_sigma.var() == pytest.approx(noise * b / (batch - b), rel=0.03)
    coarse = moments(NormPair(big, *first_part((u**2).sum(-1), w), batch))
    assert coarse.tr_sigma.var() > 1.5 * m.tr_sigma.var()
    assert coarse.grad_sq_norm.var() > m.grad_sq_norm.var()


def test_all_methods_agree_in_expectation():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)).to(D)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    teacher = torch.randn(6, 1, dtype=D)
    readings = {method: [] for method in ("pepgns", "microbatch", "subbatch")}
    with watch(model, optimizer, method=list(readings)) as gns:
        for _ in range(500):
            optimizer.zero_grad()
            x = torch.randn(12, 6, dtype=D)
            y = x @ teacher + torch.randn(12, 1, dtype=D)
            for a, b in split((x, y), [3, 5, 4]):
                ((model(a) - b).square().sum() / 12).backward()
            optimizer.step()
            for method, found in readings.items():
                raw = gns.readings[method].raw
                found.append((raw.grad_sq_norm, raw.tr_sigma))
    exact, *others = (np.array(found) for found in readings.values())
    for other in others:
        difference = other - exact
        error = difference.std(0) / np.sqrt(len(difference))
        assert (np.abs(difference.mean(0)) < 4 * error).all()
        assert (error < 0.2 * exact.mean(0)).all()


def test_a_model_that_calls_itself_makes_one_forward():
    """As a training step of Lightning does under DDP, where it is run as the model's forward."""

    class Redirected(Tiny):
        inside = False

        def forward(self, ids):
            self.inside = not self.inside
            return self(ids).clone() if self.inside else super().forward(ids)

    model, optimizer, batch = make(Redirected)
    with watch(model, optimizer, method="microbatch") as gns:
        for _ in range(2):
            accumulation(model, optimizer, batch)
            assert_right(gns, model, batch)
        assert not gns.skipped
