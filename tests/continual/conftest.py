"""Small tasks whose loss is known in closed form, and small networks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn


def regression(seed: int, n: int = 30, d: int = 5, outputs: int = 1) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    X = torch.randn(n, d, generator=random, dtype=torch.float64)
    return X, torch.randn(n, outputs, generator=random, dtype=torch.float64)


def least_squares(*tasks: tuple[Tensor, Tensor]) -> Tensor:
    """Weights [d] that minimise the sum of the tasks' mean squared errors."""
    A = sum(X.T @ X / len(X) for X, _ in tasks)
    b = sum(X.T @ y / len(X) for X, y in tasks)
    return torch.linalg.solve(A, b)[:, 0]


def linear(d: int = 5, outputs: int = 1) -> nn.Linear:
    return nn.Linear(d, outputs, bias=False).double()


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


@pytest.fixture
def blobs() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    return torch.randn(40, 4, generator=random, dtype=torch.float64), torch.randint(3, (40,), generator=random)
