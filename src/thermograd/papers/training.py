"""Small networks brought to where a protocol begins: trained, settled at a minimum, and measured there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from .. import landscape, models, noise
from ..errors import NotAvailableError
from ..hyperparameters import SGD
from ..minibatches import Minibatches
from ..problem import Problem
from ..progress import bar, track
from ..simulate import networks
from .item import Bench

__all__ = [
    "Point",
    "pooled_images",
    "record_layer",
    "settle",
    "small_classifier",
    "surroundings",
    "train_down_to",
    "trained",
]

_Array = np.ndarray[Any, Any]


def pooled_images(bench: Bench, name: str, samples: int | None, pool: int) -> tuple[Tensor, Tensor]:
    """Images averaged over squares of ``pool`` pixels, centred and of unit variance, [N, C, H, W], and classes [N]."""
    images, labels = bench.data(name, samples)
    if images.ndim == 2:  # the digits come flat
        side = round(images.shape[1] ** 0.5)
        images = images.reshape(len(images), 1, side, side)
    images = torch.nn.functional.avg_pool2d(images, pool)
    return (images - images.mean(0)) / images.std(), labels


def small_classifier(inputs: Tensor, labels: Tensor, hidden: Sequence[int]) -> Problem:
    """A tanh network with cross-entropy; its weights are drawn where it is started."""
    network = models.mlp([inputs[0].numel(), *hidden, int(labels.max()) + 1], activation="tanh")
    return Problem(network, torch.nn.CrossEntropyLoss(), (inputs, labels))


def trained(problem: Problem, sgd: SGD, rates: Sequence[float], epochs: int, seed: int) -> Tensor:
    """Weights [P] after ``epochs`` at each of the learning rates, from fresh ones."""
    theta: Any = "fresh"
    for i, rate in enumerate(rates):
        steps = round(epochs * sgd.steps_per_epoch)
        theta = networks(problem, 1, steps, sgd.replace(lr=rate), start=theta, seed=seed + i).theta
    return theta[0]


def settle(problem: Problem, theta: Tensor, weight_decay: float) -> Tensor:
    """The minimum of the loss with weight decay that L-BFGS finds from ``theta``, [P]."""

    def value(weights: _Array) -> tuple[float, _Array]:
        w = torch.tensor(weights)
        loss = float(problem.loss(w)) + weight_decay / 2 * float(w @ w)
        return loss, (problem.gradient(w) + weight_decay * w).numpy()

    options = {"maxiter": 20_000, "maxfun": 5_000, "gtol": 1e-6, "ftol": 0.0, "maxcor": 50}
    return torch.tensor(minimize(value, theta.numpy(), jac=True, method="L-BFGS-B", options=options).x)


@dataclass(frozen=True)
class Point:
    """What surrounds a point: all modes of the Hessian, the noise and the slope along each.

    Args:
        theta: the point, [P].
        curvature: Hessian eigenvalues without weight decay, descending, [P].
        vectors: eigenvectors, [P, P].
        noise: variance of the per-sample gradient along each, [P].
        slope: gradient of the loss with weight decay along each, [P].
        loss: loss there.
    """

    theta: _Array
    curvature: _Array
    vectors: _Array
    noise: _Array
    slope: _Array
    loss: _Array


def surroundings(problem: Problem, theta: Tensor, weight_decay: float) -> Point:
    """The full Hessian and the noise along its eigenvectors, at ``theta``."""
    pairs = landscape.all_eigenpairs(landscape.hessian(problem, theta).dense())
    around = noise.in_directions(problem, pairs.eigenvectors, theta)
    slope = around.mean + weight_decay * (pairs.eigenvectors.T @ theta).numpy()
    return Point(
        theta.numpy(), pairs.eigenvalues.numpy(), pairs.eigenvectors.numpy(), around.variance, slope,
        np.asarray(float(problem.loss(theta))),
    )  # fmt: skip


def _step(problem: Problem, optimizer: torch.optim.Optimizer, index: Tensor) -> None:
    assert problem.model is not None
    optimizer.zero_grad()
    problem.criterion(problem.model(problem.inputs[index]), problem.targets[index]).backward()
    optimizer.step()


def _optimizer(problem: Problem, sgd: SGD) -> torch.optim.Optimizer:
    assert problem.model is not None
    return torch.optim.SGD(problem.model.parameters(), sgd.lr, sgd.momentum, weight_decay=sgd.weight_decay)


def train_down_to(problem: Problem, sgd: SGD, level: float, seed: int, epochs: int = 1000) -> None:
    """Train the problem's model in place until its loss over all samples is below ``level``.

    Raises:
        NotAvailableError: it is not after so many epochs.
    """
    optimizer, batches = _optimizer(problem, sgd), Minibatches(problem.N, int(sgd.batch_size or 1), sgd.sampling, seed)
    per_epoch = round(sgd.steps_per_epoch)
    with bar(f"training to a loss of {level:g}") as progress:
        for epoch in range(epochs):
            if epoch % 5 == 0 and float(problem.loss()) < level:
                return
            for _ in range(per_epoch):
                _step(problem, optimizer, next(batches))
            progress.advance(per_epoch)
    raise NotAvailableError(
        f"the loss is still {float(problem.loss()):g} after {epochs} epochs", expected=f"a loss below {level:g}"
    )


def record_layer(
    problem: Problem, layer: str, sgd: SGD, steps: int, seed: int, watch: Callable[[int], None] = lambda step: None
) -> _Array:
    """Weights of one layer before each step [T, P_layer], while the problem's model trains on in place.

    ``watch`` is called before each step with its number.
    """
    optimizer, batches = _optimizer(problem, sgd), Minibatches(problem.N, int(sgd.batch_size or 1), sgd.sampling, seed)
    weight = problem.parameters[layer]
    rows = np.empty((steps, weight.numel()))
    for k in track(range(steps), "recording a layer"):
        rows[k] = weight.detach().reshape(-1).numpy()
        watch(k)
        _step(problem, optimizer, next(batches))
    return rows
