"""Rates of proximal steps for each form of SGD, work against the loss, what bounded memory keeps and leaves out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import thermograd as tg
from thermograd.continual import L2ToAnchor, LandscapeConstraint, RandomDirections, SynapticIntelligence
from thermograd.continual.curvature import output_scores
from thermograd.continual.forms import LowRank

LOSS = nn.MSELoss()


def line() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    random = torch.Generator().manual_seed(0)
    X = torch.randn(20, 2, generator=random, dtype=torch.float64)
    model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, -0.3]]))
    return model, (X, X.sum(1, keepdim=True))


@pytest.mark.parametrize(
    "sgd",
    [
        {"lr": 0.05},
        {"lr": 0.05, "momentum": 0.8},
        {"lr": 0.05, "momentum": 0.8, "dampening": 0.6},
        {"lr": 0.05, "momentum": 0.8, "nesterov": True},
    ],
    ids=str,
)
def test_sgd_with_proximal_steps_rests_where_loss_plus_penalty_do(sgd: dict[str, float]) -> None:
    """For a quadratic loss the fixed point of both steps is known: the gradient of their sum vanishes there."""
    model, (X, y) = line()
    held = L2ToAnchor(strength=0.7).fit(model, LOSS, (X, y))
    anchor = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), **sgd)
    for _ in range(3000):
        optimizer.zero_grad()
        LOSS(model(X), y).backward()
        optimizer.step()
        held.proximal_step(model, optimizer)
    hessian = 2 * X.T @ X / len(X)
    exact = torch.linalg.solve(hessian + 0.7 * torch.eye(2), 2 * X.T @ y / len(X) + 0.7 * anchor.T)
    torch.testing.assert_close(model.weight.detach().T, exact, rtol=1e-6, atol=1e-8)


def test_weights_that_worked_against_the_loss_are_not_held() -> None:
    model, data = line()
    worked = {}
    for maximise in (False, True):
        si = SynapticIntelligence()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, maximize=maximise)
        with si.watch(model, optimizer):
            for _ in range(3):
                optimizer.zero_grad()
                LOSS(model(data[0]), data[1]).backward()
                optimizer.step()
        worked[maximise] = si.fit(model, LOSS, data).form.curvature
    assert (worked[False] > 0).all()
    assert (worked[True] == 0).all()


def test_the_bound_on_what_a_sum_leaves_out_is_met_and_tight() -> None:
    random = torch.Generator().manual_seed(1)

    def form(scale: float) -> LowRank:
        directions = torch.linalg.qr(torch.randn(8, 3, generator=random, dtype=torch.float64)).Q
        return LowRank(
            directions, scale * torch.tensor([9.0, 7.0, 4.0], dtype=torch.float64), torch.zeros(3).double(), 3
        )

    def matrix(of: LowRank) -> torch.Tensor:
        return of.directions * of.curvature @ of.directions.T

    for scale in (1.0, 0.01):
        one, other, third = form(scale), form(scale), form(scale)
        both = one.plus(other)
        left = torch.linalg.eigvalsh(matrix(one) + matrix(other) - matrix(both))
        assert left.min() > -1e-12
        assert left.max().item() == pytest.approx(both.dropped, rel=1e-9)
        every = both.plus(third)
        left = torch.linalg.eigvalsh(matrix(one) + matrix(other) + matrix(third) - matrix(every))
        assert -1e-12 < left.min() <= left.max() <= every.dropped * (1 + 1e-9)
        assert every.dropped < 2 * sum(f.curvature.max().item() for f in (one, other, third))


def test_coverage_keeps_as_few_directions_as_hold_the_share() -> None:
    curvature = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    X = torch.diag((2 * curvature).sqrt())  # of the mean squared error over four samples: 2 x x^T / 4
    model = nn.Linear(4, 1, bias=False, dtype=torch.float64)
    for share, kept in ((0.5, 1), (0.75, 2), (0.9, 3), (0.97, 4)):
        held = LandscapeConstraint(rank=4, weights="curvature", coverage=share)
        held.fit(model, LOSS, (X, torch.zeros(4, 1, dtype=torch.float64)))
        torch.testing.assert_close(held.form.curvature, curvature[:kept], rtol=1e-6, atol=1e-9)


def test_random_directions_of_each_task_are_its_own() -> None:
    model, data = line()
    held = RandomDirections(rank=1, capacity=2, weights="curvature")
    first = held.fit(model, LOSS, data).form.directions
    assert held.fit(model, LOSS, data).form.directions.shape == (2, 2)
    again = RandomDirections(rank=1, capacity=2, weights="curvature").fit(model, LOSS, data).form.directions
    torch.testing.assert_close(again, first)


@pytest.mark.parametrize("temperature", [1.0, 3.0, 1e4, math.inf])
def test_scores_at_a_temperature_are_those_of_labels_from_the_outputs_over_it(temperature: float) -> None:
    random = torch.Generator().manual_seed(2)
    X, y = torch.randn(6, 2, generator=random, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    model = nn.Linear(2, 3, dtype=torch.float64)
    with torch.no_grad():
        model.weight.mul_(4.0)
    problem = tg.Problem(model, nn.CrossEntropyLoss(), (X, y))
    scores = output_scores(problem, torch.arange(6), temperature)  # [m, n, C]
    p = (model(X) / temperature).softmax(1).detach()
    exact = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    torch.testing.assert_close(torch.einsum("mnc,mnd->ncd", scores, scores), exact, rtol=1e-6, atol=1e-9)
