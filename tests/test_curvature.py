"""The full noise scale and the alignment of halves, against brute force and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks_worker import in_processes
from scipy.stats import norm
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel

import gnsmon
from gnsmon.curvature import _ratio
from gnsmon.demo.models import CharGPT
from gnsmon.demo.quadratic import NoisyQuadratic, mean_loss
from gnsmon.estimators import NormPair, moments
from gnsmon.estimators.pairs import (
    agreement,
    agreement_without_each,
    delete_one,
    form_moments,
    form_moments_without_each,
)
from gnsmon.halves import msign

SIZES = (4, 6, 2, 8, 5)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def squared(model, batch):
    x, y = batch
    return F.mse_loss(model(x), y)


def batches_of(sizes, seed=1):
    torch.manual_seed(seed)
    return [(torch.randn(n, 3).double(), torch.randn(n, 2).double()) for n in sizes]


def flat_gradient(model, batch):
    grads = torch.autograd.grad(squared(model, batch), list(model.parameters()))
    return torch.cat([g.flatten() for g in grads]).numpy()


def flat_hessian(model, batch):
    names, values = zip(*model.named_parameters(), strict=True)
    sizes = [v.numel() for v in values]

    def loss(flat):
        parts = [p.view_as(v) for p, v in zip(flat.split(sizes), values, strict=True)]
        at = dict(zip(names, parts, strict=True))
        return F.mse_loss(torch.func.functional_call(model, at, (batch[0],)), batch[1])

    at = torch.cat([v.detach().flatten() for v in values])
    return torch.func.jacrev(torch.func.jacrev(loss))(at).numpy()  # forward mode warns, torch 2.13


def brute_moments(u, h, weights, examples):
    """tr(H Sigma) and G'HG by the pairs themselves."""
    form = u @ h @ u.T
    p = (weights**2).sum()
    between = form.sum() - form.trace()
    return examples * (form.trace() - p * form.sum()) / (1 - p), between / (1 - p)


def some_parts(seed=0, n=7, d=5):
    rng = np.random.default_rng(seed)
    weights = rng.uniform(1, 3, n)
    h = rng.standard_normal((d, d))
    return rng.standard_normal((n, d)), h + h.T, weights / weights.sum()


def test_moments_of_a_form_are_those_of_its_pairs():
    u, h, w = some_parts()
    own, with_sum = ((u @ h) * u).sum(1), u @ h @ u.sum(0)
    np.testing.assert_allclose(
        form_moments(own, with_sum, w, 70), brute_moments(u, h, w, 70), rtol=1e-12
    )


def test_moments_without_each_part_are_those_of_the_others():
    u, h, w = some_parts()
    own, with_sum = ((u @ h) * u).sum(1), u @ h @ u.sum(0)
    got = form_moments_without_each(own, with_sum, w, 70)
    for i in range(len(u)):
        rest, others = np.delete(u, i, 0) / (1 - w[i]), np.delete(w, i) / (1 - w[i])
        expected = brute_moments(rest, h, others, 70 * (1 - w[i]))
        np.testing.assert_allclose(got[:, i], expected, rtol=1e-10)


def test_the_identity_gives_the_moments_of_a_step():
    u, _, w = some_parts()
    own, with_sum = (u**2).sum(1), u @ u.sum(0)
    s, g = form_moments(own, with_sum, w, 70)
    step = moments(NormPair(with_sum.sum(), own.sum(), (w**2).sum(), 70))
    assert (s, g) == pytest.approx((step.tr_sigma, step.grad_sq_norm), rel=1e-12)


def test_agreement_is_that_of_the_pairs():
    f, _, _ = some_parts()
    gram, n = f @ f.T, len(f)
    own, with_sum = gram.diagonal(), gram.sum(1)

    def of(gram):
        n = len(gram)
        return (gram.sum() - gram.trace()) / (n * (n - 1)) / (gram.trace() / n)

    assert agreement(own, with_sum) == pytest.approx(of(gram), rel=1e-12)
    without = [of(np.delete(np.delete(gram, i, 0), i, 1)) for i in range(n)]
    np.testing.assert_allclose(agreement_without_each(own, with_sum), without, rtol=1e-10)


def test_delete_one_is_the_jackknife_by_its_definition():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 9))
    whole = np.array([x[0].mean(), x[1].mean() ** 2])
    without = np.stack(
        [[np.delete(x[0], i).mean(), np.delete(x[1], i).mean() ** 2] for i in range(9)], 1
    )
    got = delete_one(whole, without, np.full(9, 1 / 9))
    centred = without - without.mean(1, keepdims=True)
    np.testing.assert_allclose(got.covariance, 8 / 9 * centred @ centred.T, rtol=1e-12)
    np.testing.assert_allclose(got.bias, 8 * (without.mean(1) - whole), atol=1e-14)


def test_full_noise_scale_is_that_of_the_materialised_hessian():
    model, parts, for_h = mlp(), batches_of(SIZES), batches_of((7, 3), seed=2)
    got = gnsmon.full_noise_scale(model, squared, parts, hessian_batches=for_h)
    w = np.array(SIZES) / sum(SIZES)
    u = w[:, None] * np.stack([flat_gradient(model, batch) for batch in parts])
    h = 0.7 * flat_hessian(model, for_h[0]) + 0.3 * flat_hessian(model, for_h[1])
    expected = brute_moments(u, h, w, sum(SIZES))
    assert (got.trace_h_sigma, got.g_h_g) == pytest.approx(expected, rel=1e-10)
    assert (got.parts, got.hessian_parts, got.examples) == (5, 2, 25)


def test_the_hessian_is_taken_from_every_fourth_batch():
    model, batches = mlp(), batches_of((4,) * 9)
    got = gnsmon.full_noise_scale(model, squared, batches)
    for_h = [batches.pop(i) for i in (7, 3)]
    assert got == gnsmon.full_noise_scale(model, squared, batches, hessian_batches=for_h[::-1])
    assert (got.parts, got.hessian_parts) == (7, 2)


def quadratic(d=12, batch_noise=8.0, negative=0, seed=0):
    """Curvatures of two decades; b_noise of some ten examples."""
    torch.manual_seed(seed)
    h = torch.logspace(-1, 1, d).double()
    h[:negative] *= -1
    basis, _ = torch.linalg.qr(torch.randn(d, d).double())
    noise = batch_noise * torch.linspace(0.5, 2, d).double()
    return NoisyQuadratic(basis * h @ basis.mT, noise, torch.randn(d).double())


def test_full_noise_scale_of_a_noisy_quadratic_is_the_closed_form():
    model = quadratic()
    generator = torch.Generator().manual_seed(1)
    runs = []
    for _ in range(40):
        batches = [model.sample(8, generator) for _ in range(10)]
        for_h = [model.sample(1, generator)]
        runs.append(gnsmon.full_noise_scale(model, mean_loss, batches, hessian_batches=for_h))
    for name in ("trace_h_sigma", "g_h_g"):
        values = np.array([getattr(run, name) for run in runs])
        error = values.std(ddof=1) / np.sqrt(len(values))
        assert abs(values.mean() - getattr(model, name)) < 4 * error
        assert error < 0.1 * abs(getattr(model, name))
    covered = sum(run.low <= model.b_noise <= run.high for run in runs if run.low is not None)
    assert all(run.status in ("ok", "wide") for run in runs)
    assert covered >= 33  # 38 ± 1.4
    assert not 0.5 < model.b_noise / model.b_simple < 2  # or b_simple would do as well


def simulated(n, repetitions, *, m=1, h_noise=0.0, size=16, seed=0):
    """`_ratio` of n Gaussian parts of `size` examples and m noisy Hessians, and the true ratio."""
    rng = np.random.default_rng(seed)
    h, g, spread = (
        np.diag([1.0, 2.0, 5.0, 0.2]),
        np.array([1.0, -1, 0.5, 2]),
        np.array([1, 2, 1, 3]),
    )
    found = []
    for _ in range(repetitions):
        u = (g + rng.standard_normal((n, 4)) * spread / np.sqrt(size)) / n
        products = []
        for _ in range(m):
            noise = h_noise * rng.standard_normal((4, 4))
            hu = u @ (h + noise + noise.T)
            products.append([(hu * u).sum(1), hu @ u.sum(0)])
        weights, weights_h = np.full(n, 1 / n), np.full(m, 1 / m)
        found.append(_ratio(np.array(products), weights, n * size, weights_h, 0.95))
    return found, (h @ spread**2).sum() / (g @ h @ g)


def rms(values):
    return float(np.sqrt(np.mean(np.square(values))))


@pytest.mark.parametrize(("m", "h_noise"), [(1, 0.0), (12, 0.2)])
def test_the_error_is_the_spread_over_repetitions(m, h_noise):
    found, truth = simulated(20, 800, m=m, h_noise=h_noise)
    ratios = np.array([r.ratio for r in found])
    assert rms([r.error for r in found]) == pytest.approx(ratios.std(), rel=0.2)
    assert rms([r.g_error for r in found]) == pytest.approx(np.std([r.g for r in found]), rel=0.2)
    covered = np.mean([r.low is not None and r.low <= truth <= r.high for r in found])
    assert abs(covered - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 800)
    corrected = np.array([r.corrected for r in found])
    assert abs(corrected.mean() - truth) < 4 * corrected.std() / np.sqrt(800) + 0.01 * truth


def test_the_noise_of_the_hessian_is_in_the_error():
    with_it, _ = simulated(20, 300, m=12, h_noise=0.2)
    without, _ = simulated(20, 300)
    assert rms([r.error for r in with_it]) > 1.15 * rms([r.error for r in without])


def test_a_hessian_of_the_parts_themselves_is_refused():
    batches = batches_of(SIZES)
    with pytest.raises(ValueError, match="batches that are not among `batches`"):
        gnsmon.full_noise_scale(mlp(), squared, batches, hessian_batches=batches[:1])


def test_an_indefinite_hessian_is_told():
    model = quadratic(negative=12)
    generator = torch.Generator().manual_seed(1)
    got = gnsmon.full_noise_scale(
        model, mean_loss, [model.sample(64, generator) for _ in range(16)]
    )
    assert (got.status, got.b_noise, got.low) == ("undefined", None, None)
    assert got.g_h_g < 0
    assert "G'HG is negative" in got.reason
    assert "H is indefinite" in str(got)


def test_noise_along_negative_curvature_is_told():
    d = torch.tensor([1.0, -1.0]).double()
    model = NoisyQuadratic(d, torch.tensor([0.5, 40.0]).double(), torch.tensor([9.0, 0]).double())
    generator = torch.Generator().manual_seed(1)
    got = gnsmon.full_noise_scale(
        model, mean_loss, [model.sample(64, generator) for _ in range(16)]
    )
    assert (got.status, got.b_noise) == ("undefined", None)
    assert got.trace_h_sigma < 0 < got.g_h_g
    assert "tr(H Sigma) is negative" in got.reason


def test_what_noise_hides_is_told():
    model = quadratic(batch_noise=1e4)
    generator = torch.Generator().manual_seed(1)
    got = gnsmon.full_noise_scale(model, mean_loss, [model.sample(2, generator) for _ in range(8)])
    assert got.status == "undefined"
    assert "not distinguishable from zero" in got.reason
    assert got.b_simple is None


def test_a_linear_loss_has_no_hessian():
    model = nn.Linear(3, 1).double()
    batches = [x for x, _ in batches_of((4,) * 8)]
    got = gnsmon.full_noise_scale(model, lambda model, x: model(x).mean(), batches)
    assert got.status == "undefined"
    assert "the loss is linear" in got.reason


def test_b_simple_is_beside_it():
    model = quadratic()
    generator = torch.Generator().manual_seed(3)
    batches = [model.sample(64, generator) for _ in range(40)]
    got = gnsmon.full_noise_scale(model, mean_loss, batches)
    assert abs(got.b_simple - model.b_simple) < 4 * got.b_simple_standard_error
    assert got.b_simple_standard_error < 0.1 * got.b_simple
    assert f"b_simple {got.b_simple:.4g}" in str(got)
    assert got.status == "ok"


@pytest.mark.parametrize("call", [gnsmon.full_noise_scale, gnsmon.alignment])
def test_the_model_is_left_as_it_was(call):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model = model.double()
    model[3].eval()
    model[0].bias.grad = torch.ones(4).double()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes, batches = [m.training for m in model.modules()], batches_of((4,) * 8)
    random = torch.get_rng_state()
    first = call(model, squared, batches)
    torch.randn(1)
    assert call(model, squared, batches) == first
    torch.set_rng_state(random)
    assert call(model, squared, batches) == first
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(model[0].bias.grad, torch.ones(4).double())
    assert model[0].weight.grad is None


@pytest.mark.parametrize("method", ["pepgns", "microbatch", "random_signs"])
@pytest.mark.parametrize("call", [None, gnsmon.full_noise_scale, gnsmon.alignment])
def test_a_monitor_takes_no_notice(call, method, tmp_path):
    model, found = mlp(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"every": 1, "run_dir": tmp_path, "strict": True, "method": method}
    with gnsmon.attach(model, optimizer, **settings, sinks=[found.append]) as gns:
        for half in zip(*[iter(batches_of((4,) * 6, seed=5))] * 2, strict=True):
            if call is not None:
                call(model, squared, batches_of((4,) * 8))
            optimizer.zero_grad()
            for x, y in half:
                losses = (model(x) - y).square().mean(1)
                gns.losses(losses)
                (losses.mean() / 2).backward()
            optimizer.step()
        assert not gns.skipped
        assert len(found) == 3
        got = [(r.raw.grad_sq_norm, r.raw.tr_sigma) for r in found]
        assert RAW.setdefault(method, got) == got


RAW: dict[str, list[tuple[float, float]]] = {}  # method -> the readings of the first of its tests


def test_attention_is_differentiated_twice():
    torch.manual_seed(0)
    model = CharGPT(11, context=6, width=8, layers=1, heads=2, dropout=0.0).double()
    windows = torch.randint(11, (8, 4, 7))

    def loss(model, batch):
        return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    got = gnsmon.full_noise_scale(model, loss, list(windows))
    assert np.isfinite([got.trace_h_sigma, got.g_h_g]).all()
    assert got.trace_h_sigma != 0

    def flash(model, batch):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return loss(model, batch)

    with pytest.raises(ValueError, match="Of attention take the math kernel"):
        gnsmon.full_noise_scale(model, flash, list(windows))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return 2 * ctx.saved_tensors[0] * dy


def test_a_loss_that_is_differentiable_once_is_refused():
    def loss(model, batch):
        return Once.apply(model(batch[0])).mean()

    with pytest.raises(ValueError, match="differentiated twice.*marked @once_differentiable"):
        gnsmon.full_noise_scale(mlp(), loss, batches_of(SIZES))


@pytest.mark.parametrize("call", [gnsmon.full_noise_scale, gnsmon.alignment])
def test_what_cannot_be_is_refused(call):
    model, batches = mlp(), batches_of((4,) * 8)
    with pytest.raises(ValueError, match="got 1"):
        call(model, squared, batches[:1])
    with pytest.raises(ValueError, match=r"expected a scalar tensor.*got shape \[4, 2\]"):
        call(model, lambda model, batch: model(batch[0]), batches)
    with pytest.raises(ValueError, match="got a tensor without a graph"):
        call(model, lambda model, batch: model(batch[0]).mean().detach(), batches)
    with pytest.raises(ValueError, match="got 0.0"):
        call(model, lambda model, batch: 0.0, batches)
    with pytest.raises(ValueError, match=r"batch 2: .*first axes of \[3, 4\]"):
        x, y = batches[2]
        call(model, squared, [*batches[:2], (x[:3], y), *batches[3:]])
    with pytest.raises(ValueError, match="its gradient has infinite or undefined values"):
        call(model, lambda model, batch: squared(model, batch) * math.nan, batches)
    with pytest.raises(ValueError, match="all of them are frozen"):
        call(model.requires_grad_(False), squared, batches)


def test_a_level_beyond_one_is_refused():
    with pytest.raises(ValueError, match="level: expected a number between 0 and 1, got 95"):
        gnsmon.full_noise_scale(mlp(), squared, batches_of((4,) * 8), level=95)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_is_refused_where_it_cannot_be_differentiated_twice():
    torch._dynamo.reset()
    compiled = torch.compile(mlp(), backend="aot_eager")
    with pytest.raises(ValueError, match="of a compiled model the one before torch.compile"):
        gnsmon.full_noise_scale(compiled, squared, batches_of((4,) * 8))


def test_many_parts_in_half_precision_add_up():
    """All parts alike: |G|² is the whole of |u|², and halves agree."""
    model = nn.Linear(3, 2, bias=False).bfloat16()
    batches = [torch.ones(1, 3, dtype=torch.bfloat16) for _ in range(600)]

    def loss(model, batch):
        return model(batch).float().square().sum(1).mean()

    found = gnsmon.full_noise_scale(
        model, loss, batches[:-1], hessian_batches=[batches[-1].clone()]
    )
    assert abs(found.trace_h_sigma) < 0.05 * found.g_h_g
    halves = gnsmon.alignment(model, loss, batches)
    assert halves.cosine.value == pytest.approx(1, abs=1e-3)
    assert halves.sign.value == pytest.approx(1, abs=1e-3)


def in_shards(rank):
    model = fully_shard(nn.Linear(4, 2))
    for call in (gnsmon.full_noise_scale, gnsmon.alignment):
        with pytest.raises(ValueError, match="weight is in the shards of fully_shard"):
            call(model, squared, [torch.randn(2, 4) for _ in range(8)])


def test_a_sharded_model_is_refused(tmp_path):
    in_processes(in_shards, folder=tmp_path)


# Halves


def transformed(kind, h, model):
    if kind == "cosine":
        return h
    if kind == "sign":
        return {name: x.sign() for name, x in h.items()}
    return {name: msign(x) for name, x in h.items() if x.ndim > 1}


@pytest.mark.parametrize("per_half", [1, 2])
@pytest.mark.parametrize("kind", ["cosine", "sign", "spectral"])
def test_alignment_is_that_of_all_pairs(kind, per_half):
    model, batches = mlp(), batches_of((4,) * 9)
    got = gnsmon.alignment(model, squared, batches, per_half=per_half)
    count = 9 // per_half
    halves = []
    for i in range(count):
        of = batches[i * per_half : (i + 1) * per_half]
        joined = tuple(torch.cat(t) for t in zip(*of, strict=True))
        grads = torch.autograd.grad(squared(model, joined), list(model.parameters()))
        h = dict(zip(dict(model.named_parameters()), grads, strict=True))
        halves.append(transformed(kind, h, model))

    def expected(names):
        names = [name for name in names if name in halves[0]]
        f = torch.stack([torch.cat([h[n].flatten() for n in names]) for h in halves]).numpy()
        gram = f @ f.T
        return (gram.sum() - gram.trace()) / (count - 1) / gram.trace()

    assert (got.halves, got.examples) == (count, 8 * per_half)
    names = list(dict(model.named_parameters()))
    assert getattr(got, kind).value == pytest.approx(expected(names), rel=1e-10)
    assert list(got.groups) == ["0", "2"]
    second = getattr(got.groups["2"], kind)
    assert second.value == pytest.approx(expected(["2.weight", "2.bias"]), rel=1e-10)


def test_the_laws_of_cosine_and_sign():
    """1 / (1 + 2 b_simple / B), and (2 Phi(mu / sigma) - 1)² averaged over coordinates."""
    model = NoisyQuadratic(
        torch.linspace(0.5, 2, 40).double(),
        torch.linspace(1, 30, 40).double(),
        torch.linspace(-2, 3, 40).double(),
    )
    generator, half = torch.Generator().manual_seed(0), 8
    runs = []
    for _ in range(40):
        batches = [model.sample(half, generator) for _ in range(10)]
        runs.append(gnsmon.alignment(model, mean_loss, batches))
    z = model.gradient / (model.covariance.diagonal() / half).sqrt()
    laws = {
        "cosine": 1 / (1 + model.b_simple / half),
        "sign": float(np.mean((2 * norm.cdf(z.numpy()) - 1) ** 2)),
    }
    for kind, law in laws.items():
        values = np.array([getattr(run, kind).value for run in runs])
        error = values.std(ddof=1) / np.sqrt(len(values))
        assert abs(values.mean() - law) < 4 * error
        assert error < 0.02
        said = rms([getattr(run, kind).standard_error for run in runs])
        assert said == pytest.approx(values.std(ddof=1), rel=0.4)  # of 40: its own error is 11 %
    assert runs[0].b_simple == pytest.approx(half * (1 / runs[0].cosine.value - 1))
    assert runs[0].examples == 2 * half


def test_the_error_of_an_agreement_is_its_spread():
    rng = np.random.default_rng(0)
    values, errors = [], []
    for _ in range(1500):
        f = np.sign(0.5 + rng.standard_normal((12, 20)))
        own, with_sum = (f**2).sum(1), f @ f.sum(0)
        value = agreement(own, with_sum)
        without = agreement_without_each(own, with_sum)
        deleted = delete_one(value[None], without[None], np.full(12, 1 / 12))
        values.append(value)
        errors.append(np.sqrt(deleted.covariance[0, 0]))
    assert rms(errors) == pytest.approx(np.std(values), rel=0.2)


class Matrix(nn.Module):
    """Of which the gradient of example i is its row of the batch, any [6, 4]."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6, 4).double())

    def forward(self, batch):
        return (self.weight * batch).sum((1, 2)).mean()


def align(batch, halves=10):
    return gnsmon.alignment(Matrix(), lambda model, b: model(b), list(batch.chunk(halves)))


def test_spectral_alignment_of_signal_and_of_noise():
    torch.manual_seed(0)
    signal = torch.randn(6, 4).double().expand(40, 6, 4)
    assert align(signal).spectral.value == pytest.approx(1, abs=1e-12)
    noise = align(torch.randn(400, 6, 4).double(), halves=100)
    assert abs(noise.spectral.value) < 4 * noise.spectral.standard_error
    assert noise.spectral.standard_error < 0.02
    # Two strong directions of four: theirs align, which is half of the rank.
    u, v = (
        torch.linalg.qr(torch.randn(6, 2).double())[0],
        torch.linalg.qr(torch.randn(4, 2).double())[0],
    )
    strong = align(1e6 * u @ v.mT + torch.randn(400, 6, 4).double(), halves=100)
    assert abs(strong.spectral.value - 0.5) < 4 * strong.spectral.standard_error + 1e-3
    assert strong.cosine.value == pytest.approx(1, abs=1e-6)


def test_msign_is_the_nearest_matrix_of_unit_singular_values():
    torch.manual_seed(0)
    for shape in ((5, 3), (3, 5)):
        m = torch.randn(shape).double()
        s = torch.linalg.svdvals(msign(m))
        torch.testing.assert_close(s, torch.ones(3).double())
        assert float((m * msign(m)).sum()) == pytest.approx(float(torch.linalg.svdvals(m).sum()))
    low = torch.outer(torch.arange(4.0), torch.ones(3))
    assert float(msign(low).square().sum()) == pytest.approx(1, rel=1e-5)
    assert not msign(torch.zeros(2, 3)).any()


def test_coordinates_and_groups_without_gradient_are_left_out():
    model = nn.ModuleDict({"used": nn.Linear(3, 1, bias=False), "not": nn.Linear(2, 2)}).double()
    batches = [x for x, _ in batches_of((4,) * 6)]
    got = gnsmon.alignment(model, lambda model, x: model["used"](x).square().mean(), batches)
    alone = gnsmon.alignment(model["used"], lambda model, x: model(x).square().mean(), batches)
    assert got.sign == alone.sign
    assert got.groups["not"].sign.value is None
    assert got.groups["not"].sign.standard_error is None


def test_two_halves_have_no_error_and_a_table_says_so():
    got = gnsmon.alignment(mlp(), squared, batches_of((4, 4)))
    assert got.cosine.standard_error is None
    text = str(got)
    assert "two halves of 8 examples" in text
    assert f"{got.sign.value:.3f}" in text
    assert "±" not in text


def test_spectral_parameters_can_be_chosen():
    batches = batches_of((4,) * 4)
    got = gnsmon.alignment(mlp(), squared, batches, spectral=["2.weight"])
    assert got.groups["0"].spectral.value is None
    assert got.spectral == got.groups["2"].spectral
    with pytest.raises(ValueError, match=r"two axes or more, got \['0.bias'\]"):
        gnsmon.alignment(mlp(), squared, batches, spectral=["0.bias"])
    with pytest.raises(ValueError, match=r"equally many examples in each, got \[4, 3\]"):
        gnsmon.alignment(mlp(), squared, batches_of((4, 3)))
