"""Losses along directions and flatness, against closed forms and dense scans."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import thermograd as tg
from thermograd.errors import InputError, NonFiniteError
from thermograd.landscape import eigenpairs, flatness, hessian, loss_along

from .networks import make, teacher


def bowl(curvature: list[float], floor: float = 1.0) -> tg.Problem:
    h = torch.tensor(curvature, dtype=torch.float64)
    zeros = torch.zeros(2, len(h), dtype=torch.float64)
    return tg.Problem.from_function(
        lambda w, a: floor + 0.5 * (h * (w - a).square()).sum(), torch.zeros(len(h), dtype=torch.float64), zeros
    )


@pytest.mark.parametrize("name", ["mlp-mse", "cnn-maxpool", "batchnorm-eval", "transformer", "subset"])
def test_losses_are_those_of_displaced_weights(name: str) -> None:
    case = make(name)
    problem = case.problem(chunk_size=5)
    directions = torch.randn(problem.P, 2, generator=torch.Generator().manual_seed(0)).double()
    profile = loss_along(problem, directions, [-0.3, 0.0, 0.2])
    assert profile.losses.shape == profile.offsets.shape == (2, 3)
    for i in range(2):
        for j, offset in enumerate([-0.3, 0.0, 0.2]):
            true = case.mean_loss(problem, problem.theta + offset * directions[:, i])
            assert profile.losses[i, j] == pytest.approx(float(true.detach()), rel=1e-12)


def test_models_that_vmap_does_not_know() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.linear(x)
            return out if float(out.detach().sum()) > 0 else 1.0 * out  # .item() under vmap raises

    problem = tg.Problem(Stubborn(), nn.MSELoss(), (torch.randn(6, 2), torch.randn(6, 1)))
    direction = torch.ones(problem.P)
    found = loss_along(problem, direction, [0.0, 0.5, 1.0])
    assert found[0, 2] == pytest.approx(float(problem.loss(problem.theta + direction)), rel=1e-12)
    assert bool(flatness(problem, direction).crossed.all())


def test_offsets_for_each_direction_weight_decay_and_centre() -> None:
    problem = bowl([1.0, 4.0])
    theta = np.array([0.0, 1.0])
    found = loss_along(problem, np.eye(2), np.array([[0.0, 1.0], [0.0, 2.0]]), theta=theta, weight_decay=0.5)
    np.testing.assert_allclose(found.losses, [[3.25, 4.0], [3.25, 1 + 18 + 0.25 * 9]])
    assert found.plot().get_ylabel() == "loss"


@settings(max_examples=25, deadline=None)
@given(
    h=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=4),
    floor=st.floats(1e-8, 1e4),
    rise=st.floats(1.01, 50),
)
def test_parabola(h: list[float], floor: float, rise: float) -> None:
    found = flatness(bowl(h, floor), torch.eye(len(h)).double(), rise=rise, rtol=1e-6, max_width=1e12)
    half = np.sqrt(2 * (rise - 1) * floor / np.array(h))
    np.testing.assert_allclose(found.right, half, rtol=3e-6)
    np.testing.assert_allclose(found.left, -half, rtol=3e-6)
    np.testing.assert_allclose(found.flatness, 2 * half, rtol=3e-6)
    assert found.crossed.all()


def test_asymmetric_well() -> None:
    # Morse potential: 0.1 + (1 - exp(-x))^2 reaches 0.1 e at -ln(1 + s) and -ln(1 - s), s = sqrt(0.1 (e - 1))
    problem = tg.Problem.from_function(
        lambda w, a: 0.1 + (1 - torch.exp(-w - a)).square().sum(), torch.zeros(1).double(), torch.zeros(3, 1).double()
    )
    found = flatness(problem, torch.ones(1), rtol=1e-8)
    s = math.sqrt(0.1 * (math.e - 1))
    assert found.left[0] == pytest.approx(-math.log(1 + s), rel=1e-7)
    assert found.right[0] == pytest.approx(-math.log(1 - s), rel=1e-7)
    assert found.curvature[0] == pytest.approx(2.0, rel=0.05)


def test_a_plateau_is_not_crossed() -> None:
    # rises to the left only; to the right it levels off below e times the value at the centre
    problem = tg.Problem.from_function(
        lambda w, a: 1 + torch.where(w > 0, torch.tanh(w), w.square()).sum() + 0 * a.sum(),
        torch.zeros(1).double(),
        torch.zeros(3, 1).double(),
    )
    found = flatness(problem, torch.ones(1))
    assert found.left[0] == pytest.approx(-math.sqrt(math.e - 1), rel=1e-3)
    assert math.isinf(found.right[0])
    assert math.isinf(found.flatness[0])
    assert not found.crossed[0]


def test_a_direction_without_any_effect() -> None:
    problem = bowl([1.0, 0.0])
    found = flatness(problem, torch.eye(2))
    assert found.crossed.tolist() == [True, False]
    assert found.plot().get_ylabel() == "flatness F"


def test_overflow_on_the_way_is_not_a_crossing_missed() -> None:
    problem = tg.Problem.from_function(
        lambda w, a: 1 + torch.expm1(w.square()).sum() + 0 * a.sum(),
        torch.zeros(1).double(),
        torch.zeros(2, 1).double(),
    )
    found = flatness(problem, 100 * torch.ones(1))  # the first probe may already be far out
    assert found.right[0] == pytest.approx(math.sqrt(1) / 100, rel=1e-3)  # expm1(w^2) = e - 1 at w = 1


def test_nan_before_the_crossing_is_refused() -> None:
    problem = tg.Problem.from_function(
        lambda w, a: 1 + 1e-3 * (1 - w.square()).sqrt().sum() + 0 * a.sum(),
        torch.zeros(1).double(),
        torch.zeros(2, 1).double(),
    )
    with pytest.raises(NonFiniteError, match="NaN"):
        flatness(problem, torch.ones(1))


def test_network_crossings_are_on_the_level_and_nearest() -> None:
    problem = teacher(samples=80, hidden=10)
    pairs = eigenpairs(hessian(problem), 5)
    found = flatness(problem, pairs, rtol=1e-7)
    assert found.crossed.all()
    level = math.e * found.loss
    assert found.loss == pytest.approx(float(problem.loss()), rel=1e-14)
    for side in (found.left, found.right):
        at = loss_along(problem, pairs.eigenvectors, side[:, None]).losses[:, 0]
        np.testing.assert_allclose(at, level, rtol=1e-5)
        inside = loss_along(problem, pairs.eigenvectors, side[:, None] * np.linspace(0, 0.999, 60)).losses
        assert (inside < level).all()
    np.testing.assert_allclose(found.curvature, pairs.eigenvalues.numpy(), rtol=0.1)
    np.testing.assert_allclose(found.flatness / found.quadratic, 1, atol=0.5)


def test_flatness_scales_inversely_with_the_direction() -> None:
    problem = teacher(samples=40, hidden=4)
    direction = torch.randn(problem.P, generator=torch.Generator().manual_seed(1)).double()
    one, ten = flatness(problem, direction, rtol=1e-8), flatness(problem, 10 * direction, rtol=1e-8)
    np.testing.assert_allclose(one.flatness, 10 * ten.flatness, rtol=1e-7)


def test_bad_arguments() -> None:
    problem = bowl([1.0, 2.0])
    with pytest.raises(InputError, match="positive loss"):
        flatness(bowl([1.0], floor=0.0), torch.ones(1))
    with pytest.raises(InputError, match="transpose"):
        flatness(problem, torch.ones(5, 2))
    with pytest.raises(InputError, match="length zero"):
        loss_along(problem, torch.zeros(2), [0.0])
    with pytest.raises(InputError):
        flatness(problem, torch.eye(2), rise=1.0)
    with pytest.raises(InputError):
        loss_along(problem, torch.eye(2), np.zeros((3, 4)))
    with pytest.raises(NonFiniteError):
        loss_along(problem, torch.eye(2), [1e200])
