"""Variance and flatness: identities, regimes, the valley model against simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thermograd import SGD
from thermograd.errors import DataError
from thermograd.theory import flatness, limiting, sampling


@given(h=st.floats(1e-6, 1e6), loss=st.floats(1e-8, 10))
@settings(max_examples=50, deadline=None)
def test_flatness_is_the_distance_over_which_the_loss_grows_by_e(h, loss):
    width = float(flatness.flatness_from_curvature(h, loss))
    assert loss + h * (width / 2) ** 2 / 2 == pytest.approx(np.e * loss)
    assert float(flatness.loss_over_flatness(width / 2, width, loss)) == pytest.approx(np.e * loss)
    delta = 0.3 * width
    assert float(flatness.loss_over_flatness(delta, width, loss)) == pytest.approx(loss + h * delta**2 / 2)
    quoted = flatness.loss_over_flatness_published(delta, width, loss)
    assert (quoted - loss) * 4 * (np.e - 1) == pytest.approx(h * delta**2 / 2)


def test_variance_is_learning_rate_times_temperature_times_correlation_time():
    for scheme in ("replacement", "reshuffle"):
        sgd = SGD(lr=0.01, batch_size=10, dataset_size=1000, sampling=scheme)
        h, s = np.array([0.01, 0.3, 2.0]), np.array([0.5, 1.0, 2.0])
        tau = sampling.correlation_time(sgd, h)
        found = flatness.variance_from_temperature(0.01, flatness.direction_temperature(0.01, s), tau)
        np.testing.assert_allclose(found, sampling.weight_variance(sgd, h, s), rtol=0.02)


def test_regimes_follow_the_crossovers():
    h = [0.01, 0.5, 3.0]
    epoch = SGD(lr=0.1, batch_size=50, dataset_size=1500)  # crossover 0.97
    assert flatness.modes_regime(epoch, h).tolist() == ["flat", "flat", "sharp"]
    free = epoch.replace(sampling="replacement")
    assert flatness.modes_regime(free, h).tolist() == ["sharp"] * 3
    assert flatness.modes_regime(free, h, window=300).tolist() == ["flat", "sharp", "sharp"]  # 3 / (0.1 * 300) = 0.1
    assert flatness.modes_regime(epoch, [2.0, 4.0], window=10).tolist() == ["flat", "sharp"]  # 3 / (0.1 * 10) = 3


def test_isotropic_noise_has_the_thermal_exponent():
    h = np.geomspace(0.01, 1, 20)
    sgd = SGD(lr=1e-3)
    variance = limiting.stationary_moments(sgd, h, 1.0).position
    width = flatness.flatness_from_curvature(h, 0.1)
    psi = -np.polyfit(np.log(width), np.log(variance), 1)[0]
    assert psi == pytest.approx(flatness.thermal_exponent(), abs=1e-3)
    for gamma in (1.0, 1.5, 2.0):
        aligned = limiting.stationary_moments(sgd, h, h**gamma).position
        psi = -np.polyfit(np.log(width), np.log(aligned), 1)[0]
        assert psi == pytest.approx(float(flatness.variance_exponent(gamma, "sharp")), abs=1e-2)


def test_displacement_of_a_drifting_walk():
    rng = np.random.default_rng(0)
    walk = np.cumsum(0.1 + rng.normal(size=(4000, 200)) * 0.5, axis=1)
    lags = np.array([1, 10, 100])
    measured = [((walk[:, m:] - walk[:, :-m]) ** 2).mean() for m in lags]
    found = flatness.drift_diffusion_displacement(lags, 0.1, 0.125)[:, 0]
    np.testing.assert_allclose(measured, found, rtol=0.03)  # standard error at lag 100 about 1%


def test_valley_of_changing_width_prefers_flat_places_only_with_anisotropic_noise():
    """L = lambda(x) y^2 / 2, lambda = 1 + x^2, noise Delta across and Delta / kappa along, Ito."""
    rng, dt, noise = np.random.default_rng(1), 0.02, 0.1
    for kappa in (1.0, 4.0):
        x, y = rng.uniform(-2, 2, 4000), np.zeros(4000)
        for _ in range(4000):
            stiff = 1 + x**2
            x, y = (
                x - x * y**2 * dt + np.sqrt(2 * noise / kappa * dt) * rng.normal(size=x.size),
                y - stiff * y * dt + np.sqrt(2 * noise * dt) * rng.normal(size=x.size),
            )
            x = np.where(x > 2, 4 - x, np.where(x < -2, -4 - x, x))  # walls
        counts, _ = np.histogram(x, bins=8, range=(-2, 2), density=True)
        fine = np.linspace(-2, 2, 801)
        density = flatness.flat_preference(1 + fine**2, kappa)
        density /= np.trapezoid(density, fine)
        expected = [
            np.trapezoid(density[100 * i : 100 * i + 101], fine[100 * i : 100 * i + 101]) / 0.5 for i in range(8)
        ]
        # standard error of a bin of 1/8 of 4000 is 4%; the toy is adiabatic only to about 5%
        np.testing.assert_allclose(counts, expected, atol=0.16 * max(expected))
        width = (1 + fine**2) ** -0.5
        gibbs = np.exp(-flatness.effective_loss(width, noise, kappa) / noise) * width  # times the transverse width
        np.testing.assert_allclose(gibbs, flatness.flat_preference(1 + fine**2, kappa))


def test_bad_input_is_refused_with_the_reason():
    with pytest.raises(DataError):
        flatness.loss_over_flatness(0.1, -1.0, 1.0)
    with pytest.raises(DataError):
        flatness.effective_loss(1.0, 0.1, 0.0)
    with pytest.raises(DataError):
        flatness.drift_diffusion_displacement([1.0], 0.0, -1.0)
