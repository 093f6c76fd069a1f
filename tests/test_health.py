"""Every number of the layers' health against a hand-checked value or brute force."""

import copy
import importlib.util
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks_worker import in_processes
from rich.console import Console
from test_monitor import (
    LOOPS,
    Checkpointed,
    Reentrant,
    Tiny,
    accumulation,
    closure,
    loss_of,
    make,
    plain,
    sum_loss,
    watch,
)
from test_sinks import HEADER, events, wandb_run
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import gnsmon
from gnsmon import health as watching
from gnsmon.estimators.health import (
    Clips,
    Health,
    LayerHealth,
    Layers,
    clip_factors,
    clipped_by_layer,
    depth_ratio,
    spread,
)
from gnsmon.health import HealthWatch, change, sampled
from gnsmon.report import render, summarise
from gnsmon.sinks import Jsonl, read_log
from gnsmon.sinks.keys import health_scalars
from gnsmon.sinks.wording import layer_health

# formulas


def test_clipping_by_the_norm():
    assert clip_factors(np.array([0.0, 1.0, 2.0, 8.0]), 2.0).tolist() == [1, 1, 1, 0.25]


def test_clipping_of_each_layer_shortens_and_turns_the_gradient():
    # |g| = 5; factors 2/3 and 1/2 leave (2, 2), of norm sqrt(8)
    left, cosine = clipped_by_layer(np.array([3.0, 4.0]), 2.0)
    assert left == pytest.approx(math.sqrt(8) / 5)
    assert cosine == pytest.approx((2 * 3 + 2 * 4) / (5 * math.sqrt(8)))
    assert clipped_by_layer(np.array([3.0, 4.0]), 4.0) == pytest.approx((1, 1))
    assert clipped_by_layer(np.zeros(2), 1.0) == (None, None)


def test_clipping_of_each_layer_against_vectors():
    torch.manual_seed(3)
    layers = [torch.randn(n).double() * scale for n, scale in ((5, 1), (7, 0.1), (2, 4))]
    clipped = [g * min(1, 1.5 / float(g.norm())) for g in layers]
    whole, after = torch.cat(layers), torch.cat(clipped)
    found = clipped_by_layer(np.array([float(g.norm()) for g in layers]), 1.5)
    assert found[0] == pytest.approx(float(after.norm() / whole.norm()))
    assert found[1] == pytest.approx(float(F.cosine_similarity(whole, after, dim=0)))


def test_depth_is_by_root_mean_square_of_the_outer_quarters():
    # eight layers, so two and two: mean squares 1 and 3 first, 16 and 0 last
    sq_norms = np.array([10.0, 6.0, 99.0, 99.0, 99.0, 99.0, 32.0, 0.0])
    sizes = np.array([10.0, 2.0, 1.0, 1.0, 1.0, 1.0, 2.0, 4.0])
    assert depth_ratio(sq_norms, sizes) == (pytest.approx(math.sqrt(8 / 2)), 2)
    assert depth_ratio(np.array([4.0, 36.0]), np.ones(2)) == (pytest.approx(3.0), 1)
    assert depth_ratio(np.array([0.0, 36.0]), np.ones(2)) == (None, 1)
    assert depth_ratio(np.ones(1), np.ones(1)) == (None, 0)


def test_spread_over_layers():
    assert spread(np.array([1.0, math.nan, 3.0])) == (3.0, 0.5)
    assert spread(np.array([0.0, 2.0])) == (None, 1.0)
    assert spread(np.array([2.0, math.nan])) == (None, None)
    assert spread(np.zeros(3)) == (None, None)


def test_relative_change_leaves_zeros_out_and_counts_them():
    before = torch.tensor([1.0, -2.0, 0.0, 4.0, 0.0])
    after = torch.tensor([1.25, -1.0, 5.0, 4.0, 0.0])
    assert change(before, after).tolist() == [0.25 + 0.5, 3, 5]
    tiny, half = torch.tensor([1e-38]), torch.tensor([3.0], dtype=torch.bfloat16)
    assert change(tiny, torch.tensor([1.0])).isfinite().all()  # beyond float32
    assert change(half, half * 2).tolist() == [1, 1, 1]


def test_the_sample_is_small_always_the_same_and_spread_over_columns(monkeypatch):
    monkeypatch.setattr(watching, "SAMPLE", 10)
    p = torch.arange(48).reshape(8, 6)  # every fifth would be enough, every seventh is prime to 48
    assert sampled(p).tolist() == list(range(0, 48, 5))
    p = torch.arange(60).reshape(10, 6)  # every sixth would be one column
    assert sampled(p).tolist() == list(range(0, 60, 7))
    assert {x % 6 for x in sampled(p).tolist()} == set(range(6))
    assert sampled(p).data_ptr() == p.data_ptr()
    assert sampled(torch.arange(10)).tolist() == list(range(10))
    assert len(sampled(torch.zeros(0))) == 0


def test_a_sample_is_mostly_too_low_where_the_mean_leans_on_few(monkeypatch):
    monkeypatch.setattr(watching, "SAMPLE", 2**14)
    g, ratios = torch.Generator().manual_seed(0), []
    for _ in range(100):
        w, dw = torch.randn(2, 2**18, generator=g)
        total, count, _ = change(w, w + dw).tolist()
        of_some, some, _ = change(sampled(w), sampled(w + dw)).tolist()
        ratios.append((of_some / some) / (total / count))
    low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    assert (low, median, high) == pytest.approx((0.59, 0.77, 1.02), abs=0.01)  # docs/health.md


def test_steps_above_the_threshold_are_counted():
    clips = Clips(2.0, 3)
    for norms in ([3.0, 1.0, 2.8], [1.0, 0.5, 0.8], [2.5, 1.8, 1.7]):
        clips.update(np.array(norms))
    assert (clips.steps, clips.clipped.tolist(), clips.any_layer) == (3, [2, 0, 1], 1)
    again, other = Clips(2.0, 3), Clips(1.0, 3)
    for fresh in (again, other):
        fresh.load_state_dict(json.loads(json.dumps(clips.state_dict())))
    assert again.state_dict() == clips.state_dict()
    assert other.steps == 0


# on a model in training


class Net(nn.Module):
    """A convolution, a layer norm and two linear layers with dropout, by which streams are told."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.LayerNorm(48)
        self.up = nn.Linear(48, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x):  # [B, 1, 4, 4]
        x = self.norm(F.relu(self.conv(x)).flatten(1))
        return self.head(F.dropout(torch.tanh(self.up(x)), 0.2, self.training))


def net(dtype=torch.float64):
    torch.manual_seed(2)
    return Net().to(dtype), torch.randn(8, 1, 4, 4, dtype=dtype), torch.randint(4, (8,))


def net_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def by_layer(model, values):
    """Sums over the parameters of each layer, by its name."""
    found = {}
    for (name, _), value in zip(model.named_parameters(), values, strict=True):
        layer = name.rpartition(".")[0]
        found[layer] = found.get(layer, 0.0) + float(value.detach())
    return found


def test_all_numbers_of_a_run_are_those_of_brute_force():
    model, *batch = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    c, above, above_layer, any_layer = 0.4, 0, dict.fromkeys(("conv", "norm", "up", "head"), 0), 0
    with watch(model, optimizer, diagnostics=True, clip=c) as gns:
        for step in range(5):
            optimizer.zero_grad()
            net_loss(model, batch).backward()
            grads = [p.grad.clone() for p in model.parameters()]
            before = [p.detach().clone() for p in model.parameters()]
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)  # comes too late to be seen
            optimizer.step()
            health = gns.health
            after = [p.detach() for p in model.parameters()]

            squares = by_layer(model, [g.square().sum() for g in grads])
            whole = sum(squares.values())
            norms = {name: math.sqrt(square) for name, square in squares.items()}
            above += math.sqrt(whole) > c
            any_layer += any(norm > c for norm in norms.values())
            assert health.step == step
            assert health.grad_norm == pytest.approx(math.sqrt(whole))
            assert health.clip_factor == pytest.approx(min(1, c / math.sqrt(whole)))
            assert health.clip_share == pytest.approx(above / (step + 1))
            assert health.layer_clip_share == pytest.approx(any_layer / (step + 1))
            left = clipped_by_layer(np.array(list(norms.values())), c)
            assert (health.layer_clip_factor, health.layer_clip_cosine) == pytest.approx(left)
            assert health.steps == step + 1

            sizes = by_layer(model, [torch.tensor(p.numel()) for p in after])
            ratio = norms["head"] / norms["conv"] * math.sqrt(sizes["conv"] / sizes["head"])
            assert health.depth_ratio == pytest.approx(ratio)
            assert (health.first, health.last) == (("conv",), ("head",))

            live = [b != 0 for b in before]
            moved = [
                ((a - b) / b).abs()[at].sum() for a, b, at in zip(after, before, live, strict=True)
            ]
            counts = by_layer(model, [at.sum() for at in live])
            sums = by_layer(model, moved)
            changes = {name: sums[name] / counts[name] for name in sums if counts[name]}
            total = sum(sums.values()) / sum(counts.values())
            assert health.relative_change == pytest.approx(total, rel=1e-6)
            assert health.change_ratio == pytest.approx(
                max(changes.values()) / min(changes.values()), rel=1e-6
            )
            values = np.array(list(changes.values()))
            assert health.change_variation == pytest.approx(values.std() / values.mean(), rel=1e-6)

            assert list(health.groups) == list(norms)
            for name, group in health.groups.items():
                above_layer[name] += norms[name] > c
                expected = LayerHealth(
                    grad_norm=norms[name],
                    grad_share=squares[name] / whole,
                    clip_factor=min(1, c / norms[name]),
                    clip_share=above_layer[name] / (step + 1),
                    relative_change=changes[name],
                    coordinates=sizes[name],
                    zeros=sizes[name] - counts[name],
                )
                assert vars(group) == pytest.approx(vars(expected), rel=1e-6)
            assert sum(g.grad_share for g in health.groups.values()) == pytest.approx(1)
        assert health.groups["norm"].zeros == 0  # its bias began at 0, and has moved
        assert health.above_bound is None
        assert health.notes == {}


def test_a_bias_that_begins_at_zero_is_left_out_and_counted():
    model, *batch = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, diagnostics=True) as gns:
        net_loss(model, batch).backward()
        optimizer.step()
        assert (gns.health.groups["norm"].coordinates, gns.health.groups["norm"].zeros) == (96, 48)
        assert gns.health.clip is None
        assert gns.health.groups["norm"].clip_factor is None


def test_a_sample_counts_for_all_of_its_tensor(monkeypatch):
    monkeypatch.setattr(watching, "SAMPLE", 20)
    model, optimizer, batch = make(lr=0.1)
    with watch(model, optimizer, diagnostics=True) as gns:
        before = [p.detach().clone() for p in model.up.parameters()]  # [16, 8] and [16]
        plain(model, optimizer, batch)
        weight, bias = (
            ((p.detach() - old) / old).abs().flatten()
            for p, old in zip(model.up.parameters(), before, strict=True)
        )
        weight = weight[::7]  # the least that leaves 20 of 128 and is prime to it
        group = gns.health.groups["up"]
        assert group.coordinates == 19 + 16
        expected = (128 * weight.mean() + 16 * bias.mean()) / (128 + 16)
        assert group.relative_change == pytest.approx(float(expected))


def test_without_diagnostics_there_is_no_health():
    model, optimizer, batch = make()
    with watch(model, optimizer) as gns:
        plain(model, optimizer, batch)
        assert gns.health is None
        assert "health" not in gns.state_dict()
        assert not optimizer._optimizer_step_pre_hooks
    assert len(read_log(gns.run_dir).health) == 0
    assert read_log(gns.run_dir).latest_health() is None


def train(kind, *, steps=4, **settings):
    model, *batch = net(torch.float32)
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.01)
    raws = []
    with watch(model, optimizer, sinks=[lambda r: raws.append(r.raw)], **settings):
        for _ in range(steps):
            optimizer.zero_grad()
            net_loss(model, batch).backward()
            optimizer.step()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    return [p.detach() for p in model.parameters()], raws


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_training_stays_the_same_to_the_last_bit(kind):
    weights, raws = train(kind, engine="hooks")
    watched, same = train(kind, engine="hooks", diagnostics=True, clip=0.1, norm_bound=0.1)
    assert all(map(torch.equal, weights, watched))
    assert same == raws
    model, *batch = net(torch.float32)
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.01)
    for _ in range(4):
        optimizer.zero_grad()
        net_loss(model, batch).backward()
        optimizer.step()
    assert all(map(torch.equal, weights, model.parameters()))


def test_a_step_that_is_not_measured_copies_nothing(monkeypatch):
    model, optimizer, batch = make()
    taken = []
    monkeypatch.setattr(watching, "sampled", lambda p: taken.append(p) or sampled(p))
    with watch(model, optimizer, diagnostics=True, every=3) as gns:
        for step in range(6):
            before = len(taken)
            plain(model, optimizer, batch)
            assert (len(taken) > before) == (step % 3 == 0)
            assert gns.health.step == step - step % 3


def script():
    path = Path(__file__).parents[1] / "scripts" / "percent_delta.py"
    spec = importlib.util.spec_from_file_location("percent_delta", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_percent_delta_and_lars_keep_what_they_promise():
    scripted = script()
    for scale, rate in ((scripted.percent_delta, 0.01), (scripted.lars, 0.02)):
        model, *batch = net()
        optimizer = scripted.ByTensor(model.parameters(), rate, scale)
        with watch(model, optimizer, diagnostics=True, groups=str) as gns:
            for _ in range(3):
                optimizer.zero_grad()
                net_loss(model, batch).backward()
                before = {name: p.detach().clone() for name, p in model.named_parameters()}
                optimizer.step()
                for name, p in model.named_parameters():
                    known = gns.health.groups[name].relative_change
                    if name == "norm.bias":  # it begins at 0 and by these rules stays there
                        assert known is None or scale is scripted.lars
                    elif scale is scripted.lars:
                        length = (p.detach() - before[name]).norm() / before[name].norm()
                        assert float(length) == pytest.approx(rate)
                    else:
                        assert known == pytest.approx(rate)
            if scale is scripted.percent_delta:
                assert gns.health.change_ratio == pytest.approx(1)
                assert gns.health.change_variation == pytest.approx(0, abs=1e-6)
            else:
                assert gns.health.change_ratio > 1.5


# examples above a bound


def own_sq_norms(model, batch):
    """Of each example's own gradient, [B]."""
    model = copy.deepcopy(model)
    model.reentrant = False
    return sum(gnsmon.per_example_sq_norms(model, loss_of, batch).values())


def a_bound(sq_norms, above):
    """One that so many are above, halfway between two of them."""
    norms = sq_norms.sqrt().sort(descending=True).values
    return float(norms[above - 1 : above + 1].mean())


@pytest.mark.parametrize("engine", ["hooks", "fused"])
@pytest.mark.parametrize("kind", [Tiny, Checkpointed])
@pytest.mark.parametrize("loop", LOOPS, ids=lambda f: f.__name__)
def test_the_share_above_a_bound_is_that_of_brute_force(loop, kind, engine):
    model, optimizer, batch = make(kind)
    each = own_sq_norms(model, batch) * (6**2 if loop is sum_loss else 1)
    for above in (1, 4):
        bound = a_bound(each, above)
        with watch(model, optimizer, engine=engine, diagnostics=True, norm_bound=bound) as gns:
            for _ in range(2):
                loop(model, optimizer, batch)
                assert gns.health.above_bound == above / 6
                assert gns.health.notes == {}


def test_single_norms_are_those_of_brute_force_in_their_order():
    for kind in (Tiny, Checkpointed, Reentrant):
        model, optimizer, batch = make(kind)
        with watch(model, optimizer, diagnostics=True, norm_bound=1.0) as gns:
            ((collector, _),) = gns._sources
            found = []
            share = collector.share
            collector.share = lambda share=share, found=found: found.append(share()) or found[-1]
            accumulation(model, optimizer, batch)
            expected = own_sq_norms(model, batch).numpy()
            assert found[0].each_sq_norms == pytest.approx(expected, rel=1e-9)


def test_what_autograd_grad_brings_is_not_counted():
    model, optimizer, batch = make()
    bound = a_bound(own_sq_norms(model, batch), 2)
    with watch(model, optimizer, diagnostics=True, norm_bound=bound) as gns:
        loss = loss_of(model, batch)
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        loss.backward()
        optimizer.step()
        assert gns.health.above_bound == 2 / 6


def test_a_sketch_beside_the_exact_norms_stays_a_sketch():
    found = []
    for settings in ({}, {"diagnostics": True, "norm_bound": 1.0}):
        model, optimizer, batch = make()
        with watch(model, optimizer, method=["pepgns", "sketch"], subspace=1, **settings) as gns:
            for sketch in gns._sources[0][0].taps.sketches.values():
                sketch.passes = 0  # or layers as narrow as these would be exact
            plain(model, optimizer, batch)
            found.append({name: reading.raw for name, reading in gns.readings.items()})
    assert found[0] == found[1]
    assert found[0]["sketch"].parts_sq_norm != found[0]["pepgns"].parts_sq_norm


class Scaled(nn.Module):
    """A layer without a rule, which is replayed."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4, 3, dtype=torch.float64))

    def forward(self, x):
        return x @ self.scale.sin()


def test_layers_without_a_rule_are_counted_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), Scaled(), nn.Linear(3, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x, y = torch.randn(9, 3).double(), torch.randint(2, (9,))
    each = sum(gnsmon.per_example_sq_norms(model, net_loss, (x, y)).values())
    with watch(model, optimizer, diagnostics=True, norm_bound=a_bound(each, 4)) as gns:
        net_loss(model, (x, y)).backward()
        optimizer.step()
        assert gns.health.above_bound == 4 / 9


def test_examples_of_unequal_weight_are_bounded_by_their_own_gradient():
    model, optimizer, batch = make()
    weights = torch.tensor([3.0, 1.0, 0.0, 2.0, 5.0, 1.0]).double()
    each = own_sq_norms(model, batch)[weights > 0]
    with watch(model, optimizer, diagnostics=True, norm_bound=a_bound(each, 2)) as gns:
        gns.weigh(weights)
        losses = F.cross_entropy(model(batch[0]).mT, batch[1], reduction="none").mean(1)
        ((losses * weights).sum() / weights.sum()).backward()
        optimizer.step()
        assert gns.health.above_bound == 2 / 5


def test_a_loss_scale_is_undone():
    model, *batch = net(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model.eval()
    each = sum(gnsmon.per_example_sq_norms(model, net_loss, tuple(batch)).values())
    net_loss(model, batch).backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    settings = {"diagnostics": True, "norm_bound": a_bound(each, 3), "clip": norm / 2}
    with watch(model, optimizer, scaler=scaler, **settings) as gns:
        optimizer.zero_grad()
        scaler.scale(net_loss(model, batch)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert gns.health.grad_norm == pytest.approx(norm, rel=1e-5)
        assert gns.health.clip_factor == pytest.approx(0.5, rel=1e-5)
        assert sum(g.grad_share for g in gns.health.groups.values()) == pytest.approx(1)
        assert gns.health.above_bound == 3 / 8


# what is absent, and why


def noted(note, of, *, model=None, step=plain, **settings):
    tiny, optimizer, batch = make()
    model = tiny if model is None else model
    with watch(model, optimizer, diagnostics=True, **settings) as gns:
        step(tiny, optimizer, batch)
        assert note in gns.health.notes[of]
        assert getattr(gns.health, of) is None
        return gns.health


def test_what_is_not_known_says_why():
    noted("pepgns", "above_bound", method="sogns", norm_bound=1.0)
    noted("pepgns", "above_bound", method="norm_layers", norm_bound=1.0)
    noted("two layers or more", "depth_ratio", groups="kind")
    noted("two layers or more", "depth_ratio", groups="total")


def test_a_parameter_whose_examples_are_not_known_leaves_the_share_out():
    def penalised(model, optimizer, batch):
        (loss_of(model, batch) + model.up.weight.square().sum()).backward()
        optimizer.step()

    with pytest.warns(RuntimeWarning, match="do not add up"):
        health = noted("left out, up.weight", "above_bound", step=penalised, norm_bound=1.0)
    assert "up" in health.groups  # whose gradient is known all the same
    assert sum(g.grad_share for g in health.groups.values()) == pytest.approx(1)


def test_an_unused_parameter_does_not_leave_the_share_out():
    model, optimizer, batch = make()
    model.spare = nn.Linear(3, 3).double()
    with watch(model, optimizer, diagnostics=True, norm_bound=1e-9) as gns:
        plain(model, optimizer, batch)
        assert gns.health.above_bound == 1.0
        assert "spare" not in gns.health.groups


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_compiled_model_has_no_single_norms():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, diagnostics=True, norm_bound=1.0) as gns:
        compiled = torch.compile(model, backend="aot_eager")
        net_loss(compiled, (torch.randn(5, 3), torch.randint(2, (5,)))).backward()
        optimizer.step()
        assert "compiled" in gns.health.notes["above_bound"]
        assert gns.health.relative_change > 0


def test_commit_knows_no_change_and_the_rest():
    model, _, batch = make()
    with watch(model, None, diagnostics=True, clip=1.0) as gns:
        loss_of(model, batch).backward()
        gns.commit()
        assert gns.health.relative_change is None
        assert "no optimizer" in gns.health.notes["relative_change"]
        assert gns.health.grad_norm == pytest.approx(math.sqrt(gns.reading.raw.big_sq_norm))


def test_embeddings_and_their_tied_heads_are_no_ends_of_the_depth():
    model, optimizer, batch = make()
    with watch(model, optimizer, diagnostics=True) as gns:
        plain(model, optimizer, batch)
        assert (gns.health.first, gns.health.last) == (("up",), ("down",))


def test_a_step_that_cannot_be_measured_has_no_health():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gns = watch(model, optimizer, diagnostics=True, strict=False)
    with gns, pytest.warns(RuntimeWarning, match="not measured"):
        net_loss(model, (torch.randn(5, 3), torch.randint(2, (5,)))).backward()
        optimizer.step()
    assert gns.health is None


# several optimizers, closures, faults, resume


def test_two_optimizers_make_one_health_of_both():
    model, _, batch = make()
    one = torch.optim.SGD(model.up.parameters(), lr=0.1)
    other = torch.optim.SGD([p for n, p in model.named_parameters() if "up" not in n], lr=0.01)
    with watch(model, [one, other], diagnostics=True) as gns:
        for step, order in enumerate(((one, other), (other, one), (one, other))):
            model.zero_grad()
            loss_of(model, batch).backward()
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            for optimizer in order:
                optimizer.step()
            assert gns.health.step == step
            assert gns.health.notes == {}
            for name in ("up", "down"):
                own = [
                    ((p - before[n]) / before[n]).abs().flatten()
                    for n, p in model.named_parameters()
                    if n.startswith(name)
                ]
                expected = float(torch.cat(own).mean().detach())
                assert gns.health.groups[name].relative_change == pytest.approx(expected)
    table = read_log(gns.run_dir).health
    assert table["step"].tolist() == [0, 1, 2]


def test_an_optimizer_that_rests_leaves_its_parameters_out_and_it_is_said():
    model, _, batch = make()
    one = torch.optim.SGD(model.up.parameters(), lr=0.1)
    other = torch.optim.SGD(model.down.parameters(), lr=0.01)
    with watch(model, [one, other], diagnostics=True) as gns:
        for _ in range(2):
            model.zero_grad()
            loss_of(model, batch).backward()
            one.step()
    log = read_log(gns.run_dir)
    assert log.health["step"].tolist() == [0, 1]
    assert "stepped" in log.latest_health().notes["relative_change"]
    assert gns.health.groups["down"].relative_change is None
    assert gns.health.groups["up"].relative_change > 0


def test_a_closure_is_seen():
    model, optimizer, batch = make(lr=0.1)
    with watch(model, optimizer, diagnostics=True) as gns:
        for _ in range(2):
            before = model.up.weight.detach().clone()
            bias = model.up.bias.detach().clone()
            closure(model, optimizer, batch)
            moved = [
                ((p - old) / old).abs().flatten()
                for p, old in ((model.up.weight, before), (model.up.bias, bias))
            ]
            expected = float(torch.cat(moved).mean().detach())
            assert gns.health.groups["up"].relative_change == pytest.approx(expected)


def test_a_fault_switches_the_diagnostics_off_and_nothing_else(monkeypatch):
    def fails(*_):
        raise OSError("no such weight")

    monkeypatch.setattr(HealthWatch, "before", fails)
    model, optimizer, batch = make()
    with watch(model, optimizer, diagnostics=True, strict=False) as gns:
        with pytest.warns(RuntimeWarning, match="diagnostics switched off: OSError"):
            plain(model, optimizer, batch)
        plain(model, optimizer, batch)
        assert gns.reading.step == 1
        assert gns.health is None
    model, optimizer, batch = make()
    with watch(model, optimizer, diagnostics=True), pytest.raises(OSError, match="no such weight"):
        plain(model, optimizer, batch)


def test_counts_go_on_after_a_resume(tmp_path):
    model, optimizer, batch = make()
    settings = {"diagnostics": True, "clip": 1e-6, "run_dir": tmp_path}
    with watch(model, optimizer, **settings) as gns:
        for _ in range(3):
            plain(model, optimizer, batch)
        state = json.loads(json.dumps(gns.state_dict()))
    with watch(model, optimizer, **settings) as gns:
        gns.load_state_dict(state)
        plain(model, optimizer, batch)
        assert (gns.health.step, gns.health.steps, gns.health.clip_share) == (3, 4, 1.0)
    assert read_log(tmp_path).health["step"].tolist() == [0, 1, 2, 3]
    state.pop("health")  # saved without diagnostics
    with watch(model, optimizer, **{**settings, "run_dir": tmp_path / "b"}) as gns:
        gns.load_state_dict(state)
        plain(model, optimizer, batch)
        assert gns.health.steps == 1


@pytest.mark.parametrize("key", ["clip", "norm_bound"])
def test_settings_are_checked(key):
    model, optimizer, _ = make()
    with pytest.raises(ValueError, match=f"{key} is for diagnostics=True"):
        watch(model, optimizer, **{key: 1.0})
    with pytest.raises(ValueError, match="greater than 0"):
        watch(model, optimizer, diagnostics=True, **{key: 0.0})


# log, dashboards, report


LAYER = LayerHealth(2.0, 0.8, 0.5, 0.75, 1e-3, 40.0, 2.0)
HEALTH = Health(
    step=30,
    grad_norm=2.5,
    clip=1.0,
    clip_factor=0.4,
    clip_share=0.75,
    layer_clip_factor=0.6,
    layer_clip_cosine=0.9,
    layer_clip_share=0.5,
    steps=4,
    depth_ratio=3.0,
    first=("conv",),
    last=("head",),
    relative_change=2e-3,
    change_ratio=12.0,
    change_variation=0.7,
    norm_bound=3.0,
    above_bound=0.125,
    notes={},
    groups={"conv": LAYER, "head": replace(LAYER, grad_norm=1.5, relative_change=None)},
)


def test_the_log_gives_back_what_was_written(tmp_path):
    sink = Jsonl(tmp_path / "gns.jsonl")
    sink.start(HEADER, 0)
    for step in (10, 20, 30):
        sink.health(replace(HEALTH, step=step, depth_ratio=None if step == 20 else math.inf))
    sink.health(HEALTH)
    sink.close()
    log = read_log(tmp_path)
    assert log.health["step"].tolist() == [10, 20, 30, 30]
    assert np.isnan(log.health["depth_ratio"]).tolist() == [True, True, True, False]
    assert log.health["relative_change"].tolist() == [2e-3] * 4
    assert log.latest_health() == HEALTH
    assert log.unreadable == 0
    lines = (tmp_path / "gns.jsonl").read_text().splitlines()
    record = json.loads(lines[-1])
    assert (record["kind"], record["schema"]) == ("health", 2)
    assert list(record)[-1] == "groups"
    assert record["groups"]["grad_norm"] == [2.0, 1.5]
    assert record["groups"]["relative_change"] == [1e-3, None]
    assert Health.from_json(json.loads(json.dumps(HEALTH.to_json()))) == HEALTH


def test_groups_are_a_mapping():
    layers = Layers.of(HEALTH.groups)
    assert dict(layers) == HEALTH.groups
    assert "absent" not in layers
    with pytest.raises(KeyError):
        layers["absent"]
    assert list(layers.take(np.array([False, True]))) == ["head"]


def test_a_run_writes_its_health_everywhere(tmp_path):
    model, *batch = net(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"diagnostics": True, "clip": 0.5, "norm_bound": 0.5, "sinks": ["tensorboard"]}
    with watch(model, optimizer, run_dir=tmp_path, **settings) as gns:
        for _ in range(12):
            optimizer.zero_grad()
            net_loss(model, batch).backward()
            optimizer.step()
    log = read_log(tmp_path)
    assert log.latest_health() == gns.health
    assert log.health["step"].tolist() == list(range(12))
    read = events(tmp_path)
    expected = health_scalars(gns.health)
    assert {k: read.Scalars(k)[-1].value for k in expected} == pytest.approx(expected)
    assert {"gns/health/relative_change", "gns/layer/up/grad_share"} <= expected.keys()
    assert [e.step for e in read.Scalars("gns/health/above_bound")] == list(range(12))
    report = summarise(log)
    assert [s.title for s in report.sections][-2:] == ["Layer health", "Advice"]
    out = io.StringIO()
    render(Console(file=out, width=160), report)
    for expected in (
        f"Clipping at 0.5 by the global norm would multiply this step by "
        f"{gns.health.clip_factor:.3g}, and act in {gns.health.clip_share:.0%} of the 12 measured",
        "Gradient of the last layers (head) over the first (conv), rms:",
        f"The step changed the weights by {gns.health.relative_change:.3g} (mean |dw/w|)",
        f"norm is above 0.5: {gns.health.above_bound:.1%} of this step's.",
        "share of its square",
    ):
        assert expected in out.getvalue()
    assert "Warning" not in out.getvalue()


def test_keys_of_absent_numbers_are_left_out():
    keys = health_scalars(replace(HEALTH, depth_ratio=None, change_ratio=math.nan))
    assert keys["gns/health/grad_norm"] == 2.5
    assert keys["gns/layer/conv/clip_share"] == 0.75
    absent = {"health/depth_ratio", "health/change_ratio", "layer/head/relative_change"}
    assert not {f"gns/{key}" for key in absent} & keys.keys()


def test_wandb(tmp_path):
    rows, _, _ = wandb_run(
        tmp_path,
        """
        from test_health import HEALTH
        run = wandb.init(project="theirs")
        sink = open_sink("wandb")
        sink.start(HEADER, 0)
        sink(at(30))
        sink.health(HEALTH)
        run.log({"loss": 1.0})
        summary = {}
        run.finish()
        """,
    )
    (row,) = [r for r in rows if "gns/health/grad_norm" in r]
    assert (row["gns/step"], row["gns/health/grad_norm"], row["gns/b_simple"]) == (30, 2.5, 340)
    assert row["gns/layer/conv/relative_change"] == 1e-3


def words(**changes):
    return " ".join(layer_health(replace(HEALTH, **changes)))


def test_health_in_words():
    said = words()
    assert "leave 60.0% of this step's norm, turned to a cosine of 0.9" in said
    assert "the fastest layer changed 12 times as much as the slowest" in said
    assert "above 3: 12.5% of this step's" in said
    assert "Warning" not in said
    assert "Warning: vanishing gradients: that is above 100." in words(depth_ratio=101.0)
    assert "Warning: exploding gradients: that is below 1/100." in words(depth_ratio=0.0099)
    assert "Warning" not in words(depth_ratio=100.0)
    assert "vanished before the first layers (conv)" in words(depth_ratio=None)
    said = words(clip_factor=None, first=(), relative_change=None, notes={"above_bound": "why"})
    assert "Clipping" not in said
    assert "rms" not in said
    assert "Examples above the norm bound: why." in said


@pytest.mark.parametrize(("gain", "kind"), [(0.25, "vanishing"), (4.0, "exploding")])
def test_a_deep_linear_net_vanishes_or_explodes(gain, kind, tmp_path):
    """Each of 8 layers multiplies what goes back by its gain, and what comes in by the same.

    With equal weights W = gain I, dL/dW_l is the same for all; so inputs are normalised between.
    """
    torch.manual_seed(0)
    layers = []
    for _ in range(8):
        linear = nn.Linear(6, 6, bias=False)
        nn.init.orthogonal_(linear.weight, gain=gain)
        layers += [linear, Normalised(gain)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer, diagnostics=True, run_dir=tmp_path) as gns:
        (model(torch.randn(5, 6)) * torch.randn(5, 6)).sum(1).mean().backward()
        optimizer.step()
    # two and two layers of eight lie six apart, so that the mean squares differ by gain to the 12th
    assert gns.health.depth_ratio == pytest.approx(gain**-6, rel=1e-4)
    assert (gns.health.first, gns.health.last) == (("0", "2"), ("12", "14"))
    assert f"Warning: {kind} gradients" in " ".join(summarise(read_log(tmp_path)).sections[-2].text)


class Normalised(nn.Module):
    """x / gain going forward, as it is going back."""

    def __init__(self, gain):
        super().__init__()
        self.gain = gain

    def forward(self, x):
        return x + (x / self.gain - x).detach()


# several ranks


def on_ranks(rank, kind):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    alone = copy.deepcopy(model)
    wrapped = model
    if kind == "ddp":
        wrapped = DDP(model)
    else:
        fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other = torch.optim.SGD(alone.parameters(), lr=0.1)
    x, y = torch.randn(8, 6).double(), torch.randint(4, (8,))
    dist.broadcast(x, 0)
    dist.broadcast(y, 0)
    settings = {"diagnostics": True, "clip": 0.05, "norm_bound": 0.1}
    with watch(wrapped, optimizer, run_dir="ranks", **settings) as gns:
        for _ in range(2):
            optimizer.zero_grad()
            other.zero_grad()
            net_loss(wrapped, (x[4 * rank :][:4], y[4 * rank :][:4])).backward()
            net_loss(alone, (x, y)).backward()
            norms = by_layer(alone, [p.grad.square().sum() for p in alone.parameters()])
            before = [p.detach().clone() for p in alone.parameters()]
            optimizer.step()
            other.step()
            moved = [
                ((a - b) / b).abs().flatten()
                for a, b in zip(alone.parameters(), before, strict=True)
            ]
        health = gns.health
        assert health.grad_norm == pytest.approx(math.sqrt(sum(norms.values())))
        for name, group in health.groups.items():
            assert group.grad_norm == pytest.approx(math.sqrt(norms[name]))
        assert "not gathered over ranks" in health.notes["above_bound"]
        if kind == "ddp":
            assert health.relative_change == pytest.approx(float(torch.cat(moved).mean().detach()))
            assert "relative_change" not in health.notes
        else:
            half = torch.cat([m.reshape(2, -1)[rank] for m in moved])  # of dimension 0, all even
            assert health.relative_change == pytest.approx(float(half.mean().detach()))
            assert "this rank's shards" in health.notes["relative_change"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks(kind, tmp_path):
    in_processes(on_ranks, kind, folder=tmp_path)
    assert len(read_log(tmp_path / "ranks").health) == 2
