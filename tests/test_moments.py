import numpy as np
import pytest

from gnsmon.estimators import NormPair, moments, obstacle


def pair(a, q, p, n):
    return NormPair(np.atleast_1d(np.asarray(a, float)), np.atleast_1d(np.asarray(q, float)), p, n)


@pytest.mark.parametrize(("batch", "part"), [(8, 1), (8, 2), (64, 16)])
def test_equal_parts_are_the_equations_of_the_papers(batch, part):
    big, small = np.array([3.0, 1.5]), np.array([7.0, 0.5])
    m = moments(pair(big, small * part / batch, part / batch, batch))
    np.testing.assert_allclose(
        m.grad_sq_norm, (batch * big - part * small) / (batch - part), rtol=1e-14
    )
    np.testing.assert_allclose(m.tr_sigma, (small - big) / (1 / part - 1 / batch), rtol=1e-14)


def test_noise_and_signal_add_up_to_the_big_norm():
    m = moments(pair(5.0, 2.0, 0.3, 10))
    np.testing.assert_allclose(m.grad_sq_norm + m.tr_sigma / 10, 5.0, rtol=1e-14)


def test_no_noise_in_identical_parts():
    w = np.array([0.2, 0.3, 0.5])
    m = moments(pair(4.0, 4.0 * (w**2).sum(), (w**2).sum(), 12))
    np.testing.assert_allclose([m.grad_sq_norm[0], m.tr_sigma[0]], [4.0, 0.0], atol=1e-14)


def test_the_ratio_is_free_of_loss_scale_and_groups_add_up():
    one, two = moments(pair(5.0, 2.0, 0.3, 10)), moments(pair(5.0 * 2**32, 2.0 * 2**32, 0.3, 10))
    assert one.tr_sigma / one.grad_sq_norm == two.tr_sigma / two.grad_sq_norm
    groups, total = moments(pair([1, 4], [0.5, 1.5], 0.3, 10)), moments(pair(5, 2.0, 0.3, 10))
    np.testing.assert_allclose(groups.grad_sq_norm.sum(), total.grad_sq_norm[0], rtol=1e-14)
    np.testing.assert_allclose(groups.tr_sigma.sum(), total.tr_sigma[0], rtol=1e-14)


@pytest.mark.parametrize(
    ("a", "p", "reason"),
    [
        (1.0, 1.0, "one part"),
        (1.0, 1 - 1e-8, "one part"),
        (np.nan, 0.5, "norm not finite"),
        (np.inf, 0.5, "norm not finite"),
        (1.0, 0.0, "weights do not add up to one"),
        (1.0, np.nan, "weights do not add up to one"),
        (1.0, 1.5, "weights do not add up to one"),
    ],
)
def test_a_step_without_an_estimate_says_why(a, p, reason):
    assert obstacle(pair(a, 1.0, p, 4)) == reason
    with pytest.raises(ValueError, match=reason):
        moments(pair(a, 1.0, p, 4))


def z_scores(*, equal_weights: bool, repetitions: int = 40_000) -> tuple[float, float]:
    """Standard errors between the mean moments of sequences of unequal lengths and the truth.

    A sequence of T tokens has mean gradient N(G, Sigma_1 / T) and weight T / sum T.
    """
    rng = np.random.default_rng(0)
    lengths = np.array([1.0, 2, 3, 5, 9, 20])
    w = lengths / lengths.sum()
    grad = np.array([0.6, -0.2, 0.3, 0.1])
    sd = np.array([1.0, 0.5, 2.0, 0.7])
    means = grad + sd * rng.standard_normal((repetitions, 6, 4)) / np.sqrt(lengths)[:, None]
    parts = w[:, None] * means
    big, small = (parts.sum(1) ** 2).sum(-1), (parts**2).sum((1, 2))
    p = 1 / 6 if equal_weights else float((w**2).sum())
    m = moments(NormPair(big, small, p, 6))
    truth = (grad**2).sum(), 6 * (sd**2).sum() / lengths.sum()
    scores = [
        float((x.mean() - t) / (x.std() / np.sqrt(repetitions)))
        for x, t in zip((m.grad_sq_norm, m.tr_sigma), truth, strict=True)
    ]
    return scores[0], scores[1]


def test_unequal_weights_are_unbiased():
    assert max(map(abs, z_scores(equal_weights=False))) < 4


def test_that_test_catches_the_naive_equal_weights():
    assert max(map(abs, z_scores(equal_weights=True))) > 10
