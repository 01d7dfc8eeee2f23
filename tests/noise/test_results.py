"""Every result of the two rooms becomes a dataset with units and a picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import thermograd as tg
from landscape.networks import teacher
from thermograd import landscape, noise

PROBLEM = teacher(samples=40, hidden=4)
DIRECTIONS = torch.eye(PROBLEM.P).double()[:, :3]


def _online() -> noise.OnlineScale:
    scale = noise.OnlineNoiseScale(batch_size=10)
    for i in range(4):
        scale.update([PROBLEM.gradient(index=slice(10 * j, 10 * j + 10)) * (1 + i) for j in range(4)])
    return scale.result()


RESULTS: dict[str, Callable[[], Any]] = {
    "eigenpairs": lambda: landscape.eigenpairs(landscape.hessian(PROBLEM), 3, which="BE"),
    "trace": lambda: landscape.trace(landscape.hessian(PROBLEM), probes=12),
    "trace_of_square": lambda: landscape.trace_of_square(landscape.gauss_newton(PROBLEM), probes=12),
    "diagonal": lambda: landscape.diagonal(landscape.hessian(PROBLEM), probes=12),
    "spectral_density": lambda: landscape.spectral_density(landscape.hessian(PROBLEM), probes=2, steps=4),
    "effective_dimension": lambda: landscape.effective_dimension([3.0, 1.0]),
    "subspace_overlap": lambda: landscape.subspace_overlap(DIRECTIONS, DIRECTIONS),
    "loss_along": lambda: landscape.loss_along(PROBLEM, DIRECTIONS, np.linspace(-1, 1, 3)),
    "flatness": lambda: landscape.flatness(PROBLEM, DIRECTIONS),
    "in_directions": lambda: noise.in_directions(PROBLEM, DIRECTIONS),
    "in_basis": lambda: noise.in_basis(PROBLEM, DIRECTIONS),
    "strength": lambda: noise.strength(PROBLEM),
    "noise_scale": lambda: noise.noise_scale(PROBLEM),
    "strength_along": lambda: noise.strength_along(PROBLEM, PROBLEM.theta * torch.tensor([[0.5], [1.0], [1.5]])),
    "decoupling": lambda: noise.decoupling(PROBLEM),
    "covariance_spectrum": lambda: noise.covariance_spectrum(PROBLEM, n=30),
    "epoch_autocovariance": lambda: noise.epoch_autocovariance(PROBLEM, DIRECTIONS, batch_size=8, epochs=40),
    "gaussianity": lambda: noise.gaussianity(PROBLEM, DIRECTIONS, batch_size=8, batches=100),
    "online": lambda: _online(),
    "alignment": lambda: noise.alignment(PROBLEM, k=8),
    "minibatch_losses": lambda: noise.minibatch_losses(PROBLEM, DIRECTIONS, [-0.1, 0.1], batch_size=5, batches=4),
}


@pytest.mark.parametrize("name", sorted(RESULTS))
def test_dataset_and_picture(name: str) -> None:
    result = RESULTS[name]()
    dataset = result.to_xarray()
    assert dataset.attrs["measurement"] == type(result).__name__
    assert all(np.asarray(v).dtype != object for v in dataset.variables.values())
    assert all("units" in v.attrs for v in dataset.variables.values())
    np.testing.assert_array_equal(np.asarray(result), np.asarray(dataset[result._primary]))
    axes = result.plot()
    axes.figure.canvas.draw()
    assert result.plot(axes) is axes


def test_names_promised_to_users() -> None:
    for room in (tg.landscape, tg.noise):
        for name in room.__all__:
            assert getattr(room, name).__doc__
    assert callable(tg.noise.covariance)
    assert callable(tg.landscape.flatness)
