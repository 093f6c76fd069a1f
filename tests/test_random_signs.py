"""Random signs: unbiased, proved against brute force in every loop, and training unnoticed."""

import copy
import gc
import weakref
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_monitor import B, Checkpointed, Positions, Reentrant, T, Tiny, WithCustom, make, split
from test_monitor import watch as watch_any
from torch import nn
from torch.utils.checkpoint import checkpoint

from gnsmon.collectors import random_signs
from gnsmon.collectors.random_signs import RandomSigns

D = torch.float64
SIZES = [3, 1, 2]
LENGTHS = torch.tensor([5, 1, 3, 2, 5, 4])


def watch(model, optimizer, **settings):
    return watch_any(model, optimizer, **{"method": "random_signs", **settings})


def losses_of(model, batch):
    ids, targets = batch
    return F.cross_entropy(model(ids).mT, targets, reduction="none").mean(1)


def collector(gns):
    return next(s.collector for s in gns._sources if isinstance(s.collector, RandomSigns))


def parts(model, batch, weights=None, losses_of=losses_of):
    """Every example's part u_j = c_j grad loss_j of the step, parameter name -> [B, numbers]."""
    model = copy.deepcopy(model)
    losses = losses_of(model, batch)
    weights = torch.full_like(losses, 1 / len(losses)) if weights is None else weights
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rows = [
        torch.autograd.grad(
            loss * w, list(trainable.values()), retain_graph=True, materialize_grads=True
        )
        for loss, w in zip(losses, weights, strict=True)
    ]
    return {n: torch.stack([r[i].flatten() for r in rows]) for i, n in enumerate(trainable)}


def assert_means(gns, takes, model, batch, weights=None, *, scale=1.0, rtol=1e-10, **options):
    """Over all 2^B signs, the mean of q is that of brute force; A and p are those of each step."""
    every = iter(list(product((-1.0, 1.0), repeat=B)))
    queue = []

    def draw(like):
        while len(queue) < len(like):
            queue.extend(next(every))
        found, queue[:] = queue[: len(like)], queue[len(like) :]
        return torch.tensor(found).to(like)

    collector(gns).draw = draw
    raws = []
    for _ in range(2**B):
        takes()
        assert gns.reading.step == gns.step - 1
        assert gns.reading.examples == B
        raws.append(gns.reading.raw)
    u = torch.cat(list(parts(model, batch, weights, **options).values()), 1) * scale
    assert next(every, None) is None and not queue
    assert np.mean([r.parts_sq_norm for r in raws]) == pytest.approx(float(u.square().sum()), rtol)
    big = float(u.sum(0).square().sum())
    assert [r.big_sq_norm for r in raws] == pytest.approx([big] * len(raws), rtol)
    w = np.full(B, 1 / B) if weights is None else np.asarray(weights / weights.sum())
    p = {r.sum_sq_weights for r in raws}
    assert list(p) == pytest.approx([np.square(w).sum()] * len(p), 1e-12)
    assert gns.reading.coverage == 1.0
    assert not gns.skipped


def plain(gns, model, optimizer, batch):
    optimizer.zero_grad()
    losses = losses_of(model, batch)
    gns.losses(losses)
    losses.mean().backward()
    optimizer.step()


def accumulate(gns, model, batch, sizes=SIZES):
    for micro in split(batch, sizes):
        losses = losses_of(model, micro)
        gns.losses(losses)
        (losses.mean() * len(losses) / B).backward()


def accumulation(gns, model, optimizer, batch):
    optimizer.zero_grad()
    accumulate(gns, model, batch)
    optimizer.step()


def clipped(gns, model, optimizer, batch):
    optimizer.zero_grad()
    accumulate(gns, model, batch)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()


def closure(gns, model, optimizer, batch):
    def evaluate():
        optimizer.zero_grad()
        accumulate(gns, model, batch)
        return 0.0

    optimizer.step(evaluate)


def thrown(gns, model, batch):
    """A batch whose gradients are thrown away; it takes no signs of the enumeration."""
    draw = collector(gns).draw
    collector(gns).draw = torch.ones_like
    accumulate(gns, model, batch, [2, 4])
    collector(gns).draw = draw


def discarded(gns, model, optimizer, batch):
    thrown(gns, model, batch)
    optimizer.zero_grad()
    accumulate(gns, model, batch)
    optimizer.step()


def discarded_in_place(gns, model, optimizer, batch):
    thrown(gns, model, batch)
    optimizer.zero_grad(set_to_none=False)
    accumulate(gns, model, batch)
    optimizer.step()


def zero_after_forward(gns, model, optimizer, batch):
    thrown(gns, model, batch)
    losses = losses_of(model, batch)
    gns.losses(losses)
    optimizer.zero_grad()
    losses.mean().backward()
    optimizer.step()


def twice_told_and_evaluated(gns, model, optimizer, batch):
    optimizer.zero_grad()
    losses = losses_of(model, batch)
    gns.losses(losses)
    gns.losses(losses)
    with torch.no_grad():
        gns.losses(losses_of(model, batch))
    gns.losses(losses_of(model, batch))  # whose backward never comes
    losses.mean().backward()
    optimizer.step()


def gradients_for_something_else(gns, model, optimizer, batch):
    optimizer.zero_grad()
    losses = losses_of(model, batch)
    gns.losses(losses)
    draw = collector(gns).draw
    collector(gns).draw = torch.ones_like
    torch.autograd.grad(losses.sum(), list(model.parameters()), retain_graph=True)
    collector(gns).draw = draw
    losses.mean().backward()
    optimizer.step()


def two_vectors_in_one_backward(gns, model, optimizer, batch):
    optimizer.zero_grad()
    both = [losses_of(model, micro) for micro in split(batch, [2, 4])]
    for losses in both:
        gns.losses(losses)
    (sum(losses.sum() for losses in both) / B).backward()
    optimizer.step()


LOOPS = [
    plain,
    accumulation,
    clipped,
    closure,
    discarded,
    discarded_in_place,
    zero_after_forward,
    twice_told_and_evaluated,
    gradients_for_something_else,
    two_vectors_in_one_backward,
]


@pytest.mark.parametrize("loop", LOOPS, ids=lambda f: f.__name__)
def test_unbiased_over_all_signs_in_every_loop(loop):
    """With a head tied to its embedding."""
    model, optimizer, batch = make()
    with watch(model, optimizer) as gns:
        assert_means(gns, lambda: loop(gns, model, optimizer, batch), model, batch)


@pytest.mark.parametrize("kind", [Checkpointed, Positions, WithCustom])
def test_unbiased_whatever_the_model_is_made_of(kind):
    model, optimizer, batch = make(kind)
    with watch(model, optimizer) as gns:
        assert_means(gns, lambda: accumulation(gns, model, optimizer, batch), model, batch)
