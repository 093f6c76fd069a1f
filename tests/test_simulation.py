import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import ks_2samp

from gnsmon.estimators import NormPair, moments
from gnsmon.simulation import (
    Gradients,
    draw,
    errors,
    gradients,
    simulate,
    steps_needed,
    variances,
)

SOME = Gradients(
    signal=np.array([0.5, 0.1]), noise=np.array([2.0, 0.25]), directions=np.array([1.0, 4.0])
)


def rng(seed=0):
    return np.random.default_rng(seed)


def pairs_of_real_vectors(of, b_big, b_small, size):
    """What `draw` stands for: Gaussian vectors, their mean and the means of their parts."""
    directions = of.directions.astype(int)
    noise = np.repeat(of.noise, directions)
    grad = np.sqrt(np.repeat(of.signal / of.directions, directions))
    examples = grad + np.sqrt(noise) * rng().standard_normal((size, b_big, len(noise)))
    parts = examples.reshape(size, b_big // b_small, b_small, -1).mean(2)
    big = np.square(parts.mean(1)).sum(-1)
    p = b_small / b_big
    return NormPair(big, np.square(p * parts).sum((1, 2)), p, b_big)


@pytest.mark.parametrize(("b_big", "b_small"), [(6, 1), (6, 3), (8, 2)])
def test_norms_are_distributed_as_those_of_gaussian_vectors(b_big, b_small):
    real = pairs_of_real_vectors(SOME, b_big, b_small, 20_000)
    drawn = draw(SOME, b_big=b_big, b_small=b_small, size=20_000, rng=rng(1))
    for name in ("big_sq_norm", "parts_sq_norm"):
        assert ks_2samp(getattr(real, name), getattr(drawn, name)).pvalue > 1e-3, name
    for of_real, of_drawn in zip(
        vars(moments(real)).values(), vars(moments(drawn)).values(), strict=True
    ):
        assert ks_2samp(of_real, of_drawn).pvalue > 1e-3
    together = [np.corrcoef(x.big_sq_norm, x.parts_sq_norm)[0, 1] for x in (real, drawn)]
    assert together[0] == pytest.approx(together[1], abs=0.02)


CASES = [
    (SOME, 6, 1),
    (SOME, 8, 4),
    (gradients(1), 64, 1),
    (gradients(1), 64, 32),
    (gradients(100), 64, 1),
    (gradients(100), 4, 2),
    (gradients(30, d_eff=10, dimension=5000), 32, 8),
]


@pytest.mark.parametrize(("of", "b_big", "b_small"), CASES)
def test_moments_are_unbiased_and_their_variances_those_of_the_closed_form(of, b_big, b_small):
    size = 40_000
    found = moments(draw(of, b_big=b_big, b_small=b_small, size=size, rng=rng()))
    want = variances(of, b_big=b_big, b_small=b_small)
    g, s = found.grad_sq_norm - of.grad_sq_norm, found.tr_sigma - of.tr_sigma
    for product, expected in (
        (g, 0.0),
        (s, 0.0),
        (g * g, want.grad_sq_norm),
        (s * s, want.tr_sigma),
        (g * s, want.covariance),
    ):
        assert abs(product.mean() - expected) < 4 * product.std() / size**0.5


def test_the_closed_form_by_hand():
    of = Gradients(np.array([2.0]), np.array([3.0]), np.array([4.0]))
    assert (of.tr_sigma, of.tr_sigma_sq, of.b_simple, of.d_eff) == (12, 36, 6, 4)
    found = variances(of, b_big=6, b_small=2)
    # Var S = 2 36 2/4; Var |G|^2 = 4 (2 3)/6 + 2 36/(6 4); Cov = -36/6
    assert (found.tr_sigma, found.grad_sq_norm, found.covariance) == (36, 7, -6)
    exact = errors(of, b_big=6, b_small=2)
    assert exact.tr_sigma == pytest.approx(0.5)
    assert exact.grad_sq_norm == pytest.approx(7**0.5 / 2)
    assert exact.b_simple == pytest.approx((0.25 + 7 / 4 + 12 / 24) ** 0.5)


@pytest.mark.parametrize(("r", "steps"), [(1, 6), (10, 240), (100, 20_000)])
def test_the_steps_for_ten_percent(r, steps):
    of = gradients(r * 4096, d_eff=100)
    assert steps_needed(errors(of, b_big=4096).grad_sq_norm) == pytest.approx(steps, rel=0.03)


def test_a_mean_over_steps_is_one():
    options = {"b_big": 8, "b_small": 2, "size": 20_000}
    many = moments(draw(SOME, **options, rng=rng(), mean_of=5))
    singles = [moments(draw(SOME, **options, rng=rng(k))) for k in range(1, 6)]
    for name in ("grad_sq_norm", "tr_sigma"):
        mean = np.mean([getattr(single, name) for single in singles], axis=0)
        assert ks_2samp(getattr(many, name), mean).pvalue > 1e-3


@pytest.mark.parametrize(("d_eff", "dimension"), [(1, 1), (7, 7), (2, 3), (20, 1000), (99, 100)])
def test_gradients_are_as_asked_for(d_eff, dimension):
    of = gradients(12.5, d_eff=d_eff, dimension=dimension)
    assert of.tr_sigma == pytest.approx(1)
    assert of.b_simple == pytest.approx(12.5)
    assert of.d_eff == pytest.approx(d_eff)
    assert of.directions.sum() == dimension


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gradients(0), "expected 0 < b_simple"),
        (lambda: gradients(1, d_eff=20, dimension=10), "1 <= d_eff <= dimension"),
        (lambda: gradients(1, d_eff=1, dimension=10), "1 < d_eff where they differ"),
        (lambda: variances(SOME, b_big=6, b_small=4), "multiple of b_small"),
        (lambda: draw(SOME, b_big=4, b_small=4, size=1, rng=rng()), "at least twice as large"),
        (lambda: simulate(SOME, b_big=4, steps=1), "two or more steps"),
    ],
)
def test_impossible_settings_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_simulated_runs_agree_with_theory():
    of = gradients(64, d_eff=50)
    found = simulate(of, b_big=64, steps=300, repeat=400, decay=0.98)
    exact = errors(of, b_big=64)
    for own, theory in (
        (found.grad_sq_norm, exact.grad_sq_norm),
        (found.tr_sigma, exact.tr_sigma),
    ):
        assert abs(own.bias) < 4 * own.bias_error
        assert own.one_step == pytest.approx(theory, rel=0.02)
    assert found.n_eff == pytest.approx(99, rel=0.01)
    assert found.error == pytest.approx(exact.b_simple / found.n_eff**0.5, rel=4 / 800**0.5)
    assert abs(found.coverage - 0.95) < 4 * found.coverage_error
    assert found.statuses == {"ok": 1.0}


def test_runs_without_a_number_are_counted():
    found = simulate(gradients(20_000), b_big=64, steps=30, repeat=50)
    assert found.statuses.get("lower_bound", 0) > 0.5
    assert sum(found.statuses.values()) == pytest.approx(1)
    console = Console(width=200, no_color=True)
    with console.capture() as captured:
        console.print(found)
    assert f"of the {found.statuses.get('wide', 0):.1%} of runs" in captured.get()


def test_a_run_without_an_interval_is_no_miss_of_one():
    few = simulate(gradients(100), b_big=64, steps=5, repeat=10)
    assert few.statuses == {"undefined": 1.0}
    assert np.isnan([few.coverage, few.coverage_error]).all()
    console = Console(width=200, no_color=True)
    with console.capture() as captured:
        console.print(few)
    text = " ".join(captured.get().split())
    assert "No run has an interval." in text and "fewer than two runs read a number" in text
    assert "Its row" not in text and ": - " not in text
    some = simulate(gradients(100, d_eff=1), b_big=2, steps=200, repeat=400)
    assert 0 < some.intervals < 400
    share = some.coverage * some.intervals
    assert share == pytest.approx(round(share))


def test_very_many_directions():
    assert gradients(10, d_eff=20, dimension=10**24).d_eff == pytest.approx(20)


def test_the_page_tells_the_steps_needed():
    console = Console(width=120, no_color=True)
    with console.capture() as captured:
        console.print(simulate(gradients(640), b_big=64, steps=20, repeat=20))
    text = captured.get()
    row = next(line for line in text.splitlines() if line.startswith("|G|²"))
    assert row.split()[-1] == "240"
    assert "b_simple is 10 times the batch" in " ".join(text.split())


@pytest.mark.parametrize("b_simple", [1e-9, 1e4, 1e6, 1e8, 1e12])
@pytest.mark.parametrize("b_big", [2, 64, 2**20])
def test_no_number_of_the_table_is_cut_off(b_simple, b_big):
    found = simulate(gradients(b_simple), b_big=b_big, steps=20, repeat=20)
    rows = {}
    for width in (80, 400):
        console = Console(width=width, no_color=True)
        with console.capture() as captured:
            console.print(found)
        lines = captured.get().splitlines()
        first = next(i for i, line in enumerate(lines) if line.startswith("|G|²"))
        rows[width] = [line.split() for line in lines[first - 1 : first + 3]]
    assert rows[80] == rows[400]
    assert "…" not in str(rows[80])


def test_the_command_needs_no_torch():
    code = (
        "import sys, gnsmon.cli\n"
        "try:\n"
        "    gnsmon.cli.main(['simulate', '--steps', '20', '--repeat', '20', '--b-big', '32'])\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "steps for 10 %" in done.stdout and "20 runs of 20 steps" in done.stdout
