"""The noise scale in the metric of the optimizer: brute force, laws, and what has no metric."""

import copy
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from cases import energy
from ranks_worker import in_processes
from test_monitor import VOCABULARY, B, Dropping, T, Tiny, loss_of, split, watch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
from typer.testing import CliRunner

from gnsmon.cli import app
from gnsmon.collectors.per_example import FACTORED, NOT_CROSSED
from gnsmon.collectors.preconditioner import NO_MOMENT, NO_STATE, Preconditioner, named
from gnsmon.norms.convolved import Convolved
from gnsmon.norms.forms import Dense, Outer, Rows
from gnsmon.norms.metric import Diagonal, Factored
from gnsmon.sinks.jsonl import read_log

D = torch.float64
SIZES = [3, 1, 2]
WHOLE = named("microbatch")


class Pictures(nn.Module):
    """Convolutions, of groups and with a stride, and a layer on three axes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 6, 3, stride=2, groups=2)
        self.mixed = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)

    def forward(self, x):
        y = self.grouped(self.first(x).tanh())
        return self.norm(self.mixed(y.flatten(2).mT))


def language(**options):
    torch.manual_seed(1)
    model = Tiny(**options).to(D)
    return model, [tuple(torch.randint(0, VOCABULARY, (2, B, T)).unbind()) for _ in range(3)]


def pictures():
    torch.manual_seed(2)
    model = Pictures().to(D)
    return model, [(torch.randn(B, 2, 6, 5, dtype=D),) for _ in range(3)]


def loss(model, batch):
    return loss_of(model, batch) if len(batch) == 2 else energy(model, batch)


def gradients(model, parts, weights):
    """Each part's gradient times its weight: name -> [parts, *shape]."""
    model = copy.deepcopy(model)
    rows = []
    for part, weight in zip(parts, weights, strict=True):
        model.zero_grad()
        (weight * loss(model, part)).backward()
        rows.append({name: p.grad.clone() for name, p in model.named_parameters()})
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def metric_of(optimizer, model):
    """P of AdamW, and 0 where a number has had no gradient yet: name -> tensor."""
    found = {}
    for name, p in model.named_parameters():
        state, group = optimizer.state[p], optimizer.param_groups[0]
        v = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
        found[name] = (v > 0) / (v.sqrt() + group["eps"])
    return found


def factored(p):
    """The rank-one P with the row and column means of 1/P² in place of it, where it has a row."""
    d = torch.where(p > 0, 1 / p, 0.0).reshape(len(p), -1).square()
    v = torch.einsum("k,i->ki", d.mean(1), d.mean(0)) / d.mean()
    return torch.where(v > 0, v**-0.5, 0.0).reshape(p.shape)


def norms(u, metric):
    """A and q in a metric, and in the Euclidean one without."""
    of_each = [(u[n], 1.0 if metric is None else metric[n]) for n in u]
    big = sum(float((p * g.sum(0).square()).sum()) for g, p in of_each)
    return big, sum(float((p * g.square()).sum()) for g, p in of_each)


def accumulate(model, optimizer, batch, sizes=SIZES):
    optimizer.zero_grad()
    for micro in split(batch, sizes):
        (loss(model, micro) * len(micro[0]) / B).backward()
    optimizer.step()


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), **{"lr": 1e-2, "eps": 1e-3, **options})


def assert_raw(gns, method, u, metric, p, *, rtol=1e-10):
    raw, (big, parts) = gns.readings[method].raw, norms(u, metric)
    assert raw.big_sq_norm == pytest.approx(big, rel=rtol)
    assert raw.parts_sq_norm == pytest.approx(parts, rel=rtol)
    assert raw.sum_sq_weights == pytest.approx(p, rel=1e-12)
    assert raw.grad_sq_norm == pytest.approx((big - parts) / (1 - p), rel=1e-8)
    assert raw.tr_sigma == pytest.approx(B * (parts - p * big) / (1 - p), rel=1e-8)
    assert gns.readings[method].coverage == 1.0
    assert gns.readings[method].step == gns.step - 1


@pytest.mark.parametrize("engine", ["hooks", "fused"])
@pytest.mark.parametrize(
    "make", [pictures, language, partial(language, tied=False)], ids=["conv", "tied", "untied"]
)
def test_norms_are_those_of_brute_force(make, engine):
    model, batches = make()
    optimizer = adamw(model)
    settings = {"method": ["pepgns", "microbatch"], "preconditioned": True, "engine": engine}
    with watch(model, optimizer, **settings) as gns:
        for step, batch in enumerate(batches):
            examples = gradients(model, split(batch, [1] * B), [1 / B] * B)
            micro = gradients(model, split(batch, SIZES), [n / B for n in SIZES])
            metric = metric_of(optimizer, model) if step else None
            accumulate(model, optimizer, batch)
            assert_raw(gns, "pepgns", examples, None, 1 / B)
            assert_raw(gns, "microbatch", micro, None, sum(n**2 for n in SIZES) / B**2)
            if metric is None:
                assert list(gns.readings) == ["pepgns", "microbatch"]
                continue
            assert_raw(gns, WHOLE, micro, metric, sum(n**2 for n in SIZES) / B**2)
            rank_one = {name: factored(p) for name, p in metric.items()}
            assert_raw(gns, FACTORED, examples, rank_one, 1 / B)
        assert gns.skipped == {NO_STATE: 1}
        groups = gns.readings[FACTORED].groups
        assert sum(g.tr_sigma for g in groups.values()) == pytest.approx(
            gns.readings[FACTORED].tr_sigma
        )


def test_the_first_of_several_microbatches():
    model, batches = language()
    optimizer = adamw(model)
    with watch(model, optimizer, method="subbatch", preconditioned=True) as gns:
        accumulate(model, optimizer, batches[0])
        metric = metric_of(optimizer, model)
        micro = gradients(model, split(batches[1], SIZES), [n / B for n in SIZES])
        accumulate(model, optimizer, batches[1])
        raw, w = gns.readings["subbatch_preconditioned"].raw, SIZES[0] / B
        assert raw.big_sq_norm == pytest.approx(norms(micro, metric)[0], rel=1e-10)
        first = {name: g[:1] for name, g in micro.items()}
        assert raw.parts_sq_norm == pytest.approx(norms(first, metric)[1] / w, rel=1e-10)


def with_moments(model, v):
    """An optimizer whose second moments are v, by name, and stay so."""
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.0, eps=0.0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.param_groups[0]["alpha"] = 1.0
    for name, p in model.named_parameters():
        optimizer.state[p]["square_avg"].copy_(v[name])
    return optimizer


BOTH = {"method": ["pepgns", "microbatch"], "preconditioned": True}


def test_a_constant_metric_is_the_euclidean_one():
    model, batches = language()
    v = {name: torch.full_like(p, 4.0) for name, p in model.named_parameters()}
    optimizer = with_moments(model, v)
    with watch(model, optimizer, **BOTH) as gns:
        accumulate(model, optimizer, batches[0])
        for method, weighed in (("pepgns", FACTORED), ("microbatch", WHOLE)):
            plain, other = gns.readings[method], gns.readings[weighed]
            assert other.raw.big_sq_norm == pytest.approx(plain.raw.big_sq_norm / 2, rel=1e-12)
            assert other.raw.tr_sigma == pytest.approx(plain.raw.tr_sigma / 2, rel=1e-12)
            for name, group in plain.groups.items():
                assert other.groups[name].raw.tr_sigma == pytest.approx(group.raw.tr_sigma / 2)


class Units(nn.Module):
    """Two layers, the second's weight in units of its own."""

    def __init__(self, c):
        super().__init__()
        self.first, self.c = nn.Linear(4, 3, dtype=D), c
        self.second = nn.Linear(3, 2, bias=False, dtype=D)
        with torch.no_grad():
            self.second.weight /= c

    def forward(self, x):
        return self.c * self.second(self.first(x).tanh())


def in_units(c):
    """All readings of one step with the second weight counted in units of c."""
    torch.manual_seed(3)
    model = Units(c)
    v = {name: torch.rand_like(p) + 0.1 for name, p in model.named_parameters()}
    v["second.weight"] *= c**2
    optimizer = with_moments(model, v)
    with watch(model, optimizer, **BOTH) as gns:
        accumulate(model, optimizer, (torch.randn(B, 4, dtype=D),))
        return gns.readings


def test_another_unit_counts_by_its_root_in_the_metric():
    """With theta' = theta / c, |g'|² = c² |g|², and in P' = P / c it is c |g|²_P alone."""
    before, after = in_units(1.0), in_units(10.0)
    for method, factor in (("pepgns", 100), ("microbatch", 100), (FACTORED, 10), (WHOLE, 10)):
        a, b = before[method].groups, after[method].groups
        assert b["first"].raw.tr_sigma == pytest.approx(a["first"].raw.tr_sigma, rel=1e-10)
        for value in ("tr_sigma", "grad_sq_norm"):
            old, new = (getattr(groups["second"].raw, value) for groups in (a, b))
            assert new == pytest.approx(factor * old, rel=1e-10)


def test_the_metric_is_of_the_step_before():
    """What happens to v while a step is under way does not reach its reading."""
    readings = []
    for meddle in (False, True):
        model, (first, second, _) = language()
        optimizer = adamw(model)
        with watch(model, optimizer, **BOTH) as gns:
            accumulate(model, optimizer, first)
            optimizer.zero_grad()
            for micro in split(second, SIZES):
                (loss(model, micro) * len(micro[0]) / B).backward()
                if meddle:
                    for i, state in enumerate(optimizer.state.values()):
                        state["exp_avg_sq"].mul_(2.0**i)
            optimizer.step()
            readings.append(gns.readings)
    for method in (WHOLE, FACTORED):
        plain, meddled = (found[method].raw for found in readings)
        assert plain == meddled


def test_unbiased_for_a_known_covariance():
    """Gradients x ~ N(G, diag(s)) of a linear loss; the means of 250 steps by their errors."""
    torch.manual_seed(4)
    n, b, steps = 6, 8, 250
    mean, s, v = torch.linspace(-1, 1, n, dtype=D), torch.rand(n, dtype=D) * 3, torch.rand(n)
    v = v.to(D) + 0.05
    model = nn.Linear(n, 1, bias=False).to(D)
    optimizer = with_moments(model, {"weight": v[None]})
    raws = {FACTORED: [], WHOLE: []}
    with watch(model, optimizer, **BOTH) as gns:
        for _ in range(steps):
            optimizer.zero_grad()
            x = mean + s.sqrt() * torch.randn(b, n, dtype=D)
            for micro in x.split(b // 2):
                (model(micro).mean() / 2).backward()
            optimizer.step()
            for method, found in raws.items():
                found.append(gns.readings[method].raw)
    weights = v**-0.5
    true = {"tr_sigma": float(weights @ s), "grad_sq_norm": float(weights @ mean.square())}
    for found in raws.values():
        for key, expected in true.items():
            values = np.array([getattr(raw, key) for raw in found])
            error = values.std(ddof=1) / steps**0.5
            assert error < 0.15 * expected
            assert abs(values.mean() - expected) < 4 * error


def trained(monitored):
    torch.manual_seed(5)
    model = Dropping().float()
    optimizer, losses = adamw(model), []
    batches = [tuple(torch.randint(0, VOCABULARY, (2, B, T)).unbind()) for _ in range(4)]
    if monitored:
        gns = watch(model, optimizer, engine="hooks", **BOTH)
    for batch in batches:
        optimizer.zero_grad()
        for micro in split(batch, SIZES):
            part = loss_of(model, micro) * len(micro[0]) / B
            part.backward()
            losses.append(part.detach())
        optimizer.step()
    if monitored:
        assert {FACTORED, WHOLE} < set(gns.readings)
        gns.close()
    state = [t for s in optimizer.state.values() for t in s.values()]
    return [*losses, *model.parameters(), *state, torch.rand(1)]


def test_training_is_bitwise_the_same():
    for bare, watched in zip(trained(False), trained(True), strict=True):
        assert torch.equal(bare, watched)


def test_the_log_and_the_report_have_both(tmp_path):
    model, batches = language()
    optimizer = adamw(model)
    with watch(model, optimizer, method="pepgns", preconditioned=True, run_dir=tmp_path) as gns:
        for _ in range(8):
            for batch in batches:
                accumulate(model, optimizer, batch)
        assert gns.reading.method == "pepgns"
        saved = gns.state_dict()
    log = read_log(tmp_path)
    assert log.methods == ["pepgns", FACTORED]
    assert len(log.of(FACTORED)) == len(log.of("pepgns")) - 1
    said = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert said.exit_code == 0, said.output
    assert f"By {FACTORED}: noise scale" in said.output.replace("\n", " ")
    with watch(model, optimizer, method="pepgns", preconditioned=True) as again:
        again.load_state_dict(saved)
        accumulate(model, optimizer, batches[0])  # whose metric was there at attach
        assert again.readings[FACTORED].step == 24
    with watch(model, optimizer, method="pepgns") as without:
        plain = without.state_dict()
    with (
        watch(model, optimizer, method="pepgns", preconditioned=True) as later,
        pytest.raises(ValueError, match="start afresh to add a method, or leave preconditioned"),
    ):
        later.load_state_dict(plain)


# Where there is no metric.


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (torch.optim.SGD, {}, "SGD, which keeps none.*supported are.*AdamW"),
        (None, {}, "none was given; supported are"),
        (torch.optim.Adam, {"method": "sketch"}, "preconditioned is for pepgns, microbatch"),
    ],
)
def test_what_cannot_be_preconditioned_is_refused(kind, settings, message):
    model, _ = language()
    optimizer = None if kind is None else kind(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        watch(model, optimizer, preconditioned=True, **settings)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_parameters_without_a_second_moment_are_named():
    model, batches = language(tied=False)
    head = torch.optim.SGD(model.head.parameters(), lr=0.1)
    others = [p for n, p in model.named_parameters() if not n.startswith("head")]
    body = torch.optim.AdamW(others)
    with (
        pytest.warns(RuntimeWarning, match="head.weight: SGD keeps no second moment") as caught,
        watch(model, [body, head], **BOTH) as gns,
    ):
        for batch in batches[:2]:
            accumulate(model, body, batch)
            head.step()
            head.zero_grad()
        for method in (FACTORED, WHOLE):
            missing = gns.coverage(method).missing
            assert missing == {"head.weight": "SGD keeps no second moment of it that is known"}
            assert 0 < gns.coverage(method).norm_fraction < 1
        assert gns.coverage("pepgns").missing == {}
    assert len(caught) == 1


@pytest.mark.parametrize("order", [1, -1])
def test_several_optimizers_are_read_once_all_have_stepped(order):
    model, batches = language(tied=False)
    head = adamw(model.head)
    body = torch.optim.AdamW([p for p in model.parameters() if p is not model.head.weight])
    with watch(model, [body, head], **BOTH) as gns:
        for step, batch in enumerate(batches):
            examples = gradients(model, split(batch, [1] * B), [1 / B] * B)
            micro = gradients(model, split(batch, SIZES), [n / B for n in SIZES])
            metric = {}
            for name, p in model.named_parameters() if step else ():
                own = head if p is model.head.weight else body
                found = own.state[p]["exp_avg_sq"] / (1 - 0.999**step)
                metric[name] = (found > 0) / (found.sqrt() + own.defaults["eps"])
            model.zero_grad()
            for part in split(batch, SIZES):
                (loss(model, part) * len(part[0]) / B).backward()
            for optimizer in (body, head)[::order]:
                optimizer.step()
            if step:
                assert_raw(gns, WHOLE, micro, metric, sum(n**2 for n in SIZES) / B**2)
                rank_one = {name: factored(p) for name, p in metric.items()}
                assert_raw(gns, FACTORED, examples, rank_one, 1 / B)


def test_what_is_thawed_has_no_moment_at_first():
    model, batches = language(tied=False)
    model.up.requires_grad_(False)
    optimizer = adamw(model)
    with watch(model, optimizer, **BOTH) as gns:
        accumulate(model, optimizer, batches[0])
        model.up.requires_grad_(True)
        accumulate(model, optimizer, batches[1])
        for method in (FACTORED, WHOLE):
            expected = dict.fromkeys(("up.weight", "up.bias"), NO_MOMENT)
            assert gns.coverage(method).missing == expected
        accumulate(model, optimizer, batches[2])
        assert not gns.coverage(FACTORED).missing


def test_an_optimizer_that_never_has_a_state_is_told_of():
    class Plain(torch.optim.SGD):
        pass

    Strange = type("Strange", (torch.optim.Optimizer,), {"step": lambda self: None})
    model, batches = language()
    optimizer = Strange(model.parameters(), {"lr": 0.1})
    with (
        pytest.warns(RuntimeWarning, match="no second moments yet"),
        watch(model, optimizer, **BOTH) as gns,
    ):
        for batch in batches:
            accumulate(model, optimizer, batch)
        assert gns.skipped == {NO_STATE: 3}
    with pytest.raises(ValueError, match="Plain"):
        watch(model, Plain(model.parameters(), lr=0.1), preconditioned=True)


def test_a_fault_of_the_state_drops_the_preconditioned_reading_alone():
    model, batches = language()
    optimizer = adamw(model)
    with watch(model, optimizer, strict=False, **BOTH) as gns:
        accumulate(model, optimizer, batches[0])
        seen = gns.step
        gns._metric._optimizers = (None,)  # to be read at the end of the next step
        with pytest.warns(RuntimeWarning, match="AttributeError"):
            accumulate(model, optimizer, batches[1])
            accumulate(model, optimizer, batches[2])
        assert gns.reading.step == seen + 1
        assert gns.skipped["fault"] == 1


# What P is.


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.Adam, {"betas": (0.0, 0.9), "eps": 1e-2}),
        (torch.optim.Adam, {"betas": (0.0, 0.5), "eps": 1e-2, "amsgrad": True}),
        (torch.optim.AdamW, {"betas": (0.0, 0.9), "weight_decay": 0.0}),
        (torch.optim.NAdam, {"betas": (0.0, 0.9)}),
        (torch.optim.RAdam, {"betas": (0.0, 0.99), "eps": 0.0}),
        (torch.optim.Adamax, {"betas": (0.0, 0.9)}),
        (torch.optim.RMSprop, {"alpha": 0.9, "eps": 1e-2}),
        (torch.optim.RMSprop, {"alpha": 0.9, "eps": 1e-2, "centered": True}),
        (torch.optim.Adagrad, {"eps": 1e-2}),
        (torch.optim.Adafactor, {"weight_decay": 0.0}),
    ],
)
def test_the_metric_is_that_of_the_optimizers_own_update(kind, options):
    """Without momentum an update is P g, times one number for each parameter."""
    torch.manual_seed(6)
    model = nn.Linear(4, 3).to(D)
    optimizer = kind(model.parameters(), lr=1e-3, **options)
    for _ in range(9):
        before = [p.detach().clone() for p in model.parameters()]
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    metric = Preconditioner(model, [optimizer], diagonal=True, factored=True)
    metric.freeze(True)
    for old, (name, p) in zip(before, model.named_parameters(), strict=True):
        moved = (old - p.detach()) / p.grad
        weights = metric.diagonal[name].root ** 2
        ratio = moved / weights
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-8, atol=0)
        if kind in (torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad):
            assert float(ratio.mean()) == pytest.approx(1e-3, rel=1e-8)
        if kind is torch.optim.Adafactor or p.ndim == 1:  # rank one already
            rank_one = metric.factored[name].scaled(torch.ones_like(p))
            torch.testing.assert_close(rank_one, metric.diagonal[name].root)
    metric.freeze(False)
    assert not metric.diagonal
    assert not metric.known


def test_adadelta_by_hand():
    model = nn.Linear(1, 1, bias=False).to(D)
    optimizer = torch.optim.Adadelta(model.parameters(), eps=1.0)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    optimizer.state[model.weight]["square_avg"].fill_(3.0)
    optimizer.state[model.weight]["acc_delta"].fill_(15.0)
    metric = Preconditioner(model, [optimizer], diagonal=True, factored=False)
    metric.freeze(True)
    assert float(metric.diagonal["weight"].root) ** 2 == pytest.approx(2.0)  # sqrt(16) / sqrt(4)


def test_rank_one_weights_by_hand():
    metric = Factored(torch.empty(2, 2, dtype=D))
    # d² has the rows' means 5 and 10, the columns' 4 and 11, and 7.5 over all.
    metric.update(torch.tensor([[1.0, 9.0], [7.0, 13.0]], dtype=D).sqrt())
    p = metric.scaled(torch.ones(2, 2, dtype=D)).square()
    expected = torch.tensor([[20.0, 55.0], [40.0, 110.0]], dtype=D) / 7.5
    torch.testing.assert_close(p, expected**-0.5)


def test_what_had_no_gradient_weighs_nothing():
    d = torch.tensor([[0.0, 0.0], [2.0, 0.0], [4.0, 0.0]], dtype=D)
    whole, rank_one = Diagonal.of(d), Factored(d)
    rank_one.update(d)
    ones = torch.ones_like(d)
    expected = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.25, 0.0]], dtype=D)
    torch.testing.assert_close(whole.scaled(ones).square(), expected)
    torch.testing.assert_close(rank_one.scaled(ones).square(), expected)  # of rank one as it is


def forms():
    """One of each kind, with a parameter's shape."""
    torch.manual_seed(7)

    def r(*shape):
        return torch.randn(*shape, dtype=D)

    index = torch.tensor([[0, 2, 2], [1, 1, 1]])
    outer, rows, dense = Outer(r(2, 3, 4), r(2, 3, 5)), Rows(index, r(2, 3, 5), (4, 5)), r(2, 4, 5)
    wide = Outer(r(2, 2, 3, 3), r(2, 2, 3, 4), (6, 2, 2))
    convolved = Convolved(
        r(2, 4, 5, 6), r(2, 6, 3, 2), (6, 2, 3, 3), (1, 2), (0, 0), (1, 1), groups=2
    )
    left = Outer(r(2, 3, 4), r(2, 3, 5), inputs="left")
    return [outer, wide, left, rows, Dense(dense), Dense(r(2, 3)), Dense(r(2)), convolved] + [
        outer + rows,
        outer + rows + Dense(dense),
        convolved + convolved,
    ]


@pytest.mark.parametrize("form", forms(), ids=lambda form: type(form).__name__)
def test_a_form_is_scaled_as_its_gradients_are(form):
    metric = Factored(torch.empty(form.shape, dtype=D))
    metric.update(torch.rand(form.shape, dtype=D) + 0.1)
    scaled = metric.form(form)
    expected = torch.stack([metric.scaled(g) for g in form.dense()])
    assert scaled.shape == form.shape
    torch.testing.assert_close(scaled.dense(), expected, rtol=1e-12, atol=1e-12)
    squares = expected.flatten(1) if form.shape else expected[:, None]
    torch.testing.assert_close(scaled.sq_norms(), squares.square().sum(1), rtol=1e-10, atol=0)


def test_a_sparse_gradient_is_scaled():
    metric = Diagonal.of(torch.full((3, 2), 4.0))
    sparse = torch.sparse_coo_tensor(
        [[0, 0]], [[1.0, 2.0], [3.0, 4.0]], (3, 2), check_invariants=True
    )
    expected = torch.tensor([[2.0, 3.0], [0.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(metric.scaled(sparse), expected)


# Compiled, and in several processes.


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("tied", [False, True])
def test_a_compiled_model(tied):
    model, batches = language(tied=tied)
    optimizer = adamw(model)
    torch._dynamo.reset()
    told = pytest.warns(RuntimeWarning, match=NOT_CROSSED) if tied else nullcontext()
    with told, watch(model, optimizer, method="pepgns", preconditioned=True, engine="hooks") as gns:
        compiled = torch.compile(model, backend="aot_eager")
        for step, batch in enumerate(batches):
            examples = gradients(model, split(batch, [1] * B), [1 / B] * B)
            metric = metric_of(optimizer, model) if step else None
            optimizer.zero_grad()
            loss(compiled, batch).backward()
            optimizer.step()
            if metric is None:
                continue
            rank_one = {name: factored(p) for name, p in metric.items()}
            if not tied:
                assert_raw(gns, FACTORED, examples, rank_one, 1 / B)
                continue
            del examples["wte.weight"]
            assert gns.coverage(FACTORED).missing == {"wte.weight": NOT_CROSSED}
            raw, (big, parts) = gns.readings[FACTORED].raw, norms(examples, rank_one)
            assert raw.big_sq_norm == pytest.approx(big, rel=1e-10)
            assert raw.parts_sq_norm == pytest.approx(parts, rel=1e-10)
            assert gns.coverage("pepgns").missing == {}


def on_ranks(rank):
    model, batches = language()
    wrapped = DDP(model)
    optimizer = adamw(model)
    settings = {"method": ["pepgns", "ranks"], "preconditioned": True, "engine": "hooks"}
    with watch(wrapped, optimizer, **settings) as gns:
        for step, batch in enumerate(batches):
            halves = split(batch, [B // 2] * 2)
            examples = gradients(model, split(batch, [1] * B), [1 / B] * B)
            parts = gradients(model, halves, [0.5, 0.5])
            metric = metric_of(optimizer, model) if step else None
            optimizer.zero_grad()
            loss(wrapped, halves[rank]).backward()
            optimizer.step()
            assert_raw(gns, "ranks", parts, None, 0.5)
            if metric is not None:
                assert_raw(gns, named("ranks"), parts, metric, 0.5)
                rank_one = {name: factored(p) for name, p in metric.items()}
                assert_raw(gns, FACTORED, examples, rank_one, 1 / B)
        assert gns.skipped == {NO_STATE: 1}


def test_ranks(tmp_path):
    in_processes(on_ranks, folder=tmp_path)


def on_shards(rank):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).to(D)
    model[0].requires_grad_(False)
    fully_shard(model)
    optimizer = adamw(model)
    settings = {"method": ["pepgns", "ranks"], "preconditioned": True, "diagnostics": True}
    said = "not measured in the optimizer's metric: 2.weight: its optimizer's second moment is in"
    with pytest.warns(RuntimeWarning, match=said), watch(model, optimizer, **settings) as gns:
        for step in range(3):
            optimizer.zero_grad()
            energy(model, torch.randn(B, 4, dtype=D)).backward()
            optimizer.step()
            assert {method: reading.step for method, reading in gns.readings.items()} == {
                "pepgns": step,
                "ranks": step,
            }
            assert gns.health.step == step
        assert gns.skipped == {NO_STATE: 1, "no metric": 2}


def test_shards_have_no_metric_and_all_else(tmp_path):
    in_processes(on_shards, folder=tmp_path)
