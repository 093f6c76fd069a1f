"""Ranks as the small batches, in real processes: brute force, one sum a step, and nobody hangs."""

import copy
import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks_worker import in_processes
from test_microbatch import gradients
from test_monitor import VOCABULARY, B, T, Tiny, loss_of, make, watch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from gnsmon.collectors import microbatch
from gnsmon.collectors.microbatch import Microbatch
from gnsmon.collectors.reduction import Ranks, over_ranks
from gnsmon.collectors.step import Share, Skipped
from gnsmon.estimators import NormPair, moments

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


def values(rank, options, sizes, given):
    """Both microbatches of each rank and ranks alone; hooks there, and not there, in turn."""
    for synced in (False, True):
        for parts in (1, 3):
            of_ranks = [own[:parts] for own in sizes]
            flat = [b for own in of_ranks for b in own]

            def share(model, micro, whole=sum(flat)):
                return loss_of(model, micro) * len(micro[0]) / whole

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
