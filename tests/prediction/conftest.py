"""A linear regression with known truth, trained by an ordinary loop and recorded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import thermograd as tg
from thermograd.minibatches import Minibatches


class Line(torch.nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.w = torch.nn.Parameter(weights)

    def forward(self, x):
        return x @ self.w


def half_square(output, target):
    return 0.5 * (output - target) ** 2


@dataclass(frozen=True)
class Regression:
    folder: Path
    problem: tg.Problem
    X: np.ndarray
    y: np.ndarray
    sgd: tg.SGD


@pytest.fixture(scope="session")
def train_line():
    """Train linear regression by an ordinary loop, one batch after the other, and record all steps."""

    def train(folder, X, y, *, lr, batch, steps, momentum=0.0, weight_decay=0.0, start=None):
        inputs, targets = torch.as_tensor(X), torch.as_tensor(y)
        model = Line(torch.zeros(X.shape[1], dtype=torch.float64) if start is None else start)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
        problem = tg.Problem(model, half_square, (inputs, targets))
        batches = Minibatches(len(X), batch, "reshuffle", 1)
        with tg.Recorder(folder, problem, optimizer, batch_size=batch, sampling="reshuffle"):
            for _ in range(steps):
                index = next(batches)
                optimizer.zero_grad()
                half_square(model(inputs[index]), targets[index]).mean().backward()
                optimizer.step()
        return problem

    return train


def solution(X, y, weight_decay):
    """Where regression with weight decay has its minimum."""
    inputs, targets = torch.as_tensor(X), torch.as_tensor(y)
    hessian = inputs.T @ inputs / len(X) + weight_decay * torch.eye(X.shape[1])
    return torch.linalg.solve(hessian, inputs.T @ targets / len(X))


@pytest.fixture(scope="session")
def regression(tmp_path_factory, train_line):
    rng = np.random.default_rng(4)
    N, d = 160, 5
    X = rng.standard_normal((N, d)) * np.geomspace(1, 0.3, d)
    y = X @ rng.standard_normal(d) + 0.5 * rng.standard_normal(N)
    sgd = tg.SGD(lr=0.05, momentum=0.6, weight_decay=0.02, batch_size=8, dataset_size=N, sampling="reshuffle")
    folder = tmp_path_factory.mktemp("regression") / "run"
    problem = train_line(
        folder, X, y, lr=0.05, momentum=0.6, weight_decay=0.02, batch=8, steps=4000, start=solution(X, y, 0.02)
    )
    return Regression(folder, problem, X, y, sgd)


@pytest.fixture(scope="session")
def noisy_regression(tmp_path_factory, train_line):
    """Inputs with heavy tails, so that much of the gradient noise is made by the spread of the weights."""
    rng = np.random.default_rng(11)
    N, d = 200, 6
    X = rng.standard_normal((N, d)) * np.geomspace(1.5, 0.3, d) * (0.3 + rng.exponential(1, (N, 1)))
    y = X @ rng.standard_normal(d) + 0.5 * rng.standard_normal(N)
    sgd = tg.SGD(lr=0.007, momentum=0.9, weight_decay=0.01, batch_size=10, dataset_size=N, sampling="reshuffle")
    folder = tmp_path_factory.mktemp("noisy") / "run"
    problem = train_line(
        folder, X, y, lr=0.007, momentum=0.9, weight_decay=0.01, batch=10, steps=3000, start=solution(X, y, 0.01)
    )
    return Regression(folder, problem, X, y, sgd)
