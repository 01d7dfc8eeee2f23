"""Random hyperparameters against plain numpy replicas, noise models, sweeps.

Every comparison is a z-score of independent replicas. Of hundreds, at least 95% must lie within 3 standard errors;
were the theory exact and the scores Gaussian, 0.3% would lie outside, and more than 5% of 300 with probability 1e-12.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import solve_discrete_lyapunov

from thermograd import SGD, theory
from thermograd.errors import DataError, HyperparameterError, ThermogradWarning, UnstableError
from thermograd.theory import discrete, limiting, noise_models, sampling, stability


def random_setting(rng: np.random.Generator, **fixed) -> SGD:
    momentum = float(rng.choice([0.0, rng.uniform(0.2, 0.95)]))
    nesterov = bool(momentum > 0 and rng.random() < 0.3)
    dampening = float(rng.uniform(0, 0.5)) if momentum > 0 and not nesterov and rng.random() < 0.3 else 0.0
    decay = float(rng.choice([0.0, 0.02]))
    lr = float(np.exp(rng.uniform(np.log(0.01), np.log(1))))
    return SGD(lr=lr, momentum=momentum, nesterov=nesterov, dampening=dampening, weight_decay=decay, **fixed)


def step(sgd: SGD, theta, buffer, gradient):
    gradient = gradient + sgd.weight_decay * theta
    buffer = sgd.momentum * buffer + (1 - sgd.dampening) * gradient
    return theta - sgd.lr * (gradient + sgd.momentum * buffer if sgd.nesterov else buffer), buffer


def score(samples: np.ndarray, expected) -> np.ndarray:
    """Z of the mean of samples [R, ...] against what is expected."""
    error = samples.std(axis=0) / np.sqrt(len(samples))
    return (samples.mean(axis=0) - expected) / np.maximum(error, 1e-300)


def test_transients_and_stationary_moments_of_random_settings():
    rng, scores, replicas = np.random.default_rng(0), [], 2500
    for _ in range(24):
        sgd = random_setting(rng)
        h = np.sort(rng.uniform(1e-3, 0.9, 3)) * (stability.largest_stable_curvature(sgd) + sgd.weight_decay)
        s = rng.uniform(0.2, 2, 3)
        start = rng.normal(size=3)
        theta, buffer = np.tile(start, (replicas, 1)), np.zeros((replicas, 3))
        few = [2, 9, 120]
        exact = limiting.propagate(sgd, h - sgd.weight_decay, s, few, position=start)
        for k in range(1, 121):
            gradient = (h - sgd.weight_decay) * theta + np.sqrt(s) * rng.normal(size=theta.shape)
            before = theta
            theta, buffer = step(sgd, theta, buffer, gradient)
            if k in few:
                i = few.index(k)
                v = (theta - before) / sgd.lr
                a, b = theta - exact.position_mean[i], v - exact.velocity_mean[i]
                scores += [score(theta, exact.position_mean[i]), score(a**2, exact.position[i])]
                scores += [score(b**2, exact.velocity[i]), score(a * b, exact.cross[i])]
                moved = limiting.displacement_from_start(sgd, h - sgd.weight_decay, s, [k], position=start)[0]
                scores.append(score((theta - start) ** 2, moved))
    z = np.abs(np.concatenate(scores))
    assert z.size == 24 * 3 * 5 * 3
    assert np.mean(z < 3) >= 0.95
    assert np.sqrt(np.mean(np.minimum(z, 6) ** 2)) == pytest.approx(1, abs=0.25)  # the errors are what they claim to be


@pytest.mark.parametrize("scheme", ["replacement", "reshuffle", "shuffle-once"])
def test_sampling_schemes_of_random_settings(scheme):
    rng, scores, replicas = np.random.default_rng(1), [], 1200
    for _ in range(10):
        batch, size = int(rng.integers(1, 5)), 24
        sgd = random_setting(rng, batch_size=batch, dataset_size=size, sampling=scheme)
        top = stability.largest_stable_curvature(sgd) + sgd.weight_decay
        h = np.maximum(np.sort(rng.uniform(0.1, 0.8, 2)) * top - sgd.weight_decay, 0.0)
        offsets = rng.normal(size=(size, 2))
        offsets -= offsets.mean(axis=0)
        per_epoch = -(-size // batch)
        steps = per_epoch * max(3, int(6 * limiting.relaxation_steps(sgd, h).max() / per_epoch) + 1)
        theta, buffer = np.zeros((replicas, 2)), np.zeros((replicas, 2))
        order = rng.permuted(np.tile(np.arange(size), (replicas, 1)), axis=1)
        when = steps + rng.integers(per_epoch, size=replicas)  # a random phase, as the theory averages over it
        kept = np.zeros_like(theta)
        for k in range(steps + per_epoch):
            phase = k % per_epoch
            if scheme == "replacement":
                pick = rng.integers(size, size=(replicas, batch))
            else:
                if phase == 0 and scheme == "reshuffle":
                    order = rng.permuted(order, axis=1)
                pick = order[:, phase * batch : (phase + 1) * batch]
            theta, buffer = step(sgd, theta, buffer, h * theta + offsets[pick].mean(axis=1))
            kept[when == k] = theta[when == k]
        variance = sampling.weight_variance(sgd, h, (offsets**2).mean(axis=0) * sgd.minibatch_factor)
        # the mean of a fixed order's own cycle is not zero when its last batch is short: only whole epochs are compared
        if scheme != "shuffle-once" or size % batch == 0:
            scores.append(score(kept**2, variance))
    z = np.abs(np.concatenate(scores))
    assert z.size >= 14
    assert np.mean(z < 3) >= 0.95


def test_regression_with_multiplicative_noise_of_random_settings():
    rng, scores, replicas = np.random.default_rng(2), [], 1500
    for _ in range(12):
        batch, size = int(rng.integers(1, 6)), 30
        x, y = rng.normal(size=(size, 2)) * [1, 0.6], rng.normal(size=size)
        sgd = random_setting(rng, batch_size=batch, dataset_size=size, sampling="replacement")
        if stability.mean_square_gain(sgd, x) > 0.6:  # near its bound the fourth moment, and the error bar, is infinite
            sgd = sgd.replace(lr=sgd.lr * 0.2)
        try:
            if stability.mean_square_gain(sgd, x) > 0.6:
                continue
            exact = limiting.linear_regression_moments(sgd, x, y)
        except UnstableError:
            continue
        slowest = limiting.relaxation_steps(sgd, np.linalg.eigvalsh(x.T @ x / size)).max()
        theta, buffer = np.tile(exact.mean, (replicas, 1)), np.zeros((replicas, 2))
        for _ in range(min(int(6 * slowest) + 5, 3000)):
            pick = rng.integers(size, size=(replicas, batch))
            rest = np.einsum("rbd,rd->rb", x[pick], theta) - y[pick]
            theta, buffer = step(sgd, theta, buffer, np.einsum("rb,rbd->rd", rest, x[pick]) / batch)
        off = theta - exact.mean
        scores.append(score(off[:, [0, 0, 1]] * off[:, [0, 1, 1]], exact.position[[0, 0, 1], [0, 1, 1]]))
    z = np.abs(np.concatenate(scores))
    assert z.size >= 18
    assert np.mean(z < 3) >= 0.95


# -- noise models ------------------------------------------------------------------------------------------------


def test_matrix_learning_rate_solves_its_chain():
    rng = np.random.default_rng(3)
    a, c = rng.normal(size=(2, 3, 3))
    h, c = a @ a.T / 3 + 0.2 * np.eye(3), c @ c.T / 3
    for rates in (np.full(3, 0.2), np.array([0.1, 0.2, 0.05]), None):
        rate = np.diag(rates) if rates is not None else 0.1 * np.eye(3) + 0.02 * h  # commutes with H, so symmetric
        found = noise_models.preconditioned_covariance(SGD(lr=1.0, momentum=0.6), h, c, rate)
        chain = np.block([[np.eye(3) - rate @ h, 0.6 * np.eye(3)], [-rate @ h, 0.6 * np.eye(3)]])
        drive = np.kron(np.ones((2, 2)), rate @ c @ rate)
        full = solve_discrete_lyapunov(chain, drive)
        np.testing.assert_allclose(found, full[:3, :3], rtol=1e-9)
    scalar = limiting.stationary_covariance(SGD(lr=0.2, momentum=0.6), h, c).position
    np.testing.assert_allclose(
        noise_models.preconditioned_covariance(SGD(lr=1.0, momentum=0.6), h, c, np.full(3, 0.2)), scalar, rtol=1e-9
    )
    with pytest.raises(UnstableError):
        noise_models.preconditioned_covariance(SGD(lr=1.0), h, c, np.full(3, 10.0))


def test_noise_of_gaussian_inputs_is_that_of_many_samples():
    rng = np.random.default_rng(4)
    a = np.array([[1.0, 0.3], [0.3, 0.5]])
    offset = np.array([0.7, -0.4])
    x = rng.normal(size=(400_000, 2)) @ np.linalg.cholesky(a).T
    g = x * (x @ offset - 0.8 * rng.normal(size=400_000))[:, None]
    sgd = SGD(lr=0.1, batch_size=4, sampling="replacement")
    exact = noise_models.gaussian_inputs_noise(sgd, a, 0.64, np.outer(offset, offset))
    np.testing.assert_allclose(np.cov(g.T) / 4, exact, atol=0.02 * exact.max())  # standard error 0.4%
    loss = 0.32 + offset @ a @ offset / 2
    decoupled = noise_models.loss_noise(sgd, a, loss)
    missed = exact - decoupled
    np.testing.assert_allclose(missed, np.outer(a @ offset, a @ offset) / 4, atol=1e-12)  # what decoupling leaves out
    published = noise_models.loss_noise(sgd, a, loss, a @ offset)
    np.testing.assert_allclose(decoupled - published, missed, atol=1e-12)


def test_noise_models_near_minima():
    sgd = SGD(lr=0.1, batch_size=2, sampling="replacement")
    h, s = np.diag([2.0, 1.0]), np.diag([0.1, 0.3])
    np.testing.assert_allclose(noise_models.residual_noise(sgd, h, s), np.diag([0.3, 0.1]))
    assert np.all(noise_models.residual_noise(sgd, h, np.zeros((2, 2))) == 0)  # no spread, no noise, no escape
    np.testing.assert_allclose(noise_models.curvature_noise(sgd, -h), h / 2)
    np.testing.assert_allclose(noise_models.loss_noise(sgd, h, 0.0), 0)
    ridge = noise_models.weight_decay_noise(sgd, h, 0.5, 0.1 * np.eye(2), [1.0, 0.0])
    np.testing.assert_allclose(ridge, np.diag([1.0 - 0.005, 0.5]))
    with pytest.raises(DataError):
        noise_models.loss_noise(sgd, h, -1.0)
    with pytest.raises(DataError):
        noise_models.gaussian_inputs_noise(sgd, h, 1.0, np.eye(3))


# -- sweeps ------------------------------------------------------------------------------------------------------


def test_sweep_is_the_formula_at_each_setting():
    base = SGD(lr=0.1, batch_size=4, dataset_size=100)
    found = theory.sweep(
        sampling.weight_variance, base, [0.1, 1.0, 2.0], 1.0, over={"momentum": [0.0, 0.9], "lr": [0.1, 0.2, 0.4]}
    )
    assert found.values.shape == (2, 3, 3)
    one = sampling.weight_variance(base.replace(momentum=0.9, lr=0.2), [0.1, 1.0, 2.0], 1.0)
    np.testing.assert_array_equal(found.values[1, 1], one)
    np.testing.assert_array_equal(np.asarray(found), found["values"])
    data = found.to_xarray()
    assert data["values"].sel(momentum=0.9, lr=0.2).shape == (3,)
    several = theory.sweep(limiting.stationary_moments, [base, base.replace(lr=0.2)], [1.0], 1.0)
    assert several.position.shape == (2, 1)
    assert several.to_xarray()["velocity"].dims == ("setting", "mode")
    scalar = theory.sweep(discrete.kesten_index, base, 1.0, over={"lr": [0.5, 1.0]})
    assert scalar.values.shape == (2,)
    pair = theory.sweep(sampling.asymptotic_variance, base, [1.0], 1.0, over={"lr": [0.1]})
    assert pair["values_0"].shape == (1, 1)


def test_sweep_says_which_settings_diverge():
    base, over = SGD(lr=0.1), {"lr": [0.1, 1.0, 3.0]}
    with pytest.raises(UnstableError):
        theory.sweep(limiting.stationary_moments, base, [1.0], 1.0, over=over)
    with pytest.warns(ThermogradWarning, match="1 of 3"):
        found = theory.sweep(limiting.stationary_moments, base, [1.0], 1.0, over=over, unstable="nan")
    assert np.isfinite(found.position[:2]).all()
    assert np.isnan(found.position[2, 0])
    with pytest.raises(UnstableError):
        theory.sweep(limiting.stationary_moments, base, [100.0], 1.0, over=over, unstable="nan")
    with pytest.raises(HyperparameterError):
        theory.sweep(limiting.stationary_moments, base, [1.0], 1.0, over={"momentum": [0.5, 1.0]})
    with pytest.raises(DataError, match="nothing"):
        theory.sweep(limiting.stationary_moments, base, [1.0], 1.0)
    with pytest.raises(AttributeError):
        _ = found.nothing


@pytest.mark.parametrize(
    "wrong",
    [{"momentum": 1.0}, {"momentum": -0.1}, {"batch_size": -4}, {"lr": 0.0}, {"lr": float("nan")}, {"batch_size": 2.5},
     {"weight_decay": -1.0}, {"dampening": 1.0}, {"nesterov": True}],
)  # fmt: skip
def test_impossible_hyperparameters_are_refused(wrong):
    with pytest.raises(HyperparameterError):
        SGD(**{"lr": 0.1, **wrong})
