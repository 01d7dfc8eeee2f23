"""Noise over steps and over minibatches, on data whose answer is known.

Statistical tests compare at 4.5 standard errors (false alarm 7e-6 each for Gaussian errors); seeds are fixed.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import thermograd as tg
from landscape.networks import make, teacher
from thermograd.errors import InputError, NonFiniteError, TooShortError
from thermograd.noise import (
    OnlineNoiseScale,
    epoch_autocovariance,
    gaussianity,
    gaussianity_of,
    in_directions,
    noise_scale,
)

# ---------------------------------------------------------------------- the noise scale while training


@pytest.mark.parametrize("sizes", [(4, 4, 4), (1, 3, 8), (6, 6)])
@pytest.mark.parametrize("replacement", [True, False])
def test_single_steps_are_unbiased(sizes: tuple[int, ...], replacement: bool) -> None:
    problem = teacher(samples=40, hidden=3)
    G = problem.sample_gradients().numpy()
    truth = noise_scale(problem)
    random = np.random.default_rng(0)
    scale = OnlineNoiseScale(dataset_size=None if replacement else problem.N)
    found = []
    for _ in range(4000):
        chosen = random.choice(problem.N, sum(sizes), replace=replacement)
        parts = np.split(chosen, np.cumsum(sizes)[:-1])
        found.append(scale.update([G[part].mean(0) for part in parts], sizes))
    strength, square = np.array(found).T
    assert abs(strength.mean() - truth.strength) < 4.5 * strength.std() / math.sqrt(4000)
    assert abs(square.mean() - truth.gradient_square) < 4.5 * square.std() / math.sqrt(4000)
    result = scale.result()
    assert len(scale) == result.steps == 4000
    assert result.strength_stderr == pytest.approx(strength.std() / math.sqrt(4000), rel=0.6)
    # bias of a ratio: the relative error squared
    assert abs(result.noise_scale - truth.simple) < 4.5 * result.stderr + truth.simple * 0.02


def test_errors_cover_the_truth() -> None:
    random = np.random.default_rng(1)
    scores = []
    for _ in range(150):
        scale = OnlineNoiseScale(batch_size=5)
        for _ in range(200):
            scale.update(list(1 + random.standard_normal((4, 5, 6)).mean(1)))  # Tr C = |g|^2 = 6
        result = scale.result()
        scores.append((result.noise_scale - 1) / result.stderr)
    # Student with 19 degrees of freedom: standard deviation 1.06, its own error 0.06
    assert 0.75 < np.std(scores) < 1.4
    assert abs(np.mean(scores)) < 4.5 / math.sqrt(150) + 0.1


def test_gradient_accumulation_in_a_loop() -> None:
    case = make("mlp-mse")
    model, problem = case.model, case.problem()
    scale = OnlineNoiseScale(dataset_size=problem.N)
    for part in (slice(0, 5), slice(5, 14)):
        model.zero_grad()
        case.loss(model(case.X[part]), case.y[part]).backward()
        scale.add(model.parameters(), size=len(case.X[part]))
    scale.step()
    direct = OnlineNoiseScale(dataset_size=problem.N)
    direct.update([problem.gradient(index=part) for part in (slice(0, 5), slice(5, 14))], [5, 9])
    assert scale.result().strength == pytest.approx(direct.result().strength, rel=1e-10)
    assert scale.result().gradient_square == pytest.approx(float(problem.gradient().square().sum()), rel=1e-10)


def test_what_the_scale_refuses() -> None:
    scale = OnlineNoiseScale(batch_size=2)
    with pytest.raises(TooShortError):
        scale.result()
    with pytest.raises(InputError, match="two microbatches"):
        scale.update([torch.ones(3)])
    with pytest.raises(NonFiniteError, match="microbatch 0 at step 0"):
        scale.update([torch.tensor([math.nan]), torch.ones(1)])
    with pytest.raises(InputError, match="batch_size"):
        OnlineNoiseScale().update([torch.ones(1), torch.ones(1)])
    for _ in range(40):
        scale.update([torch.tensor([1.0]), torch.tensor([-1.0])])
    assert not scale.result().resolved


# ---------------------------------------------------------------------- over an epoch


@pytest.mark.parametrize("sampling", ["replacement", "reshuffle", "shuffle-once"])
@pytest.mark.parametrize("batch_size", [10, 9])
def test_autocovariance_is_the_closed_form(sampling: str, batch_size: int) -> None:
    problem = teacher(samples=60, hidden=3)
    D = torch.eye(problem.P).double()[:, :2]
    found = epoch_autocovariance(problem, D, batch_size, sampling=sampling, epochs=4000)  # type: ignore[arg-type]
    assert found.steps_per_epoch == 6
    z = (found.autocovariance - found.expected) / found.stderr
    assert np.abs(z).max() < 7.5  # Student with 19 degrees of freedom, 26 values: false alarm 1e-5
    variance = in_directions(problem, D).variance
    same = 1.0 if sampling == "replacement" else (60 - batch_size) / 59
    np.testing.assert_allclose(found.expected[0], variance / batch_size * same, rtol=1e-10)
    if batch_size == 10 and sampling != "replacement":
        assert (found.epoch_sum < 1e-20).all()  # an epoch uses every sample once
        series = found.expected[:6, 0] * np.array([6, 10, 8, 6, 4, 2]) / 6
        if sampling == "reshuffle":
            weights = np.array([6, 2 * 6, 2 * 6, 2 * 6, 2 * 6, 2 * 6])  # the closed form holds (M - h)/M already
            assert abs((found.expected[:6, 0] * weights).sum()) < 1e-12 * abs(series).max()


def test_what_an_epoch_refuses() -> None:
    problem = teacher(samples=20, hidden=2)
    with pytest.raises(InputError, match="batch_size"):
        epoch_autocovariance(problem, torch.ones(problem.P), 15)
    with pytest.raises(InputError, match="sampling"):
        epoch_autocovariance(problem, torch.ones(problem.P), 5, sampling="sometimes")  # type: ignore[arg-type]


# ---------------------------------------------------------------------- Gaussianity


def test_p_values_of_gaussian_noise_are_uniform() -> None:
    random = np.random.default_rng(0)
    found = gaussianity_of(random.standard_normal((120, 800)))
    for p in (found.anderson_darling_p, found.shapiro_p):
        for level in (0.05, 0.25, 0.5):  # 4.5 binomial errors, and 0.02 for the fits behind the p-values
            assert abs((p < level).mean() - level) < 4.5 * math.sqrt(level * (1 - level) / 800) + 0.02
    assert (found.skewness / found.skewness_stderr).std() == pytest.approx(1, abs=4.5 / math.sqrt(1600))
    assert (found.excess_kurtosis / found.excess_kurtosis_stderr).std() == pytest.approx(1, abs=0.25)


def test_tails_are_told_apart() -> None:
    random = np.random.default_rng(1)
    heavy = gaussianity_of(random.standard_t(1.5, size=20000))
    assert heavy.tail_low[0] < 1.5 < heavy.tail_high[0] * 1.1
    assert heavy.tail_high[0] < 2
    assert heavy.anderson_darling_p[0] < 1e-6
    thin = gaussianity_of(random.standard_normal(20000))
    assert thin.tail_low[0] < thin.gaussian_tail_index < thin.tail_high[0]
    assert thin.tail_index[0] > 4


def test_larger_batches_are_more_gaussian() -> None:
    data = torch.as_tensor(np.random.default_rng(0).exponential(size=(4000, 1)))  # skewness 2, excess kurtosis 6
    problem = tg.Problem.from_function(lambda w, a: (a * w).sum(), torch.ones(1), data)
    for size in (1, 16, 400):
        found = gaussianity(problem, torch.ones(1), batch_size=size, batches=4000)
        # the error of the skewness of what is itself skewed: about twice the Gaussian one and less for sums
        assert abs(found.skewness[0] - 2 / math.sqrt(size)) < 9 * found.skewness_stderr[0]
    assert found.anderson_darling_p[0] > 1e-4
    samples = gaussianity(problem, torch.ones(1), batch_size=1, batches=0)
    assert samples.batches == 4000
    assert samples.anderson_darling_p[0] < 1e-6


def test_what_gaussianity_refuses() -> None:
    with pytest.raises(TooShortError):
        gaussianity_of(np.arange(5.0))
    with pytest.raises(InputError, match="no noise"):
        gaussianity_of(np.ones(50))
    with pytest.raises(InputError, match="finite"):
        gaussianity_of([math.nan] * 50)
