"""The rate of a proximal step for each form of SGD, and work that was done against the loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from thermograd.continual import L2ToAnchor, SynapticIntelligence

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
