"""Second moments against closed forms, and against an average over every order of the samples."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import thermograd as tg
from thermograd.errors import InputError, NotAvailableError, UnstableError
from thermograd.prediction.moments import block_moments, epoch_batches, epoch_profile
from thermograd.theory import limiting
from thermograd.theory import sampling as schemes


@pytest.mark.parametrize(
    "sgd",
    [
        tg.SGD(lr=0.1, momentum=0.9, batch_size=7, dataset_size=100, weight_decay=0.01),
        tg.SGD(lr=0.1, momentum=0.5, batch_size=20, dataset_size=100, nesterov=True),
        tg.SGD(lr=0.2, momentum=0.3, dampening=0.2, batch_size=7, dataset_size=100, sampling="replacement"),
        tg.SGD(lr=0.3, batch_size=50, dataset_size=100),
    ],
)
def test_long_after_the_start_they_are_the_stationary_closed_forms(sgd):
    h, noise = np.array([0.01, 0.1, 1.0, 5.0]), np.array([1.0, 2.0, 3.0, 4.0])
    epoch = len(epoch_batches(sgd))
    found = block_moments(sgd, h, noise, [0, 20_000 * epoch, 20_001 * epoch])
    np.testing.assert_allclose(found.position[-1], schemes.weight_variance(sgd, h, noise * sgd.minibatch_factor), 1e-5)
    np.testing.assert_allclose(
        found.velocity[-1], schemes.velocity_variance(sgd, h, noise * sgd.minibatch_factor), 1e-5
    )


def test_with_replacement_the_way_there_is_that_of_propagate():
    sgd = tg.SGD(lr=0.1, momentum=0.8, weight_decay=0.05, batch_size=4, sampling="replacement")
    h, noise = np.array([-0.02, 0.0, 0.3, 3.0]), np.array([0.5, 1.0, 2.0, 3.0])
    steps = [1, 2, 10, 60]
    exact = limiting.propagate(sgd, h, noise / 4, steps, position=0.7, velocity=-0.4)
    for row, k in enumerate(steps):
        found = block_moments(sgd, h, noise, [k - 1, k], position=0.7, velocity=-0.4)
        np.testing.assert_allclose(found.position[0], exact.position[row] + exact.position_mean[row] ** 2, 1e-10)
        np.testing.assert_allclose(found.mean_square[0], exact.position_mean[row] ** 2, 1e-10)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_reshuffled_epochs_equal_the_average_over_every_order(batch):
    values = np.array([1.0, -0.3, 0.4, -1.5])  # gradient of each sample at the minimum
    values -= values.mean()
    sgd = tg.SGD(lr=0.2, momentum=0.5, weight_decay=0.1, batch_size=batch, dataset_size=4)
    orders = list(itertools.permutations(range(4)))
    epoch = len(epoch_batches(sgd))
    squares = np.zeros(2 * epoch)
    for first in orders:
        for second in orders:
            theta, buffer, k = 0.3, -0.2, 0
            for order in (first, second):
                for start in range(0, 4, batch):
                    noise = values[list(order[start : start + batch])].mean()
                    buffer = 0.5 * buffer + (0.7 + 0.1) * theta + noise
                    theta = theta - 0.2 * buffer
                    squares[k] += theta**2
                    k += 1
    squares /= len(orders) ** 2
    variance = float((values**2).mean())
    found = block_moments(
        sgd, [0.7], [variance], np.arange(2 * epoch + 1), position=0.3, velocity=0.2
    )  # velocity is minus the buffer
    np.testing.assert_allclose(found.position[:, 0], squares, rtol=1e-12)


def test_noise_drawn_anew_adds_to_that_of_the_epoch():
    sgd = tg.SGD(lr=0.1, momentum=0.9, batch_size=10, dataset_size=100)
    white = sgd.replace(sampling="replacement")
    both = block_moments(sgd, [0.5], [1.0], [100_000, 100_010], white=2.0).position
    parts = schemes.weight_variance(sgd, [0.5], 1.0 * sgd.minibatch_factor) + schemes.weight_variance(
        white, [0.5], 2.0 * sgd.minibatch_factor
    )
    np.testing.assert_allclose(both[0], parts, 1e-6)


def test_a_mode_beyond_its_bound_is_infinite_and_leaves_the_others_alone():
    sgd = tg.SGD(lr=1.0, batch_size=1, sampling="replacement")
    found = block_moments(sgd, [0.5, 2.5], 1.0, [3000, 4000])
    assert np.isinf(found.position[0, 1])
    np.testing.assert_allclose(found.position[0, 0], schemes.weight_variance(sgd, [0.5], 1.0), 1e-6)


def test_impossible_blocks_and_schemes_are_refused():
    sgd = tg.SGD(lr=0.1, batch_size=2, dataset_size=10)
    for edges in ([5], [5, 5], [-1, 3], [3, 1]):
        with pytest.raises(InputError, match="edges"):
            block_moments(sgd, [1.0], [1.0], edges)
    with pytest.raises(NotAvailableError, match="order"):
        block_moments(sgd.replace(sampling="shuffle-once"), [1.0], [1.0], [0, 1])


@pytest.mark.parametrize(
    ("sgd", "drop_last"),
    [
        (tg.SGD(lr=0.1, momentum=0.9, batch_size=7, dataset_size=30, weight_decay=0.01), False),
        (tg.SGD(lr=0.1, momentum=0.9, batch_size=7, dataset_size=30, weight_decay=0.01), True),
        (tg.SGD(lr=0.1, momentum=0.5, batch_size=10, dataset_size=30, nesterov=True), False),
        (tg.SGD(lr=0.2, momentum=0.3, dampening=0.2, batch_size=7, dataset_size=30, sampling="replacement"), False),
    ],
)
def test_the_profile_of_an_epoch_is_what_the_recursion_settles_to(sgd, drop_last):
    h, noise, white = np.array([0.1, 1.0, 5.0]), np.array([1.0, 2.0, 3.0]), np.array([0.0, 1.0, 0.5])
    profile = epoch_profile(sgd, h, noise, white=white, drop_last=drop_last)
    batches = len(epoch_batches(sgd, drop_last=drop_last))
    assert profile.shape == (batches, 3)
    first = 3000 * batches  # the recursion stops looking at single steps where its epochs repeat to 1e-9
    walked = [
        block_moments(sgd, h[i : i + 1], noise[i], first + np.arange(batches + 1), white=white[i], drop_last=drop_last,
                      position=0.3).position[:, 0]
        for i in range(3)
    ]  # fmt: skip
    anew = sgd.replace(sampling="replacement")
    mean = schemes.weight_variance(sgd, h, noise * sgd.minibatch_factor, drop_last=drop_last)
    if batches == 1:
        np.testing.assert_allclose(profile[0], np.transpose(walked)[0], rtol=1e-6)
    np.testing.assert_allclose(np.mean(walked, axis=1), profile.mean(0), rtol=1e-6)
    without = epoch_profile(sgd, h, noise, drop_last=drop_last).mean(0)
    np.testing.assert_allclose(without, mean, rtol=1e-9)
    if (not drop_last and sgd.dataset_size % sgd.batch_size == 0) or sgd.sampling == "replacement":
        added = schemes.weight_variance(anew, h, white * sgd.minibatch_factor)
        np.testing.assert_allclose(profile.mean(0), mean + added, rtol=1e-9)


def test_within_an_epoch_the_profile_is_that_of_every_order():
    values = np.array([1.0, -0.3, 0.4, -1.1])
    sgd = tg.SGD(lr=0.3, momentum=0.2, batch_size=1, dataset_size=4)
    orders, theta = list(itertools.permutations(range(4))), {(0.0, 0.0): 1.0}
    for _ in range(3):  # epochs; the start is forgotten by (0.7)^12
        squares, after = np.zeros(4), {}
        for (place, buffer), weight in theta.items():
            for order in orders:
                t, u = place, buffer
                for k, i in enumerate(order):
                    u = 0.2 * u + t + values[i]
                    t = t - 0.3 * u
                    squares[k] += weight * t * t / len(orders)
                key = (round(t, 9), round(u, 9))
                after[key] = after.get(key, 0.0) + weight / len(orders)
        theta = after
    found = epoch_profile(sgd, [1.0], [(values**2).mean()])[:, 0]
    np.testing.assert_allclose(found, squares, rtol=1e-2)
    assert squares[1] > 1.5 * squares[3]


def test_modes_without_a_stationary_state_have_no_profile():
    sgd = tg.SGD(lr=1.0, batch_size=2, dataset_size=10)
    for curvature in (0.0, 2.5):
        with pytest.raises(UnstableError, match="no stationary state"):
            epoch_profile(sgd, [curvature], [1.0])
    with pytest.raises(NotAvailableError, match="order"):
        epoch_profile(sgd.replace(sampling="shuffle-once"), [1.0], [1.0])
