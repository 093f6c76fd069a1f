"""What each method makes of a step: sketch, calibration, norm layers, two sources in one."""

import csv
import math
import re

import cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map

import gnsmon
from gnsmon.collectors.combine import combined
from gnsmon.collectors.per_example import PerExample
from gnsmon.collectors.step import Skipped, StepNorms
from gnsmon.demo.models import CharGPT
from gnsmon.estimators import NormPair, moments
from gnsmon.sinks.wording import approximation

B, T, WORDS = 6, 24, 40


def text(dtype=torch.float64, **options):
    torch.manual_seed(0)
    options = {"context": T, "width": 48, "layers": 2, "heads": 2, "dropout": 0.0, **options}
    model = CharGPT(WORDS, **options).to(dtype)
    window = torch.randint(WORDS, (B, T + 1), generator=torch.Generator().manual_seed(1))
    return model, (window[:, :-1], window[:, 1:])


def loss_of(model, batch):
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def train(model, batch, steps, *, lr=0.0, microbatches=1, tmp_path=None, **options):
    """All readings by method, of a run on one batch."""
    kept = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    options = {"every": 1, "groups": "total", "strict": True, **options}
    sink = lambda reading: kept.setdefault(reading.method, []).append(reading)  # noqa: E731
    with gnsmon.attach(model, optimizer, sinks=[sink], run_dir=tmp_path, **options) as gns:
        for _ in range(steps):
            optimizer.zero_grad()
            for part in zip(*(t.chunk(microbatches) for t in batch), strict=True):
                (loss_of(model, part) / microbatches).backward()
            optimizer.step()
    return gns, kept


# The sketch.


def sketched(model, collector):
    """Those parameters whose norms are really sketched, for tests must not pass by exactness."""
    return [name for name, s in collector.taps.sketches.items() if s.passes == 0]


@pytest.mark.parametrize("case", cases.CASES, ids=lambda c: c.name)
def test_a_sketch_of_all_directions_is_exact_for_every_layer(case):
    model, batch = case.make()
    collector = PerExample(model, ["pepgns", "sketch"], subspace=10**6, strict=True)
    for sketch in collector.taps.sketches.values():
        sketch.passes = 0
    # The second time with subspaces that were tracked.
    for part in [tree_map(lambda t: t[:2], batch), batch]:
        model.zero_grad()
        collector.arm(True)
        case.loss(model, part).backward()
        found = collector.close()
    collector.remove()
    exact, sketch = found["pepgns"].parts_sq_norm, found["sketch"].parts_sq_norm
    narrow = [p.shape[0] < p[0].numel() for p in model.parameters() if p.ndim > 1]
    if not any(narrow):  # else its rows bound the subspace
        np.testing.assert_allclose(sketch, exact, rtol=1e-9, atol=1e-20 * exact.sum())
    assert np.isfinite(sketch).all()


def test_the_sketch_is_unbiased_and_knows_its_error(tmp_path):
    model, batch = text()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    collector = PerExample(model, ["pepgns", "sketch"], subspace=2, strict=True)
    for sketch in collector.taps.sketches.values():
        sketch.passes = 0
    found = []
    for _ in range(400):
        collector.arm(True)
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        found.append(collector.close())
    assert sketched(model, collector)
    exact = found[-1]["pepgns"].parts_sq_norm
    drawn = np.array([f["sketch"].parts_sq_norm for f in found[2:]])
    said = np.array([f["sketch"].parts_variance for f in found[2:]])
    noisy = drawn.std(0) > 1e-9 * exact
    assert noisy.sum() >= 8
    assert drawn[:, ~noisy] == pytest.approx(np.broadcast_to(exact, drawn.shape)[:, ~noisy])
    error = drawn.std(0) / math.sqrt(len(drawn))
    assert (abs(drawn.mean(0) - exact)[noisy] < 4 * error[noisy]).all()
    ratio = drawn.sum(1).var() / said.sum(1).mean()
    assert 0.5 < ratio < 1.2  # the neglected diagonal makes it a little too large


def test_microbatches_do_not_share_their_probes():
    """Else their errors would add up, and the sum err by more than it says."""
    model, batch = text(torch.float32, layers=1)
    example = tuple(t[:1] for t in batch)
    collector = PerExample(model, ["sketch"], subspace=2, strict=True)
    for sketch in collector.taps.sketches.values():
        sketch.passes = 0
    drawn, said = [], []
    for _ in range(100):
        collector.arm(True)
        model.zero_grad()
        for _ in range(8):
            loss_of(model, example).backward()
        found = collector.close()["sketch"]
        drawn.append(found.parts_sq_norm.sum())
        said.append(found.parts_variance.sum())
    assert 0.4 < np.var(drawn[2:]) / np.mean(said[2:]) < 1.6


def test_training_with_the_sketch_is_the_same_training(tmp_path):
    results = []
    for monitored in (False, True):
        model, batch = text(torch.float32, dropout=0.1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        torch.manual_seed(5)
        options = {"method": ["sketch", "norm_layers"], "every": 2, "run_dir": tmp_path}
        gns = gnsmon.attach(model, optimizer, **options) if monitored else None
        for _ in range(5):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
        if gns is not None:
            gns.close()
        results.append([*model.state_dict().values(), torch.rand(1)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_gradient_that_overflows_leaves_the_subspaces_sound():
    model, batch = text(torch.float32)
    collector = PerExample(model, ["sketch"])
    for scale in (1.0, float("inf"), 1.0):
        collector.arm(True)
        model.zero_grad()
        (loss_of(model, batch) * scale).backward()
        found = collector.close()
        assert isinstance(found, Skipped) == (scale != 1.0)
    for sketch in collector.taps.sketches.values():
        q = sketch.subspace
        torch.testing.assert_close(q.mT @ q, torch.eye(q.shape[1]), rtol=0, atol=1e-5)


def test_the_error_of_a_sketch_is_told_at_any_scale_of_the_loss():
    """It is of fourth powers of the gradient, which leave the range of float32 long before it."""
    said = []
    for scale in (1.0, 1e-12, 1e12):
        model, batch = text(torch.float32, layers=1)
        collector = PerExample(model, ["sketch"], subspace=2, strict=True)
        for sketch in collector.taps.sketches.values():
            sketch.passes = 0
        collector.arm(True)
        (loss_of(model, batch) * scale).backward()
        found = collector.close()["sketch"]
        said.append(math.sqrt(found.parts_variance.sum()) / found.parts_sq_norm.sum())
    assert said[0] > 1e-3
    assert said == pytest.approx([said[0]] * 3, rel=1e-4)


def test_the_reading_of_a_sketch_says_its_error(tmp_path):
    model, batch = text()
    _, kept = train(model, batch, 3, method="sketch", tmp_path=tmp_path)
    known = kept["sketch"][-1].approximation
    assert (known.factor, known.exact_steps, known.spread) == (1.0, 0, None)
    assert 0 <= known.standard_error < 0.5
    assert not kept["sketch"][-1].proxy


def test_layers_without_numbers_are_no_obstacle(tmp_path):
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="zero-element"):
        inner = nn.Linear(5, 0), nn.Linear(0, 5)
    model = nn.Sequential(nn.Linear(4, 5), *inner, nn.LayerNorm(5), nn.Linear(5, 3))
    nn.init.normal_(model[2].bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    methods = ["pepgns", "sketch", "sogns", "norm_layers"]
    options = {"every": 1, "strict": True, "run_dir": tmp_path}
    with gnsmon.attach(model, optimizer, method=methods, **options) as gns:
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(B, 7, 4)).square().sum().backward()
            optimizer.step()
        assert gns.coverage().fraction == 1
        assert gns.readings["sketch"].raw.parts_sq_norm == pytest.approx(
            gns.readings["pepgns"].raw.parts_sq_norm
        )


def test_a_step_whose_gradient_was_ruined_after_backward_spoils_no_later_one():
    model, batch = text(torch.float32)
    collector = PerExample(model, ["pepgns", "sketch"], strict=True)
    for sketch in collector.taps.sketches.values():
        sketch.passes = 0
    for ruined in (True, False):
        collector.arm(True)
        model.zero_grad()
        loss_of(model, batch).backward()
        if ruined:
            for p in model.parameters():
                p.grad.fill_(float("nan"))
        found = collector.close()
    assert found["sketch"].parts_sq_norm.sum() == pytest.approx(
        found["pepgns"].parts_sq_norm.sum(), rel=0.3
    )


# Norm layers.


def test_norm_layers_measures_them_alone_and_taps_nothing_else(tmp_path):
    model, batch = text()
    collector = PerExample(model, ["norm_layers"], calibrated=True)
    both = PerExample(model, ["pepgns"])
    calls = []
    for tap in collector.taps.layers:
        original = tap._statistics
        tap._statistics = lambda *a, t=tap, f=original: (calls.append(t.path), f(*a))[1]
    for exact in (False, True):
        calls.clear()
        collector.arm(True, exact=exact)
        both.arm(True)
        model.zero_grad()
        loss_of(model, batch).backward()
        found, everything = collector.close(), both.close()["pepgns"]
        assert all("norm" in path for path in calls) is not exact
        own = found["norm_layers"]
        norms = np.array(["norm" in name for name in collector.names])
        np.testing.assert_allclose(own.parts_sq_norm, everything.parts_sq_norm * norms)
        np.testing.assert_allclose(own.big_sq_norm, everything.big_sq_norm * norms)
        assert ("exact" in found) is exact
        if exact:
            np.testing.assert_allclose(found["exact"].parts_sq_norm, everything.parts_sq_norm)
    assert set(own.missing) == {n for n in collector.names if "norm" not in n}
    assert own.norm_fraction == pytest.approx(own.big_sq_norm.sum() / everything.big_sq_norm.sum())


def test_calibrated_norm_layers_follow_the_whole_model(tmp_path):
    torch.manual_seed(0)
    model, _ = text()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    kept = {}
    sink = lambda r: kept.setdefault(r.method, []).append(r)  # noqa: E731
    with gnsmon.attach(
        model,
        optimizer,
        method=["pepgns", "norm_layers"],
        calibrate_every=2,
        every=1,
        groups="total",
        sinks=[sink],
        run_dir=tmp_path,
    ):
        for _ in range(60):
            window = torch.randint(WORDS // 4, (B, T + 1))
            optimizer.zero_grad()
            loss_of(model, (window[:, :-1], window[:, 1:])).backward()
            optimizer.step()
    exact, norms = kept["pepgns"][-1], kept["norm_layers"][-1]
    factor, error = norms.approximation.factor, norms.approximation.standard_error
    assert norms.approximation.exact_steps == 30
    assert kept["norm_layers"][5].proxy
    assert not norms.proxy
    assert abs(math.log(norms.b_simple / exact.b_simple)) < 4 * error
    assert abs(math.log(factor)) > 0.02  # which the law alone would not give
    uncorrected = math.log(norms.b_simple / factor / exact.b_simple)
    assert abs(uncorrected) > abs(math.log(norms.b_simple / exact.b_simple))


def test_the_factor_of_norm_layers_is_said_to_be_one_of_the_noise_scale(tmp_path):
    model, batch = text()
    options = {"method": "norm_layers", "calibrate_every": 1, "groups": "layer"}
    _, kept = train(model, batch, 12, tmp_path=tmp_path, **options)
    reading = kept["norm_layers"][-1]
    assert re.fullmatch(r"corrected by [\d.]+, which is known to [\d.]+%", approximation(reading))
    assert reading.groups["norm"].approximation is None  # exact


def test_an_exact_step_of_a_single_example_calibrates_nothing(tmp_path):
    model, batch = text()
    one = tuple(t[:1] for t in batch)
    options = {"method": "norm_layers", "calibrate_every": 1, "tmp_path": tmp_path}
    with pytest.warns(RuntimeWarning, match="one part"):
        gns, kept = train(model, one, 4, **options)
    assert gns.skipped == {"one part": 4}
    assert not kept


def test_norm_layers_of_a_model_without_any_is_refused():
    with pytest.raises(ValueError, match="the model has no normalisation layer"):
        gnsmon.attach(nn.Linear(3, 2), method="norm_layers")


# Calibrated SOGNS.


def test_calibrated_sogns_is_exact_at_exact_steps_of_the_same_batch(tmp_path):
    model, batch = text()
    _, kept = train(
        model, batch, 4, method=["pepgns", "sogns"], calibrate_every=3, tmp_path=tmp_path
    )
    for exact, sogns in zip(kept["pepgns"], kept["sogns"], strict=True):
        assert sogns.raw.parts_sq_norm == pytest.approx(exact.raw.parts_sq_norm, rel=1e-9)
    known = kept["sogns"][-1].approximation
    assert known.exact_steps == 2
    assert known.spread == pytest.approx(0, abs=1e-9)
    assert known.factor != pytest.approx(1, abs=0.01)
    assert known.amplification is None or known.amplification >= 1


def test_uncalibrated_sogns_is_a_proxy(tmp_path):
    model, batch = text()
    gns, kept = train(model, batch, 12, method="sogns", tmp_path=tmp_path)
    reading = kept["sogns"][-1]
    assert reading.proxy
    assert "proxy of uncalibrated bias" in " ".join(str(gns.advice()).split())


def test_groups_have_factors_of_their_own(tmp_path):
    model, batch = text()
    _, kept = train(
        model, batch, 2, method="sogns", calibrate_every=1, groups="layer", tmp_path=tmp_path
    )
    groups = kept["sogns"][-1].groups
    factors = {name: group.approximation.factor for name, group in groups.items()}
    assert factors["norm"] == pytest.approx(1)  # nothing is approximated there
    assert factors["blocks.0.qkv"] != pytest.approx(1, abs=0.05)


def test_exact_steps_follow_the_step_counter(tmp_path):
    model, batch = text()
    gns, kept = train(
        model, batch, 9, method="sogns", every=2, calibrate_every=2, tmp_path=tmp_path
    )
    steps = [r.step for r in kept["sogns"]]
    counts = [r.approximation.exact_steps for r in kept["sogns"]]
    assert (steps, counts) == ([0, 2, 4, 6, 8], [1, 1, 2, 2, 3])


def test_calibration_is_resumed(tmp_path):
    model, batch = text()
    options = {"method": ["sogns", "norm_layers"], "calibrate_every": 1}
    gns, kept = train(model, batch, 3, tmp_path=tmp_path / "a", **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    resumed = gnsmon.attach(model, optimizer, every=1, groups="total", run_dir=tmp_path, **options)
    resumed.load_state_dict(gns.state_dict())
    assert resumed.state_dict() == gns.state_dict()
    optimizer.zero_grad()
    loss_of(model, batch).backward()
    optimizer.step()
    resumed.close()
    assert resumed.readings["sogns"].approximation.exact_steps == 4


def test_readings_go_through_json(tmp_path):
    model, batch = text()
    _, kept = train(
        model, batch, 2, method="sogns", calibrate_every=1, groups="layer", tmp_path=tmp_path
    )
    reading = kept["sogns"][-1]
    assert gnsmon.Reading.from_json(reading.to_json()) == reading


# Two sources.


def norms(big, parts, p, examples=8, missing=(), names="abc"):
    why = {name: "gone" for name in missing}
    kept = np.array([name not in missing for name in names])
    return StepNorms(
        np.array(big) * kept, np.array(parts) * kept, p, examples, None, 1, 1, why, 1.0
    )


def test_two_sources_add_up_to_one_unbiased_total():
    first = norms([5.0, 3.0, 0.0], [2.0, 1.5, 0.0], 1 / 8, missing="c")
    rest = norms([5.0, 3.0, 4.0], [3.0, 1.0, 2.5], 1 / 2)
    whole = combined(first, rest, "abc")
    found = moments(NormPair(whole.big_sq_norm, whole.parts_sq_norm, 1 / 8, 8))
    for columns, source in ((slice(0, 2), first), (slice(2, 3), rest)):
        own = moments(NormPair(source.big_sq_norm, source.parts_sq_norm, source.sum_sq_weights, 8))
        np.testing.assert_allclose(found.tr_sigma[columns], own.tr_sigma[columns])
        np.testing.assert_allclose(found.grad_sq_norm[columns], own.grad_sq_norm[columns])
    assert not whole.missing
    assert whole.sum_sq_weights == 1 / 8


def test_what_neither_measures_stays_missing():
    whole = combined(
        norms([1.0, 1, 1], [1.0, 1, 1], 1 / 8, missing="bc"),
        norms([1.0, 1, 1], [1.0, 1, 1], 1 / 2, missing="ac"),
        "abc",
    )
    assert whole.missing == {"c": "gone"}
    assert list(whole.big_sq_norm) == [1, 1, 0]


def test_sources_of_other_steps_are_not_joined():
    one, other = norms([1.0] * 3, [1.0] * 3, 0.1), norms([1.0] * 3, [1.0] * 3, 0.5, examples=9)
    assert combined(one, other, "abc").reason == "several passes"
    single = norms([1.0] * 3, [1.0] * 3, 1.0)
    assert combined(one, single, "abc").reason == "one part"


class Gated(nn.Module):
    """A parameter of its own beside layers of its own: nothing can be replayed."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))
        self.inner = nn.Linear(5, 5)

    def forward(self, x):
        return x + self.scale * self.inner(x).tanh()


def gated():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 5), Gated(), nn.Linear(5, 1)).double()


def test_another_source_takes_what_has_no_rule(tmp_path):
    """Over many batches its estimates agree with microbatches alone; coverage is whole."""
    model = gated()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    kept = {}
    sink = lambda r: kept.setdefault(r.method, []).append(r)  # noqa: E731
    methods = ["pepgns+microbatch", "microbatch", "pepgns"]
    options = {"every": 1, "groups": "layer", "sinks": [sink], "run_dir": tmp_path}
    torch.manual_seed(1)
    with (
        pytest.warns(RuntimeWarning, match="left out"),
        gnsmon.attach(model, optimizer, method=methods, strict=True, **options) as gns,
    ):
        for _ in range(300):
            optimizer.zero_grad()
            for _ in range(4):
                x = torch.randn(4, 5, dtype=torch.float64)
                ((model(x).squeeze(1) - x.sum(1)).square().mean() / 4).backward()
            optimizer.step()
        assert gns.coverage("pepgns").missing.keys() == {"1.scale"}
        assert gns.coverage("pepgns+microbatch").fraction == 1
        assert not gns.coverage().missing
    both, coarse, fine = (kept[m] for m in methods)
    assert both[-1].method == "pepgns+microbatch"
    for moment in ("tr_sigma", "grad_sq_norm"):
        a, b = (np.array([getattr(r.raw, moment) for r in k]) for k in (both, coarse))
        assert abs((a - b).mean()) < 4 * (a - b).std() / math.sqrt(300)
        parts = sum(getattr(r.groups["1"].raw, moment) for r in both)
        rest = sum(getattr(r.raw, moment) for r in fine)
        assert a.sum() == pytest.approx(parts + rest, rel=1e-9)


def test_only_what_the_approximate_source_measured_is_called_approximate(tmp_path):
    model = gated()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    methods = ["sogns+microbatch", "sketch+microbatch"]
    options = {"every": 1, "calibrate_every": 1, "strict": True, "run_dir": tmp_path}
    groups = lambda name: "own" if name == "1.scale" else "others"  # noqa: E731
    with gnsmon.attach(model, optimizer, method=methods, groups=groups, **options) as gns:
        for _ in range(3):
            optimizer.zero_grad()
            for _ in range(2):
                model(torch.randn(4, 5, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
    for method in methods:
        reading = gns.readings[method]
        assert reading.approximation.factor == pytest.approx(1)
        assert reading.groups["others"].approximation.factor == pytest.approx(1)
        assert reading.groups["own"].approximation is None


def test_where_another_source_measures_all_nothing_is_approximate(tmp_path):
    model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options = {"every": 1, "groups": "total", "strict": True, "run_dir": tmp_path}
    with gnsmon.attach(model, optimizer, method="sogns+microbatch", **options) as gns:
        for _ in range(2):
            optimizer.zero_grad()
            for _ in range(2):
                model(torch.randn(4, 5, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
    assert gns.reading.approximation is None


def test_where_examples_are_coupled_the_other_source_measures_all(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options = {"method": "pepgns+microbatch", "every": 1, "run_dir": tmp_path, "strict": True}
    with gnsmon.attach(model, optimizer, **options) as gns:
        for _ in range(2):
            (model(torch.randn(6, 5)).square().mean() / 2).backward()
        optimizer.step()
    assert gns.coverage().fraction == 1
    assert gns.reading.raw.sum_sq_weights == 0.5
    assert not gns.skipped


def test_without_the_rest_there_is_no_measurement(tmp_path):
    model = gated()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options = {"method": "pepgns+microbatch", "every": 1, "run_dir": tmp_path}
    with gnsmon.attach(model, optimizer, **options) as gns:
        model(torch.randn(6, 5, dtype=torch.float64)).square().mean().backward()
        with pytest.warns(RuntimeWarning, match="accumulate two or more"):
            optimizer.step()
    assert gns.reading is None
    assert gns.skipped == {"one part": 1}


# Compiled.


def untied():
    model, batch = text(layers=1)
    model.lm_head.weight = nn.Parameter(1.1 * model.wte.weight.detach())
    return model, batch


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize(
    ("backend", "methods", "graphs"),
    [
        ("aot_eager", ["pepgns", "sogns", "sketch"], 1),
        ("aot_eager", ["sogns", "norm_layers"], 2),
        ("inductor", ["pepgns", "sogns", "sketch"], 1),
    ],
)
def test_one_graph_and_the_same_norms_when_compiled(backend, methods, graphs):
    """A second graph where some steps are measured exactly too."""
    torch._dynamo.reset()
    found = {}
    for compiled in (False, True):
        model, batch = untied()
        collector = PerExample(model, methods, calibrated=True, subspace=4, strict=True)
        for sketch in collector.taps.sketches.values():
            sketch.passes = 0
        torch._dynamo.utils.counters.clear()
        call = torch.compile(model, backend=backend, fullgraph=True) if compiled else model
        for step in range(4):
            collector.arm(True, exact=graphs == 2 and step % 2 == 0)
            model.zero_grad()
            loss_of(call, batch).backward()
            found[compiled, step] = collector.close()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    for step in range(4):
        eager, own = found[False, step], found[True, step]
        assert own.keys() == eager.keys()
        for method, norms in own.items():
            assert norms.missing == eager[method].missing
            expected = eager[method].parts_sq_norm
            np.testing.assert_allclose(norms.parts_sq_norm, expected, rtol=1e-9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_compiled_sketch_of_a_tied_head_has_its_cross_terms():
    torch._dynamo.reset()
    model, batch = text(layers=1, width=24)  # fewer columns than rows
    assert model.lm_head.weight is model.wte.weight
    collector = PerExample(model, ["pepgns", "sketch"], subspace=10**6, strict=True)
    for sketch in collector.taps.sketches.values():
        sketch.passes = 0
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    collector.arm(True)
    loss_of(call, batch).backward()
    found = collector.close()
    i = collector.names.index("wte.weight")
    tied = [found[m].parts_sq_norm[i] for m in ("pepgns", "sketch")]
    expected = gnsmon.per_example_sq_norms(model, loss_of, batch)["wte.weight"].sum() / B**2
    assert tied == pytest.approx([float(expected)] * 2, rel=1e-9)
    assert not found["sketch"].missing


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_compiled_sketch_of_a_tied_head_is_unbiased():
    torch._dynamo.reset()
    model, batch = text(layers=1)
    collector = PerExample(model, ["pepgns", "sketch"], subspace=2, strict=True)
    for sketch in collector.taps.sketches.values():
        sketch.passes = 0
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    i = collector.names.index("wte.weight")
    drawn = []
    for _ in range(200):
        collector.arm(True)
        model.zero_grad()
        loss_of(call, batch).backward()
        found = collector.close()
        drawn.append(found["sketch"].parts_sq_norm[i])
    exact = found["pepgns"].parts_sq_norm[i]
    assert np.std(drawn) > 1e-3 * exact
    assert abs(np.mean(drawn) - exact) < 4 * np.std(drawn) / math.sqrt(200)


def test_overflow_at_every_step_is_said_in_the_end(tmp_path):
    model, batch = text(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gnsmon.attach(model, optimizer, every=1, run_dir=tmp_path) as gns:
        for step in range(12):
            optimizer.zero_grad()
            (loss_of(model, batch) * 1e30).backward()
            if step == 9:
                with pytest.warns(RuntimeWarning, match="10 measurements in a row"):
                    optimizer.step()
            else:
                optimizer.step()
    assert gns.skipped == {"nonfinite": 12}


def test_a_spreadsheet_shows_how_far_a_source_is_off(tmp_path):
    model, batch = text()
    options = {"method": "sogns", "calibrate_every": 1, "sinks": ["csv"], "run_dir": tmp_path}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gnsmon.attach(model, optimizer, every=1, **options) as gns:
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
    with (tmp_path / "gns.csv").open() as file:
        row = list(csv.DictReader(file))[-1]
    assert float(row["factor"]) == pytest.approx(gns.reading.approximation.factor)
    assert float(row["spread"]) == pytest.approx(0, abs=1e-9)
