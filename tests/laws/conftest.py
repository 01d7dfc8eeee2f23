"""Recorded runs of quadratic problems whose noise is known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import thermograd as tg


@dataclass(frozen=True)
class Quadratic:
    """l_i = (w - a_i) H (w - a_i) / 2 with diagonal H: curvature h, per-sample noise C_ii = h_i^2 Var(a_i), exactly."""

    path: Path
    problem: tg.Problem
    curvature: torch.Tensor
    noise: torch.Tensor
    sgd: tg.SGD


def record(path, exponent, sampling="replacement", *, drift=0.0, steps=6000, d=24, seed=0, weight_decay=0.0):
    """Train a quadratic whose noise is C = H^exponent, and record it."""
    generator = torch.Generator().manual_seed(seed)
    size, batch, lr, momentum = 400, 10, 0.1, 0.5
    h = torch.logspace(0, -2, d, dtype=torch.float64)
    a = torch.randn(size, d, generator=generator, dtype=torch.float64)
    a = (a - a.mean(0)) / a.std(0, correction=0) * h ** (exponent / 2 - 1)
    theta = torch.zeros(d, dtype=torch.float64, requires_grad=True)
    problem = tg.Problem.from_function(lambda w, x: 0.5 * ((w - x) * h * (w - x)).sum(), theta, a)
    optimizer = torch.optim.SGD([theta], lr=lr, momentum=momentum, weight_decay=weight_decay)

    def batches(count):
        done = 0
        while done < count:
            if sampling == "replacement":
                yield torch.randint(0, size, (batch,), generator=generator)
                done += 1
                continue
            for part in torch.randperm(size, generator=generator).split(batch):
                yield part
                done += 1

    def step(index):
        theta.grad = h * (theta.detach() - a[index].mean(0)) - drift
        optimizer.step()

    for index in batches(2000):  # several relaxation times of the flattest mode
        step(index)
    with tg.Recorder(path, problem, optimizer, batch_size=batch, sampling=sampling):
        for index in batches(steps):
            step(index)
    sgd = tg.SGD(lr, momentum, weight_decay, batch, size, sampling)
    return Quadratic(Path(path), problem, h, h**exponent, sgd)


@pytest.fixture(scope="session")
def aligned(tmp_path_factory):
    return record(tmp_path_factory.mktemp("runs") / "aligned", exponent=1.0)


@pytest.fixture(scope="session")
def isotropic(tmp_path_factory):
    return record(tmp_path_factory.mktemp("runs") / "isotropic", exponent=0.0)


@pytest.fixture(scope="session")
def reshuffled(tmp_path_factory):
    return record(tmp_path_factory.mktemp("runs") / "reshuffled", exponent=2.0, sampling="reshuffle")
