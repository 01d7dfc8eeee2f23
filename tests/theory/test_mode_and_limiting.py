"""Exact discrete moments: the numbers of an independent derivation, limits, brute force, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thermograd import SGD
from thermograd.errors import DataError, NonFiniteError, NotAvailableError, UnstableError
from thermograd.theory import limiting, stability

FIXTURES = [  # (lr, momentum, curvature), gamma, omega, OU variances, discrete (position, velocity, cross)
    ((0.1, 0.9, 1.0), (0.5, 5.26315789), (0.51351351, 5.40540541, 0.27027027)),
    ((0.1, 0.9, 0.01), (50.0, 5.26315789), (50.01316136, 5.2645433, None)),
    ((0.5, 0.0, 0.5), (0.5, 1.0), (0.57142857, 1.14285714, 0.28571429)),
]
DISPLACEMENTS = [  # r(7), MSD(7): exact, Ornstein-Uhlenbeck, published sum
    ((0.1, 0.9, 1.0), -0.350840842, (1.38735005, 1.34060154, 1.36048126)),
    ((0.1, 0.9, 0.01), 0.979506918, (2.04984768, 2.03858821, 2.04976209)),
    ((0.5, 0.0, 0.5), 0.133483887, (0.99030413, 0.8446438, 1.43694752)),
]


@pytest.mark.parametrize(("setting", "continuous", "discrete"), FIXTURES)
def test_stationary_moments_are_those_of_the_notes(setting, continuous, discrete):
    lr, momentum, curvature = setting
    sgd = SGD(lr=lr, momentum=momentum)
    exact = limiting.stationary_moments(sgd, [curvature], [1.0])
    for name, value in zip(("position", "velocity", "cross"), discrete, strict=True):
        if value is not None:
            assert getattr(exact, name)[0] == pytest.approx(value, rel=2e-8)
    model = limiting.ornstein_uhlenbeck_stationary(sgd, [curvature], [1.0])
    assert (model.position[0], model.velocity[0]) == pytest.approx(continuous, rel=2e-9)


@pytest.mark.parametrize(("setting", "correlation", "displacement"), DISPLACEMENTS)
def test_displacements_are_those_of_the_notes(setting, correlation, displacement):
    lr, momentum, curvature = setting
    sgd, args = SGD(lr=lr, momentum=momentum), ([curvature], [1.0], [7])
    assert limiting.autocorrelation(sgd, [curvature], [7])[0, 0] == pytest.approx(correlation, abs=1e-9)
    functions = (limiting.mean_squared_displacement, limiting.ornstein_uhlenbeck_msd, limiting.published_msd)
    found = [f(sgd, *args)[0, 0] for f in functions]
    assert found == pytest.approx(displacement, rel=2e-8)


def test_langevin_coefficients_and_propagator():
    sgd = SGD(lr=0.1, momentum=0.9)
    found = limiting.langevin_coefficients(sgd, [1.0])
    assert (found.gamma, found.omega[0]) == pytest.approx((0.52631579, 3.24442842), rel=1e-8)
    matrix = limiting.propagator(sgd, [1.0], [0.7])[0, 0]
    np.testing.assert_allclose(matrix, [[-0.34060154, 0.16935209], [-1.78265358, -0.5188669]], rtol=3e-8)


@pytest.mark.parametrize("curvature", [1e-6, 0.0131578, 0.013157894736842105, 0.02, 5.0])
def test_propagator_is_a_matrix_exponential_in_every_damping_regime(curvature):
    from scipy.linalg import expm

    sgd = SGD(lr=0.2, momentum=0.9)  # critical at (1 - beta)^2 / (2 eta (1 + beta)) = 0.01316
    found = limiting.langevin_coefficients(sgd, [curvature])
    drift = np.array([[0, -1], [found.omega[0] ** 2, 2 * found.gamma]])
    for time in (0.0, 0.3, 7.0, 400.0):
        expected = expm(-drift * time)
        got = limiting.propagator(sgd, [curvature], [time])[0, 0]
        np.testing.assert_allclose(got, expected, rtol=1e-7, atol=1e-9 * max(1e-300, np.abs(expected).max()))


@given(
    lr=st.floats(1e-4, 1),
    momentum=st.floats(0, 0.99),
    decay=st.sampled_from([0.0, 1e-3]),
    dampening=st.sampled_from([0.0, 0.3]),
    nesterov=st.booleans(),
    fraction=st.floats(1e-6, 0.98),
)
@settings(max_examples=150, deadline=None)
def test_moments_solve_the_discrete_lyapunov_equation(lr, momentum, decay, dampening, nesterov, fraction):
    nesterov = nesterov and momentum > 0
    sgd = SGD(lr=lr, momentum=momentum, weight_decay=decay, nesterov=nesterov, dampening=0.0 if nesterov else dampening)
    curvature = fraction * stability.largest_stable_curvature(sgd)
    exact = limiting.stationary_moments(sgd, [curvature], [1.7])
    h, eta, b, g = curvature + decay, lr, momentum, 1 - sgd.dampening
    if nesterov:  # state (theta, buffer)
        step, push = np.array([[1 - eta * h * (1 + b), -eta * b * b], [h, b]]), np.array([-eta * (1 + b), 1.0])
    else:
        step, push = np.array([[1 - eta * g * h, -eta * b], [g * h, b]]), np.array([-eta * g, g])
    noise = 1.7 * np.outer(push, push)
    covariance = np.linalg.solve(np.eye(4) - np.kron(step, step), noise.ravel()).reshape(2, 2)
    move = step[0] - [1, 0]
    squared_step = move @ covariance @ move + noise[0, 0]
    assert exact.position[0] == pytest.approx(covariance[0, 0], rel=1e-6)
    assert exact.velocity[0] == pytest.approx(squared_step / eta**2, rel=1e-6)
    assert exact.cross[0] == pytest.approx(eta * exact.velocity[0] / 2, rel=1e-12)
    if not nesterov:  # equipartition holds exactly in discrete time
        assert h * exact.position[0] == pytest.approx(eta * (1 + b) / (2 * g) * exact.velocity[0], rel=1e-9)
        assert limiting.fluctuation_dissipation(sgd, exact.velocity)[0] == pytest.approx(h * exact.position[0])


def test_matrix_form_agrees_with_the_modes_and_with_an_independent_solver():
    from scipy.linalg import solve_discrete_lyapunov

    rng = np.random.default_rng(0)
    a, c = rng.normal(size=(2, 5, 5))
    hessian, noise = a @ a.T / 5 + 0.1 * np.eye(5), c @ c.T
    sgd = SGD(lr=0.2, momentum=0.8, weight_decay=0.05)
    found = limiting.stationary_covariance(sgd, hessian, noise)
    h = hessian + 0.05 * np.eye(5)
    step = np.block([[np.eye(5) - 0.2 * h, 0.2 * 0.8 * np.eye(5)], [-h, 0.8 * np.eye(5)]])
    drive = np.block([[0.04 * noise, 0.2 * noise], [0.2 * noise, noise]])
    full = solve_discrete_lyapunov(step, drive)
    np.testing.assert_allclose(found.position, full[:5, :5], rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(found.velocity, full[5:, 5:], rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(found.cross, full[:5, 5:], rtol=1e-9, atol=1e-10)
    for nesterov in (False, True):
        plain = SGD(lr=0.2, momentum=0.8, nesterov=nesterov)
        modes = limiting.stationary_moments(plain, [0.3, 2.0], [1.0, 3.0])
        blocks = limiting.stationary_covariance(plain, np.diag([0.3, 2.0]), np.diag([1.0, 3.0]))
        for name in ("position", "velocity", "cross"):
            np.testing.assert_allclose(np.diag(getattr(blocks, name)), getattr(modes, name), rtol=1e-11)


def test_transients_start_exact_and_end_stationary():
    sgd = SGD(lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.01)
    found = limiting.propagate(sgd, [1.0, 0.0], [2.0, 1.0], [5, 0, 5000], position=0.5, velocity=[1.0, -1.0])
    theta, v = np.array([0.5, 0.5]), np.array([1.0, -1.0])
    for _ in range(5):  # the mean, by hand
        v = 0.9 * v - 0.8 * (np.array([1.01, 0.01]) * theta)
        theta = theta + 0.1 * v
    np.testing.assert_allclose(found.position_mean[0], theta)
    np.testing.assert_allclose(found.velocity_mean[0], v)
    np.testing.assert_array_equal(found.position_mean[1], [0.5, 0.5])
    stationary = limiting.stationary_moments(sgd, [1.0, 0.0], [2.0, 1.0])
    for name in ("position", "velocity", "cross"):
        assert getattr(found, name)[2, 0] == pytest.approx(getattr(stationary, name)[0], rel=1e-9)
    frozen = limiting.propagate(
        sgd, [1.0], [2.0], [1, 17], position_variance=stationary.position[:1],
        velocity_variance=stationary.velocity[:1], cross=stationary.cross[:1],
    )  # fmt: skip
    np.testing.assert_allclose(frozen.position[:, 0], stationary.position[0], rtol=1e-12)
    unstable = limiting.propagate(SGD(lr=0.1), [-1.0], [1.0], [10], position=1.0)
    assert unstable.position_mean[0, 0] == pytest.approx(1.1**10)


def test_ornstein_uhlenbeck_moments_obey_their_differential_equation():
    sgd = SGD(lr=0.1, momentum=0.9)
    t, dt = 0.8, 1e-5
    times = [t - dt, t, t + dt]
    found = limiting.ornstein_uhlenbeck_moments(sgd, [0.5], [2.0], times, position=1.0, velocity=-1.0)
    coefficients = limiting.langevin_coefficients(sgd, [0.5], [2.0])
    drift = np.array([[0, -1], [coefficients.omega[0] ** 2, 2 * coefficients.gamma]])
    p = found.covariance[:, 0]
    expected = -drift @ p[1] - p[1] @ drift.T + np.diag([0, coefficients.noise[0]])
    np.testing.assert_allclose((p[2] - p[0]) / (2 * dt), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose((found.mean[2, 0] - found.mean[0, 0]) / (2 * dt), -drift @ found.mean[1, 0], rtol=1e-6)


def test_flat_modes_diffuse_and_steep_ones_saturate():
    sgd = SGD(lr=0.1, momentum=0.9)
    flat = limiting.mean_squared_displacement(sgd, [0.0], [1.0], [10**6])[0, 0]
    assert flat == pytest.approx(10**6 * 0.1**2 / 0.1**2, rel=1e-4)  # (eta / (1 - beta))^2 s t
    steep = limiting.mean_squared_displacement(sgd, [3.0], [1.0], [10**5])[0, 0]
    assert steep == pytest.approx(2 * limiting.stationary_moments(sgd, [3.0], [1.0]).position[0], rel=1e-12)
    lags = np.arange(60)
    dense = limiting.mean_squared_displacement(sgd, [0.7], [1.0], lags)[:, 0]
    scattered = [limiting.mean_squared_displacement(sgd, [0.7], [1.0], [int(k)])[0, 0] for k in lags]
    np.testing.assert_allclose(dense, scattered, rtol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
def test_noise_alone_never_exceeds_the_ceiling(nesterov):
    lags = np.unique(np.geomspace(1, 4000, 60).astype(int))
    for momentum in (0.3, 0.9, 0.99):
        sgd = SGD(lr=0.1, momentum=momentum, nesterov=nesterov)
        curvature = np.array([0, 1e-7, 1e-4, 0.01, 0.1, 0.5, 0.9, 0.95]) * stability.largest_stable_curvature(sgd)
        for h in curvature:
            moved = limiting.mean_squared_displacement(sgd, [h], [1.0], lags)[:, 0]
            ratio = limiting.noise_ceiling(sgd, moved, limiting.local_displacement(sgd, [h], [1.0]), lags)
            assert ratio.max() <= 1 + 1e-9
    assert limiting.noise_ceiling(sgd, 2 * moved, limiting.local_displacement(sgd, [h], [1.0]), lags).max() > 0


@pytest.mark.parametrize(("power", "expected"), [(1.5, 0.657), (2.0, 0.503), (3.0, 0.343), (4.0, 0.265)])
def test_exponent_of_a_power_law_spectrum(power, expected):
    curvature = np.arange(1, 20001) ** -power * 0.5
    sgd = SGD(lr=0.1, momentum=0.9)
    assert limiting.exponent_from_spectrum(sgd, curvature, curvature, (1000, 10000)) == pytest.approx(
        expected, abs=0.02
    )
    assert limiting.exponent_from_spectrum(sgd, curvature, 1.0, (1000, 10000)) == pytest.approx(1, abs=0.05)


def test_modified_loss_is_isotropic_when_noise_follows_curvature():
    found = limiting.modified_loss(SGD(lr=0.1, momentum=0.9), [0.1, 1.0, 5.0], [0.2, 2.0, 10.0])
    assert np.ptp(found.position) < 1e-9 * found.position.max()
    np.testing.assert_allclose(found.velocity, (1 - 0.81) / np.array([0.2, 2.0, 10.0]))


def test_local_displacement_as_published_is_the_limit_of_small_steps():
    sgd = SGD(lr=1e-4, momentum=0.9)
    exact = limiting.local_displacement(sgd, [1.0, 2.0], [1.0, 3.0])
    assert limiting.local_displacement_published(sgd, [1.0, 3.0]) == pytest.approx(exact, rel=1e-4)


def test_inputs_may_be_lists_arrays_or_tensors():
    sgd = SGD(lr=0.1, momentum=0.5)
    kinds = ([1.0, 2.0], np.array([1, 2]), torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True))
    results = [limiting.stationary_moments(sgd, kind, 1.0).position for kind in kinds]
    assert all(r.dtype == np.float64 and np.array_equal(r, results[0]) for r in results)


def test_bad_input_is_refused_with_the_reason():
    sgd = SGD(lr=0.1, momentum=0.9)
    with pytest.raises(UnstableError, match="lower the learning rate"):
        limiting.stationary_moments(sgd, [1.0, 38.1], 1.0)
    limiting.stationary_moments(sgd, [37.9], 1.0)
    with pytest.raises(UnstableError, match="mean_squared_displacement"):
        limiting.stationary_moments(sgd, [0.0], 1.0)
    with pytest.raises(UnstableError, match="runs away"):
        limiting.mean_squared_displacement(sgd, [-0.1], 1.0, [1])
    with pytest.raises(NonFiniteError, match="curvature"):
        limiting.stationary_moments(sgd, [np.nan], 1.0)
    with pytest.raises(NonFiniteError, match="noise_variance"):
        limiting.stationary_moments(sgd, [1.0], np.inf)
    with pytest.raises(DataError, match="negative"):
        limiting.stationary_moments(sgd, [1.0], [-1.0])
    with pytest.raises(DataError, match="one value a mode"):
        limiting.stationary_moments(sgd, [1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(DataError, match="whole numbers"):
        limiting.mean_squared_displacement(sgd, [1.0], 1.0, [1.5])
    for heavy_ball_only in (limiting.published_msd, limiting.modified_loss, limiting.local_displacement_published):
        extra = ([1.0], [7])[: {"published_msd": 2, "modified_loss": 1}.get(heavy_ball_only.__name__, 0)]
        with pytest.raises(NotAvailableError):
            heavy_ball_only(SGD(lr=0.1, momentum=0.9, nesterov=True), [1.0], *extra)
    with pytest.raises(NonFiniteError, match="diverges"):
        limiting.propagate(SGD(lr=1.0), [10.0], 1.0, [10**6], position=1.0)
