r"""Curvature and gradient noise of a network as a list of modes: every eigenvector, or the sharpest and a quadrature.

What SGD does to the loss is a sum over Hessian modes of a function of the curvature, weighted with the noise in the
mode: :math:`\sum_l s_l f(h_l) = \operatorname{Tr} f(H) C`. Small problems are decomposed in full. For larger ones the k
sharpest modes are found one by one; for the rest that trace is a mean over random noise vectors,
:math:`E\,b^\top f(H)b` with :math:`b\sim C` from the per-sample gradients themselves, and each of these is a
Lanczos quadrature (Golub & Meurant 1994): its nodes and weights serve as modes, whatever the number of weights.

Two lists are made: *cold*, where the noise-free flow leads, and *hot*, averaged over weights that the run passed
through. Their difference is how curvature and noise respond to the spread of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from .. import landscape, noise
from ..landscape.density import lanczos
from ..noise.gradients import combinations
from ..progress import bar
from ..theory.arrays import Array

if TYPE_CHECKING:
    from ..problem import Problem

__all__ = ["Modes", "measure_modes"]

DENSE = 2500  # weights up to which the whole Hessian is decomposed
_SHARP = 30  # modes found one by one otherwise
_PROBES = 12  # noise vectors for the rest
_NODES = 40  # of each quadrature
_WORK = 2e11  # floating-point operations that an averaged Hessian may take before points share the samples
_BINS = 0.02  # width of a bin in the logarithm of the curvature


@dataclass(frozen=True)
class Modes:
    """Modes of one list; those of ``probe`` -1 are exact, the others belong to one of ``probes`` noise vectors.

    ``curvature`` and ``energy`` (the curvature that turns a variance into loss) are without weight decay; ``coloured``
    and ``white`` are variances over samples of the gradient along the mode: the part that stays the same while the
    weights fluctuate, and the part that changes with them. All [n]. ``vectors`` are the sharpest eigenvectors,
    ``white_error`` the standard error of the total of ``white``, over that of all noise.
    """

    curvature: Array
    energy: Array
    coloured: Array
    white: Array
    probe: np.ndarray
    probes: int
    vectors: Tensor
    white_error: float = 0.0

    @property
    def exact(self) -> np.ndarray:
        """Positions of the modes that were found one by one, sharpest first."""
        which = np.flatnonzero(self.probe < 0)
        return which[np.argsort(-self.curvature[which])]

    def binned(self) -> Modes:
        """Modes of nearly equal curvature joined, so that sums over them cost less; curvatures move by 1 % at most."""
        size = np.abs(self.curvature)
        floor = 1e-7 * size.max() if size.size and size.max() > 0 else 1.0
        key = np.where(size > floor, np.sign(self.curvature) * np.round(np.log(np.maximum(size, floor)) / _BINS), 0)
        key = np.where(size > floor, key + np.sign(self.curvature) * 1e6, 0)
        _, where = np.unique(np.stack([key, self.probe]), axis=1, return_inverse=True)
        where = where.reshape(-1)

        def total(values: Array) -> Array:
            return np.bincount(where, values).astype(float)

        weight = self.coloured + self.white + 1e-300
        mass = total(weight)
        return Modes(
            total(weight * self.curvature) / mass,
            total(weight * self.energy) / mass,
            total(self.coloured),
            total(self.white),
            np.array([self.probe[where == i][0] for i in range(len(mass))]),
            self.probes,
            self.vectors[:, :0],
        )


def measure_modes(
    problem: Problem, cold_at: Tensor, points: Sequence[Tensor], centre: Tensor, seed: int = 0
) -> tuple[Modes, Modes]:
    """The modes at one point, and averaged over several.

    The noise is looked at in the weights mirrored at their mean too, so that its change in proportion to the
    displacement, which averages out over the run and not over a few weights, cancels.

    Args:
        problem: the problem.
        cold_at: where the noise-free flow leads, [P].
        points: weights that the run passed through, [P] each.
        centre: their mean, or that of the run, [P].
        seed: of every random draw.
    """
    before: Any = landscape.hessian(problem, cold_at)
    if problem.P <= DENSE:
        before = before.dense()
    return _cold(problem, before, cold_at, seed), _hot(problem, points, centre, before, cold_at, seed)


def _cold(problem: Problem, operator: Any, theta: Tensor, seed: int) -> Modes:
    if problem.P <= DENSE:
        curvature, vectors = _decompose(operator)
        along = noise.in_directions(problem, vectors, theta).variance
        return _exact(curvature, curvature, along, np.zeros_like(along), vectors)

    def draw(count: int) -> Tensor:
        return combinations(problem, theta, torch.arange(problem.N, device=problem.device), count, seed)

    pairs, nodes = _split(operator, draw, seed)
    along = noise.in_directions(problem, pairs.eigenvectors, theta).variance
    top = _exact(_numpy(pairs.eigenvalues), _numpy(pairs.eigenvalues), along, np.zeros_like(along), pairs.eigenvectors)
    return _joined(top, *nodes, energy=1.0, coloured=1.0)


def _hot(problem: Problem, points: Sequence[Tensor], centre: Tensor, before: Any, cold_at: Tensor, seed: int) -> Modes:
    """The modes averaged over several points.

    For large problems each point sees its share of the samples, so that a Hessian averaged over samples and points
    costs as much as one; the cheaper the problem, the more of the samples each point sees, up to all. Noise up to what
    it is at ``cold_at`` counts as coloured, what it has beyond that as white. The energy is taken halfway between the
    two curvatures, as for a curvature that changes in proportion to the spread.
    """
    shares = _shares(problem, points, seed)
    points, parts = [at for at, _ in shares], [part for _, part in shares]
    total = sum(map(len, parts))
    weights = [len(part) / total for part in parts]
    if problem.P <= DENSE:
        dense: Any = sum(
            w * landscape.hessian(problem, at, part).dense().double()
            for w, at, part in zip(weights, points, parts, strict=True)
        )
        curvature, vectors = _decompose(dense)
        vectors = vectors.to(problem.dtype)
        energy = (curvature + _along(before, vectors)) / 2
        coloured, white, error = _noise_split(problem, points, centre, parts, cold_at, vectors)
        return _exact(curvature, energy, coloured, white, vectors, error)
    operator = reduce(
        lambda a, b: a + b,
        (w * landscape.hessian(problem, at, part) for w, at, part in zip(weights, points, parts, strict=True)),
    )

    def draw(count: int) -> Tensor:
        pieces = zip(weights, points, parts, range(len(parts)), strict=True)
        return sum(  # type: ignore[return-value]
            math.sqrt(w / 2) * combinations(problem, where, part, count, seed + 1 + 2 * i + j)
            for w, at, part, i in pieces
            for j, where in enumerate((at, 2 * centre - at))
        )

    pairs, nodes = _split(operator, draw, seed)
    vectors = pairs.eigenvectors
    values = _numpy(pairs.eigenvalues)
    coloured, white, error = _noise_split(problem, points, centre, parts, cold_at, vectors)
    top = _exact(values, (values + _along(before, vectors)) / 2, coloured, white, vectors, error)
    start = nodes[2]
    hot_energy, cold_energy = (float(((op @ start) * start).sum()) for op in (operator, before))
    ratio = cold_energy / hot_energy if hot_energy > 0 else 1.0
    now, before_ = float(start.double().square().sum()), _rest_noise(problem, cold_at, vectors, seed)
    return _joined(
        top, *nodes, energy=float(np.clip((1 + ratio) / 2, 0.25, 2)), coloured=min(1.0, before_ / now if now else 1.0)
    )


# ---------------------------------------------------------------------- pieces


def _numpy(values: Tensor) -> Array:
    return values.detach().double().cpu().numpy()


def _decompose(matrix: Tensor) -> tuple[Array, Tensor]:
    values, vectors = torch.linalg.eigh(matrix.double())
    return _numpy(values.flip(0)), vectors.flip(1).to(matrix.dtype)


def _exact(
    curvature: Array, energy: Array, coloured: Array, white: Array, vectors: Tensor, white_error: float = 0.0
) -> Modes:
    return Modes(curvature, energy, coloured, white, np.full(len(curvature), -1), 0, vectors[:, :_SHARP], white_error)


def _along(operator: Any, vectors: Tensor) -> Array:
    return _numpy(((operator @ vectors) * vectors).sum(0))


def _shares(problem: Problem, points: Sequence[Tensor], seed: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs of a point and the samples that it sees: each point gets as many equal shares as the work allows."""
    order = torch.randperm(problem.N, generator=torch.Generator().manual_seed(seed))
    shares = [part for part in torch.tensor_split(order, min(len(points), problem.N)) if len(part)]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        problem.loss(problem.theta, shares[0])
    work = 6 * problem.P * counter.get_total_flops() * len(shares)  # of a whole Hessian
    rounds = int(np.clip(_WORK / max(work, 1), 1, len(shares)))
    if problem.P > DENSE:
        rounds = 1
    return [
        (points[i], torch.cat([shares[(i + r) % len(shares)] for r in range(rounds)]).sort().values)
        for i in range(len(shares))
    ]


def _noise_split(
    problem: Problem, points: Sequence[Tensor], centre: Tensor, parts: list[Tensor], cold_at: Tensor, vectors: Tensor
) -> tuple[Array, Array, float]:
    """Variance over samples along the vectors: what it is at the cold point, what it has beyond that, its error."""
    cold = noise.in_directions(problem, vectors, cold_at).variance
    squares = np.zeros((len(points), vectors.shape[1]))
    for i, (at, part) in enumerate(zip(points, parts, strict=True)):
        for where in (at, 2 * centre - at):
            mean = _numpy(problem.gradient(where) @ vectors)
            slopes = _numpy(noise.projections(problem, vectors, where, part))
            squares[i] += ((slopes - mean) ** 2).sum(0) / 2
    size = np.array([len(part) for part in parts], float)
    hot = squares.sum(0) / size.sum()
    each = squares.sum(1) / size
    error = float(each.std(ddof=1) / math.sqrt(len(each)) / each.mean()) if len(each) > 1 and each.mean() > 0 else 0.0
    return np.minimum(cold, hot), np.maximum(hot - cold, 0), error


def _split(
    operator: Any, draw: Callable[[int], Tensor], seed: int
) -> tuple[Any, tuple[np.ndarray, np.ndarray, Tensor]]:
    """The sharpest eigenpairs, and nodes, weights and start vectors of the quadratures for the rest."""
    pairs = landscape.eigenpairs(operator, k=_SHARP, tol=1e-3, seed=seed)
    vectors = pairs.eigenvectors
    start = draw(_PROBES)
    start = start - vectors @ (vectors.T @ start)
    lengths = start.norm(dim=0)
    rest = landscape.projected(operator, vectors, complement=True)
    with bar("noise quadrature", _PROBES * _NODES) as progress:
        nodes, weights = lanczos(landscape.as_operator(rest), start / lengths, _NODES, progress)
    return pairs, (nodes, weights * _numpy(lengths.square())[:, None], start)


def _rest_noise(problem: Problem, theta: Tensor, vectors: Tensor, seed: int) -> float:
    start = combinations(problem, theta, torch.arange(problem.N, device=problem.device), _PROBES, seed + 1)
    return float((start - vectors @ (vectors.T @ start)).double().square().sum())


def _joined(
    top: Modes, nodes: np.ndarray, weights: np.ndarray, start: Tensor, *, energy: float, coloured: float
) -> Modes:
    probes, size = nodes.shape
    noise_ = (weights / probes).reshape(-1)
    flat = nodes.reshape(-1)
    return Modes(
        np.concatenate([top.curvature, flat]),
        np.concatenate([top.energy, energy * flat]),
        np.concatenate([top.coloured, coloured * noise_]),
        np.concatenate([top.white, (1 - coloured) * noise_]),
        np.concatenate([top.probe, np.repeat(np.arange(probes), size)]),
        probes,
        top.vectors,
        top.white_error,
    )
