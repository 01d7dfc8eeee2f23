"""The protocol of Feng & Tu (PNAS 118, e2015617118, 2021): a trained network, two windows of its path, three bases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import landscape, models, noise
from ..hyperparameters import SGD, Sampling
from ..problem import Problem
from ..theory import sampling
from ..trajectory import pca
from ..trajectory.detrend import detrended
from .item import Bench
from .outcome import Series
from .training import record_layer, train_down_to

__all__ = [
    "BASES",
    "DATA",
    "LAYER",
    "PAPER",
    "SCHEMES",
    "Modes",
    "Run",
    "components_of",
    "correlation_times",
    "exact_window",
    "explore",
    "fitted_over",
    "in_bases",
    "middle",
    "modes_of",
    "note",
    "power",
    "problem_of",
    "ranks",
    "ready",
    "relation",
    "sizes",
    "standard",
    "theory_line",
]

PAPER = "Feng & Tu 2021"
DATA = "digits; MNIST at full size with --full"
LAYER = "layer2.weight"
SCHEMES: dict[Sampling, str] = {"reshuffle": "without replacement", "replacement": "with replacement"}
BASES = {"in": "in sample", "out": "held out", "hess": "Hessian basis"}
_Array = np.ndarray[Any, Any]


# ---------------------------------------------------------------------------------------------- network and path


def problem_of(bench: Bench, seed: int) -> Problem:
    """Images and a bias-free ReLU network of two hidden layers of 50, initialised as torch does."""
    if bench.scale == "full":
        images, labels = bench.data("mnist")
        images = images.reshape(len(images), -1)
    else:
        images, labels = bench.data("digits", bench.choose(500, 1500, 1500))
    hidden = bench.choose(20, 50, 50)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = models.mlp([images.shape[1], hidden, hidden, 10], bias=False).double()
    return Problem(model, torch.nn.CrossEntropyLoss(), (images.double(), labels))


def standard(problem: Problem, scheme: Sampling = "reshuffle", lr: float = 0.1, batch: int = 50) -> SGD:
    """B = 50, α = 0.1, a fresh permutation every epoch, unless told otherwise."""
    return SGD(lr=lr, batch_size=batch, dataset_size=problem.N, sampling=scheme)


def ready(bench: Bench, seed: int, level: float | None = None) -> Problem:
    """A network in the exploration phase: trained until its loss is small, once for each seed."""
    problem = problem_of(bench, seed)
    target = bench.choose(1e-2, 1e-3, 5e-5) if level is None else level

    def make() -> dict[str, Any]:
        train_down_to(problem, standard(problem), target, seed)
        return {"theta": problem.theta.numpy()}

    problem.set_weights(torch.tensor(bench.part(f"trained-{target:g}-{seed}", make)["theta"]))
    return problem


def middle(problem: Problem) -> Problem:
    """The same with the middle layer's weights alone, the others where they stand."""
    assert problem.model is not None
    return Problem(problem.model, problem.criterion, (problem.inputs, problem.targets), params=LAYER)


@dataclass(frozen=True)
class Run:
    """The middle layer in the exploration phase: two windows of ten epochs, and the landscape at their centre.

    Args:
        problem: the middle layer, with all weights at their mean over the first window.
        sgd: as the windows were recorded.
        first: the first window [T, 2500]; directions come from it.
        second: the window that follows.
    """

    problem: Problem
    sgd: SGD
    first: _Array
    second: _Array

    @property
    def epoch(self) -> int:
        """Steps in an epoch."""
        return round(self.sgd.steps_per_epoch)


def explore(bench: Bench, seed: int, scheme: Sampling = "reshuffle", lr: float = 0.1, batch: int = 50) -> Run:
    """Record two windows of ten epochs and put the network, all its layers, at the mean of the first."""
    problem = ready(bench, seed)
    sgd = standard(problem, scheme, lr, batch)
    window = 10 * round(sgd.steps_per_epoch)
    centre = torch.zeros_like(problem.theta)

    def add(step: int) -> None:
        if step < window:
            centre.add_(problem.theta, alpha=1 / window)

    rows = record_layer(problem, LAYER, sgd, 2 * window, seed + 1, add)
    problem.set_weights(centre)
    return Run(middle(problem), sgd, rows[:window], rows[window:])


# ---------------------------------------------------------------------------------------------- directions


def sizes(bench: Bench) -> tuple[int, int, int]:
    """Principal components, Hessian directions, and how many of either are measured."""
    return bench.choose((60, 40, 12), (150, 120, 30), (1000, 300, 60))


def ranks(count: int, of: int) -> _Array:
    """Ranks from 1 (the first component, a drift, left out) to ``of``, about ``count`` of them, evenly spaced."""
    return np.unique(np.linspace(1, of - 1, count).round().astype(int))


def components_of(run: Run, components: int, count: int) -> tuple[Tensor, _Array]:
    """About ``count`` principal components of the first window [P, k], and their variances there [k]."""
    parts = pca(run.first, held_out=False, n=components)
    chosen = ranks(count, parts.directions.shape[1])
    return parts.directions[:, chosen], parts.variance[chosen]


@dataclass(frozen=True)
class Modes:
    """Eigenvectors of the middle layer's Hessian in the trained network, the curvature and the flatness along each.

    Args:
        vectors: [P, k].
        curvature: [k].
        flatness: [k].
    """

    vectors: Tensor
    curvature: _Array
    flatness: _Array


def modes_of(bench: Bench, seed: int, of: int, count: int) -> Modes:
    """About ``count`` of the ``of`` sharpest modes, evenly spaced in rank."""
    layer = middle(ready(bench, seed))
    pairs = landscape.eigenpairs(landscape.hessian(layer), of, tol=1e-3)
    chosen = np.unique(np.linspace(0, of - 1, count).round().astype(int))
    vectors = pairs.eigenvectors[:, chosen]
    wide = landscape.flatness(layer, vectors, rtol=1e-2).flatness
    return Modes(vectors, pairs.eigenvalues[chosen].numpy(), wide)


def in_bases(run: Run, modes: Modes, components: int, count: int) -> dict[str, _Array]:
    """Variance, flatness, noise and correlation time in three bases.

    ``in``: about ``count`` principal components with the variances of the window they come from, as published;
    ``out``: the same directions with the variances of the window that follows; ``hess``: the modes of the Hessian in
    that window, with what the epoch-noise theory says of them, nothing fitted. The noise is the variance of a
    minibatch's gradient at the mean of the first window.
    """
    P, inside = components_of(run, components, count)
    wide = landscape.flatness(run.problem, P, rtol=1e-2).flatness
    around = noise.in_directions(run.problem, torch.cat([P, modes.vectors], 1)).variance * run.sgd.minibatch_factor
    found: dict[str, _Array] = {}
    for name, basis, path in (("in", P, run.first), ("out", P, run.second), ("hess", modes.vectors, run.second)):
        found[f"{name}_variance"], found[f"{name}_tau"] = correlation_times(path @ basis.numpy())
        found[f"{name}_flatness"] = modes.flatness if name == "hess" else wide
        found[f"{name}_noise"] = around[P.shape[1] :] if name == "hess" else around[: P.shape[1]]
    found["in_variance"] = inside
    found["exact_variance"], found["exact_tau"] = exact_window(
        run.sgd, modes.curvature, found["hess_noise"], len(run.second)
    )
    return found


def relation(bench: Bench, seed: int) -> dict[str, _Array]:
    """:func:`in_bases` at B = 50, α = 0.1 for either scheme, which stands before each name."""
    components, hessian, count = sizes(bench)
    modes = modes_of(bench, seed, hessian, count)
    return {
        f"{scheme}_{name}": value
        for scheme in SCHEMES
        for name, value in in_bases(explore(bench, seed, scheme), modes, components, count).items()
    }


# ---------------------------------------------------------------------------------------------- numbers


def power(x: _Array, y: _Array) -> tuple[float, float]:
    """Exponent of y against x and the correlation of the logarithms."""
    good = np.isfinite(x) & (x > 0) & (y > 0)
    u, v = np.log(x[good]), np.log(y[good])
    return float(np.polyfit(u, v, 1)[0]), float(np.corrcoef(u, v)[0, 1])


def correlation_times(coordinates: _Array) -> tuple[_Array, _Array]:
    """Variance with the line removed and 2 Var/Var(step) of coordinates [T, k]."""
    spread = (detrended(coordinates, "linear") ** 2).mean(0)
    return spread, 2 * spread / np.diff(coordinates, axis=0).var(0)


def exact_window(sgd: SGD, curvature: _Array, variance: _Array, window: int) -> tuple[_Array, _Array]:
    """Variance of a window with its line removed, and correlation time: the epoch-noise theory, nothing fitted."""
    h = np.maximum(curvature, 0.0)
    spread = sampling.weight_variance_window(sgd, h, variance, window, "linear")
    return spread, 2 * spread / (sgd.lr**2 * sampling.velocity_variance(sgd, h, variance))


def theory_line(one: dict[str, _Array], what: str) -> Series:
    """What the epoch-noise theory says of one network's Hessian modes, without replacement, against their flatness."""
    order = np.argsort(one["reshuffle_hess_flatness"])
    x, y = one["reshuffle_hess_flatness"][order], one[f"reshuffle_exact_{what}"][order]
    return Series("theory, Hessian basis", x, y, None, "line", 3)


def fitted_over(components: int, hessian: int, count: int) -> str:
    """Which directions the exponents are fitted over, in words."""
    return (
        f" Exponents and medians are over {count} of the principal components 2 to {components} and {count} of the "
        f"{hessian} sharpest modes of the layer's Hessian in the trained network, evenly spaced in rank."
    )


def note(bench: Bench, found: list[Any]) -> str:
    """The protocol in words."""
    where = bench.choose(
        "500 digits, two hidden layers of 20, loss 1e-2",
        "1,500 digits, two hidden layers of 50, loss 1e-3",
        "MNIST, two hidden layers of 50, loss 5e-5",
    )
    return (
        f"{where}, ReLU, no biases, B = 50, α = 0.1, {len(found)} seeds, a network each. The middle layer is recorded "
        "at every step of twenty epochs, after the loss has fallen so far; principal components come from the first "
        "ten, held-out variances and those of Hessian modes from the last ten, with a straight line removed."
    )
