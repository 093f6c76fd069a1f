"""Every source on several ranks against one process with the same global batch, in real ones."""

import copy
import json
import warnings
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks_worker import in_processes
from test_microbatch import gradients
from test_monitor import Checkpointed, T, Tiny, brute, loss_of, watch
from test_ranks import batches
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel as DDP

D = torch.float64
METHODS = [
    "pepgns",
    "sogns",
    "sketch",
    "norm_layers",
    "microbatch",
    "pepgns+microbatch",
]
SIZES = [[2, 1], [1, 2], [2, 2], [1, 1]]  # of the microbatches of each rank


@pytest.fixture
def processes(tmp_path):
    return lambda fn, *args, **options: in_processes(fn, *args, folder=tmp_path, **options)


def tiny(dtype=D, kind=Tiny):
    torch.manual_seed(1)
    return kind().to(dtype)


def descent(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


class Plain(Tiny):
    """Without the in-place operation that fully_shard warns of, and parallel layers refuse."""

    def __init__(self, **given):
        super().__init__(**given)
        self.relu = nn.ReLU()


def share(model, micro, examples):
    """A microbatch's part of the mean over all examples."""
    return loss_of(model, micro) * len(micro[0]) / examples


def seen(gns):
    """All that ranks must agree on, and one process with them."""
    return {
        method: [
            gns.reading.step,
            reading.examples,
            reading.coverage,
            sorted(gns.coverage(method).missing),
            reading.raw.big_sq_norm,
            reading.raw.parts_sq_norm,
            reading.raw.sum_sq_weights,
            reading.raw.grad_sq_norm,
            reading.raw.tr_sigma,
            reading.grad_sq_norm,
            reading.tr_sigma,
            reading.b_simple,
            {name: [g.raw.tr_sigma, g.raw.grad_sq_norm] for name, g in reading.groups.items()},
        ]
        for method, reading in gns.readings.items()
    }


def in_one_process(sizes, *, steps=3, methods=METHODS, dtype=D, kind=Tiny):
    """What one process sees of the microbatches of all ranks, and the gradients of each step."""
    model = tiny(dtype, kind)
    optimizer = descent(model)
    micros = [micro for own in batches(sizes) for micro in own]
    examples = sum(map(sum, sizes))
    found, grads = [], []
    with watch(model, optimizer, method=methods) as gns:
        for _ in range(steps):
            optimizer.zero_grad()
            for micro in micros:
                share(model, micro, examples).backward()
            grads.append([p.grad.clone() for p in model.parameters()])
            optimizer.step()
            found.append(seen(gns))
    return found, grads


def agree(gns):
    """All ranks see the same, to the last bit."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, json.dumps([seen(gns), dict(gns.skipped), gns.state_dict()]))
    assert len(set(everyone)) == 1


def assert_same(found, expected, rtol=1e-9):
    assert found.keys() == expected.keys()
    for method in expected:
        *some, groups = found[method]
        *others, of_groups = expected[method]
        for a, b in [*zip(some, others, strict=True)]:
            assert a == (b if isinstance(b, (list, type(None))) else pytest.approx(b, rel=rtol)), (
                method
            )
        assert groups.keys() == of_groups.keys()
        for name in groups:
            assert groups[name] == pytest.approx(of_groups[name], rel=100 * rtol, abs=rtol)


# DistributedDataParallel.


def step_of_ddp(wrapped, optimizer, own, examples, *, synced=False):
    optimizer.zero_grad()
    for j, micro in enumerate(own):
        with nullcontext() if synced or j == len(own) - 1 else wrapped.no_sync():
            (dist.get_world_size() * share(wrapped, micro, examples)).backward()


def ddp(rank, sizes, given, options, expected, synced):
    own, examples = batches(sizes)[rank], sum(map(sum, sizes))
    runs = []
    for monitored in (False, True):
        model = tiny()
        gns = watch(model, opt := descent(model), method=METHODS) if given == "before" else None
        wrapped = DDP(model, **options)
        if given != "before":
            opt = descent(model)
            if monitored:
                gns = watch({"wrapper": wrapped, "inner": model}[given], opt, method=METHODS)
        elif not monitored:
            gns.close()
        grads = []
        for step in range(len(expected)):
            step_of_ddp(wrapped, opt, own, examples, synced=synced)
            grads += [p.grad.clone() for p in model.parameters()]
            opt.step()
            if monitored:
                assert_same(seen(gns), expected[step])
                agree(gns)
        if monitored:
            assert not gns.skipped
            assert gns.coverage().fraction == 1
            gns.close()
        runs.append(grads)
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


DDP_OPTIONS = {
    "buckets": {"gradient_as_bucket_view": False},
    "views": {"gradient_as_bucket_view": True},
    "static": {"static_graph": True},
    "unused": {"find_unused_parameters": True},
}


@pytest.mark.parametrize("given", ["wrapper", "inner", "before"])
@pytest.mark.parametrize("options", DDP_OPTIONS)
def test_ddp_is_one_process(processes, options, given):
    expected, _ = in_one_process(SIZES[:2])
    # A static graph wants its first backward synchronised.
    processes(ddp, SIZES[:2], given, DDP_OPTIONS[options], expected, options == "static")


def test_four_ranks_of_ddp(processes):
    expected, _ = in_one_process(SIZES)
    processes(ddp, SIZES, "wrapper", {"gradient_as_bucket_view": True}, expected, False, ranks=4)


def by_brute_force(rank):
    model = tiny()
    wrapped, opt = DDP(model), descent(model, lr=0.0)
    data = batches(SIZES[:2])
    with watch(wrapped, opt, method=["pepgns", "subbatch"]) as gns:
        step_of_ddp(wrapped, opt, data[rank], 6)
        opt.step()
    whole = [torch.cat(t) for t in zip(*(micro for own in data for micro in own), strict=True)]
    big, parts = brute(model, whole)
    raw = gns.readings["pepgns"].raw
    assert raw.big_sq_norm == pytest.approx(big, rel=1e-9)
    assert raw.parts_sq_norm == pytest.approx(parts, rel=1e-9)
    assert raw.sum_sq_weights == pytest.approx(1 / 6)
    u = gradients(model, partial(share, examples=6), [micro for own in data for micro in own])
    squares = u.square().sum(1).tolist()
    # The first microbatch of a rank stands for all of the rank.
    raw = gns.readings["subbatch"].raw
    assert raw.parts_sq_norm == pytest.approx(squares[0] * 3 / 2 + squares[2] * 3 / 1, rel=1e-9)
    assert raw.sum_sq_weights == pytest.approx((2 * 3 + 1 * 3) / 36)


def test_two_ranks_are_brute_force(processes):
    processes(by_brute_force)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))

    def forward(self, x, expert):
        return self.experts[expert](x)


def unused(rank):
    """Each rank has an expert of its own, and nobody the third."""
    torch.manual_seed(1)
    model = Experts().to(D)
    wrapped, opt = DDP(model, find_unused_parameters=True), descent(model)
    x = torch.randn(2, 3, 4, dtype=D)
    with watch(wrapped, opt, groups="total") as gns:
        for _ in range(2):
            opt.zero_grad()
            wrapped(x[rank], rank).sin().sum().backward()
            u = torch.stack(
                [
                    torch.cat([g.flatten() for g in of_one]) / 2
                    for r in (0, 1)
                    for row in x[r]
                    for of_one in [
                        torch.autograd.grad(
                            model(row[None], r).sin().sum(),
                            list(model.parameters()),
                            materialize_grads=True,
                        )
                    ]
                ]
            )
            opt.step()
            raw = gns.reading.raw
            assert raw.big_sq_norm == pytest.approx(float(u.sum(0).square().sum()), rel=1e-9)
            assert raw.parts_sq_norm == pytest.approx(float(u.square().sum()), rel=1e-9)
            why = "no gradient in this step"
            assert gns.coverage().missing == {f"experts.2.{n}": why for n in ("weight", "bias")}
            agree(gns)


def test_parameters_that_one_rank_or_none_uses(processes):
    processes(unused)


def weighted(rank):
    """A mean over the tokens of all ranks, whose sequences have lengths of their own."""
    model = tiny()
    wrapped, opt = DDP(model), descent(model, lr=0.0)
    lengths = torch.tensor([[5, 1], [3, 4]])
    data = batches([[2], [2]])
    masked = [
        (ids, y.masked_fill(torch.arange(T) >= n[:, None], -100))
        for ((ids, y),), n in zip(data, lengths, strict=True)
    ]
    with watch(wrapped, opt, method=["pepgns", "microbatch"]) as gns:
        opt.zero_grad()
        gns.weigh(lengths[rank])
        (2 * loss_of(wrapped, masked[rank], "sum") / 13).backward()
        opt.step()
        each = [tuple(t[i : i + 1] for t in micro) for micro in masked for i in range(2)]
        u = gradients(model, lambda m, micro: loss_of(m, micro, "sum") / 13, each)
        raw = gns.reading.raw
        assert raw.big_sq_norm == pytest.approx(float(u.sum(0).square().sum()), rel=1e-9)
        assert raw.parts_sq_norm == pytest.approx(float(u.square().sum()), rel=1e-9)
        assert raw.sum_sq_weights == pytest.approx((25 + 1 + 9 + 16) / 169)
        assert gns.reading.tokens == 13
        assert gns.readings["microbatch"].raw.sum_sq_weights == pytest.approx((36 + 49) / 169)
        agree(gns)


def test_weights_are_those_of_all_ranks(processes):
    processes(weighted)


# One sum; and where something is wrong on one rank.


def counted(rank, kind):
    """One all_reduce a measured step, none on others; neither wrapper calls one in Python."""
    calls, all_reduce = [], dist.all_reduce

    def counting(tensor, *args, **kwargs):
        calls.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    model = tiny(kind=Plain)
    wrapped, take_step = spread(model, kind)
    opt = descent(model)
    own = batches(SIZES[:2])[rank]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counting)
        with watch(wrapped, opt, method=[*METHODS, "subbatch", "ranks"], every=3) as gns:
            calls.clear()  # whether all attach alike
            after = []
            for _ in range(7):
                take_step(wrapped, opt, own, 6)
                opt.step()
                after.append(len(calls))
            assert after == [1, 1, 1, 2, 2, 2, 3]
            assert not gns.skipped
            assert gns.readings["ranks"].raw == gns.readings["microbatch"].raw


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_one_sum_a_measured_step_for_all_sources(processes, kind):
    processes(counted, kind)


def paced(rank, where):
    """Clocks that differ, a step that one rank cannot measure, another batch; one sum each."""
    calls, all_reduce = [], dist.all_reduce

    def counting(tensor, *args, **kwargs):
        calls.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    generator, now = torch.Generator().manual_seed(rank), [0.0]
    model = tiny()
    wrapped, opt = DDP(model), descent(model)
    measured = []
    with (
        warnings.catch_warnings(),
        pytest.MonkeyPatch.context() as patch,
        watch(wrapped, opt, every="auto", overhead=0.05, strict=False) as gns,
    ):
        warnings.simplefilter("ignore", RuntimeWarning)
        gns._clock._clock = lambda: now[0]
        patch.setattr(dist, "all_reduce", counting)
        for step in range(300):
            due = gns._sources[0][0].wanted
            jitter = float(torch.rand((), generator=generator))
            now[0] += (1 + 2 * rank) * (1 + 0.5 * due + 0.1 * jitter)
            own = batches([[2], [2]] if step < 150 else [[3], [2]])[rank][0]
            loss = broken(gns, own) if due and (rank, len(measured)) == (where, 3) else loss_of
            measured += [step] * due
            opt.zero_grad()
            loss(wrapped, own).backward()
            opt.step()
            assert len(calls) == len(measured)
        assert gns.skipped == {"fault": 1}
        assert gns.reading.step == measured[-1]
        assert 15 + 240 / 15 < len(measured) < 15 + 240 / 7
        agree(gns)  # the plan among all else
    everyone = [None, None]
    dist.all_gather_object(everyone, measured)
    assert everyone[0] == everyone[1]


@pytest.mark.parametrize("where", [0, 1])
def test_all_ranks_measure_the_same_steps_whatever_their_clocks_say(processes, where):
    processes(paced, where)


def bypassed(model, gns):
    """A weight used behind its layer's back, on this rank alone."""
    return lambda m, micro: loss_of(m, micro) + 0.1 * model.up.weight.square().sum()


def hooked(model, gns):
    handle = model.down.weight.register_hook(lambda g: g.clamp(-1e-4, 1e-4))
    return lambda m, micro: (loss_of(m, micro), handle)[0]


def left_out(rank, where):
    for trouble, names in ((bypassed, {"up.weight"}), (hooked, {"down.weight"})):
        model = tiny()
        wrapped, opt = DDP(model), descent(model)
        own = batches([[2], [2]])[rank][0]
        with watch(wrapped, opt, method=["pepgns", "sketch"]) as gns:
            loss = trouble(model, gns) if rank == where else loss_of
            opt.zero_grad()
            loss(wrapped, own).backward()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                opt.step()
            assert set(gns.coverage().missing) == names
            agree(gns)


@pytest.mark.parametrize("where", [0, 1])
def test_what_one_rank_spoils_is_left_out_on_all(processes, where):
    processes(left_out, where)


def known_on_one_rank(rank):
    model = tiny()
    wrapped, opt = DDP(model), descent(model)
    with watch(wrapped, opt) as gns:
        opt.zero_grad()
        loss_of(wrapped, batches([[2], [2]])[rank][0]).backward()
        if rank:
            gns._sources[0][0].taps.layers[1].reason = "norm: lost"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opt.step()
        why = "norm: lost" if rank else "it was left out on another rank, as it says there"
        assert gns.coverage().missing == {"norm.weight": why, "norm.bias": why}
        agree(gns)


def test_a_reason_of_one_rank_holds_for_all(processes):
    processes(known_on_one_rank)


def infinite(gns, own):
    return lambda m, micro: loss_of(m, micro) * torch.inf


def two_forwards(gns, own):
    return lambda m, micro: loss_of(m, micro) + loss_of(m, micro)


def wrong_weights(gns, own):
    gns.weigh(torch.ones(9))
    return loss_of


def weights_on_one_rank(gns, own):
    gns.weigh(torch.ones(len(own[0])))
    return loss_of


def broken(gns, own):
    share_of_it, collector = gns._sources[0][0].share, gns._sources[0][0]

    def fails():
        share_of_it()
        collector.share = share_of_it
        raise RuntimeError("broken")

    collector.share = fails
    return loss_of


TROUBLES = {
    infinite: "nonfinite",
    two_forwards: "several passes",
    wrong_weights: "fault",
    weights_on_one_rank: "weights",
    broken: "fault",
}


def troubled(rank, where, kind):
    own = batches([[2], [2]])[rank][0]
    for trouble, reason in TROUBLES.items():
        if trouble is two_forwards and kind == "fsdp":
            continue  # whose ranks must gather as often as each other
        model = tiny(kind=Plain)
        if kind == "ddp":
            wrapped = DDP(model)
        else:
            shard(wrapped := model, "blocks")
        opt = descent(model)
        with (
            warnings.catch_warnings(record=True) as told,
            watch(wrapped, opt, strict=False, method=["pepgns", "sogns"]) as gns,
        ):
            warnings.simplefilter("always", RuntimeWarning)
            for step in range(4):
                before = copy.deepcopy(model.state_dict())
                loss = trouble(gns, own) if (step, rank) == (1, where) else loss_of
                opt.zero_grad()
                loss(wrapped, own).backward()
                opt.step()
                if step == 1:
                    model.load_state_dict(before)
            assert gns.skipped == {reason: 1}, trouble.__name__
            assert (gns.reading.step, gns.reading.coverage) == (3, 1)
            agree(gns)
        if rank != where and reason not in ("nonfinite", "weights"):
            assert f"rank {where} could not measure it ({reason})" in str(told[0].message)


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_all_ranks_skip_what_one_cannot_measure(processes, kind, where):
    processes(troubled, where, kind)


def written(rank):
    model = tiny()
    wrapped, opt = DDP(model), descent(model)
    readings = []
    with watch(wrapped, opt, sinks=[readings.append], run_dir="run") as gns:
        for _ in range(3):
            opt.zero_grad()
            loss_of(wrapped, batches([[2], [2]])[rank][0]).backward()
            opt.step()
    assert len(readings) == (0 if rank else 3)
    assert (gns.run_dir is None) == bool(rank)


def test_the_first_rank_writes(processes, tmp_path):
    processes(written)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["gns.jsonl"]


def different(rank):
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(1 + rank)))
    with pytest.raises(ValueError, match="expected the same model and the same settings on all"):
        watch(model, descent(model))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ValueError, match="expected the same model and the same settings on all"):
        watch(tiny(), None, every=1 + rank)


def mistyped(rank):
    with pytest.raises(ValueError, match="expected a sink as one of"):
        watch(model := tiny(), descent(model), sinks=["tensorbord"])


def test_a_mistake_in_the_settings_is_found_on_all_ranks(processes):
    processes(mistyped)


def test_ranks_that_differ_are_refused(processes):
    """As the stages of a pipeline; or one that measures other steps, for which all would wait."""
    processes(different)


def own_probes(rank):
    """Errors of sketches average over ranks; the proof has one direction on all."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(D)
    with watch(DDP(model), descent(model), method="sketch", subspace=2) as gns:
        taps = gns._sources[0][0].taps
        mine = [s.probes.tolist() for s in taps.sketches.values()]
        shared = [d.signs.tolist() for d in taps.directions.values()]
    everyone = [None, None]
    dist.all_gather_object(everyone, (mine, shared))
    assert everyone[0][0] != everyone[1][0]
    assert everyone[0][1] == everyone[1][1]


def test_each_rank_draws_probes_of_its_own(processes):
    processes(own_probes)


def sketched(rank):
    """The sketch of all ranks is unbiased, and as far off as its variance says."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(D)
    wrapped, opt = DDP(model), descent(model, lr=0.0)
    x = torch.randn(2, 4, 12, 64, dtype=D)[rank]
    errors, variances = [], []
    with watch(wrapped, opt, method=["pepgns", "sketch"], subspace=2) as gns:
        for sketch in gns._sources[0][0].taps.sketches.values():
            sketch.passes = 0  # layers as small as these would be exact
        for _ in range(60):
            opt.zero_grad()
            wrapped(x).sin().mean().backward()
            opt.step()
            exact, drawn = (gns._methods[m].last for m in ("pepgns", "sketch"))
            errors.append(float(drawn.parts_sq_norm.sum() - exact.parts_sq_norm.sum()))
            variances.append(float(drawn.parts_variance.sum()))
            agree(gns)
    errors, variance = torch.tensor(errors), sum(variances) / len(variances)
    assert abs(float(errors.mean())) < 4 * (variance / len(errors)) ** 0.5
    assert variance > 0
    assert 0.5 < float(errors.square().mean()) / variance < 1.7


def test_the_sketch_of_all_ranks_is_as_good_as_it_says(processes):
    processes(sketched)


def calibrated(rank, expected):
    model = tiny()
    wrapped, opt = DDP(model), descent(model)
    own = batches(SIZES[:2])[rank]
    with watch(wrapped, opt, method=["sogns", "norm_layers"], calibrate_every=2) as gns:
        for _ in range(4):
            step_of_ddp(wrapped, opt, own, 6)
            opt.step()
            agree(gns)
    assert_same(seen(gns), expected)


def test_calibrations_are_those_of_one_process(processes):
    model = tiny()
    opt = descent(model)
    micros = [micro for own in batches(SIZES[:2]) for micro in own]
    with watch(model, opt, method=["sogns", "norm_layers"], calibrate_every=2) as gns:
        for _ in range(4):
            opt.zero_grad()
            for micro in micros:
                share(model, micro, 6).backward()
            opt.step()
    processes(calibrated, seen(gns))


class CheckpointedPlain(Checkpointed):
    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()


def recomputed(rank, expected, kind):
    model = tiny(kind=CheckpointedPlain)
    wrapped, take_step = spread(model, kind)
    opt = descent(model)
    own = batches(SIZES[:2])[rank]
    with watch(wrapped, opt, method=METHODS) as gns:
        for of_step in expected:
            take_step(wrapped, opt, own, 6)
            opt.step()
            assert_same(seen(gns), of_step)
            agree(gns)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_checkpoints(processes, kind):
    expected, _ = in_one_process(SIZES[:2], kind=CheckpointedPlain)
    processes(recomputed, expected, kind)


# fully_shard (FSDP2).


BLOCKS = ("norm", "up", "down")


def shard(model, kind, **options):
    """Each block and the root, or the root alone."""
    # Of a Linear by itself, which returns a view; with a monitor it does not.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    if kind == "blocks":
        for block in map(model.get_submodule, BLOCKS):
            fully_shard(block, **options)
    fully_shard(model, **options)


def step_of_fsdp(model, optimizer, own, examples, *, synced=False, clip=False, whole=False):
    optimizer.zero_grad()
    for j, micro in enumerate(own):
        last = j == len(own) - 1
        model.set_requires_gradient_sync(synced or last)
        model.set_reshard_after_backward(last or not whole)
        (dist.get_world_size() * share(model, micro, examples)).backward()
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def spread(model, kind):
    """The model as DDP or FSDP2 has it, and how it takes a step."""
    if kind == "ddp":
        return DDP(model), step_of_ddp
    shard(model, "blocks")
    return model, step_of_fsdp


def local_grads(model):
    return [p.grad.to_local().clone() for p in model.parameters()]


def fsdp(rank, sizes, kind, before, synced, expected, options, mesh, width):
    own, examples = batches(sizes)[rank], sum(map(sum, sizes))
    if mesh:
        options = {**options, "mesh": init_device_mesh("cpu", mesh, mesh_dim_names=("r", "s"))}
    runs = []
    for monitored in (False, True):
        model = tiny(kind=partial(Plain, width=width))
        gns = watch(model, None, method=METHODS) if monitored and before else None
        shard(model, kind, **options)
        opt = descent(model)
        if gns:
            opt.register_step_post_hook(lambda *_, gns=gns: gns.commit())
        elif monitored:
            gns = watch(model, opt, method=METHODS)
        grads = []
        for step in range(len(expected)):
            step_of_fsdp(model, opt, own, examples, synced=synced)
            grads += local_grads(model)
            opt.step()
            if gns:
                assert not gns.skipped
                assert gns.coverage().missing == {}
                assert_same(seen(gns), expected[step])
                agree(gns)
        if gns:
            gns.close()
        runs.append(grads)
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def against_one_process(processes, sizes, kind="blocks", before=False, synced=False, **given):
    width = given.get("width", 8)
    expected, _ = in_one_process(sizes, kind=partial(Plain, width=width))
    processes(
        fsdp,
        sizes,
        kind,
        before,
        synced,
        expected,
        given.get("options", {}),
        given.get("mesh"),
        width,
        ranks=len(sizes),
    )


@pytest.mark.parametrize("synced", [False, True], ids=["accumulated", "synced"])
@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("kind", ["blocks", "root"])
def test_fsdp_is_one_process(processes, kind, before, synced):
    against_one_process(processes, SIZES[:2], kind, before, synced)


@pytest.mark.parametrize("reshard", [False, True])
def test_fsdp_that_reshards_after_forward_or_not(processes, reshard):
    against_one_process(processes, SIZES[:2], options={"reshard_after_forward": reshard})


def test_four_ranks_of_fsdp_with_uneven_and_empty_shards(processes):
    """Eleven rows are 3, 3, 3 and 2; three are 1, 1, 1 and none."""
    against_one_process(processes, SIZES, width=3)


def test_hybrid_shards(processes):
    against_one_process(processes, SIZES, mesh=(2, 2))


def now(found):
    """What is of one step alone."""
    return {method: [*of[1:3], *of[4:9]] for method, of in found.items()}


def loops(rank, expected):
    """Clipping, batches thrown away in both ways, parameters kept whole between microbatches."""
    own = batches(SIZES[:2])[rank]
    model = tiny(kind=Plain)
    shard(model, "blocks")
    opt = descent(model, lr=0.0)
    with watch(model, opt, method=METHODS) as gns:
        for number in range(5):
            if number in (2, 3):
                model.set_requires_gradient_sync(True)
                loss_of(model, own[0]).backward()
                opt.zero_grad(set_to_none=number == 2)
            step_of_fsdp(
                model, opt, own, 6, synced=number == 3, clip=number == 1, whole=number == 4
            )
            opt.step()
            assert not gns.skipped
            assert gns.coverage().missing == {}
            for method, values in now(seen(gns)).items():
                assert values == pytest.approx(now(expected[0])[method], rel=1e-9), (number, method)
            agree(gns)


def test_loops_of_fsdp(processes):
    processes(loops, in_one_process(SIZES[:2], steps=1)[0])


def half(rank):
    """Computed in bfloat16, reduced and kept in float32."""
    data = batches([[4, 4], [4, 4]])
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = tiny(torch.float32, Plain)
    twin = copy.deepcopy(model).double()
    shard(model, "blocks", mp_policy=policy)
    opt = descent(model, lr=0.0)
    methods = ["pepgns", "sketch", "microbatch"]
    with watch(model, opt, method=methods) as gns:
        for synced in (False, True):
            step_of_fsdp(model, opt, data[rank], 16, synced=synced)
            big = sum(
                float(p.grad.full_tensor().double().square().sum()) for p in model.parameters()
            )
            opt.step()
            assert not gns.skipped
            assert gns.coverage().missing == {}
            micros = [micro for own in data for micro in own]
            u = gradients(twin, partial(share, examples=16), micros)
            whole = [torch.cat(t) for t in zip(*micros, strict=True)]
            for method, parts in (
                ("pepgns", brute(twin, whole)[1]),
                ("sketch", brute(twin, whole)[1]),
                ("microbatch", float(u.square().sum())),
            ):
                raw = gns.readings[method].raw
                assert raw.big_sq_norm == pytest.approx(big, rel=1e-5)
                assert raw.parts_sq_norm == pytest.approx(parts, rel=2e-2)
            agree(gns)


def test_mixed_precision_of_fsdp(processes):
    processes(half)


def compiled(rank, expected):
    """Each block compiled, before or after it is sharded."""
    warnings.simplefilter("ignore")  # of dynamo's own
    own = batches(SIZES[:2])[rank]
    for late in (False, True):
        torch._dynamo.reset()
        model = tiny(kind=Plain)
        gns = watch(model, None, method=["pepgns", "sogns", "sketch", "microbatch"])
        for block in map(model.get_submodule, BLOCKS):
            if not late:
                block.compile(backend="aot_eager")
            fully_shard(block)
            if late:
                block.compile(backend="aot_eager")
        fully_shard(model)
        opt = descent(model)
        for step in range(2):
            step_of_fsdp(model, opt, own, 6)
            opt.step()
            gns.commit()
            assert not gns.skipped
            assert gns.coverage().missing == {}
            assert_same({k: of for k, of in seen(gns).items() if k != "microbatch"}, expected[step])
            agree(gns)
            # Which would have to be found in the model while their layer runs.
            unseen = gns.coverage("microbatch").missing
            assert set(unseen) <= {f"{b}.{n}" for b in BLOCKS for n in ("weight", "bias")}
            assert all("could not be seen" in why for why in unseen.values())
        gns.close()


def test_compiled_blocks_of_fsdp(processes):
    expected, _ = in_one_process(SIZES[:2], steps=2, methods=["pepgns", "sogns", "sketch"])
    processes(compiled, expected)


def replayed(rank):
    """A layer without a rule is run again while its parameters are whole."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 4), Scale(), nn.Linear(4, 4)).to(D)
    x = torch.randn(2, 3, 4, dtype=D)
    u = gradients(
        model, lambda m, row: m(row).sin().sum() / 24, [row[None] for row in x.flatten(0, 1)]
    )
    for block in model:
        fully_shard(block)
    fully_shard(model)
    opt = descent(model)
    with watch(model, opt) as gns:
        opt.zero_grad()
        model(x[rank]).sin().mean().backward()
        opt.step()
        raw = gns.reading.raw
        assert raw.big_sq_norm == pytest.approx(float(u.sum(0).square().sum()), rel=1e-9)
        assert raw.parts_sq_norm == pytest.approx(float(u.square().sum()), rel=1e-9)
        assert gns.coverage().missing == {}
        agree(gns)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * self.scale


def test_a_layer_without_a_rule_in_shards(processes):
    processes(replayed)


def divided(rank):
    """A mean over another number than that of the ranks: nothing is guessed."""
    model = tiny(kind=Plain)
    fully_shard(model)
    model.set_gradient_divide_factor(1.0)
    opt = descent(model)
    with watch(model, opt, method=["pepgns", "ranks"]) as gns:
        with pytest.warns(RuntimeWarning, match="do not add up to .grad .off by.*mean over"):
            step_of_fsdp(model, opt, batches([[2], [2]])[rank], 4)
            opt.step()
        assert gns.skipped == {"nothing measured": 2}


def test_another_divide_factor_is_named(processes):
    processes(divided)


# What is refused.


def tensor_parallel(rank):
    def parallel(model):
        mesh = init_device_mesh("cpu", (2,))
        parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})

    model = tiny(kind=Plain)
    parallel(model)
    with pytest.raises(ValueError, match="up.weight is a DTensor that no fully_shard has made"):
        watch(model, descent(model))
    model = tiny(kind=Plain)
    with watch(model, None, strict=False) as gns:
        parallel(model)
        loss_of(model, batches([[2]])[0][0]).backward()
        with pytest.warns(RuntimeWarning, match="tensor parallel.*; supported are data-parallel"):
            gns.commit()
        assert gns.skipped == {"sharding": 1}
        assert gns.reading is None


def test_tensor_parallel_is_refused(processes):
    processes(tensor_parallel)


def both_parallel(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = tiny(kind=Plain)
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    for block in (model.up, model.down):
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    with pytest.raises(ValueError, match="supported are data-parallel ranks alone"):
        watch(model, descent(model))
    model = tiny(kind=Plain)
    fully_shard(model, mesh=mesh["dp"])
    with pytest.raises(ValueError, match="sharded over 2 of 4 ranks"):
        watch(model, descent(model))


def test_parallel_in_two_ways_is_refused(processes):
    processes(both_parallel, ranks=4)


def first_fsdp(rank):
    model = nn.Sequential(nn.Linear(2, 2))
    wrapped = type("FullyShardedDataParallel", (nn.Sequential,), {})(model)
    with pytest.raises(ValueError, match="is a FullyShardedDataParallel .FSDP1.; supported are"):
        watch(wrapped, descent(model))


def test_fsdp_of_the_first_kind_is_refused(processes):
    processes(first_fsdp)


# Resumed.


def going_on(rank, state, sizes, expected):
    model = tiny()
    wrapped, optimizer = DDP(model), descent(model, lr=0.0)
    with watch(wrapped, optimizer, method=["pepgns", "microbatch"]) as gns:
        gns.load_state_dict(json.loads(state))
        step_of_ddp(wrapped, optimizer, batches(sizes)[rank], sum(map(sum, sizes)))
        optimizer.step()
        assert_same(seen(gns), expected)
        agree(gns)


def test_a_run_goes_on_with_more_ranks_and_another_batch(processes):
    """From one process and six examples to two ranks and eleven; as if one process had gone on."""
    small, large = [[3, 3]], [[4, 2], [3, 2]]
    model = tiny()
    optimizer = descent(model, lr=0.0)
    with watch(model, optimizer, method=["pepgns", "microbatch"]) as gns:
        for sizes in (small, small, large):
            state = json.dumps(gns.state_dict())
            optimizer.zero_grad()
            for micro in [micro for own in batches(sizes) for micro in own]:
                share(model, micro, sum(map(sum, sizes))).backward()
            optimizer.step()
        expected = seen(gns)
    assert gns.reading.step == 2
    processes(going_on, state, large, expected)
