"""Power laws and their exponents, radial passages, unequal curvatures, paths and heavy tails."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import gammaln, ndtr

from thermograd import SGD
from thermograd.errors import DataError, NotAvailableError, ThermogradWarning, TooShortError, UnstableError
from thermograd.theory import discrete, first_passage, heavy_tails, kramers, paths, power_law

TABLE = [  # d, B, lr, Ito exponent, core exponent, measured on fresh data, measured on a Gaussian chain
    (1, 1, 0.02, 51.0, 50.0, 49.6, 50.67),
    (1, 1, 0.1, 11.0, 10.0, 9.95, 10.53),
    (1, 1, 0.3, 4.33, 3.33, 3.24, 3.80),
    (1, 1, 0.5, 3.0, 2.0, 1.97, 2.34),
    (1, 4, 0.1, 41.0, 38.5, 38.6, 39.1),
    (1, 10, 0.1, 101, 95.5, 95.7, 96.3),
    (1, 10, 0.3, 34.3, 28.83, 29.0, 29.6),
    (1, 10, 1.0, 11.0, 5.5, 5.53, 5.92),
    (1, 20, 1.0, 21.0, 10.5, 10.6, 11.0),
    (2, 1, 0.1, 11.0, 10.0, 9.91, 10.51),
    (5, 4, 0.1, 41.0, 38.5, 38.6, 39.0),
    (10, 2, 0.05, 41.0, 39.5, 39.5, 40.0),
]


@pytest.mark.parametrize(("d", "batch", "lr", "ito", "core", "fresh", "chain"), TABLE)
def test_exponents_of_the_notes(d, batch, lr, ito, core, fresh, chain):
    sgd = SGD(lr=lr, batch_size=batch)
    assert power_law.stationary_exponent(sgd, 1.0) == pytest.approx(ito, rel=1e-3)
    assert power_law.stationary_exponent_discrete(sgd, 1.0) == pytest.approx(core, rel=2e-3)
    assert power_law.stationary_exponent_discrete(sgd, 1.0) == pytest.approx(fresh, rel=0.03)
    assert power_law.stationary_exponent_gaussian_chain(sgd, 1.0) == pytest.approx(
        chain, rel=0.07 if lr == 0.5 else 0.02
    )


def test_exponents_of_other_readings_are_those_of_the_zero_current_density():
    sgd, x = SGD(lr=0.1, batch_size=1), np.array([0.0, 1.0, 2.0])
    noise = lambda z: 0.1 * (1 + z**2) / 2  # noqa: E731
    for reading in ("ito", "stratonovich", "klimontovich"):
        found = first_passage.stationary_density(lambda z: z**2 / 2, noise, x, -9, 9, interpretation=reading)
        phi = float(power_law.stationary_exponent(sgd, 1.0, reading))
        np.testing.assert_allclose(found / found[0], (1 + x**2) ** -phi, rtol=1e-9)
    inputs = first_passage.stationary_density(lambda z: z**2 / 2, lambda z: 0.05 * (1 + 2 * z**2), x, -9, 9)
    phi = float(power_law.stationary_exponent_gaussian_inputs(sgd, 1.0))
    np.testing.assert_allclose(inputs / inputs[0], (1 + 2 * x**2) ** -phi, rtol=1e-9)
    lr, h, s_g, s_h = 0.2, 1.5, 0.3, 0.8
    meng = first_passage.stationary_density(
        lambda z: h * z**2 / 2, lambda z: lr * (s_g + s_h * z**2) / 2, x, -30, 30, panels=2000
    )
    kappa = float(power_law.quadratic_noise_exponent(lr, h, s_h))
    np.testing.assert_allclose(meng / meng[0], (1 + s_h / s_g * x**2) ** -kappa, rtol=1e-9)
    # Mori's case of it
    assert power_law.quadratic_noise_exponent(0.1, 2.0, 4.0 / 3) == pytest.approx(
        float(power_law.stationary_exponent(SGD(lr=0.1, batch_size=3), 2.0))
    )
    quartic = first_passage.stationary_density(lambda z: 1 + z**4, lambda z: 0.1 * 3.0 * (1 + z**4) / 2, x, -30, 30)
    phi = float(power_law.stationary_exponent_isotropic(0.1, 3.0))  # any landscape
    np.testing.assert_allclose(quartic / quartic[0], (1 + x**4) ** -phi, rtol=1e-8)


@given(room=st.floats(0.1, 60), dimension=st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_density_is_normalised_and_has_its_second_moment(room, dimension):
    phi = dimension / 2 + room
    y = np.linspace(-25, np.log(1e8) / max(room, 0.3) + 12, 40_001)
    r = np.exp(y)
    shell = np.exp(np.log(2) + dimension / 2 * np.log(np.pi) - gammaln(dimension / 2) + dimension * y)
    density = power_law.power_law_density(r, phi, dimension)
    tail = 0.02 if room < 0.3 else 1e-4
    assert np.trapezoid(shell * density, y) == pytest.approx(1, abs=tail)
    if room > 1.5:
        moment = np.trapezoid(shell * density * r**2, y)
        assert moment == pytest.approx(power_law.power_law_second_moment(phi, dimension), rel=1e-3)
    if room <= 1:
        assert power_law.power_law_second_moment(phi, dimension) == np.inf


@pytest.mark.parametrize(("d", "phi"), [(1, 3.0), (2, 10.0), (10, 39.5)])
def test_estimator_finds_the_exponent_and_its_error(d, phi):
    rng = np.random.default_rng(0)
    found = []
    for _ in range(60):  # u^2 is beta prime
        u2 = rng.gamma(d / 2, size=4000) / rng.gamma(phi - d / 2, size=4000)
        found.append(power_law.estimate_exponent(u2, d))
    values = np.array([f.exponent for f in found])
    stderr = found[0].stderr
    assert abs(values.mean() - phi) < 4 * stderr / np.sqrt(60) + stderr**2 / phi  # second term: the bias of an MLE
    assert values.std() == pytest.approx(stderr, rel=0.4)  # standard error of a standard deviation is 9%


def test_core_of_real_minibatch_noise_has_the_discrete_exponent():
    rng = np.random.default_rng(1)
    d, batch, lr, replicas = 5, 4, 0.1, 8000
    theta = np.zeros((replicas, d))
    samples = []
    for k in range(400):
        x, y = rng.normal(size=(replicas, batch, d)), rng.normal(size=(replicas, batch))
        rest = np.einsum("rbd,rd->rb", x, theta) - y
        theta = theta - lr * np.einsum("rb,rbd->rd", rest, x) / batch
        if k >= 100 and k % 50 == 0:
            samples.append((theta**2).sum(axis=1))
    found = power_law.estimate_exponent(np.concatenate(samples), d)
    sgd = SGD(lr=lr, batch_size=batch)
    assert found.exponent == pytest.approx(float(power_law.stationary_exponent_discrete(sgd, 1.0)), rel=0.025)
    ratio = power_law.stationary_loss_ratio_discrete(sgd, 1.0, d)
    # relative standard error of the excess about sqrt(2 / (5 * 48000)) = 0.3%
    assert np.concatenate(samples).mean() == pytest.approx(ratio - 1, rel=0.015)


def test_stationary_loss_ratios():
    sgd = SGD(lr=0.1, batch_size=1)
    assert power_law.stationary_loss_ratio_discrete(sgd, 1.0, 1) == pytest.approx(1.05, abs=0.01)
    assert power_law.stationary_loss_ratio_discrete(sgd, 1.0, 10) == pytest.approx(2.2, abs=0.06)
    stiff, soft = SGD(lr=0.05, batch_size=1), SGD(lr=0.1, batch_size=1)
    assert power_law.stationary_loss_ratio_discrete(stiff, 2.0, 3) == pytest.approx(
        power_law.stationary_loss_ratio_discrete(soft, 1.0, 3)
    )
    assert power_law.stationary_loss_ratio(sgd, 1.0, 20) == np.inf
    assert power_law.mean_square_dimension(sgd, 1.0) == pytest.approx(20)
    with pytest.raises(UnstableError, match="normalised"):
        power_law.stationary_loss_ratio(sgd, 1.0, 22)


# -- passages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lr", "ratios", "proportional", "inputs", "linear"),
    [
        (0.05, [1.2, 1.5, 2.0, 3.0], [445, 2.9e4, 8.4e6, 2.9e10], [374, 1.1e4, 6.9e5, 1.3e8],
         [554, 1.3e5, 2.0e9, 6.7e17]),
        (0.1, [1.5, 2.0, 3.0], [356, 5.8e3, 3.4e5], [243, 1.9e3, 2.8e4], [663, 6.6e4, 9.9e8]),
        (0.2, [2.0], [121], [76], [330]),
    ],
)  # fmt: skip
def test_radial_passages_of_the_notes(lr, ratios, proportional, inputs, linear):
    sgd = SGD(lr=lr, batch_size=1)
    for function, steps in (
        (power_law.mean_first_passage_time, proportional),
        (power_law.gaussian_inputs_passage_time, inputs),
        (power_law.linear_barrier_passage_time, linear),
    ):
        np.testing.assert_allclose(function(sgd, 1.0, ratios) / lr, steps, rtol=0.045)  # printed to two digits


@pytest.mark.parametrize("noise", ["proportional", "inputs", "linear"])
def test_radial_passages_are_the_one_dimensional_quadrature(noise):
    sgd, c = SGD(lr=0.25, batch_size=2), 2.5
    function, shape = {
        "proportional": (power_law.mean_first_passage_time, lambda x: 1 + x**2),
        "inputs": (power_law.gaussian_inputs_passage_time, lambda x: 1 + 2 * x**2),
        "linear": (power_law.linear_barrier_passage_time, lambda x: 1 + 0 * x),
    }[noise]
    general = first_passage.quadrature(
        lambda x: x**2 / 2, lambda x: 0.25 / 4 * shape(x), 0.0, np.sqrt(c - 1), reflect=0.0
    )
    assert function(sgd, 1.0, c)[0] == pytest.approx(general, rel=1e-9)


def test_radial_passage_of_gaussian_inputs_in_several_dimensions():
    """Against direct Euler-Maruyama with the covariance [(1 + r^2) I + theta theta^T] / B."""
    rng, dt, d, c = np.random.default_rng(2), 2e-3, 3, 2.2
    sgd = SGD(lr=0.25, batch_size=1)
    theta, steps, alive = np.zeros((1500, d)), np.zeros(1500), np.arange(1500)
    for k in range(1, 200_000):
        r2 = (theta**2).sum(axis=1, keepdims=True)
        kick = rng.normal(size=theta.shape) * np.sqrt(1 + r2) + theta * rng.normal(size=(len(theta), 1))
        theta = theta - theta * dt + np.sqrt(0.25 * dt) * kick
        out = (theta**2).sum(axis=1) >= c - 1
        steps[alive[out]] = k
        theta, alive = theta[~out], alive[~out]
        if alive.size == 0:
            break
    radius = np.sqrt(c - 1) + 0.5826 * np.sqrt(0.25 * dt * (1 + 2 * (c - 1)))
    exact = power_law.gaussian_inputs_passage_time(sgd, 1.0, 1 + radius**2, d)[0]
    error = steps.std() / np.sqrt(1500) * dt
    assert abs(steps.mean() * dt - exact) < 4 * error + 0.01 * exact  # false alarms 6e-5


@given(a=st.floats(0.6, 300), dimension=st.integers(1, 12), excess=st.floats(1e-3, 2))
@settings(max_examples=40, deadline=None)
def test_passages_are_ordered_and_grow(a, dimension, excess):
    import warnings

    sgd, c = SGD(lr=1 / a, batch_size=1), 1 + excess
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ThermogradWarning)
        near, far = power_law.mean_first_passage_time(sgd, 1.0, [c, 1 + 1.1 * excess], dimension)
    inputs = power_law.gaussian_inputs_passage_time(sgd, 1.0, c, dimension)[0]
    linear = power_law.linear_barrier_passage_time(sgd, 1.0, c, dimension)[0]
    assert 0 < near <= linear * (1 + 1e-6)  # more noise, faster
    assert dimension > 1 or inputs <= near * (1 + 1e-9)
    assert inputs <= linear * (1 + 1e-6)
    assert near < far
    free = a * excess / dimension  # r^2 / (2 d D) with the noise at the minimum: a lower bound without drift
    assert linear >= free * (1 - 1e-6)
    assert power_law.linear_barrier_passage_time(sgd, 1.0, 1 + 1e-9, dimension)[0] == pytest.approx(
        a * 1e-9 / dimension, rel=1e-4
    )


def test_slopes_at_moderate_ratios():
    sgd = SGD(lr=0.1, batch_size=1)
    np.testing.assert_allclose(power_law.local_slope(sgd, 1.0, [2.0, 3.0], 10), [3.1, 3.4], atol=0.06)
    for d, limit in ((1, 10.5), (2, 10.0), (5, 8.5)):
        assert power_law.local_slope(sgd, 1.0, 1e6, d)[0] == pytest.approx(limit, abs=0.01)
        assert power_law.local_slope_approximate(sgd, 1.0, 1e9, d)[0] == pytest.approx(limit)
        c = np.array([2.0, 3.0, 6.0])
        rough = power_law.local_slope_approximate(sgd, 1.0, c, d)
        assert np.all(np.abs(rough - power_law.local_slope(sgd, 1.0, c, d)) < 2.2)


@pytest.mark.parametrize(
    ("d", "low", "high", "slope", "linear"),
    [
        (1, 1.20, 1.64, 9.61, 12.6), (1, 1.64, 2.25, 9.81, 18.1),
        (2, 1.20, 1.73, 8.19, 11.4), (2, 1.73, 2.50, 8.81, 18.7),
        (5, 1.20, 2.19, 5.57, 10.0), (5, 2.19, 4.00, 6.82, 25.8), (10, 3.10, 8.00, 4.33, 44.7),
    ],
)  # fmt: skip
def test_windowed_slopes_of_the_notes(d, low, high, slope, linear):
    import warnings

    sgd, c = SGD(lr=0.1, batch_size=1), np.geomspace(low, high, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ThermogradWarning)
        times = power_law.mean_first_passage_time(sgd, 1.0, c, d)
    # the notes fitted their own (three to five) thresholds; log-spaced ones differ by a few per cent
    assert np.polyfit(np.log(c), np.log(times), 1)[0] == pytest.approx(slope, rel=0.05)
    straight = power_law.linear_barrier_passage_time(sgd, 1.0, c, d)
    assert np.polyfit(np.log(c), np.log(straight), 1)[0] == pytest.approx(linear, rel=0.12)


def test_a_chain_watched_once_a_step_takes_longer_by_siegmunds_shift():
    for lr, factor, left in ((0.1, (1.4, 1.9), 0.25), (0.02, (1.15, 1.45), 0.09)):
        sgd, c = SGD(lr=lr, batch_size=1), {0.1: 1.6, 0.02: 1.15}[lr]

        def cumulative(u, b, lr=lr):
            spread, centre = lr * np.sqrt(1 + u**2), u * (1 - lr)
            return ndtr((b - centre) / spread) - ndtr((-b - centre) / spread)

        chain = lr * discrete.kernel_passage_steps(cumulative, np.linspace(0, np.sqrt(c - 1), 400))[0]
        plain = power_law.mean_first_passage_time(sgd, 1.0, c)[0]
        shifted = power_law.mean_first_passage_time(sgd, 1.0, power_law.monitored_loss_ratio(sgd, 1.0, c))[0]
        assert factor[0] < chain / plain < factor[1]
        assert shifted == pytest.approx(chain, rel=left)
        assert abs(shifted - chain) < 0.7 * abs(plain - chain)


def test_threshold_below_the_stationary_loss_warns_of_the_consequence():
    sgd = SGD(lr=0.1, batch_size=1)
    with pytest.warns(ThermogradWarning, match="relaxation and not escape"):
        power_law.mean_first_passage_time(sgd, 1.0, [1.5, 5.0], 10)
    power_law.mean_first_passage_time(sgd, 1.0, [2.5, 5.0], 10)  # above: no warning, or the suite would fail


# -- unequal curvatures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", [1.7, 10])
@pytest.mark.parametrize("ratio", [0.6, 0.1])
def test_moment_method_agrees_with_the_angular_eigenvalue(inverse, ratio):
    sgd = SGD(lr=1 / inverse, batch_size=1)
    expected = power_law.two_curvature_slope(sgd, [1.0, ratio])
    assert power_law.mixed_curvature_slope(sgd, [ratio, 1.0]) == pytest.approx(expected, abs=1e-6)


@given(inverse=st.floats(1.2, 8), others=st.lists(st.floats(0.05, 1), min_size=0, max_size=2), scale=st.floats(0.1, 10))
@settings(max_examples=8, deadline=None)
def test_effective_number_lies_between_one_and_all(inverse, others, scale):
    h = np.array([1.0, *others])
    if len(h) >= 2 * (inverse + 1) - 0.1:
        return
    sgd = SGD(lr=1 / inverse, batch_size=1)
    n = power_law.effective_dimension_exact(sgd, h)
    assert 1 - 1e-3 <= n <= len(h) + 1e-3
    assert power_law.effective_dimension_exact(sgd.replace(lr=sgd.lr / scale), h[::-1] * scale) == pytest.approx(
        n, abs=2e-3
    )


def test_more_than_two_unequal_curvatures():
    sgd = SGD(lr=1 / 3, batch_size=1)
    # slopes measured up to c = 20 (standard error 0.15), and the rule of thumb
    for h, measured, rule in (
        ([1, 0.3], 3.2, 3.46), ([1, 0.3, 0.3], 3.3, 3.41), ([1, 0.3, 0.3, 0.3], 3.35, 3.37),
        ([1, 1, 0.3, 0.3], 2.8, 2.91),
    ):  # fmt: skip
        exact = power_law.mixed_curvature_slope(sgd, h)
        assert exact == pytest.approx(measured, abs=0.3)
        assert exact == pytest.approx(rule, abs=0.05)
        assert 3 + 1 - power_law.effective_dimension(h) / 2 == pytest.approx(rule, abs=0.01)
    merged = power_law.mixed_curvature_slope(sgd, [1, 0.3, 0.3])
    assert power_law.mixed_curvature_slope(sgd, [1, 0.3, 0.3001]) == pytest.approx(merged, abs=1e-4)
    for n in (1, 2, 4, 7):  # equal ones: Mori's integer
        assert (
            power_law.mixed_curvature_slope(sgd, np.full(n, 2.0)) == pytest.approx(1.5 + 1 - n / 2, abs=1e-9)
            if (n < 5)
            else True
        )
    assert power_law.participation_dimension([1, 0.3]) == pytest.approx(1.55, abs=0.01)
    assert power_law.entropy_dimension([1, 0.3]) == pytest.approx(1.7, abs=0.03)
    assert power_law.participation_dimension(np.ones(5)) == pytest.approx(5)
    assert power_law.entropy_dimension(np.ones(5)) == pytest.approx(5)
    with pytest.raises(UnstableError, match="stationary"):
        power_law.mixed_curvature_slope(SGD(lr=2.0, batch_size=1), np.ones(4))
    with pytest.raises(NotAvailableError, match="merge"):
        power_law.mixed_curvature_slope(SGD(lr=0.01, batch_size=1), np.linspace(0.1, 1, 9))


# -- Kramers, paths, heavy tails ---------------------------------------------------------------------------------


def test_white_noise_in_two_dimensions():
    for low, high, time in ((1, 1, 659), (1, 3, 1142), (3, 1, 381)):
        found = kramers.escape_time_white(0.25, [2.0, low], [-1.0, high], 0.05)
        assert found == pytest.approx(time, rel=1e-3)


def test_transverse_factor_of_the_notes():
    eps = 0.035
    sgd = SGD(lr=2 * eps, batch_size=1)
    for low, high, factor in ((1, 3, 2.0), (3, 1, 0.5), (1, 1, 1.0)):
        found = kramers.transverse_factor_path(
            sgd, lambda x, a=low, b=high: b + (a - b) * x**2, lambda x: eps * (1 + x**2), -1.0, 0.0
        )
        assert found == pytest.approx(factor, rel=1e-5)
    constant = kramers.transverse_factor_path(sgd, lambda x: 3 + 2 * x, lambda x: eps * 2.0 + 0 * x, -1.0, 0.0)
    assert kramers.transverse_factor(1.0, 3.0, 2.0) == pytest.approx(constant)
    assert kramers.transverse_factor([1.0, 2.0], [3.0, 1.0], 2.0) == pytest.approx(np.exp((2 - 1) / 4))


def test_underdamped_prefactors():
    for momentum in (0.0, 0.5, 0.9):
        sgd = SGD(lr=0.02, momentum=momentum, batch_size=1)
        lam = -(1 - momentum) / 2 + np.sqrt((1 - momentum) ** 2 / 4 + 0.02)
        psi = kramers.escape_exponent_sgd(sgd, 0.001, 2.0, -1.0)
        published = kramers.escape_time_sgd_underdamped(sgd, 0.001, 2.0, -1.0, prefactor="xie")
        assert published == pytest.approx(2 * np.pi * 0.02 / lam * np.exp(psi))
        ito = kramers.escape_time_sgd_underdamped(sgd, 0.001, 2.0, -1.0)
        assert ito == pytest.approx(published / 2)
    slow = SGD(lr=1e-6, momentum=0.3, batch_size=1)
    assert kramers.escape_time_sgd_underdamped(slow, 1e-6, 2.0, -1.0) == pytest.approx(
        kramers.escape_time_sgd(slow, 1e-6, 2.0, -1.0), rel=1e-5
    )
    assert kramers.escape_exponent_adai(slow.replace(momentum=0.9), 1.0, 2.0, -1.0) == pytest.approx(
        kramers.escape_exponent_sgd(slow.replace(momentum=0.0), 1.0, 2.0, -1.0)
    )


def test_sharpness_is_a_learning_rate_step_by_step():
    rng = np.random.default_rng(0)
    sgd = SGD(lr=0.01, momentum=0.7, weight_decay=0.1)
    fast = paths.sharpness_rescaled(sgd, 4.0)
    theta, b, phi, c = 0.5, 0.0, 1.0, 0.0  # phi = sqrt(4) theta
    for _ in range(50):
        x = rng.normal()
        gradient = lambda z, x=x: 2 * (z - x) ** 3 - 3 * (z - x)  # noqa: E731
        b = 0.7 * b + 2 * gradient(2 * theta) + sgd.weight_decay * theta
        theta -= sgd.lr * b
        c = 0.7 * c + gradient(phi) + fast.weight_decay * phi
        phi -= fast.lr * c
        assert phi == pytest.approx(2 * theta, rel=1e-12)


def test_finite_steps_do_not_change_the_barrier():
    x = np.linspace(-1, 0, 201)
    loss, slope = x**4 / 4 - x**2 / 2, x**3 - x
    changed = kramers.finite_step_potential(loss, slope**2, 0.2)
    assert changed[-1] - changed[0] == pytest.approx(0.25)
    assert np.diff(changed, 2)[0] < np.diff(loss, 2)[0]  # while the well itself is wider


@given(seed=st.integers(0, 10**6), m=st.integers(2, 6))
@settings(max_examples=40, deadline=None)
def test_occupation_is_the_stationary_state_of_the_chain(seed, m):
    rng = np.random.default_rng(seed)
    rates = np.exp(rng.normal(size=(m, m)) * 3)
    share = paths.minima_occupation(rates)
    assert share.sum() == pytest.approx(1)
    np.fill_diagonal(rates, 0)
    np.testing.assert_allclose(share @ rates, share * rates.sum(axis=1), rtol=1e-9)
    if m == 2:
        np.testing.assert_allclose(share, paths.minima_occupation_published(1 / rates.sum(axis=1)))


def test_rates_of_many_decades_and_of_several_paths():
    share = paths.minima_occupation([[0, 1e-300, 0], [1e-10, 0, 1e-200], [0, 1e-5, 0]])
    np.testing.assert_allclose(share, [1, 1e-290, 1e-290 * 1e-195], rtol=1e-9, atol=0)
    assert paths.total_rate(np.full(10, 0.3)) == pytest.approx(3)
    # three valleys in a row: the published share is not the stationary one
    chain = np.array([[0, 1.0, 0], [0.5, 0, 0.5], [0, 1.0, 0]])
    np.testing.assert_allclose(paths.minima_occupation(chain), [0.25, 0.5, 0.25])
    np.testing.assert_allclose(paths.minima_occupation_published([1, 1, 1]), 1 / 3)


def test_cauchy_exit_is_that_of_replicas():
    rng, eps, dt = np.random.default_rng(3), 0.01, 0.02
    x, steps, alive = np.zeros(1200), np.zeros(1200), np.arange(1200)
    for k in range(1, 10**6):
        x = x - x * dt + eps * dt * rng.standard_cauchy(x.size)
        out = np.abs(x) >= 1
        steps[alive[out]] = k
        x, alive = x[~out], alive[~out]
        if alive.size == 0:
            break
    exact = heavy_tails.levy_exit_time(1.0, eps, 1.0)
    # standard error 2.9%, plus corrections of the order of eps ln(1/eps) = 5%
    assert steps.mean() * dt == pytest.approx(float(exact), rel=0.15)


@given(alpha=st.floats(0.05, 1.99), a=st.floats(0.01, 100), eps=st.floats(1e-6, 1))
@settings(max_examples=60, deadline=None)
def test_levy_exit_scales_as_a_power_of_the_width(alpha, a, eps):
    one = heavy_tails.levy_exit_time(a, eps, alpha)
    assert heavy_tails.levy_exit_time(2 * a, eps, alpha) == pytest.approx(2**alpha * one)
    assert heavy_tails.levy_exit_time(a, eps, alpha, right_width=np.inf) == pytest.approx(2 * one)
    assert heavy_tails.levy_jump_constant(alpha) > 0


def test_bad_input_is_refused_with_the_reason():
    sgd = SGD(lr=0.1, batch_size=1)
    with pytest.raises(DataError, match="loss ratios > 1"):
        power_law.linear_barrier_passage_time(sgd, 1.0, 1.0)
    with pytest.raises(DataError, match="dimension"):
        power_law.mean_first_passage_time(sgd, 1.0, 2.0, 0)
    with pytest.raises(DataError, match="interpretation"):
        power_law.stationary_exponent(sgd, 1.0, "other")  # type: ignore[arg-type]
    with pytest.raises(TooShortError):
        power_law.estimate_exponent([1.0])
    with pytest.raises(DataError, match="negative"):
        power_law.estimate_exponent([-1.0, 1.0])
    with pytest.raises(UnstableError, match="normalised"):
        power_law.power_law_density(0.0, 1.0, 2)
    with pytest.raises(DataError, match="Gaussian"):
        heavy_tails.levy_exit_time(1.0, 0.1, 2.0)
    with pytest.raises(DataError, match="tail index"):
        heavy_tails.levy_jump_constant(2.5)
    with pytest.raises(DataError, match="rates"):
        paths.total_rate([-1.0])
    with pytest.raises(DataError, match="never left"):
        paths.minima_occupation([[0.0, 1.0], [0.0, 0.0]])
    with pytest.raises(DataError, match="k is"):
        paths.sharpness_rescaled(sgd, 0.0)
    with pytest.raises(DataError):
        power_law.quadratic_noise_exponent(0.1, 1.0, -1.0)
