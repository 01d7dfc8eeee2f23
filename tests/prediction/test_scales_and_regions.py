"""Noise scale, critical batch, quadratic region, escape scale and errors of a run's loss, each against its own law."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

import thermograd as tg
from thermograd.prediction import Predictions
from thermograd.prediction.closure import Closure
from thermograd.theory import limiting
from thermograd.whatif import measured_run


@pytest.fixture(scope="module")
def measured(regression):
    return measured_run(regression.folder, regression.problem)


def test_the_gradient_noise_scale_is_that_of_the_last_weights(regression, measured):
    residual = regression.X @ measured.forecast.standing.theta.numpy() - regression.y
    gradients = regression.X * residual[:, None]
    mean = gradients.mean(0)
    exact = ((gradients - mean) ** 2).sum() / len(gradients) / (mean @ mean)
    found = measured.at(measured.sgd)["gradient_noise_scale"]
    assert found == pytest.approx(exact, rel=0.02)  # divisor N or N - 1


def test_the_critical_batch_is_where_noise_limits_the_rate_as_much_as_curvature(regression, measured):
    sgd = measured.sgd.replace(sampling="replacement")
    X, y, decay = regression.X, regression.y, sgd.weight_decay
    H = X.T @ X / len(X)
    curvature, vectors = np.linalg.eigh(H)
    best = np.linalg.solve(H + decay * np.eye(5), X.T @ y / len(X))
    gradients = (X * (X @ best - y)[:, None]) @ vectors
    without = limiting.stationary_moments(sgd, curvature, gradients.var(0) / sgd.batch_size).position
    whole = np.trace((H + decay * np.eye(5)) @ limiting.linear_regression_moments(sgd, X, y).position)
    gain = 1 - (curvature + decay) @ without / whole  # of the noise, how much the spread itself causes
    row = measured.at(sgd)
    assert row["noise_gain"] == pytest.approx(gain, rel=0.5)  # measured at eight weights of a run
    # gain B / B' = 1 at the largest rate that curvature allows, the gain being linear in the rate
    fastest = 2 * (1 + sgd.momentum) / (curvature.max() + decay)
    assert row["critical_batch_size"] == pytest.approx(sgd.batch_size * row["noise_gain"] * fastest / sgd.lr, rel=1e-6)


def quartic_run(folder):
    """Along the first weight the loss h x^2 / 2 + c x^4, along the second a parabola."""
    h, c = torch.tensor([1.0, 0.5], dtype=torch.float64), torch.tensor([4.0, 0.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    kicks = torch.randn(40, 2, generator=generator, dtype=torch.float64)
    kicks = 0.3 * (kicks - kicks.mean(0))

    def loss(w, a):
        return (0.5 * h * w**2 + c * w**4 + a * w).sum()

    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    problem = tg.Problem.from_function(loss, weights, kicks)
    optimizer = torch.optim.SGD([weights], lr=0.02)
    with tg.Recorder(folder, problem, optimizer, batch_size=4, sampling="replacement"):
        for _ in range(1500):
            index = torch.randint(0, 40, (4,), generator=generator)
            optimizer.zero_grad()
            (loss(weights, 0.0) + (kicks[index].mean(0) * weights).sum()).backward()
            optimizer.step()
    return measured_run(folder, problem, steps=300)


def test_the_quadratic_region_ends_where_the_fourth_power_takes_over(tmp_path):
    ready = quartic_run(tmp_path / "run")
    width = ready.forecast.fits["quadratic_width"]
    # the even part over x^2 is h + 2 c x^2, off by half of h at x = sqrt(h / 4 c); looked at in steps of 1.41
    edge = math.sqrt(1 / 16)
    assert edge / 1.1 < width[0] < 1.5 * edge
    spread = np.sqrt(ready.at(ready.sgd)["weight_variance"][1])
    assert width[1] > 20 * spread  # a parabola has no edge: the farthest that was looked at


def test_the_escape_scale_is_kramers_time_over_the_edge(tmp_path):
    ready = quartic_run(tmp_path / "run")
    sgd = ready.sgd.replace(lr=0.005)
    variance = ready.at(sgd)["weight_variance"][0]
    for ratio in (2.0, 4.0):
        fits = {
            **ready.forecast.fits, "quadratic_width": np.array([math.sqrt(2 * ratio * variance), np.nan]),
            "quadratic_curvature": np.array([1.0, 0.5]),
        }  # fmt: skip
        found = Predictions(dataclasses.replace(ready.forecast, fits=fits)).at(sgd)["escape_steps"]
        # overdamped, curvature h in the valley and -h on the saddle, barrier over temperature = ratio
        assert found * sgd.lr == pytest.approx(2 * math.pi * math.exp(ratio), rel=0.05)


def test_error_and_drift_of_the_runs_loss_are_those_of_the_series(measured):
    rng, standing = np.random.default_rng(0), measured.forecast.standing
    errors, drifts, told = [], [], []
    for _ in range(400):
        one = dataclasses.replace(standing, losses=1 + rng.standard_normal(240))
        errors.append(one.loss_stderr**2)
        drifts.append(one.drift[0])
        told.append(one.drift[1] ** 2)
    assert np.sqrt(np.mean(errors)) == pytest.approx(1 / math.sqrt(240), rel=0.1)
    assert np.std(drifts) == pytest.approx(np.sqrt(np.mean(told)), rel=0.1)
    assert np.mean(drifts) == pytest.approx(0, abs=4 * np.std(drifts) / 20)
    falling = dataclasses.replace(standing, losses=np.linspace(3, 1, 240))
    assert falling.drift[0] == pytest.approx(-2, rel=0.01)
    assert falling.drift[1] == pytest.approx(0, abs=1e-6)


def test_the_closure_is_the_fixed_point_of_noise_that_follows_the_spread():
    closure = Closure(cold=1.0, seen=1.6, response=0.5, measured=1.3, measured_stderr=0.01)
    assert closure.own == pytest.approx(1.3)
    assert closure.gain(1.0, 1.6) == pytest.approx(0.3 / 1.3)
    for cold, seen in ((1.0, 1.6), (0.2, 0.28), (2.0, 3.5)):
        found, level = closure.join(cold, seen)
        value = cold  # turn the spread into noise and the noise into spread, until nothing changes
        for _ in range(2000):
            x = value / closure.own
            value = (1 - x) * cold + x * closure.hot(cold, seen)
        assert level == pytest.approx(value / closure.own, rel=1e-9)
        assert found == pytest.approx(value, rel=1e-9)  # measured is what is predicted: kappa is 1
    assert closure.join(1.0, 4.0)[0] == math.inf  # a gain above 1
