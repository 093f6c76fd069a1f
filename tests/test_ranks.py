"""Ranks as the small batches, in real processes: brute force, one sum a step, and nobody hangs."""

import copy
import json
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks_worker import in_processes
from test_microbatch import gradients
from test_monitor import VOCABULARY, Checkpointed, Reentrant, T, Tiny, loss_of, make, watch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from gnsmon.collectors import microbatch
from gnsmon.collectors.microbatch import every_part
from gnsmon.collectors.reduction import Ranks, over_ranks
from gnsmon.collectors.step import Columns, Share, Skipped

D = torch.float64
SIZES = [[2, 1, 3], [1, 4, 2], [2, 2, 1], [3, 1, 1]]  # of the microbatches of each rank


@pytest.fixture
def processes(tmp_path):
    return lambda fn, *args, **options: in_processes(fn, *args, folder=tmp_path, **options)


def tiny(lr=0.0, **options):
    """The same model on every rank, its wrapper, and an optimizer."""
    torch.manual_seed(1)
    model = Tiny().to(D)
    return model, DDP(model, **options), torch.optim.SGD(model.parameters(), lr=lr)


def batches(sizes):
    """The same microbatches of all ranks on every rank."""
    generator = torch.Generator().manual_seed(7)
    return [
        [tuple(torch.randint(0, VOCABULARY, (2, b, T), generator=generator)) for b in of_rank]
        for of_rank in sizes
    ]


def train(wrapped, optimizer, own, share, *, synced=False, clip=False):
    """A step of accumulation; `share(model, micro)` is a microbatch's part of the mean over all."""
    optimizer.zero_grad()
    for j, micro in enumerate(own):
        last = j == len(own) - 1
        with nullcontext() if last or synced else wrapped.no_sync():
            (dist.get_world_size() * share(wrapped, micro)).backward()
    if clip:
        nn.utils.clip_grad_norm_(wrapped.parameters(), 1e-3)
    optimizer.step()


def assert_reading(gns, u, weights, examples, *, coverage=1.0, rtol=1e-10):
    weights = np.asarray(weights, dtype=float) / np.sum(weights)
    a, q = float(u.sum(0).square().sum()), float(u.square().sum())
    p = float(np.square(weights).sum())
    raw, reading = gns.reading.raw, gns.reading
    assert (reading.step, reading.examples, reading.coverage) == (gns.step - 1, examples, coverage)
    assert raw.big_sq_norm == pytest.approx(a, rel=rtol)
    assert raw.parts_sq_norm == pytest.approx(q, rel=rtol)
    assert raw.sum_sq_weights == pytest.approx(p, rel=1e-12)
    assert raw.grad_sq_norm == pytest.approx((a - q) / (1 - p), rel=1e-9)
    assert raw.tr_sigma == pytest.approx(examples * (q - p * a) / (1 - p), rel=1e-9)


def share_of_all(examples, model, micro):
    return loss_of(model, micro) * len(micro[0]) / examples


def values(rank, options, sizes, given):
    """Both microbatches of each rank and ranks alone; hooks there, and not there, in turn."""
    for synced in (False, True):
        for parts in (1, 3):
            of_ranks = [own[:parts] for own in sizes]
            flat = [b for own in of_ranks for b in own]
            share = partial(share_of_all, sum(flat))

            model, wrapped, optimizer = tiny(**options)
            data = batches(of_ranks)
            if options.get("static_graph"):  # whose first backward DDP wants to be synchronised
                train(wrapped, optimizer, data[rank][:1], share)
            with watch(wrapped if given else model, optimizer, method="ranks", every=2) as gns:
                for step in range(5):
                    train(wrapped, optimizer, data[rank], share, synced=synced, clip=step > 1)
                    u = gradients(model, share, [micro for own in data for micro in own])
                    if step % 2 == 0:
                        assert_reading(gns, u, flat, sum(flat))
                assert gns.reading.step == 4
                assert not gns.skipped
                assert gns.coverage().covered == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("static_graph", [False, True])
@pytest.mark.parametrize("gradient_as_bucket_view", [False, True])
def test_norms_are_those_of_brute_force(processes, gradient_as_bucket_view, static_graph):
    options = {"gradient_as_bucket_view": gradient_as_bucket_view, "static_graph": static_graph}
    processes(values, options, SIZES[:2], not static_graph)


def test_four_ranks(processes):
    processes(values, {"gradient_as_bucket_view": True}, SIZES, True, ranks=4)


def weighted(rank, by_hand):
    """A mean over the tokens of all ranks, whose sequences have lengths of their own."""
    model, wrapped, optimizer = tiny()
    lengths = [[torch.tensor(n) for n in own] for own in (([5, 1], [2]), ([3, 4, 1], [1, 1]))]
    data = [
        [
            (ids, y.masked_fill(torch.arange(T) >= n[:, None], -100), n)
            for (ids, y), n in zip(own, of_own, strict=True)
        ]
        for own, of_own in zip(batches([[2, 1], [3, 2]]), lengths, strict=True)
    ]

    def share(model, micro):
        if by_hand and model is wrapped:
            gns.weigh(micro[2])
        return loss_of(model, micro[:2], "sum") / 18

    known = {tuple(i.flatten().tolist()): n for own in data for i, _, n in own}
    weights = None if by_hand else (lambda ids: known[tuple(ids.flatten().tolist())])
    with watch(wrapped, optimizer, method="ranks", weights=weights) as gns:
        train(wrapped, optimizer, data[rank], share)
        u = gradients(model, share, [micro for own in data for micro in own])
        assert_reading(gns, u, [6, 2, 8, 2], 8)
        assert gns.reading.tokens == 18


@pytest.mark.parametrize("by_hand", [False, True])
def test_weights_are_those_of_all_ranks(processes, by_hand):
    processes(weighted, by_hand)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))

    def forward(self, x, expert):
        return self.experts[expert](x)


def unused(rank, used, options):
    """Of three experts each rank uses those in `used[rank]`, one a microbatch."""
    torch.manual_seed(1)
    model = Experts().to(D)
    wrapped = DDP(model, find_unused_parameters=True, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    data = [[(torch.randn(3, 4, dtype=D), expert) for expert in own] for own in used]

    def share(model, micro):
        return model(*micro).sin().sum()

    with watch(wrapped, optimizer, method="ranks") as gns:
        for synced in (True, False):
            train(wrapped, optimizer, data[rank], share, synced=synced)
            u = gradients(model, share, [micro for own in data for micro in own])
            assert_reading(gns, u, [1] * len(u), 3 * len(u), coverage=pytest.approx(2 / 3))
            why = "no gradient in this step"
            assert gns.coverage().missing == {f"experts.2.{n}": why for n in ("weight", "bias")}


@pytest.mark.parametrize("gradient_as_bucket_view", [False, True])
@pytest.mark.parametrize("used", [[[0], [1]], [[0, 0], [1, 0]]], ids=["alone", "accumulated"])
def test_parameters_that_one_rank_or_none_uses(processes, used, gradient_as_bucket_view):
    processes(unused, used, {"gradient_as_bucket_view": gradient_as_bucket_view})


def recomputed(rank):
    for kind in (Checkpointed, Reentrant):
        torch.manual_seed(1)
        model = kind().to(D)
        wrapped = DDP(model, static_graph=kind is Reentrant, gradient_as_bucket_view=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        data, share = batches([[2, 3], [1, 2]]), partial(share_of_all, 8)
        with watch(wrapped, optimizer, method="ranks") as gns:
            for _ in range(2):
                train(wrapped, optimizer, data[rank], share, synced=True)
                u = gradients(model, share, [micro for own in data for micro in own])
                assert_reading(gns, u, [2, 3, 1, 2], 8)


def test_checkpoints(processes):
    processes(recomputed)


# Where something is wrong on one rank.


def mean_over_all(model, micro):
    return loss_of(model, micro) / dist.get_world_size()


def infinite(gns, own):
    return lambda model, micro: mean_over_all(model, micro) * torch.inf


def no_examples(gns, own):
    own[0] = tuple(t[:0] for t in own[0])
    return lambda model, micro: loss_of(model, micro, "sum")


def two_forwards(gns, own):
    return lambda model, micro: (loss_of(model, micro) + loss_of(model, micro)) / 4


def wrong_weights(gns, own):
    if gns:
        gns.weigh(torch.ones(9))
    return mean_over_all


def weights_on_one_rank(gns, own):
    if gns:
        gns.weigh(torch.ones(len(own[0][0])))
    return mean_over_all


def broken(gns, own):
    def fails(sq_norms, weights):
        microbatch.METHODS["ranks"] = every_part
        raise RuntimeError("broken")

    if gns:
        microbatch.METHODS["ranks"] = fails
    return mean_over_all


TROUBLES = {
    infinite: "nonfinite",
    no_examples: "examples unknown",
    two_forwards: "several passes",
    wrong_weights: "fault",
    weights_on_one_rank: "weights",
    broken: "fault",
}


def train_in_trouble(rank, trouble, where, monitored):
    """Five steps, the second with trouble on rank `where`: the gradients, and the monitor."""
    model, wrapped, optimizer = tiny(lr=0.1, gradient_as_bucket_view=True)
    gns = watch(wrapped, optimizer, method="ranks", strict=False) if monitored else None
    grads = []
    for step in range(5):
        own, before = batches([[2], [2]])[rank], copy.deepcopy(model.state_dict())
        share = trouble(gns, own) if (step, rank) == (1, where) else mean_over_all
        train(wrapped, optimizer, own, share)
        grads += [p.grad.clone() for p in model.parameters()]
        if step == 1:
            model.load_state_dict(before)  # which an infinite gradient has spoiled
    return grads, gns


def troubled(rank, where):
    for trouble, reason in TROUBLES.items():
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", RuntimeWarning)
            bare, _ = train_in_trouble(rank, trouble, where, False)
            watched, gns = train_in_trouble(rank, trouble, where, True)
        for a, b in zip(bare, watched, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        assert gns.skipped == {reason: 1}, trouble.__name__
        assert gns.reading.step == 4
        assert gns.reading.n_eff == pytest.approx(4, rel=0.01)
        if reason not in ("nonfinite", "weights") and rank != where:
            assert f"rank {where} could not measure it ({reason})" in str(told[0].message)
        gns.close()


@pytest.mark.parametrize("where", [0, 1])
def test_all_ranks_skip_what_one_cannot_measure(processes, where):
    """None hangs, all count the same reason and go on, and training is the same training."""
    processes(troubled, where)


class BrokenScaler:
    def get_scale(self):
        raise RuntimeError("broken")


def broken_after_the_sum(rank):
    model, wrapped, optimizer = tiny()
    scaler = BrokenScaler() if rank == 1 else None
    with watch(wrapped, optimizer, method="ranks", strict=False, scaler=scaler) as gns:
        for step in range(6):
            with warnings.catch_warnings():
                warnings.simplefilter("error" if step or not rank else "ignore")
                train(wrapped, optimizer, batches([[2], [2]])[rank], mean_over_all)
        assert gns.skipped == ({"fault": 6} if rank else {})


def test_a_rank_that_fails_alone_does_not_leave_the_others(processes):
    processes(broken_after_the_sum)


def strictly(rank):
    model, wrapped, optimizer = tiny()
    with watch(wrapped, optimizer, method="ranks") as gns:
        if rank:
            gns.weigh(torch.ones(9))
            with pytest.raises(ValueError, match="one for each of the 2 examples"):
                train(wrapped, optimizer, batches([[2], [2]])[rank], mean_over_all)
        else:
            with pytest.warns(RuntimeWarning, match=r"rank 1 could not measure it \(fault\)"):
                train(wrapped, optimizer, batches([[2], [2]])[rank], mean_over_all)


def test_a_strict_rank_raises_after_the_sum(processes):
    processes(strictly)


def unlike(rank):
    model, wrapped, optimizer = tiny()
    with pytest.raises(ValueError, match="same settings on all ranks.*those of rank 1 are not"):
        watch(wrapped, optimizer, method="ranks", every=1 + rank)
    given = wrapped if rank else model  # alike, whichever of the two
    with watch(given, optimizer, method="ranks", every=2) as gns:
        train(wrapped, optimizer, batches([[2], [2]])[rank], mean_over_all)
        assert gns.reading.coverage == 1


def test_ranks_that_would_not_meet_are_refused(processes):
    processes(unlike)


# What does not add up.


def apart(rank):
    model, _, _ = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer, method="ranks") as gns:
        optimizer.zero_grad()
        loss_of(model, batches([[2], [2]])[rank][0]).backward()
        with pytest.warns(RuntimeWarning, match="or never reduced.*DistributedDataParallel"):
            optimizer.step()
        assert gns.skipped == {"nothing measured": 1}
        assert gns.reading is None


def test_ranks_that_train_apart_are_told(processes):
    processes(apart)


def uncleared(rank, where):
    """Gradients of an earlier step are left on one rank, which DDP hands to all."""
    model, wrapped, optimizer = tiny()
    own = batches([[2], [2]])[rank]
    with watch(wrapped, optimizer, method="ranks") as gns:
        train(wrapped, optimizer, own, mean_over_all)
        if rank != where:
            optimizer.zero_grad()
        (2 * mean_over_all(wrapped, own[0])).backward()
        with pytest.warns(RuntimeWarning, match="not cleared since an earlier step"):
            optimizer.step()
        assert gns.skipped == {"nothing measured": 1}


def changed(rank):
    """A hook on one rank changes what its backward adds, after the monitor has seen it."""
    model, wrapped, optimizer = tiny()
    own, u = batches([[2], [2]])[rank], model.up.weight
    with watch(wrapped, optimizer, method="ranks", groups=lambda name: name) as gns:
        handle = u.register_hook(lambda g: g.clamp(-1e-3, 1e-3)) if rank else None
        expected = nullcontext()
        if not rank:
            expected = pytest.warns(RuntimeWarning, match="up.weight: .*a hook changes it, or it")
        with expected:
            train(wrapped, optimizer, own, mean_over_all)
        assert set(gns.coverage().missing) == {"up.weight"}
        assert "up.weight" not in gns.reading.groups
        if rank:
            handle.remove()
        train(wrapped, optimizer, own, mean_over_all)
        assert gns.reading.coverage == 1


def test_gradients_that_one_rank_spoils_are_left_out_on_all(processes):
    processes(spoiled)


def spoiled(rank):
    changed(rank)
    for where in (0, 1):
        uncleared(rank, where)


# One sum, and what all ranks have of it.


def share_of(rank, **changed):
    """Two parameters, the first with two rows in the proof."""
    return Share(
        **{
            "parts_sq_norm": np.array([[4.0, 8.0 * rank]]),
            "along": np.array([2.0 + rank, 6.0, 1.0]),
            "big_sq_norm": np.array([3.0, 5.0]) * rank,
            "big_along": np.array([2.5, 6.0, 7.0]) * rank,
            "present": np.array([rank == 1, False]),
            "seen": np.array([True, rank == 0]),
            "half": np.array([False, rank == 0]),
            "whole": 9.0 * rank,
            "sum_weights": 3.0 + rank,
            "sum_sq_weights": 5.0,
            "weighted": False,
            "examples": 3 + rank,
            "tokens": 30,
            "microbatch": 2 - rank,
            "microbatches": 2,
            "missing": {},
            **changed,
        }
    )


def summed(rank):
    columns, ranks = Columns(["a", "b"], 1, np.array([0, 0, 1])), Ranks.of(nn.Linear(1, 1))
    assert (ranks.rank, ranks.size) == (rank, 2)

    def over_all(*of_sources):
        local = [(share, columns) for share in of_sources]
        answers, seconds = over_ranks(local, 1.0 + rank, ranks, device=torch.device("cpu"))
        assert seconds == 1.5
        return answers

    def over(local):
        return over_all(local)[0]

    whole = over(share_of(rank))
    assert whole.parts_sq_norm.tolist() == [[8.0, 8.0]]
    assert whole.along.tolist() == [5.0, 12.0, 2.0]
    assert whole.big_sq_norm.tolist() == [3.0, 5.0]
    assert whole.big_along.tolist() == [2.5, 6.0, 7.0]
    assert whole.present.tolist() == [True, False]
    assert whole.seen.tolist() == [True, True]
    assert whole.half.tolist() == [False, True]
    assert (whole.whole, whole.sum_weights, whole.sum_sq_weights) == (9.0, 7.0, 10.0)
    assert (whole.examples, whole.tokens, whole.weighted) == (7, 60, False)
    assert (whole.microbatch, whole.microbatches, whole.missing) == (2, 2, {})
    assert over(share_of(rank, tokens=None if rank else 30)).tokens is None
    missing = over(share_of(rank, missing={"b": "torn"} if rank else {})).missing
    assert missing == {"b": "torn" if rank else "it was left out on another rank, as it says there"}
    both = over(Skipped("a reason of more than 24 letters", "mine"))
    assert both == Skipped("a reason of more than 24", "mine")
    apart = over(Skipped("nonfinite" if rank else "fault", "mine"))
    assert apart == Skipped("several reasons", "mine")
    one = over(share_of(rank) if rank else Skipped("fault", "mine"))
    told = "rank 0 could not measure it (fault), as the warning there says" if rank else "mine"
    assert one == Skipped("fault", told)
    first, second = over_all(Skipped("fault", "x") if rank else share_of(rank), share_of(rank))
    assert first.reason == "fault"
    assert second.parts_sq_norm.tolist() == [[8.0, 8.0]]


def test_the_sum_over_ranks(processes):
    processes(summed)


def counted(rank):
    """One all_reduce a measured step and none on others; not DDP's, which calls none in Python."""
    calls, all_reduce = [], dist.all_reduce

    def counting(tensor, *args, **kwargs):
        calls.append(tensor)
        return all_reduce(tensor, *args, **kwargs)

    model, wrapped, _ = tiny()
    one = torch.optim.SGD(model.up.parameters(), lr=0.0)
    other = torch.optim.SGD([p for n, p in model.named_parameters() if "up" not in n], lr=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counting)
        with watch(wrapped, [one, other], method="ranks", every=3) as gns:
            assert len(calls) == 1  # whether all attach alike
            calls.clear()
            seen = []
            for step in range(7):
                wrapped.zero_grad()
                (2 * mean_over_all(wrapped, batches([[2], [2]])[rank][0])).backward()
                for optimizer in (one, other) if step % 2 else (other, one):
                    optimizer.step()
                seen.append(len(calls))
            assert seen == [1, 1, 1, 2, 2, 2, 3]
            assert gns.reading.step == 6
            assert not gns.skipped
    assert {(t.dtype, t.device.type, t.numel()) for t in calls} == {(D, "cpu", len(calls[0]))}


def test_one_sum_a_measured_step_and_none_on_others(processes):
    processes(counted)


def logged(rank):
    """Only the first rank writes; all have the same reading and the same state."""
    model, wrapped, optimizer = tiny()
    own = batches([[2, 1], [3, 2]])[rank]
    readings = []
    settings = {"method": "ranks", "half_life": "40 examples"}
    with watch(
        wrapped, optimizer, run_dir="run", sinks=["csv", readings.append], **settings
    ) as gns:
        for _ in range(12):
            train(wrapped, optimizer, own, mean_over_all)
        state = json.dumps(gns.state_dict())
        mine = json.dumps([vars(gns.reading.raw), gns.reading.tr_sigma, state])
        assert gns.advice().world_size == 2
        assert gns.advice().microbatch == 1  # of the first rank's last backward
    everyone = [None, None]
    dist.all_gather_object(everyone, mine)
    assert everyone[0] == everyone[1]
    assert len(readings) == (0 if rank else 12)
    assert (gns.run_dir is None) == bool(rank)
    dist.barrier()
    assert sorted(str(p) for p in Path().rglob("*.*")) == ["run/gns.csv", "run/gns.jsonl"]
    header = json.loads(Path("run/gns.jsonl").read_text().splitlines()[0])
    assert header["world_size"] == 2
    with watch(wrapped, optimizer, run_dir="run", **settings) as again:
        again.load_state_dict(json.loads(state))
        train(wrapped, optimizer, own, mean_over_all)
        assert (again.reading.step, again.reading.n_eff > gns.reading.n_eff) == (12, True)


def test_the_first_rank_writes(processes):
    processes(logged)


# What is refused.


def refused(rank):
    model, wrapped, optimizer = tiny()
    for method in ("random_signs", "pepgns+random_signs"):
        with pytest.raises(ValueError, match="measures one process only, and this is a run of 2"):
            watch(wrapped, optimizer, method=method)


def test_random_signs_are_refused_on_several_ranks(processes):
    processes(refused)


def alone(rank):
    model, wrapped, optimizer = tiny()
    with pytest.raises(ValueError, match="this is one process; use 'pepgns'"):
        watch(wrapped, optimizer, method="ranks")
    with watch(wrapped, optimizer) as gns:
        train(wrapped, optimizer, batches([[3]])[0], mean_over_all)
        assert (gns.reading.examples, gns.reading.coverage) == (3, 1.0)


def test_one_rank_is_one_process(processes):
    processes(alone, ranks=1)
    model, optimizer, _ = make()
    with pytest.raises(ValueError, match="this is one process; use 'pepgns'"):
        watch(model, optimizer, method="ranks")
