"""The linearised way against dense matrices, and the ways it may not be taken."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import thermograd as tg
from thermograd.errors import NonFiniteError, NotAvailableError
from thermograd.landscape import engine, gauss_newton, hessian
from thermograd.landscape.linearised import NotLinearisableError, linearise

from .networks import NAMES, make
from .test_curvature import dense_gauss_newton, dense_hessian, relative


@pytest.fixture
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the comparison with the reverse way, which costs a trace of its own: here the truth is known."""
    monkeypatch.setattr(engine.Engine, "agrees", lambda self, reverse, within: True)


@pytest.mark.usefixtures("_unchecked")
@pytest.mark.parametrize("name", NAMES)
def test_linearised_products_equal_the_dense_matrices(name: str) -> None:
    case = make(name)
    problem, single = case.problem(), case.problem(dtype=torch.float32)
    block = torch.randn(problem.P, 3)
    truths = {hessian: dense_hessian(case, problem), gauss_newton: dense_gauss_newton(case, problem)}
    for operator, true in truths.items():
        found = operator(problem, method="linearised")
        assert relative(found @ block.double(), true @ block.double()) < 1e-10
        assert found.method == "linearised"
    found = hessian(single, method="linearised")
    assert relative((found @ block).double(), truths[hessian] @ block.double()) < 1e-5


def test_a_stopped_gradient_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv1d(3, 4, 1), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.tanh(self.one(x[:, :, None])).flatten(1)
            return self.two(h * h.detach())

    monkeypatch.setattr(engine, "_WORTH", 0)
    torch.manual_seed(0)
    problem = tg.Problem(Stopped(), nn.MSELoss(), (torch.randn(9, 3), torch.randn(9, 2)))
    H = hessian(problem)
    block = torch.randn(problem.P, 2, dtype=torch.float64)
    torch.testing.assert_close(H @ block, hessian(problem, method="reverse") @ block)
    assert H.method == "reverse"


def test_control_flow_on_the_data_goes_the_reverse_way(monkeypatch: pytest.MonkeyPatch) -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(3, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.conv(x[:, :, None]).flatten(1)
            return out.square() if len(x) == 1 and bool(x.sum() > 0) else torch.where(x.sum(1, True) > 0, out**2, out)

    monkeypatch.setattr(engine, "_WORTH", 0)
    torch.manual_seed(0)
    problem = tg.Problem(Branch(), nn.MSELoss(), (torch.randn(9, 3), torch.randn(9, 2)), chunk_size=1)
    H = hessian(problem)
    torch.testing.assert_close(H.dense(), hessian(problem, method="reverse").dense())
    assert H.method == "reverse"
    with pytest.raises(NotAvailableError):
        hessian(problem, method="linearised").dense()


@pytest.mark.usefixtures("_unchecked")
@pytest.mark.parametrize("name", ["mlp-mse", "cnn-maxpool", "transformer"])
def test_chunks_blocks_and_forgetting_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(name)
    block = torch.randn(case.problem().P, 5, dtype=torch.float64)
    whole = hessian(case.problem(chunk_size=None), method="linearised") @ block
    problem = case.problem(chunk_size=5)
    assert relative(hessian(problem, method="linearised") @ block, whole) < 1e-12
    monkeypatch.setattr(engine, "_KEPT_SHARE", 2**80)
    monkeypatch.setattr(engine, "_MOST_VECTORS", 3)
    forgetful = hessian(problem, method="linearised")
    for _ in range(2):
        assert relative(forgetful @ block, whole) < 1e-12
    assert forgetful._engine is not None
    assert not forgetful._engine._keep


def test_running_out_of_memory_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make("mlp-mse").problem(chunk_size=None)
    H = hessian(problem, method="linearised")
    true = hessian(problem, method="reverse").dense()
    push = engine.Linearised.__call__

    def small(self: engine.Linearised, tangents: torch.Tensor) -> torch.Tensor:
        if len(tangents) * self.others[0].numel() > 10:
            raise torch.OutOfMemoryError("out of memory")
        return push(self, tangents)

    monkeypatch.setattr(engine.Linearised, "__call__", small)
    assert relative(H.dense(), true) < 1e-12
    assert H._engine is not None
    assert H._engine.width == 1
    assert H._engine.chunk <= 10


def test_changes_of_frozen_parts_are_seen() -> None:
    case = make("frozen")
    problem = case.problem()
    H = hessian(problem, method="linearised")
    before = H.dense()
    with torch.no_grad():
        case.model[2].weight.mul_(2.0)
    after = H.dense()
    assert relative(after, hessian(problem, method="reverse").dense()) < 1e-13
    assert relative(after, before) > 1e-3


def test_a_loss_that_is_not_finite_is_named() -> None:
    X = torch.randn(20, 3).double()
    model = nn.Linear(3, 2).double()
    problem = tg.Problem(model, nn.MSELoss(), (X, torch.zeros(20, 2).double()))
    theta = problem.theta.clone()
    X[7] = torch.inf
    with pytest.raises(NonFiniteError, match="sample 7"):
        hessian(problem, theta, method="linearised") @ torch.ones(problem.P)


def test_linearise_refuses_what_it_cannot_do() -> None:
    with pytest.raises(NotLinearisableError):
        linearise(lambda x: (x * float(x.sum()),), torch.ones(3))
    constant = linearise(lambda x: (torch.ones_like(x),), torch.ones(3))
    assert float(constant(torch.eye(3)).abs().max()) == 0


def test_the_linearised_way_is_for_large_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not engine.worth_tracing(make("cnn-maxpool").problem(), 14, 20)
    monkeypatch.setattr(engine, "_WORTH", 0)
    assert engine.worth_tracing(make("cnn-maxpool").problem(), 14, 1)
    assert not engine.worth_tracing(make("mlp-mse").problem(), 14, 1)
    assert engine.worth_tracing(make("mlp-mse").problem(), 14, 20)
