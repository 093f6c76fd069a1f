"""Random signs: unbiased, proved against brute force in every loop, and training unnoticed."""

import copy
import gc
import weakref
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_monitor import B, Checkpointed, Positions, Reentrant, T, WithCustom, make, split
from test_monitor import watch as watch_any
from torch import nn
from torch._functorch import config as functorch
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
    return next(c for c, _ in gns._sources if isinstance(c, RandomSigns))


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
        reading = gns.readings["random_signs"]
        assert (reading.step, reading.examples, reading.coverage) == (gns.step - 1, B, 1.0)
        raws.append(reading.raw)
    u = torch.cat(list(parts(model, batch, weights, **options).values()), 1) * scale
    assert next(every, None) is None and not queue
    assert np.mean([r.parts_sq_norm for r in raws]) == pytest.approx(float(u.square().sum()), rtol)
    big = float(u.sum(0).square().sum())
    assert [r.big_sq_norm for r in raws] == pytest.approx([big] * len(raws), rtol)
    w = np.full(B, 1 / B) if weights is None else np.asarray(weights / weights.sum())
    p = {r.sum_sq_weights for r in raws}
    assert list(p) == pytest.approx([np.square(w).sum()] * len(p), 1e-12)
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


def test_unbiased_for_a_recurrent_network():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte = nn.Embedding(11, 4)
            self.lstm = nn.LSTM(4, 5, batch_first=True)
            self.head = nn.Linear(5, 11)

        def forward(self, ids):
            return self.head(self.lstm(self.wte(ids))[0])

    model, optimizer, batch = make(Recurrent)
    with watch(model, optimizer) as gns:
        assert_means(gns, lambda: accumulation(gns, model, optimizer, batch), model, batch)


def test_sparse_gradients():
    class Bag(nn.Module):
        def __init__(self, sparse=True):
            super().__init__()
            self.table, self.out = nn.Embedding(11, 3, sparse=sparse), nn.Linear(3, 11)

        def forward(self, ids):
            return self.out(self.table(ids))

    model, optimizer, batch = make(Bag)
    twin, _, _ = make(Bag, sparse=False)
    with watch(model, optimizer) as gns:
        assert_means(gns, lambda: accumulation(gns, model, optimizer, batch), twin, batch)


def test_its_own_signs_are_unbiased_for_every_parameter():
    """2000 draws, by their standard error."""
    model, optimizer, batch = make()
    found = []

    def keep(reading):
        found.append([g.raw.parts_sq_norm for g in reading.groups.values()])

    with watch(model, optimizer, groups=lambda name: name, sinks=[keep]) as gns:
        for _ in range(2000):
            plain(gns, model, optimizer, batch)
        names = list(gns.reading.groups)
    draws, u = np.array(found), parts(model, batch)
    error = draws.std(0) / np.sqrt(len(draws))
    expected = np.array([float(u[name].square().sum()) for name in names])
    assert (np.abs(draws.mean(0) - expected) < 4 * error).all()
    assert (error < 0.02 * expected).all()


# Laws.


def test_the_relative_spread_is_that_of_the_formula():
    """sd(q) / q = sqrt(2 (1/d_eff - sum |u|^4 / q^2)), d_eff = tr(U U')^2 / tr((U U')^2)."""
    model, batch = make()[0], make()[2]
    u = torch.cat(list(parts(model, batch).values()), 1)
    gram = u @ u.T
    signs = torch.tensor(list(product((-1.0, 1.0), repeat=B)), dtype=D)
    draws = (signs @ gram * signs).sum(1)
    off_diagonal = gram.square().sum() - gram.diagonal().square().sum()
    variance = float(2 * off_diagonal)
    assert float(draws.var(correction=0)) == pytest.approx(variance, 1e-10)
    d_eff = float(gram.trace() ** 2 / gram.square().sum())
    assert variance**0.5 / float(gram.trace()) < (2 / d_eff) ** 0.5


SCALES = {
    "mean": lambda losses: losses.mean(),
    "sum": lambda losses: losses.sum(),
    "scaled": lambda losses: losses.mean() * 2.0**20,
    "negative": lambda losses: -losses.sum(),
}


def test_the_loss_scale_cancels():
    found = []
    for total in SCALES.values():
        model, optimizer, batch = make()
        with watch(model, optimizer) as gns:
            losses = losses_of(model, batch)
            gns.losses(losses)
            total(losses).backward()
            optimizer.step()
            raw = gns.reading.raw
            found.append((raw.parts_sq_norm / raw.big_sq_norm, raw.sum_sq_weights, raw.tr_sigma))
    ratios, weights, tr_sigma = zip(*found, strict=True)
    assert ratios == pytest.approx([ratios[0]] * 4, 1e-12)
    assert weights == pytest.approx([1 / B] * 4, 1e-12)
    assert tr_sigma[1] == pytest.approx(B**2 * tr_sigma[0], 1e-12)


def test_weights_are_seen_in_the_backward():
    """Sequences of unequal length; counts told by hand are only counted."""
    model, optimizer, (ids, targets) = make()
    targets = targets.masked_fill(torch.arange(T) >= LENGTHS[:, None], -100)
    micros = split((ids, targets, LENGTHS), SIZES)

    def by_token(model, batch):
        by_token = F.cross_entropy(model(batch[0]).mT, batch[1], reduction="none")
        return by_token.sum(1) / (batch[1] >= 0).sum(1)

    with watch(model, optimizer) as gns:

        def take():
            optimizer.zero_grad()
            for micro in micros:
                losses = by_token(model, micro)
                gns.losses(losses)
                gns.weigh(micro[2])
                (losses * micro[2] / LENGTHS.sum()).sum().backward()
            optimizer.step()

        weights = LENGTHS.double() / LENGTHS.sum()
        assert_means(gns, take, model, (ids, targets), weights, losses_of=by_token)
        assert gns.reading.tokens == 20


def test_loss_scaling_is_undone_and_overflows_are_dropped():
    model, _, batch = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    with watch(model, optimizer, scaler=scaler) as gns:
        collector(gns).draw = lambda like: torch.tensor([1, 1, -1, 1, -1, -1]).to(like)
        found = []
        for i in range(4):
            optimizer.zero_grad()
            losses = losses_of(model, batch)
            gns.losses(losses)
            scaler.scale(losses.mean() * (torch.inf if i == 2 else 1)).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            found.append((gns.reading.raw.parts_sq_norm, gns.reading.raw.big_sq_norm))
        assert found == [pytest.approx(found[0], 1e-10)] * 4
        assert gns.readings["random_signs"].step == 2  # where nothing was stepped, nothing is read
    u = torch.cat(list(parts(model, batch).values()), 1)
    assert found[0][1] == pytest.approx(float(u.sum(0).square().sum()), 1e-9)


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside):
    model, optimizer, batch = make()
    model.float()
    with watch(model, optimizer) as gns:

        def take():
            optimizer.zero_grad()
            for micro in split(batch, SIZES):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    losses = losses_of(model, micro)
                    gns.losses(losses)
                    loss = losses.sum() / B
                    if inside:
                        loss.backward()
                if not inside:
                    loss.backward()
            optimizer.step()

        assert_means(gns, take, model, batch, rtol=0.02)


def test_half_precision_parameters():
    model, optimizer, batch = make()
    model.bfloat16()
    with watch(model, optimizer) as gns:
        for _ in range(3):
            accumulation(gns, model, optimizer, batch)
        assert gns.reading.coverage == 1


# Training does not notice.


class Dropping(nn.Module):
    """Dropout and BatchNorm, within a checkpoint and without."""

    def __init__(self, check=False, preserve=True):
        super().__init__()
        self.check, self.preserve = check, preserve
        self.up, self.norm = nn.Linear(4, 8), nn.BatchNorm1d(8)
        self.dropout, self.down = nn.Dropout(0.4), nn.Linear(8, 3)

    def body(self, x):
        return self.dropout(self.norm(self.up(x)).relu())

    def forward(self, x):
        if self.check:
            x = checkpoint(self.body, x, use_reentrant=False, preserve_rng_state=self.preserve)
        else:
            x = self.body(x)
        return self.dropout(self.down(x))


@pytest.mark.parametrize("measured", ["random_signs", ["pepgns", "random_signs", "microbatch"]])
@pytest.mark.parametrize("check", [{}, {"check": True}, {"check": True, "preserve": False}])
@pytest.mark.filterwarnings("ignore:gnsmon:RuntimeWarning")
def test_training_is_bitwise_the_same(check, measured):
    found = []
    for watched in (False, True):
        torch.manual_seed(5)
        model = Dropping(**check)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        gns = watch(model, optimizer, method=measured, strict=False) if watched else None
        history = []
        for _ in range(12):
            optimizer.zero_grad()
            for x in torch.randn(2, 6, 4):
                losses = F.cross_entropy(model(x), torch.arange(6) % 3, reduction="none")
                if gns is not None:
                    gns.losses(losses)
                (losses.mean() / 2).backward()
                history.append(losses.detach())
            history.extend(p.grad.clone() for p in model.parameters())
            optimizer.step()
        state = [t.clone() for t in model.state_dict().values()]
        found.append([*history, *state, torch.get_rng_state()])
        if gns is not None:
            gns.close()
        if gns is not None and check.get("preserve", True):
            assert gns.readings["random_signs"].step == 11
            assert gns.readings["random_signs"].coverage == 1
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_nothing_is_kept():
    model, optimizer, batch = make()
    gns = watch(model, optimizer)
    accumulation(gns, model, optimizer, batch)
    losses = losses_of(model, batch)
    gns.losses(losses)
    losses.mean().backward()
    done = weakref.ref(losses)
    del losses
    never = losses_of(model, batch)
    gns.losses(never)
    unused = weakref.ref(never)
    del never
    gc.disable()  # by counting references alone
    optimizer.step()
    gc.enable()
    assert done() is None and unused() is None
    gns.close()
    assert not any(p._backward_hooks for p in model.parameters())
    assert not model._forward_hooks and not model._forward_pre_hooks


# Together with other methods.


def test_mixed_with_the_other_methods():
    """Their hooks see the backwards of this one, and pay no attention."""
    model, optimizer, batch = make()
    methods = ["pepgns", "random_signs", "microbatch", "sogns"]
    with watch(model, optimizer, method=methods) as gns:

        def take():
            accumulation(gns, model, optimizer, batch)
            raw = gns.readings["pepgns"].raw
            assert raw.parts_sq_norm == pytest.approx(exact, 1e-10)
            raw = gns.readings["microbatch"].raw
            assert raw.parts_sq_norm == pytest.approx(by_microbatch, 1e-10)

        u = torch.cat(list(parts(model, batch).values()), 1)
        exact = float(u.square().sum())
        by_microbatch = float(sum(m.sum(0).square().sum() for m in u.split(SIZES)))
        assert_means(gns, take, model, batch)
        assert set(gns.readings) == set(methods)


def test_two_vectors_in_one_backward_beside_microbatches():
    model, optimizer, batch = make()
    with watch(model, optimizer, method=["random_signs", "microbatch"]) as gns:
        for micro in split(batch, SIZES[:1] * 2):
            both = [losses_of(model, half) for half in split(micro, [2, 1])]
            for losses in both:
                gns.losses(losses)
            gns.weigh(torch.ones(3))
            (sum(losses.sum() for losses in both) / B).backward()
        optimizer.step()
        u = torch.cat(list(parts(model, batch).values()), 1)
        expected = float(sum(m.sum(0).square().sum() for m in u.split(3)))
        assert gns.readings["microbatch"].raw.parts_sq_norm == pytest.approx(expected, 1e-10)
        assert [r.coverage for r in gns.readings.values()] == [1, 1]


# What is left out, and refused.


def left_out(gns, model, optimizer, batch, penalty):
    optimizer.zero_grad()
    losses = losses_of(model, batch)
    gns.losses(losses)
    (losses.mean() + penalty(model)).backward()
    optimizer.step()


def test_a_penalty_is_left_out_and_named():
    model, optimizer, batch = make()
    with watch(model, optimizer) as gns:
        with pytest.warns(RuntimeWarning, match="another term of the loss reaches it too"):
            left_out(gns, model, optimizer, batch, lambda m: 0.1 * m.up.weight.square().sum())
        assert set(gns.coverage().missing) == {"up.weight"}
        u = parts(model, batch)
        big = sum(float(u[n].sum(0).square().sum()) for n in u if n != "up.weight")
        assert gns.reading.raw.big_sq_norm == pytest.approx(big, 1e-10)


def test_a_parameter_that_only_a_penalty_reaches_is_left_out_and_named():
    model, optimizer, batch = make()
    model.extra = nn.Parameter(torch.ones(3, dtype=D))
    with (
        watch(model, optimizer) as gns,
        pytest.warns(RuntimeWarning, match="extra: gns.losses does not reach it"),
    ):
        left_out(gns, model, optimizer, batch, lambda m: m.extra.square().sum())


def test_a_penalty_that_comes_later_is_found_by_the_next_proof():
    model, optimizer, batch = make()
    runs = []
    handle = model.norm.bias.register_hook(lambda g: runs.append(1))
    with watch(model, optimizer) as gns:
        for _ in range(random_signs.PROOF_EVERY):
            runs.clear()
            plain(gns, model, optimizer, batch)
            assert len(runs) == (3 if gns.step == 1 else 2)
        handle.remove()
        with pytest.warns(RuntimeWarning, match="another term of the loss reaches it too"):
            left_out(gns, model, optimizer, batch, lambda m: 0.1 * m.up.weight.square().sum())
        assert set(gns.coverage().missing) == {"up.weight"}
        left_out(gns, model, optimizer, batch, lambda m: 0.1 * m.up.weight.square().sum())
        assert set(gns.coverage().missing) == {"up.weight"}


def test_gradients_that_were_not_cleared_are_noticed():
    model, optimizer, batch = make()
    losses_of(model, batch).mean().backward()  # before anybody watched
    with watch(model, optimizer) as gns:
        with pytest.warns(RuntimeWarning, match="not cleared since an earlier step"):
            accumulate(gns, model, batch)
            optimizer.step()
        assert gns.skipped == {"nothing measured": 1}
        accumulation(gns, model, optimizer, batch)
        assert gns.reading.coverage == 1


def test_hooks_that_are_not_linear_are_noticed():
    model, optimizer, batch = make()
    model.down.weight.register_hook(lambda g: 3 * g)
    model.up.weight.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
    with (
        watch(model, optimizer) as gns,
        pytest.warns(RuntimeWarning, match="up.weight: .* a hook changes it"),
    ):
        accumulation(gns, model, optimizer, batch)
        assert set(gns.coverage().missing) == {"up.weight"}


def test_a_parameter_that_comes_late_is_proved_when_it_comes():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = nn.Linear(4, 4)
            self.experts = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))

        def forward(self, x, expert):
            return self.experts[expert](self.trunk(x))

    model = Experts().to(D)
    model.experts[2].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def take(experts, penalty=0.0):
        optimizer.zero_grad()
        for i in experts:
            losses = model(torch.randn(3, 4, dtype=D), i).sin().sum(1)
            gns.losses(losses)
            (losses.sum() + penalty * model.experts[i].weight.square().sum()).backward()
        optimizer.step()
        return set(gns.coverage().missing)

    def named(*experts):
        return {f"experts.{i}.{n}" for i in experts for n in ("weight", "bias")}

    with watch(model, optimizer) as gns:
        assert take([0, 0]) == named(1, 2) - {"experts.2.bias"}
        assert take([0, 1]) == named(2) - {"experts.2.bias"}
        with pytest.warns(RuntimeWarning, match="experts.2.weight: .* another term"):
            assert take([0, 2], penalty=1.0) == {"experts.2.weight", *named(1)}
        model.experts[2].bias.requires_grad_(True)
        assert take([2, 1]) == named(0)  # proved anew, as the bias is new to it
        assert gns.reading.examples == 6


def test_losses_that_were_not_given():
    model, optimizer, batch = make()
    with watch(model, optimizer, strict=False) as gns:
        with pytest.warns(RuntimeWarning, match=r"call gns.losses\(losses\) between forward and"):
            losses_of(model, batch).mean().backward()
            optimizer.step()
        with pytest.warns(RuntimeWarning, match="from another tensor than the one given"):
            losses = losses_of(model, batch)
            mean = losses.mean()
            gns.losses(losses * 2)
            mean.backward()
            optimizer.step()
        assert gns.skipped == {"no losses": 1, "no backward": 1}
        plain(gns, model, optimizer, batch)
        assert gns.reading.step == 2


@pytest.mark.parametrize("forgotten", [0, 1])
def test_a_microbatch_without_losses_is_said(forgotten):
    model, optimizer, batch = make()
    with pytest.warns(RuntimeWarning, match="without coming through gns.losses"):
        gns = watch(model, optimizer, strict=False)
        for i, part in enumerate(split(batch, [3, 3])):
            losses = losses_of(model, part)
            if i != forgotten:
                gns.losses(losses)
            (losses.sum() / 6).backward()
        optimizer.step()
    assert gns.skipped == {"losses unknown": 1}
    gns.close()


def test_a_backward_that_was_thrown_away_needs_no_losses():
    model, optimizer, batch = make()
    gns = watch(model, optimizer)
    losses_of(model, batch).mean().backward()
    optimizer.zero_grad()
    losses = losses_of(model, batch)
    gns.losses(losses)
    losses.mean().backward()
    optimizer.step()
    assert not gns.skipped
    assert gns.reading.examples == B
    gns.close()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.filterwarnings("ignore:gnsmon:RuntimeWarning")
def test_losses_are_forgotten_with_their_step():
    model, _, batch = make()
    with watch(model, None) as gns:
        early = losses_of(model, batch)
        gns.losses(early)
        gns.commit()
        early.mean().backward()
        gns.commit()
        assert gns.skipped == {"no backward": 1, "no losses": 1}


def test_two_optimizers_make_one_reading_a_step():
    model, _, batch = make()
    one = torch.optim.SGD(model.up.parameters(), lr=0.0)
    other = torch.optim.SGD([p for n, p in model.named_parameters() if "up" not in n], lr=0.0)
    readings = []
    with watch(model, [one, other], sinks=[readings.append]) as gns:
        for order in ((one, other), (other, one)):
            model.zero_grad()
            accumulate(gns, model, batch)
            for optimizer in order:
                optimizer.step()
        assert [r.step for r in readings] == [0, 1]
        assert not gns.skipped


WRONG = {
    "scalar": (lambda losses: losses.mean(), r"\[B\], with its graph; got shape \[\]\."),
    "by token": (lambda losses: losses[:, None].expand(-1, 5), r"got shape \[6, 5\]\."),
    "detached": (lambda losses: losses.detach(), r"got shape \[6\] without a graph"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_vector_is_an_error_if_strict_and_no_measurement_otherwise(wrong):
    spoil, message = WRONG[wrong]
    model, optimizer, batch = make()
    with watch(model, optimizer) as gns, pytest.raises(ValueError, match=message):
        gns.losses(spoil(losses_of(model, batch)))
    with watch(model, optimizer, strict=False, run_dir="other") as gns:
        losses = losses_of(model, batch)
        gns.losses(spoil(losses))
        losses.mean().backward()
        with pytest.warns(RuntimeWarning, match=message):
            optimizer.step()
        assert gns.skipped == {"fault": 1}


def test_signs_in_the_loss_are_refused():
    model, optimizer, batch = make()
    with watch(model, optimizer) as gns:
        losses = losses_of(model, batch)
        gns.losses(losses)
        (losses * torch.tensor([1, 1, 1, -1, 1, 1])).sum().backward()
        with pytest.warns(RuntimeWarning, match="some of gns.losses with a plus and others with"):
            optimizer.step()
        assert gns.skipped == {"weights": 1}


def test_two_backwards_through_one_vector_are_refused():
    model, optimizer, batch = make()
    with watch(model, optimizer) as gns:
        losses = losses_of(model, batch)
        gns.losses(losses)
        losses.mean().backward(retain_graph=True)
        losses.mean().backward()
        with pytest.warns(RuntimeWarning, match="several backwards went through one vector"):
            optimizer.step()
        accumulation(gns, model, optimizer, batch)
        assert gns.reading.coverage == 1


def test_a_failed_backward_is_noticed_and_survived():
    model, optimizer, batch = make()

    def fails(g):
        raise MemoryError

    with watch(model, optimizer, strict=False) as gns:
        handle = model.norm.weight.register_hook(fails)
        with pytest.raises(MemoryError):
            accumulate(gns, model, batch)
        handle.remove()
        with pytest.warns(RuntimeWarning, match="MemoryError|ended in an exception"):
            accumulation(gns, model, optimizer, batch)
        accumulation(gns, model, optimizer, batch)
        assert gns.reading.coverage == 1


def test_reentrant_checkpoints_are_refused_and_harm_no_other_method():
    model, optimizer, batch = make(Reentrant)
    twin, _, _ = make()
    with watch(model, optimizer, method=["random_signs", "microbatch"], strict=False) as gns:
        with pytest.warns(RuntimeWarning, match="use_reentrant=False"):
            accumulation(gns, model, optimizer, batch)
        assert gns.skipped == {"fault": 1}
        u = torch.cat(list(parts(twin, batch).values()), 1)
        expected = float(sum(m.sum(0).square().sum() for m in u.split(SIZES)))
        assert gns.readings["microbatch"].raw.parts_sq_norm == pytest.approx(expected, 1e-10)
        for name, p in model.named_parameters():
            grads = parts(twin, batch)[name].sum(0)
            torch.testing.assert_close(p.grad.flatten(), grads, rtol=1e-10, atol=1e-14)


def test_layers_in_a_reentrant_checkpoint_that_no_parameter_precedes():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).to(D)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer) as gns:
        x = torch.randn(5, 3, dtype=D, requires_grad=True)
        losses = model[1](checkpoint(model[0], x, use_reentrant=True)).sin().squeeze(1)
        gns.losses(losses)
        losses.mean().backward()
        with pytest.warns(RuntimeWarning, match="which should be False"):
            optimizer.step()
        assert set(gns.coverage().missing) == {"0.weight", "0.bias"}


def test_steps_that_are_not_measured_cost_nothing():
    model, optimizer, batch = make()
    with watch(model, optimizer, every=2) as gns:
        for step in range(4):
            losses = losses_of(model, batch)
            gns.losses(losses)
            assert bool(losses._backward_hooks) == (step % 2 == 0)
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
        assert gns.reading.step == 2


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@functorch.patch(donated_buffer=False)
def test_compiled(backend):
    model, optimizer, batch = make()
    with watch(model, optimizer) as gns:
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        take = lambda: accumulation(gns, compiled, optimizer, batch)  # noqa: E731
        assert_means(gns, take, model, batch)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compiled_with_donated_buffers_is_refused_with_what_to_do():
    model, optimizer, batch = make()
    with watch(model, optimizer, strict=False) as gns:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with pytest.warns(RuntimeWarning, match="config.donated_buffer = False"):
            accumulation(gns, compiled, optimizer, batch)
        assert gns.skipped == {"fault": 1}
        for name, u in parts(model, batch).items():
            grad = model.get_parameter(name).grad
            torch.testing.assert_close(grad.flatten(), u.sum(0), rtol=1e-10, atol=1e-14)


def test_it_fills_what_the_layer_rules_leave_out():
    model, optimizer, batch = make(Positions)
    with watch(model, optimizer, method="pepgns+random_signs") as gns:
        accumulation(gns, model, optimizer, batch)
        assert gns.reading.coverage == 1
        u = torch.cat(list(parts(model, batch).values()), 1)
        assert gns.reading.raw.big_sq_norm == pytest.approx(float(u.sum(0).square().sum()), 1e-10)


def test_weights_that_only_the_loss_knows_are_not_mixed_with_equal_ones():
    """Otherwise p would be the rules', and |G|² of both sources biased."""
    model, optimizer, batch = make(Positions)
    weights = torch.arange(1.0, B + 1)
    for told in (True, False):
        with watch(model, optimizer, method="pepgns+random_signs") as gns:
            losses = losses_of(model, batch)
            gns.losses(losses)
            if told:
                gns.weigh(weights)
            (losses * weights / weights.sum()).sum().backward()
            if told:
                optimizer.step()
                p = float(weights.square().sum() / weights.sum() ** 2)
                assert gns.reading.raw.sum_sq_weights == pytest.approx(p)
                assert gns.reading.coverage == 1
            else:
                with pytest.warns(RuntimeWarning, match="0.167, while the loss puts 0.206 on"):
                    optimizer.step()
                assert gns.skipped == {"weights": 1}
            optimizer.zero_grad()
