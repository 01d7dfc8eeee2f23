"""Sampling schemes: an independent double sum, published numbers, limits and scaling."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thermograd import SGD
from thermograd.errors import DataError, HyperparameterError, TooShortError, UnstableError
from thermograd.theory import flatness, limiting, sampling, stability


def direct(sgd: SGD, curvature: float, lags: int) -> np.ndarray:
    """Autocovariance by brute force: impulse response, its correlation, and the noise autocovariance, summed."""
    a, beta = sgd.lr * (curvature + sgd.weight_decay), sgd.momentum
    length = 40_000
    response = np.zeros(length)
    p, b = (1 + beta) * (1 - a) if sgd.nesterov else 1 + beta - a, beta * (1 - a) if sgd.nesterov else beta
    c0, c1 = (1 + beta, -beta) if sgd.nesterov else (1.0, 0.0)
    response[0] = c0
    response[1] = p * c0 + c1
    for k in range(2, length):
        response[k] = p * response[k - 1] - b * response[k - 2]
    size = 1 << 17
    power = np.abs(np.fft.rfft(response, size)) ** 2
    white = sgd.lr**2 * np.fft.irfft(power, size)
    reach = 4 * int(sgd.steps_per_epoch) if sgd.sampling == "replacement" else int(sgd.steps_per_epoch)
    m = np.arange(-reach, reach + 1)
    c = sampling.noise_autocovariance(sgd, np.abs(m))
    return np.array([np.sum(c * white[np.abs(k - m)]) for k in range(lags)])


@pytest.mark.parametrize("scheme", ["replacement", "reshuffle"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("curvature", [0.02, 0.5, 5.0])
def test_autocovariance_equals_the_direct_double_sum(scheme, nesterov, curvature):
    sgd = SGD(lr=0.1, momentum=0.8, nesterov=nesterov, batch_size=10, dataset_size=400, sampling=scheme)
    expected = direct(sgd, curvature, 100)
    found = sampling.autocovariance(sgd, [curvature], 1.0, np.arange(100))[:, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9 * expected[0])
    moved = sampling.mean_squared_displacement(sgd, [curvature], 1.0, np.arange(100))[:, 0]
    np.testing.assert_allclose(moved, 2 * (expected[0] - expected), rtol=1e-6, atol=1e-8 * expected[0])


@pytest.mark.parametrize("scheme", ["replacement", "reshuffle", "shuffle-once"])
@pytest.mark.parametrize("detrend", ["mean", "linear"])
@pytest.mark.parametrize("every", [1, 3])
def test_window_variance_is_the_quadratic_form_of_the_autocovariance(scheme, detrend, every):
    sgd = SGD(lr=0.1, momentum=0.5, batch_size=10, dataset_size=400, sampling=scheme)
    rows = 90
    curvature = [0.003, 0.3, 3.0]
    covariance = sampling.autocovariance(sgd, curvature, 1.0, every * np.arange(rows))
    distance = np.abs(np.subtract.outer(np.arange(rows), np.arange(rows)))
    basis = np.ones((rows, 1)) if detrend == "mean" else np.vander(np.arange(rows), 2)
    q, _ = np.linalg.qr(basis)
    kept = np.eye(rows) - q @ q.T
    expected = [np.trace(kept @ covariance[:, i][distance]) / rows for i in range(3)]
    found = sampling.weight_variance_window(sgd, curvature, 1.0, rows, detrend, every=every)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    unbiased = sampling.weight_variance_window(sgd, curvature, 1.0, rows, detrend, every=every, ddof=1)
    np.testing.assert_allclose(unbiased, found * rows / (rows - 1))


@given(
    momentum=st.floats(0, 0.95),
    batches=st.integers(2, 400),
    fraction=st.floats(1e-7, 0.95),
    scheme=st.sampled_from(["replacement", "reshuffle", "shuffle-once"]),
)
@settings(max_examples=80, deadline=None)
def test_schemes_are_ordered_and_scale_with_the_noise(momentum, batches, fraction, scheme):
    sgd = SGD(lr=0.1, momentum=momentum, batch_size=4, dataset_size=4 * batches, sampling=scheme)
    h = [fraction * stability.largest_stable_curvature(sgd)]
    one = sampling.weight_variance(sgd, h, 1.0)
    np.testing.assert_allclose(sampling.weight_variance(sgd, h, 3.0), 3 * one)
    assert one[0] > 0
    assert sampling.weight_variance_window(sgd, h, 1.0, 20, "none")[0] == pytest.approx(one[0])
    mean, line = (sampling.weight_variance_window(sgd, h, 1.0, 20, d)[0] for d in ("mean", "linear"))
    assert 0 < line <= mean
    if scheme != "shuffle-once":  # there a window may begin anywhere in a cycle, and the cycle's mean is the origin
        assert mean <= one[0] * (1 + 1e-9)


def test_numbers_of_an_independent_simulation():
    sgd = SGD(lr=0.1, batch_size=10, dataset_size=1000)
    white = sgd.replace(sampling="replacement")
    for x, ratio in ((0.01, 0.0034), (1.0, 0.268), (3.0, 0.554), (10.0, 0.836)):
        h = [x / (0.1 * 100)]
        found = sampling.weight_variance(sgd, h, 1.0) / sampling.weight_variance(white, h, 1.0)
        assert found[0] == pytest.approx(ratio, abs=6e-4)
    times = sampling.correlation_time(sgd, [1e-3, 0.3, 1.0])
    np.testing.assert_allclose(times, [33.6, 18.4, 8.29], rtol=3e-3)
    assert sampling.correlation_time(sgd.replace(momentum=0.9), [1e-4])[0] == pytest.approx(583, rel=0.02)
    assert sampling.correlation_time(white, [1e-3])[0] == pytest.approx(10000, rel=1e-3)


def test_epoch_ratio_of_a_momentum_run():
    sgd = SGD(lr=0.02, momentum=0.9, batch_size=16, dataset_size=512)
    white = sgd.replace(sampling="replacement")
    h = [0.98, 0.30, 0.11, 0.031, 0.010, 0.0029]
    found = sampling.weight_variance(sgd, h, 1.0) / sampling.weight_variance(white, h, 1.0)
    found *= sgd.minibatch_factor / white.minibatch_factor  # the notes' ratio has it in; their curvatures are rounded
    np.testing.assert_allclose(found, [0.622, 0.264, 0.104, 0.0318, 0.0104, 0.0030], rtol=0.045)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_flat_modes_reach_the_brownian_bridge(momentum):
    sgd = SGD(lr=0.1, momentum=momentum, batch_size=1, dataset_size=3000)
    variances = sampling.weight_variance(sgd, [0.0, 1e-13, 1e-10, 1e-7], 2.0)
    np.testing.assert_allclose(variances, variances[0], rtol=2e-3)
    assert variances[1] == pytest.approx(variances[0], rel=1e-9)
    bridge = (0.1 / (1 - momentum)) ** 2 * 2.0 * 3001 / 6
    assert variances[0] == pytest.approx(bridge, rel=1e-12 if momentum == 0 else 0.02)
    flat, sharp = sampling.asymptotic_variance(sgd, [1e-7, 3.0], 2.0)
    assert flat[0] == pytest.approx(bridge)
    assert sampling.weight_variance(sgd, [3.0], 2.0)[0] == pytest.approx(sharp[1], rel=0.1 + 0.1 * (momentum == 0))


def test_scaling_form_and_its_limits():
    assert float(sampling.scaling_form(3.0)) == pytest.approx(0.5445, abs=5e-5)
    x = np.array([0.0, 1e-9, 1e-3, 0.0199, 0.0201])
    np.testing.assert_allclose(sampling.scaling_form(x), x / 3 - x**2 / 12 + x**3 / 60, rtol=1e-6, atol=1e-300)
    assert float(sampling.scaling_form(1e6)) == pytest.approx(1 - 2e-6, rel=1e-9)
    sgd = SGD(lr=0.001, batch_size=1, dataset_size=2000)
    h = np.geomspace(0.01, 20, 9)
    ratio = sampling.weight_variance(sgd, h, 1.0) / sampling.weight_variance(
        sgd.replace(sampling="replacement"), h, 1.0
    )
    np.testing.assert_allclose(ratio, sampling.scaling_form(0.001 * h * 2000), rtol=0.02)
    crossover = sampling.crossover_curvature(sgd)
    flat, sharp = sampling.asymptotic_variance(sgd, [crossover], 1.0)
    assert flat[0] == pytest.approx(sharp[0])


def test_window_of_white_noise_follows_the_same_scaling_form():
    sgd = SGD(lr=0.001, sampling="replacement")
    h = np.geomspace(0.01, 20, 9)
    ratio = sampling.weight_variance_window(sgd, h, 1.0, 2000) / sampling.weight_variance(sgd, h, 1.0)
    np.testing.assert_allclose(ratio, sampling.scaling_form(0.001 * h * 2000), rtol=0.02)
    flat = sampling.weight_variance_window(sgd, [0.0], 1.0, 2000, "linear")[0]
    assert flat == pytest.approx(0.001**2 * 2000 / 15, rel=1e-3)


def test_noise_sums_to_zero_over_an_epoch_only_when_batches_divide_it():
    whole = sampling.epoch_noise(SGD(lr=1, batch_size=10, dataset_size=200))
    assert whole.total == 0
    short = sampling.epoch_noise(SGD(lr=1, batch_size=32, dataset_size=1797))
    assert short.batches == 57
    assert short.total == pytest.approx(0.0811, abs=1e-3)
    dropped = sampling.epoch_noise(SGD(lr=1, batch_size=32, dataset_size=1797), drop_last=True)
    assert (dropped.batches, dropped.at([0])[0]) == (56, pytest.approx(1))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("scheme", ["reshuffle", "shuffle-once"])
def test_noise_autocovariance_matches_real_permutations(scheme, drop_last):
    rng = np.random.default_rng(1)
    sgd = SGD(lr=1, batch_size=4, dataset_size=22, sampling=scheme)
    per_epoch = 5 if drop_last else 6
    values = rng.normal(size=22)
    values -= values.mean()
    epochs, draws = 3, 40_000
    orders = rng.permuted(np.tile(np.arange(22), (draws, epochs if scheme == "reshuffle" else 1, 1)), axis=2)
    orders = np.broadcast_to(orders, (draws, epochs, 22))
    edges = [(4 * i, min(4 * i + 4, 22)) for i in range(per_epoch)]
    series = np.stack([values[orders[:, :, a:b]].mean(axis=2) for a, b in edges], axis=2).reshape(draws, -1)
    unit = values.var() * (22 - 4) / (4 * 21)
    lags = np.arange(9)
    found = [(series[:, :per_epoch] * series[:, m : m + per_epoch]).mean() / unit for m in lags]
    expected = sampling.noise_autocovariance(sgd, lags, drop_last=drop_last)
    # standard error about sqrt(1/(draws * batches)) = 0.002; 5 of them
    np.testing.assert_allclose(found, expected, atol=0.012)


def test_shuffle_once_varies_least():
    sgd = SGD(lr=0.1, batch_size=10, dataset_size=500)
    h = [0.0, 1e-4, 0.1, 1.0]
    once, fresh = (sampling.weight_variance(sgd.replace(sampling=s), h, 1.0) for s in ("shuffle-once", "reshuffle"))
    assert np.all(once < fresh)
    assert once[0] == pytest.approx(0.1**2 * 51 / 12, rel=1e-9)  # a bridge about its own mean: half the free one


def test_flat_psi_follows_from_the_noise_exponent():
    h = np.geomspace(1e-4, 1e-3, 10)  # far below the crossover
    sgd = SGD(lr=0.1, batch_size=50, dataset_size=1500)
    for gamma in (1.0, 1.25, 2.0):
        variance = sampling.weight_variance(sgd, h, h**gamma)
        width = flatness.flatness_from_curvature(h, 1e-3)
        psi = -np.polyfit(np.log(width), np.log(variance), 1)[0]
        assert psi == pytest.approx(float(flatness.variance_exponent(gamma, "flat")), abs=0.03)


def test_velocity_variance_and_identity():
    for scheme in ("replacement", "reshuffle", "shuffle-once"):
        sgd = SGD(lr=0.1, batch_size=10, dataset_size=1000, sampling=scheme)
        speed = sampling.velocity_variance(sgd, [0.01, 1.0], 1.0)
        np.testing.assert_allclose(speed, 1, rtol=0.12)
        position = sampling.weight_variance(sgd, [0.01, 1.0], 1.0)
        np.testing.assert_allclose(position, sampling.correlation_time(sgd, [0.01, 1.0]) * 0.1**2 * speed / 2)
    white = SGD(lr=0.1, momentum=0.9, sampling="replacement")
    np.testing.assert_allclose(
        sampling.velocity_variance(white, [1.0], 1.0), limiting.stationary_moments(white, [1.0], 1.0).velocity
    )


@pytest.mark.parametrize("nesterov", [False, True])
def test_matrix_form_for_epochs_agrees_with_the_modes(nesterov):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 3)) * [1.0, 0.3, 0.05]
    x = np.linalg.qr(x - x.mean(axis=0))[0] * np.sqrt(400) * [1.0, 0.3, 0.05]  # uncorrelated inputs
    y = rng.normal(size=400)
    sgd = SGD(lr=0.1, momentum=0.5, nesterov=nesterov, batch_size=10, dataset_size=400)
    found = limiting.linear_regression_moments(sgd, x, y, multiplicative=False)
    h, noise = np.diag(x.T @ x / 400), np.diag(found.noise)
    np.testing.assert_allclose(np.diag(found.position), sampling.weight_variance(sgd, h, noise), rtol=1e-8)
    np.testing.assert_allclose(np.diag(found.velocity), sampling.velocity_variance(sgd, h, noise), rtol=1e-8)
    np.testing.assert_allclose(np.diag(found.cross), 0.05 * np.diag(found.velocity), rtol=1e-8)


def test_speed_and_memory_are_linear_in_modes():
    import time

    sgd = SGD(lr=0.1, momentum=0.9, batch_size=1, dataset_size=5000)
    began = time.process_time()
    found = sampling.weight_variance(sgd, np.geomspace(1e-9, 10, 5000), 1.0)
    assert time.process_time() - began < 3
    assert np.all(np.diff(found) < 0)


def test_bad_input_is_refused_with_the_reason():
    sgd = SGD(lr=0.1, batch_size=10, dataset_size=100)
    with pytest.raises(UnstableError, match="zero"):
        sampling.weight_variance(sgd.replace(sampling="replacement"), [0.0], 1.0)
    with pytest.raises(UnstableError, match="diverges"):
        sampling.weight_variance(sgd, [20.0], 1.0)
    with pytest.raises(HyperparameterError, match="not set"):
        sampling.weight_variance(SGD(lr=0.1), [1.0], 1.0)
    with pytest.raises(HyperparameterError, match="whole data set"):
        sampling.weight_variance(SGD(lr=0.1, batch_size=10, dataset_size=10), [1.0], 1.0)
    with pytest.raises(TooShortError):
        sampling.weight_variance_window(sgd, [1.0], 1.0, 1)
    with pytest.raises(TooShortError):
        sampling.weight_variance_window(sgd, [1.0], 1.0, 2, "linear")
    with pytest.raises(DataError, match="detrend"):
        sampling.weight_variance_window(sgd, [1.0], 1.0, 10, "cubic")  # type: ignore[arg-type]
    with pytest.raises(UnstableError):  # a short last batch leaves a diffusing residue in a flat mode
        sampling.weight_variance(SGD(lr=0.1, batch_size=10, dataset_size=105), [0.0], 1.0)
