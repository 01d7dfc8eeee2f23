"""Noise that follows the spread: its correlation over an epoch, and what the closure makes of it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from thermograd.hyperparameters import SGD
from thermograd.prediction.closure import Closure
from thermograd.prediction.memory import repeated_share
from thermograd.theory import sampling as schemes

SAMPLES, BATCH = 40, 4


def samples():
    """Curvature and slope of each sample of a one-dimensional quadratic; curvature and slope are uncorrelated."""
    rng = np.random.default_rng(0)
    half = rng.exponential(1, SAMPLES // 2)
    slope = rng.standard_normal(SAMPLES // 2)
    return np.concatenate([half, half]) / half.mean(), np.concatenate([slope, -slope])


def simulated(lr, momentum, replicas=1000):
    """Mean square over replicas and over the epochs after 40% of them, each epoch a new order, and its error."""
    curvature, slope = samples()
    rng = np.random.default_rng(1)
    batches = SAMPLES // BATCH
    epochs = int(max(40, 25 * max((1 - momentum) / lr, 1 / (1 - momentum)) / batches))
    at, speed = np.zeros(replicas), np.zeros(replicas)
    total, count = np.zeros(replicas), 0
    for epoch in range(epochs):
        order = np.argsort(rng.random((replicas, SAMPLES)), axis=1)
        for k in range(batches):
            index = order[:, k * BATCH : (k + 1) * BATCH]
            speed = momentum * speed - curvature[index].mean(1) * at - slope[index].mean(1)
            at = at + lr * speed
            if epoch >= 0.4 * epochs:
                total, count = total + at**2, count + 1
    return (total / count).mean(), (total / count).std() / math.sqrt(replicas)


def expected(lr, momentum, share=None):
    """Self-consistent variance with the spread's noise repeated as given, or as derived."""
    curvature, slope = samples()
    sgd = SGD(lr=lr, momentum=momentum, batch_size=BATCH, dataset_size=SAMPLES, sampling="reshuffle")
    anew, one, factor = sgd.replace(sampling="replacement"), np.ones(1), sgd.minibatch_factor
    coloured, value = np.array([np.mean(slope**2)]), 0.0
    for _ in range(60):
        white = np.array([curvature.var() * value + 1e-30])
        part = share
        if part is None:
            part = repeated_share(sgd, one, one, coloured, white, SAMPLES // BATCH)
        value = float(
            schemes.weight_variance(sgd, one, (coloured + part * white) * factor)[0]
            + schemes.weight_variance(anew, one, (1 - part) * white * factor)[0]
        )
    return value


@pytest.mark.parametrize(("lr", "momentum"), [(0.1, 0.0), (0.05, 0.9), (0.005, 0.99)])
def test_the_noise_of_the_spread_is_correlated_over_the_epoch_as_derived(lr, momentum):
    value, error = simulated(lr, momentum)
    assert abs(expected(lr, momentum) - value) < 4 * error + 0.02 * value


def test_weights_slower_than_an_epoch_are_not_taken_for_fast_ones():
    value, error = simulated(0.005, 0.99, replicas=3000)
    fresh = expected(0.005, 0.99, share=0.0)  # drawn anew each step: too much noise by 7%
    assert fresh - value > 3 * error
    assert abs(expected(0.005, 0.99) - value) < abs(fresh - value) / 2


def test_the_share_lies_between_none_and_all():
    one = np.ones(1)
    sgd = SGD(lr=0.1, momentum=0.0, batch_size=4, dataset_size=40, sampling="reshuffle")
    shares = [
        repeated_share(sgd.replace(lr=0.1 * (1 - m), momentum=m), one, one, one, one, 10)
        for m in (0.0, 0.5, 0.9, 0.99, 0.999)
    ]
    assert (np.diff(shares) > 0).all()
    assert shares[0] > 0
    assert 0.95 < shares[-1] <= 1
    assert repeated_share(sgd.replace(sampling="replacement"), one, one, one, one, 1) == 0
    assert repeated_share(sgd, one, one, one, 0 * one, 10) == 0


def closure(**changes):
    return Closure(**{"cold": 1.0, "seen": 1.5, "response": 1.0, "measured": 1.5, "measured_stderr": 0.05} | changes)


def test_the_closure_solves_its_own_equation():
    made = closure()
    for cold, seen in ((1.0, 1.5), (0.01, 0.0101), (3.0, 4.0)):
        value, level = made.join(cold, seen)
        assert level * made.own == pytest.approx((1 - level) * cold + level * seen)
        assert value == pytest.approx(level * made.own)  # kappa is 1
    assert made.join(1.0, 1.5)[1] == pytest.approx(1.0)
    assert made.level(3.0, 5.0) == math.inf  # each unit of spread makes more than one of noise
    assert made.gain(3.0, 5.0) > 1


def test_near_the_stability_bound_a_curvature_that_falls_with_the_spread_holds_the_fluctuation():
    # N(x) = 1 / (bound - h(x)) with h(x) = 3 - x, at the run's bound 3.2 and at others
    def fluctuation(bound, x):
        return 1 / (bound - 3 + x)

    made = closure(cold=fluctuation(3.2, 0), seen=fluctuation(3.2, 1), measured=fluctuation(3.2, 1))
    for bound in (3.2, 3.02, 3.6, 6.0):
        level = made.join(fluctuation(bound, 0), fluctuation(bound, 1))[1]
        assert level * made.own == pytest.approx(fluctuation(bound, level))
    beyond = made.join(math.inf, fluctuation(2.9, 1))[1]  # without spread beyond the bound
    assert beyond * made.own == pytest.approx(math.sqrt(made.own * fluctuation(2.9, 1)))
    near, linear = made.join(1.0, 0.999)[1], 1.0 / (made.own + 1.0 - 0.999)
    assert near == pytest.approx(linear, rel=1e-3)


def test_weights_that_happen_to_lie_far_out_are_corrected_for():
    plain, far = closure(), closure(seen=2.0, response=0.5, measured=1.5)  # twice the energy and twice the noise
    assert far.own == pytest.approx(plain.own)
    assert far.join(2.0, 3.0) == pytest.approx(plain.join(2.0, 2.5))


def test_an_unknown_fluctuation_scales_nothing():
    value, stderr = closure(measured=9.0, measured_stderr=math.inf).scale
    assert (value, stderr) == (1.0, 0.1)
    value, stderr = closure(measured=1.65, measured_stderr=0.15).scale  # kappa 1.1 +- 0.1
    assert value == pytest.approx(1.05)
    assert stderr == pytest.approx(0.1 / math.sqrt(2))
