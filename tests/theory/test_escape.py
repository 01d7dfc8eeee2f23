"""Escape: quadrature against known integrals, Kramers and power laws against quadrature."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import brentq

from thermograd import SGD
from thermograd.errors import DataError, NonFiniteError, UnstableError
from thermograd.theory import first_passage, flatness, kramers, power_law, stability


def well(x):
    return x**4 / 4 - x**2 / 2


def test_quadrature_of_cases_known_in_closed_form():
    free = first_passage.quadrature(lambda x: 0 * x, 2.0, 0.0, 3.0, reflect=-1.0)
    assert free == pytest.approx((4.0**2 - 1.0**2) / (2 * 2.0), rel=1e-12)
    slope, d, length = 3.0, 0.5, 2.0  # constant drift against the walker, wall at the start
    k = slope / d
    exact = (np.expm1(k * length) / k - length) / slope
    assert first_passage.quadrature(lambda x: slope * x, d, 0.0, length, reflect=0.0) == pytest.approx(exact, rel=1e-10)
    mirrored = first_passage.quadrature(lambda x: -slope * x, d, 0.0, -length, reflect=0.0)
    assert mirrored == pytest.approx(exact, rel=1e-10)


def test_quadrature_numbers_of_the_double_well():
    for noise, time in ((0.10, 61.3), (0.06, 317), (0.04, 2468), (0.03, 19460)):
        assert first_passage.quadrature(well, noise, -1.0, 0.6) == pytest.approx(time, rel=2e-3)
    full, half = (first_passage.quadrature(well, 0.03, -1.0, end) for end in (0.6, 0.0))
    assert half / full == pytest.approx(0.5, abs=0.005)  # 9740 of 19460


@pytest.mark.parametrize(
    ("interpretation", "times"),
    [("ito", (456, 7.934e8)), ("stratonovich", (611, 1.109e9)), ("klimontovich", (829, 1.554e9))],
)
def test_quadrature_numbers_of_multiplicative_noise(interpretation, times):
    for eps, time in zip((0.04, 0.01), times, strict=True):
        found = first_passage.quadrature(
            well, lambda x, e=eps: e * (1 + x**2), -1.0, 0.6, interpretation=interpretation
        )
        assert found == pytest.approx(time, rel=3e-3)


def test_quadrature_with_a_jump_of_the_noise():
    for s, eps, time in ((0.25, 0.02, 1.87e5), (0.5, 0.04, 388), (0.75, 0.02, 8295)):
        switch = -np.sqrt(1 - np.sqrt(s))  # where L has climbed s of the barrier
        noise = lambda x, e=eps, b=switch: np.where(x < b, 2 * e, e)  # noqa: E731
        found = first_passage.quadrature(well, noise, -1.0, 0.6, breaks=[switch])
        assert found == pytest.approx(time, rel=6e-3)
        sgd = SGD(lr=2 * eps, batch_size=1)
        assert found / kramers.escape_time_sgd(sgd, 0.25, 2.0, -1.0, path=s) == pytest.approx(1.07, abs=0.08)
        published = kramers.escape_time_sgd(sgd, 0.25, 2.0, -1.0, path=s, prefactor="xie")
        assert published == pytest.approx(2 * kramers.escape_time_sgd(sgd, 0.25, 2.0, -1.0, path=s))


def test_log_scale_has_no_ceiling():
    found = first_passage.log_quadrature(lambda x: 4e4 * well(x), 1.0, -1.0, 0.6)
    assert found == pytest.approx(1e4 + np.log(2 * np.pi / np.sqrt(2) / 4e4), abs=0.01)


def test_kramers_is_the_limit_of_the_quadrature():
    for noise, tolerance in ((0.03, 0.06), (0.01, 0.02), (0.002, 0.004)):
        exact = first_passage.log_quadrature(well, noise, -1.0, 0.6)
        formula = np.log(kramers.escape_time_white(0.25, 2.0, -1.0, noise))
        assert exact - formula == pytest.approx(0, abs=tolerance)
    two = kramers.escape_time_white(0.25, [2.0, 1.0], [-1.0, 3.0], 0.05)
    assert two / kramers.escape_time_white(0.25, 2.0, -1.0, 0.05) == pytest.approx(np.sqrt(3))


def test_kramers_numbers_and_scalings():
    sgd = SGD(lr=0.08, batch_size=1)
    assert kramers.escape_time_sgd(sgd, 0.25, 2.0, -1.0) == pytest.approx(341, abs=0.5)
    psi = kramers.escape_exponent_sgd(sgd, 0.25, 2.0, -1.0, path=0.3)
    assert kramers.path_parameter(sgd, psi, 0.25, 2.0, -1.0) == pytest.approx(0.3)
    assert kramers.escape_exponent_sgd(sgd.replace(batch_size=3), 0.25, 2.0, -1.0, path=0.3) == pytest.approx(3 * psi)
    slow = kramers.escape_exponent_sgd(sgd.replace(momentum=0.5), 0.25, 2.0, -1.0, path=0.3)
    assert slow == pytest.approx(psi / 2)
    # underdamped numbers, steps, at fixed temperature: noise variance = 2 T (1 - beta) / eta
    cases = [(0.05, 0.02, 0.0, 3.36e4), (0.05, 0.02, 0.5, 1.77e4), (0.05, 0.02, 0.9, 6.59e3)]
    cases += [(0.05, 0.002, 0.9, 3.86e4), (0.04, 0.02, 0.9, 2.30e4), (0.05, 0.2, 0.0, 3860)]
    for t, eta, beta, steps in cases:
        found = kramers.escape_time_momentum(SGD(lr=eta, momentum=beta), 0.25, 2.0, -1.0, 2 * t * (1 - beta) / eta)
        assert found / eta == pytest.approx(steps, rel=5e-3)


def test_power_law_exponents():
    sgd = SGD(lr=0.1, batch_size=4)
    assert power_law.stationary_exponent(sgd, 1.0) == pytest.approx(41)
    assert power_law.stationary_exponent_discrete(sgd, 1.0) == pytest.approx(38.5)
    np.testing.assert_allclose(power_law.critical_dimension(sgd, [1.0, 2.0]), [82, 42])
    np.testing.assert_allclose(
        power_law.asymptotic_slope(SGD(lr=0.1, batch_size=1), 1.0, [1, 2, 5, 10]), [10.5, 10, 8.5, 6]
    )
    assert power_law.effective_dimension([1.0, 0.3, 0.3]) == pytest.approx(1.18)
    assert power_law.tail_index(sgd, 1.0, 3) == pytest.approx(79)


def test_first_passage_of_the_isotropic_quadratic():
    fine, coarse = SGD(lr=0.05, batch_size=1), SGD(lr=0.1, batch_size=1)
    np.testing.assert_allclose(
        power_law.mean_first_passage_time(fine, 1.0, [1.2, 1.5, 2.0, 3.0]) / 0.05,
        [445, 2.9e4, 8.4e6, 2.9e10],
        rtol=0.02,
    )
    np.testing.assert_allclose(
        power_law.mean_first_passage_time(coarse, 1.0, [1.5, 2.0, 3.0]) / 0.1, [356, 5.8e3, 3.4e5], rtol=0.02
    )
    # in one dimension it is the general quadrature
    loss, noise = (lambda x: x**2 / 2), (lambda x: 0.05 * (1 + x**2))
    general = first_passage.quadrature(lambda x: loss(np.abs(x)), noise, 0.0, 1.0, reflect=0.0)
    assert power_law.mean_first_passage_time(coarse, 1.0, 2.0)[0] == pytest.approx(general, rel=1e-9)
    # curvature only rescales learning rate and time
    stiff = power_law.mean_first_passage_time(SGD(lr=0.05, batch_size=1), 2.0, 2.0, 3)
    soft = power_law.mean_first_passage_time(SGD(lr=0.1, batch_size=1), 1.0, 2.0, 3)
    np.testing.assert_allclose(stiff, soft / 2)


@pytest.mark.parametrize(("dimension", "slope"), [(1, 3.50), (2, 3.00), (4, 1.99), (6, 1.00)])
def test_slope_at_large_loss_ratio(dimension, slope):
    sgd = SGD(lr=0.1, batch_size=1)
    c = np.array([500.0, 1000.0])
    exact = power_law.mean_first_passage_time(sgd, 10 / 3, c, dimension)  # B / (eta h) = 3
    assert np.log(exact[1] / exact[0]) / np.log(2) == pytest.approx(slope, abs=0.02)
    limit = power_law.mean_first_passage_time_asymptotic(sgd, 10 / 3, 1e6, dimension)
    assert power_law.mean_first_passage_time(sgd, 10 / 3, 1e6, dimension)[0] == pytest.approx(limit[0], rel=0.01)
    moderate = power_law.mean_first_passage_time(SGD(lr=0.1, batch_size=1), 1.0, [2.0, 2.02], 10)
    assert np.diff(np.log(moderate))[0] / np.log(1.01) == pytest.approx(3.1, abs=0.1)


@pytest.mark.parametrize(("ratio", "product"), [(1, 0.73), (2, 0.87), (4, 0.94), (8, 0.97)])
def test_escape_rate_against_quadrature_of_a_true_saddle(ratio, product):
    floor = 0.05  # L = x^4/4 - x^2/2 + 1/4 + L*, D = eta L h / B
    loss = lambda x: well(x) + 0.25 + floor  # noqa: E731
    sgd = SGD(lr=1 / (2.0 * ratio), batch_size=1)
    time = first_passage.log_quadrature(loss, lambda x: sgd.lr * 2.0 * loss(x), -1.0, 0.6)
    rate = power_law.log_escape_rate(sgd, 2.0, -1.0, floor, floor + 0.25)
    assert np.exp(rate + time) == pytest.approx(product, abs=0.015)


def test_stability_bounds():
    sgd = SGD(lr=0.1, momentum=0.5, weight_decay=0.5)
    assert stability.largest_stable_curvature(sgd) == pytest.approx(29.5)
    assert stability.largest_dimension(SGD(lr=0.1, batch_size=1), 1.0) == pytest.approx(18)
    assert stability.largest_dimension(SGD(lr=0.2, batch_size=3), 0.5) == pytest.approx(2 * 3 / 0.1 - 3 - 1)
    x = np.random.default_rng(0).normal(size=(100_000, 4))
    for momentum in (0.0, 0.7):  # at the Gaussian bound the exact gain is one

        def excess(lr, momentum=momentum):
            return min(stability.gaussian_gain(SGD(lr=lr, momentum=momentum, batch_size=2), np.ones(4)), 1e9) - 1

        sgd = SGD(lr=brentq(excess, 0.01, 0.9), momentum=momentum, batch_size=2, sampling="replacement")
        assert stability.mean_square_gain(sgd, x) == pytest.approx(1, rel=0.02)
    assert stability.mean_square_gain(SGD(lr=3.0, batch_size=1), x) == float("inf")


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_edge_of_stability_is_where_the_dynamics_diverge(nesterov):
    sgd = SGD(lr=0.1, momentum=0.6, nesterov=nesterov)
    edge = stability.largest_stable_curvature(sgd)
    for factor, stable in ((0.999, True), (1.001, False)):
        theta, buffer = 1.0, 0.0
        for _ in range(60_000):
            g = factor * edge * theta
            buffer = 0.6 * buffer + g
            theta -= 0.1 * (g + 0.6 * buffer if nesterov else buffer)
            if abs(theta) > 1e12:
                break
        assert (abs(theta) < 1e-3) == stable


def test_flatness_identities():
    h, loss = np.array([0.1, 2.0]), 1e-3
    width = flatness.flatness_from_curvature(h, loss)
    np.testing.assert_allclose(loss + h * (width / 2) ** 2 / 2, np.e * loss)
    np.testing.assert_allclose(flatness.curvature_from_flatness(width, loss), h)
    for regime in ("flat", "sharp"):
        np.testing.assert_allclose(flatness.noise_exponent(flatness.variance_exponent(1.3, regime), regime), 1.3)
    np.testing.assert_allclose(
        flatness.variance_from_temperature(0.1, flatness.direction_temperature(0.1, h), 7), h * 0.035
    )


def test_random_walk_null_is_the_spectrum_of_a_walk():
    shares = flatness.random_walk_pca(60)
    assert shares.sum() == pytest.approx(1)
    walk = np.cumsum(np.random.default_rng(0).normal(size=(60, 40_000)), axis=0)
    walk -= walk.mean(axis=0)
    values = np.linalg.eigvalsh(walk @ walk.T)[::-1][:-1]
    np.testing.assert_allclose(values[:10] / values.sum(), shares[:10], rtol=0.05)  # standard error sqrt(2/40000)
    assert np.polyfit(np.log(np.arange(1, 21)), np.log(flatness.random_walk_pca(10_000)[:20]), 1)[0] == pytest.approx(
        -2, abs=0.01
    )


def test_bad_input_is_refused_with_the_reason():
    sgd = SGD(lr=0.1, batch_size=1)
    with pytest.raises(DataError, match="loss ratios > 1"):
        power_law.mean_first_passage_time(sgd, 1.0, [0.9])
    with pytest.raises(UnstableError):
        power_law.stationary_exponent(sgd, -1.0)
    with pytest.raises(UnstableError, match="critical"):
        power_law.mean_first_passage_time_asymptotic(sgd, 1.0, 2.0, 22)
    with pytest.raises(DataError, match="loss floor"):
        power_law.escape_rate(sgd, 1.0, -1.0, 0.0, 1.0)
    with pytest.raises(DataError, match="negative at the saddle"):
        power_law.escape_rate(sgd, [1.0, 2.0], [1.0, 2.0], 0.1, 1.0)
    with pytest.raises(DataError, match="negative curvature"):
        kramers.escape_time_sgd(sgd, 0.25, 2.0, 1.0)
    with pytest.raises(DataError, match="prefactor"):
        kramers.escape_time_sgd(sgd, 0.25, 2.0, -1.0, prefactor="other")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="confine"):
        first_passage.quadrature(lambda x: x, 1.0, 0.0, 1.0)
    with pytest.raises(NonFiniteError):
        first_passage.quadrature(lambda x: np.where(x > 0.3, np.nan, x**2), 1.0, 0.0, 1.0)
    with pytest.raises(DataError, match="D\\(x\\) > 0"):
        first_passage.quadrature(lambda x: x**2, lambda x: x, -1.0, 1.0, reflect=-2.0)
    with pytest.raises(DataError):
        flatness.flatness_from_curvature([-1.0], 1.0)
