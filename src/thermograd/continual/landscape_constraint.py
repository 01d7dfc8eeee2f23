r"""Landscape-dependent constraints: weights held along the directions in which a task's loss rises."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from .. import landscape
from ..errors import InputError, TooShortError
from ..problem import Problem
from ..theory.flatness import curvature_from_flatness
from ..trajectory import pca, select
from .constraint import Constraint
from .curvature import check_temperature, tempered
from .forms import Blocks, Form, LowRank
from .layout import Layout

__all__ = ["LandscapeConstraint", "RandomDirections", "Source", "Weights"]

Source = Literal["trajectory", "hessian", "gauss_newton"]
Weights = Literal["flatness", "curvature"]
_TOLERANCE = 1e-3  # relative residual of eigenvectors: directions this close constrain alike


class LandscapeConstraint(Constraint):
    r"""Landscape-dependent constraint (LDC, Feng & Tu 2021): later tasks may move where earlier losses are flat.

    .. math::
        R(\theta) = \mathrm{strength} \sum_i \tfrac12 h_i \bigl[p_i \cdot (\theta - \theta_1)\bigr]^2, \qquad
        h_i = \frac{8(r-1)\,L_0}{F_i^2}

    with orthonormal directions :math:`p_i` and their flatness :math:`F_i`, the width over which the finished task's
    loss :math:`L_0` rises by a factor r (e as published). Feng & Tu write
    :math:`\lambda \sum_i [p_i \cdot (\theta - \theta_1)]^2 / F_i^2`, so their :math:`\lambda` is
    :math:`4(e-1) L_0 \cdot \mathrm{strength}`: at strength 1 the penalty is the finished task's own loss, as far as
    that is a parabola. It stores k (P + 2) numbers for k directions.

    Args:
        strength: see :class:`Constraint`.
        directions: where directions come from. "trajectory": principal components of the recorded path
            (``fit(..., run=...)``), as published; "hessian" or "gauss_newton": leading eigenvectors, for which no path
            is needed; a pair of these, ``("trajectory", "hessian")``: both, turned within their span such that the
            curvature is diagonal in it.
        weights: "flatness": h from the measured width (as published; where the loss does not rise on both sides, h is
            zero); "curvature": h from the second derivative.
        rise: r. A larger one asks for the parabola through walls that are further off than where the loss is
            quadratic; of a parabola h is the same for all r.
        rank: most directions of one task from each source (and in each layer, with ``by_layer``).
        coverage: keep only as many of them as hold this share of the trace of the curvature; None keeps all.
        by_layer: directions of each weight with its bias by itself (of the path: the principal components of these
            weights alone): as many numbers, ``rank`` directions for every layer.
        capacity: most directions over all tasks; default: what ``rank`` gives for one. See :class:`~.forms.LowRank`
            for what is lost.
        temperature: of the Gauss-Newton matrix, see :mod:`.curvature`. Above 1 the weights are its eigenvalues.
        window: rows of the run that count, as in :func:`thermograd.trajectory.pca`; default: all.
        options: ``anchors``, ``params``, ``samples``, ``seed``, see :class:`Constraint`.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> X = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> ldc = LandscapeConstraint(rank=1, weights="curvature").fit(model, torch.nn.MSELoss(), (X, torch.zeros(2, 1)))
    >>> ldc.form.curvature, ldc.memory
    (tensor([9.]), 4)
    """

    name: ClassVar[str] = "landscape"

    def __init__(
        self,
        strength: float = 1.0,
        *,
        directions: Source | tuple[Source, ...] | list[Source] = "gauss_newton",
        weights: Weights = "flatness",
        rise: float = math.e,
        rank: int = 20,
        coverage: float | None = None,
        by_layer: bool = False,
        capacity: int | None = None,
        temperature: float = 1.0,
        window: Any = None,
        **options: Any,
    ):
        super().__init__(strength, **options)
        self.directions = (directions,) if isinstance(directions, str) else tuple(directions)
        if not self.directions or not set(self.directions) <= {"trajectory", "hessian", "gauss_newton"}:
            raise InputError(
                f"directions is {directions!r}", expected="'trajectory', 'hessian', 'gauss_newton' or a pair"
            )
        if weights not in ("flatness", "curvature"):
            raise InputError(f"weights is {weights!r}", expected="'flatness' or 'curvature'")
        if not (isinstance(rise, int | float) and 1 < rise < math.inf):
            raise InputError(f"rise is {rise!r}", expected="a number above 1")
        if rise != math.e and weights == "curvature":
            raise InputError(f"rise is {rise:g} with weights from the curvature", expected="weights='flatness'")
        if not (isinstance(rank, int) and rank >= 1):
            raise InputError(f"rank is {rank!r}", expected="a whole number >= 1")
        if coverage is not None and not 0 < coverage <= 1:
            raise InputError(f"coverage is {coverage!r}", expected="a share in (0, 1], or None")
        if capacity is not None and not (isinstance(capacity, int) and capacity >= 1):
            raise InputError(f"capacity is {capacity!r}", expected="a whole number >= 1")
        self.weights, self.rank, self.coverage = weights, rank, coverage
        self.by_layer, self.window, self.rise = by_layer, window, float(rise)
        self.capacity = capacity or rank * len(self.directions)
        self.temperature = check_temperature(temperature)
        if self.temperature > 1 and weights == "flatness":
            raise InputError(
                f"temperature is {temperature:g} with weights from the flatness",
                expected="weights='curvature': the flatness is that of the loss itself",
            )

    def _measure(self, problem: Problem, index: Tensor, run: Any = None, **measured_on: Any) -> Form:
        if "trajectory" in self.directions and run is None:
            raise InputError(
                "directions from the trajectory, but fit got no run",
                expected="fit(..., run=path): a recorded run, or its weights as an array [T, P]",
                remedy="record the end of the task's training, or take directions='gauss_newton'",
            )
        if not self.by_layer:
            return self._low_rank(problem, index, run, self.window, torch.arange(problem.P))
        path = None if run is None else select(run, self.window, minimum=4).theta  # [T, P]
        if path is not None:
            _check_path(path.shape[1], problem.P)
        layout = Layout(dict(problem.shapes))
        parts: dict[str, tuple[Tensor, Form]] = {}
        for names in _layers(problem.names):
            at = layout.positions(names)
            parts[names[0]] = at, self._low_rank(problem, index, None if path is None else path[:, at], None, at)
        return Blocks(problem.P, parts)

    def _low_rank(self, problem: Problem, index: Tensor, run: Any, window: Any, at: Tensor) -> LowRank:
        """The form on the weights at some positions [p], with their own curvature (p, p) and path."""
        curvature = self._operator(problem, index, self._curvature, at)
        vectors, values = self._directions(problem, index, curvature, run, window, at)
        if self.coverage is not None:
            needed = self.coverage * float(landscape.trace(curvature).value)
            enough = int((values.clamp_min(0).cumsum(0) < needed).sum()) + 1
            vectors, values = vectors[:, :enough], values[:enough]
        if self.weights == "flatness":
            whole = vectors.new_zeros(problem.P, vectors.shape[1])
            whole[at] = vectors
            values = self._from_flatness(problem, index, whole)
        values = values.clamp_min(0)
        kept = values.argsort(descending=True, stable=True)[: self.capacity].sort().values
        vectors, values = vectors[:, kept], values[kept]
        return LowRank(vectors, values, vectors.T @ problem.theta[at], self.capacity)

    @property
    def _curvature(self) -> Source:
        """Of which matrix the curvatures along the directions are."""
        return "gauss_newton" if self.directions == ("gauss_newton",) or self.temperature > 1 else "hessian"

    def _operator(self, problem: Problem, index: Tensor, source: Source, at: Tensor) -> Any:
        """The Hessian or the Gauss-Newton matrix of the weights at some positions [p]."""
        whole: Any
        if source == "gauss_newton":
            whole = landscape.gauss_newton(tempered(problem, self.temperature), index=index)
        else:
            whole = landscape.hessian(problem, index=index)
        return whole if len(at) == problem.P else landscape.sub_block(whole, at)

    def _directions(
        self, problem: Problem, index: Tensor, curvature: Any, run: Any, window: Any, at: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Orthonormal directions [p, k] and the curvatures along them [k]; the largest first, but for a path's own."""
        rank = min(self.rank, len(at))
        found = []
        for source in self.directions:
            if source == "trajectory":
                found.append(_principal(problem, run, window, rank, len(at)))
                continue
            operator = curvature if source == self._curvature else self._operator(problem, index, source, at)
            pairs = landscape.eigenpairs(operator, k=rank, tol=_TOLERANCE, seed=self.seed)
            if self.directions == (self._curvature,):
                return pairs.eigenvectors, pairs.eigenvalues
            found.append(pairs.eigenvectors)
        if len(found) == 1:  # keep their own axes, as published
            return found[0], _along(found[0], curvature)
        basis = torch.linalg.qr(torch.cat(found, dim=1)).Q
        inside = basis.T @ (curvature @ basis)
        values, turn = torch.linalg.eigh((inside + inside.T) / 2)
        return basis @ turn.flip(1), values.flip(0)

    def _from_flatness(self, problem: Problem, index: Tensor, vectors: Tensor) -> Tensor:
        """The curvature that each width stands for, 0 where the loss does not rise on both sides."""
        part = problem
        if len(index) < problem.N and problem.model is not None:
            inputs, targets = problem._samples.take(index, problem.device, problem.dtype)
            part = Problem(
                problem.model, problem.criterion, (inputs, targets), params=problem.names, dtype=problem.dtype
            )
        widths = landscape.flatness(part, vectors, rise=self.rise)
        return torch.as_tensor(_parabola(widths.flatness, widths.loss, self.rise)).to(vectors)


def _parabola(widths: np.ndarray, loss: float, rise: float) -> np.ndarray:
    """Second derivatives of the parabolas that rise by the factor over the widths; 0 for infinite ones."""
    crossed = np.isfinite(widths)
    values = np.zeros(len(widths))
    values[crossed] = curvature_from_flatness(widths[crossed], loss) * (rise - 1) / (math.e - 1)
    return values


class RandomDirections(LandscapeConstraint):
    """The control of :class:`LandscapeConstraint`: random orthonormal directions with their own measured weights.

    >>> import torch
    >>> model, data = torch.nn.Linear(3, 1), (torch.randn(8, 3), torch.randn(8, 1))
    >>> RandomDirections(rank=2).fit(model, torch.nn.MSELoss(), data).form.directions.shape
    torch.Size([4, 2])
    """

    name: ClassVar[str] = "random"

    def _directions(
        self, problem: Problem, index: Tensor, curvature: Any, run: Any, window: Any, at: Tensor
    ) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(self.seed + self.tasks)
        drawn = torch.randn(len(at), min(self.rank, len(at)), generator=random, dtype=torch.float64)
        basis = torch.linalg.qr(drawn).Q.to(problem.device, problem.dtype)
        return basis, _along(basis, curvature)


def _along(basis: Tensor, curvature: Any) -> Tensor:
    """Curvatures along the columns of a basis, [k]."""
    return (basis * (curvature @ basis)).sum(0)


def _principal(problem: Problem, run: Any, window: Any, rank: int, size: int) -> Tensor:
    """The leading principal directions of a path, [size, k]."""
    directions = pca(run, window, held_out=False, n=rank).directions
    _check_path(directions.shape[0], size)
    if directions.shape[1] == 0:
        raise TooShortError("the run does not move", expected="a recorded path")
    return directions.to(problem.device, problem.dtype)


def _check_path(found: int, expected: int) -> None:
    if found != expected:
        raise InputError(
            f"the run has {found} weights and the task's problem {expected}",
            expected="a run of the same parameters, in the same order",
            remedy="choose them alike: params=... in the constraint, Layer or training.record in the recording",
        )


def _layers(names: list[str]) -> list[list[str]]:
    """Parameters of one module together: a weight with its bias."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    return list(groups.values())
