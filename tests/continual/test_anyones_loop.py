"""Networks and optimizers as people have them: tied weights, batch norm, recurrent nets; AdamW, momentum, loaders."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.utils.data import DataLoader, TensorDataset

from thermograd import Problem
from thermograd.continual import EWC, Constraint, L2ToAnchor, LandscapeConstraint, LayerLandscape, SynapticIntelligence
from thermograd.errors import InputError
from thermograd.landscape import gauss_newton

LOSS = nn.CrossEntropyLoss()


class Tied(nn.Module):
    """One matrix used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.view(-1, 2, 4))[0][:, -1])


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.1), nn.Linear(6, 4))


def convolution() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 2, 4)), nn.Conv2d(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))


NETWORKS: list[Callable[[], nn.Module]] = [Tied, Recurrent, normalised, convolution]
MAKERS: list[Callable[[], Constraint]] = [
    lambda: EWC(100.0),
    lambda: LayerLandscape(100.0, temperature=math.inf),
    lambda: LandscapeConstraint(10.0, rank=4),
    lambda: SynapticIntelligence(1.0),
    lambda: L2ToAnchor(1.0),
]
OPTIMIZERS: list[Callable[..., torch.optim.Optimizer]] = [
    lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-3),
]


def samples(seed: int, n: int = 60) -> tuple[Tensor, Tensor]:
    X = torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))
    return X, X[:, seed : seed + 4].argmax(1)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("optimize", OPTIMIZERS)
def test_two_tasks_from_loaders_in_single_precision(network: Any, make: Any, optimize: Any, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, constraint = network(), make()
    optimizer = optimize(model.parameters())
    for seed in (0, 1):
        loader = DataLoader(TensorDataset(*samples(seed)), batch_size=20, shuffle=True)
        watched = constraint.watch(model, optimizer) if isinstance(constraint, SynapticIntelligence) else nullcontext()
        with watched:
            for _ in range(3):
                for x, y in loader:
                    optimizer.zero_grad()
                    LOSS(model(x), y).backward()
                    optimizer.step()
                    constraint.proximal_step(model, optimizer)
        constraint.fit(model, LOSS, loader)
    assert constraint.tasks == 2
    assert model.training  # as it was before the measurement
    before = constraint.penalty(model).item()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5)
    after = constraint.penalty(model).item()
    assert math.isfinite(before)
    assert after > before
    torch.save(constraint.state_dict(), tmp_path / "state.pt")
    again = make()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.penalty(model).item() == pytest.approx(after)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_curvature_held_is_that_of_the_whole_network(network: Any) -> None:
    """Its trace is that of J^T (diag p - p p^T) J, with every use of a shared weight."""
    torch.manual_seed(0)
    model = network().double().eval()
    X, y = samples(0, 30)
    X = X.double()
    parameters = dict(model.named_parameters())
    jacobians = jacrev(lambda q: functional_call(model, q, (X,)))(parameters)
    p = model(X).softmax(1).detach()[:, :, None]
    exact = 0.0
    for J in jacobians.values():
        rows = J.detach().flatten(2)  # [n, C, P_l]
        exact += float((p * rows**2).sum() - ((p * rows).sum(1) ** 2).sum()) / len(X)
    assert EWC().fit(model, LOSS, (X, y)).form.curvature.sum().item() == pytest.approx(exact)  # type: ignore[attr-defined]
    whole = LayerLandscape(memory_per_weight=None).fit(model, LOSS, (X, y)).form
    held = sum(float(part.curvature.sum()) for _, part in whole.parts.values())  # type: ignore[attr-defined]
    assert held == pytest.approx(exact)


class Sequences(nn.Module):
    """Outputs at every position, [n, C, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gru, self.head = nn.Embedding(7, 4), nn.GRU(4, 4, batch_first=True), nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.embed(x))[0]).transpose(1, 2)


def test_outputs_at_every_position_by_labels_drawn_from_the_model() -> None:
    torch.manual_seed(0)
    model, x = Sequences().double(), torch.randint(0, 7, (20, 4))
    problem = Problem(model, LOSS, (x, x.flip(0)))
    exact = gauss_newton(problem).dense()
    ewc = EWC(draws=40).fit(problem).form.curvature  # type: ignore[attr-defined]
    error = (ewc - exact.diagonal()).norm() / exact.diagonal().norm()
    assert float(error) < 5 / math.sqrt(20 * 40)
    few = EWC(draws=2).fit(problem).form.curvature  # type: ignore[attr-defined]
    whole = LayerLandscape(draws=2, memory_per_weight=None).fit(problem).form
    held = sum(float(part.curvature.sum()) for _, part in whole.parts.values())  # type: ignore[attr-defined]
    assert held == pytest.approx(float(few.sum()))  # the same labels
    with pytest.raises(InputError, match="draws=1"):
        EWC().fit(problem)
