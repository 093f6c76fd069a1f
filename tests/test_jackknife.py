import numpy as np
import pytest

from gnsmon.estimators.jackknife import (
    block_fieller,
    block_jackknife,
    jackknife,
    weighted_jackknife,
)

X = np.array([3.0, 5, 4, 6])
Y = np.array([1, 2, 1.5, 2.5])


def series(n, groups=4, seed=0, correlation=0.0):
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((n, 2, groups))
    for t in range(1, n):
        noise[t] = correlation * noise[t - 1] + np.sqrt(1 - correlation**2) * noise[t]
    return 8 + noise[:, 0], 2 + noise[:, 1]


def test_numbers_by_hand():
    ratio, corrected, variance = jackknife(X, Y)
    assert ratio == pytest.approx(2.5714286, abs=5e-8)
    assert corrected == pytest.approx(2.5516234, abs=5e-8)
    assert variance == pytest.approx(0.0116167355, abs=5e-11)


def test_definition():
    s, g = series(25)
    n = len(s)
    without = np.stack([np.delete(s, i, 0).sum(0) / np.delete(g, i, 0).sum(0) for i in range(n)])
    got = jackknife(s, g)
    ratio = s.sum(0) / g.sum(0)
    np.testing.assert_allclose(got.ratio, ratio, rtol=1e-13)
    np.testing.assert_allclose(got.corrected, n * ratio - (n - 1) * without.mean(0), rtol=1e-12)
    spread = (n - 1) / n * ((without - without.mean(0)) ** 2).sum(0)
    np.testing.assert_allclose(got.variance, spread, rtol=1e-10)


def test_equal_weights_are_delete_1():
    s, g = series(25)
    for one, two in zip(jackknife(s, g), weighted_jackknife(s, g, np.full(25, 0.04)), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-12)


def test_blocks_of_one_step_are_delete_1():
    s, g = series(25)
    for one, two in zip(jackknife(s, g), block_jackknife(s, g, 1), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-12)


def test_blocks_use_every_step():
    s, g = series(47)
    assert block_jackknife(s, g, 5).ratio == pytest.approx(s.sum(0) / g.sum(0))


@pytest.mark.parametrize("decay", [0.9, 0.98])
def test_variance_of_weighted_ratio(decay):
    s, g = series(200, groups=4000)
    w = decay ** np.arange(200)[::-1]
    got = weighted_jackknife(s, g, w / w.sum())
    assert got.variance.mean() == pytest.approx(got.ratio.var(), rel=0.12)
    assert abs(got.corrected.mean() - 4) < abs(got.ratio.mean() - 4)


def test_blocks_see_the_correlation_that_delete_1_misses():
    s, g = series(1000, groups=2000, correlation=0.5)
    truth = jackknife(s, g).ratio.var()
    assert jackknife(s, g).variance.mean() < 0.5 * truth
    assert block_jackknife(s, g, 20).variance.mean() == pytest.approx(truth, rel=0.12)


def test_block_fieller_covers():
    s, g = series(600, groups=2000, correlation=0.5)
    hit = [x.low <= 4 <= x.high for x in block_fieller(s, g, 20)]
    assert abs(np.mean(hit) - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 2000) + 0.01


def test_ten_blocks_make_a_reading():
    s, g = series(100)
    assert {x.status for x in block_fieller(s, g, 10)} <= {"ok", "wide"}
    assert {x.status for x in block_fieller(s, g, 11)} == {"undefined"}


def test_what_cannot_be_is_refused_or_not_finite():
    with pytest.raises(ValueError, match="two blocks of 3 steps"):
        block_jackknife(X, Y, 3)
    with pytest.raises(ValueError, match="two or more weights"):
        jackknife(X[:1], Y[:1])
    with pytest.raises(ValueError, match="add up to 1"):
        weighted_jackknife(X, Y, np.ones(4))
    assert not np.isfinite(jackknife(X, 0 * Y)).any()
