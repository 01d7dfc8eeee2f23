r"""How strong gradient noise is: its total variance, and its ratio to the gradient."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, ThermogradWarning, TooShortError
from ..landscape.curvature import hessian
from ..measurement import Measurement, new_axes, quantity
from ..problem import Problem
from ..progress import bar, track
from ..statistics import power_law
from .gradients import combinations, deviations, projections, sample_index, subsample

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["NoiseScale", "Strength", "StrengthAlong", "noise_scale", "strength", "strength_along"]

_COMBINATIONS = 48  # random combinations of noise vectors for traces of products with the covariance
_BASIS = 32  # of these, those that span where most of the noise is
_PARTS = 10  # of the samples, for the jackknife
_ZERO = 1e-24  # |g|^2 below this part of the mean |g_i|^2 is zero to rounding


@dataclass(frozen=True)
class Strength(Measurement):
    """Total variance of per-sample gradients; see :func:`strength`."""

    value: float = quantity(units="loss^2", long_name="noise strength Tr C_0")
    stderr: float = quantity(units="loss^2", long_name="standard error over samples")
    mean_square_gradient: float = quantity(units="loss^2", long_name="mean |g_i|^2")
    gradient_square: float = quantity(units="loss^2", long_name="|g|^2 of the mean gradient")
    samples: int = quantity(long_name="number of samples")

    _primary = "value"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Noise strength beside the square of the mean gradient."""
        ax = new_axes(ax)
        ax.bar(["Tr C", "|g|²"], [self.value, self.gradient_square], yerr=[self.stderr, 0], capsize=4)
        ax.set(ylabel="squared gradient", yscale="log")
        return ax


def strength(problem: Problem, theta: Any = None, index: Any = None) -> Strength:
    r"""Strength of the gradient noise of a single sample.

    .. math:: \mathcal N = \operatorname{Tr} C_0 = \frac1N \sum_i |g_i|^2 - |\bar g|^2

    (Mori et al. 2022, section 4.3). A minibatch has ``SGD(...).minibatch_factor`` times that. The standard error
    is the scatter of :math:`|g_i - \bar g|^2` over samples, as if they were drawn from a larger population. After
    Ctrl-C the samples that are done, a random part, give the mean, with a warning.

    Args:
        problem: the problem.
        theta: weights ``[P]``; default: where the model stands now.
        index: the samples; default all N.

    >>> problem = Problem.from_function(lambda w, a: (a * w).sum(), torch.ones(1), torch.tensor([[1.0], [3.0]]))
    >>> s = strength(problem)
    >>> s.value, s.mean_square_gradient, s.gradient_square
    (1.0, 5.0, 4.0)
    """
    theta = problem.as_theta(theta)
    chosen = sample_index(problem, index)
    gradient = problem.gradient(theta, chosen)  # [P]
    squares = deviations(problem, theta, chosen, gradient)[0].cpu().numpy()  # [N]
    size = float(gradient.square().sum())
    value = float(squares.mean())
    stderr = float(squares.std() / math.sqrt(len(squares)))
    return Strength(value, stderr, value + size, size, len(squares))


@dataclass(frozen=True)
class NoiseScale(Measurement):
    """Batch size at which noise and gradient are equally large; see :func:`noise_scale`."""

    simple: float = quantity(units="samples", long_name="simple noise scale Tr C / |g|^2")
    stderr: float = quantity(units="samples", long_name="standard error of the simple noise scale")
    curvature_weighted: float = quantity(units="samples", long_name="Tr(H C) / (g H g)")
    curvature_weighted_stderr: float = quantity(units="samples", long_name="its standard error")
    strength: float = quantity(units="loss^2", long_name="Tr C_0")
    gradient_square: float = quantity(units="loss^2", long_name="estimate of |g|^2, free of the noise's bias")
    gradient_square_stderr: float = quantity(units="loss^2", long_name="its standard error over samples")
    lower_bound: float = quantity(units="samples", long_name="simple noise scale if |g|^2 is two errors larger")
    gradient_is_zero: bool = quantity(long_name="whether |g|^2 lies within two standard errors of zero")
    samples: int = quantity(long_name="number of samples used")
    note: str = ""

    _primary = "simple"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Both noise scales with error bars; a scale that is not resolved is shown by its lower bound."""
        ax = new_axes(ax)
        values = [self.simple if math.isfinite(self.simple) else self.lower_bound, self.curvature_weighted]
        errors = [self.stderr, self.curvature_weighted_stderr]
        for i, (value, error) in enumerate(zip(values, errors)):
            if math.isfinite(value):
                ax.errorbar([i], [value], yerr=[error if math.isfinite(error) else 0], fmt="o", capsize=4)
        ax.set(xticks=[0, 1], xticklabels=["simple", "curvature-weighted"], ylabel="noise scale (samples)")
        return ax


def noise_scale(
    problem: Problem, theta: Any = None, n: int | None = None, seed: int = 0, index: Any = None
) -> NoiseScale:
    r"""Gradient noise scale: the batch size beyond which larger batches stop helping.

    .. math::
        B_\mathrm{simple} = \frac{\operatorname{Tr} C_0}{|g|^2}, \qquad
        B_\mathrm{noise} = \frac{\operatorname{Tr}(H C_0)}{g^\top H g}

    (McCandlish, Kaplan, Amodei et al. 2018, Eqs. 2.8-2.9). With ``n`` of N samples the noise that remains in the
    mean gradient is subtracted, :math:`|\bar g_n|^2 - \frac{S}{n}(1 - \frac nN)`, which makes the estimate of
    :math:`|g|^2` unbiased; with all N, C_0 and g are those of the data set and exact. Standard errors of the simple
    scale are to first order over samples (to second order for the gradient); those of the weighted one are by
    jackknife over ten parts of the samples, whose Hessians, gradients and covariances all take part, with the error
    of the random vectors that estimate what Tr(HC) has outside the leading directions of the noise. With ``n`` of N
    samples they are about the value for all N; with all N about that of a larger population the data are drawn from.
    After Ctrl-C the samples that are done, a random part, give what they can, with a warning: the simple scale with an
    upper bound of its error, the weighted one from three parts of the samples on and NaN before.

    Near a minimum the gradient vanishes and the ratio says nothing: ``gradient_is_zero`` is then True, a
    subsampled ``simple`` is infinite, and ``lower_bound`` is what can be said.

    Args:
        problem: the problem.
        theta: weights ``[P]``; default: where the model stands now.
        n: how many samples to use, drawn without replacement; default all.
        seed: of the draw, and of the random combinations that estimate Tr(HC).
        index: the samples to draw from; default all N.

    >>> data = torch.tensor([[1.0], [3.0]])
    >>> problem = Problem.from_function(lambda w, a: 0.5 * (w - a).square().sum(), torch.zeros(1), data)
    >>> noise_scale(problem).simple
    0.25
    """
    theta = problem.as_theta(theta)
    population = len(sample_index(problem, index))
    chosen = subsample(problem, index, n, seed)
    count = len(chosen)
    if count < 2:
        raise InputError(f"{count} sample", expected="at least 2, to have a variance")
    part = 1 - count / population  # what remains of the noise in the mean gradient
    gradient = problem.gradient(theta, chosen)  # [P]
    lengths, products = deviations(problem, theta, chosen, gradient)
    squares, along = lengths.cpu().numpy(), products.cpu().numpy()  # [n]
    done = len(squares)
    noise = _noise(problem, theta, chosen, seed) if done == count else None
    total = float(squares.mean()) * count / (count - 1)  # S, over n - 1
    raw = float(gradient.square().sum())
    square = raw - part * total / count
    trace_c2 = total**2 if noise is None else _pairs(noise)[0]  # at most that
    variance = 4 * float(along.var()) / count + 2 * trace_c2 / count**2
    error = math.sqrt(variance)
    zero = raw - total / count < 2 * error
    value = total * (population - 1) / population if part > 0 else float(squares.mean())
    unresolved = (zero and part > 0) or square <= _ZERO * (raw + total)
    influence = squares / value - 2 * along / square if not unresolved and value > 0 else squares
    relative = math.sqrt(float(influence.var()) / done + 2 * trace_c2 / (count * square) ** 2) if not unresolved else 0
    scatter = math.sqrt(part) if part > 0 else 1.0  # drawn without replacement from the N that are asked about
    simple = math.inf if unresolved else value / square
    weighted, weighted_error = math.inf, math.inf
    if noise is None:
        weighted, weighted_error = math.nan, math.nan
    elif not unresolved:
        weighted, weighted_error = _weighted(problem, theta, chosen, gradient, noise, population)
    notes = []
    if zero:
        notes.append("the mean gradient is zero within its sampling error: near a minimum the noise scale says little")
    if math.isnan(weighted):
        notes.append("interrupted before the curvature-weighted scale was known: it is NaN")
    if math.isinf(weighted) and not unresolved:
        notes.append("curvature along the gradient or Tr(HC) is not positive: no curvature-weighted scale")
    return NoiseScale(
        simple=simple,
        stderr=math.inf if unresolved else simple * relative * scatter,
        curvature_weighted=weighted,
        curvature_weighted_stderr=weighted_error,
        strength=value,
        gradient_square=square,
        gradient_square_stderr=error * scatter,
        lower_bound=value / max(square + 2 * error * scatter, 1e-300),
        gradient_is_zero=bool(zero),
        samples=done,
        note="; ".join(notes),
    )


def _noise(problem: Problem, theta: Tensor, chosen: Tensor, seed: int) -> Tensor | None:
    """Random combinations of the g_i - g that have their covariance, [P, q]; None, with a warning, after Ctrl-C."""
    try:
        return combinations(problem, theta, chosen, _COMBINATIONS, seed)
    except KeyboardInterrupt:
        message = "interrupted: the simple noise scale is returned, with an error that is an upper bound"
        warnings.warn(message, ThermogradWarning, stacklevel=3)
        return None


def _pairs(noise: Tensor) -> tuple[float, float]:
    """Tr C^2 from the squared products of independent noise vectors, and its standard error."""
    products = (noise.T @ noise).square()
    q = products.shape[0]
    rows, columns = torch.triu_indices(q, q, offset=1)
    values = products[rows, columns]
    return float(values.mean()), float(values.std() / math.sqrt(q))


def _weighted(
    problem: Problem, theta: Tensor, chosen: Tensor, gradient: Tensor, noise: Tensor, population: int
) -> tuple[float, float]:
    """Tr(H C) / (g H g) on the samples used, with its standard error; infinite where it is not defined.

    Everything is projected on a few directions U that hold the gradient, its image under H and most of the noise:
    there all matrices are small and known for each part of the samples. Random vectors estimate the rest of the trace.
    After Ctrl-C from the parts of the samples that are done, with a warning; NaN where these are fewer than three.
    """
    basis, probes = noise[:, :_BASIS], noise[:, _BASIS:]
    random = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))
    shares = [some.sort()[0] for some in random.chunk(min(_PARTS, len(chosen)))]
    parts: list[_Part] = []
    try:
        with bar("curvature-weighted noise scale", len(shares) + 2, bytes=_bytes(noise)) as progress:
            images = hessian(problem, theta, chosen) @ torch.cat([gradient[:, None], probes], dim=1)
            progress.advance(2)
            U = torch.linalg.qr(torch.cat([gradient[:, None], images[:, :1], basis], dim=1))[0]  # [P, m]
            for some in shares:
                parts.append(_Part.of(problem, theta, chosen[some], U))
                progress.advance()
    except KeyboardInterrupt:
        message = f"interrupted: the curvature-weighted scale is of {len(parts)} of {len(shares)} parts of the samples"
        warnings.warn(message, ThermogradWarning, stacklevel=3)
        if len(parts) < min(3, len(shares)):
            return math.nan, math.nan
    done = sum(p.count for p in parts)
    part = 1 - done / population
    rest, rest_error = 0.0, 0.0
    if U.shape[1] < problem.P:
        forms = (probes * images[:, 1:]).sum(0).double().cpu().numpy()  # [q] x.H.x, each with mean Tr(HC)
        inside = (U.T @ probes).double().cpu().numpy()  # [m, q]
        forms -= ((np.sum([p.hessian for p in parts], axis=0) / done @ inside) * inside).sum(0)
        rest, rest_error = float(forms.mean()), float(forms.std(ddof=1)) / math.sqrt(len(forms))
    top, bottom = _ratio(parts, part, rest)
    if bottom <= 0 or top <= 0:
        return math.inf, math.inf
    value = top / bottom
    left_out = [_ratio(parts[:i] + parts[i + 1 :], part, rest) for i in range(len(parts))]
    values = np.array([t / b if b > 0 else math.inf for t, b in left_out])
    spread = (len(parts) - 1) * float(((values - values.mean()) ** 2).mean()) if np.isfinite(values).all() else math.inf
    scatter = math.sqrt(part) if part > 0 else 1.0
    return value, math.hypot(math.sqrt(spread) * scatter, value * rest_error / top)


def _bytes(noise: Tensor) -> int:
    """Memory of the weighted scale: combinations, their images, and as many directions with theirs."""
    return 4 * noise.numel() * noise.element_size()


@dataclass(frozen=True)
class _Part:
    """Sums over some of the samples, on m directions: Hessian and second moment [m, m], gradient [m]."""

    count: int
    hessian: np.ndarray
    second: np.ndarray
    gradient: np.ndarray

    @classmethod
    def of(cls, problem: Problem, theta: Tensor, some: Tensor, U: Tensor) -> _Part:
        along = projections(problem, U, theta, some).double().cpu().numpy()  # [n, m]
        curved = (U.T @ (hessian(problem, theta, some) @ U)).double().cpu().numpy()
        return cls(len(some), len(some) * curved, along.T @ along, along.sum(0))


def _ratio(parts: list[_Part], part: float, rest: float) -> tuple[float, float]:
    """Tr(HC) and g.H.g free of the noise left in g, over the parts given."""
    count = sum(p.count for p in parts)
    H, second, g = (
        np.sum([getattr(p, name) for p in parts], axis=0) / count for name in ("hessian", "second", "gradient")
    )
    top = float((H * (second - np.outer(g, g))).sum()) + rest
    return top, float(g @ H @ g) - part * top / max(count - 1, 1)


@dataclass(frozen=True)
class StrengthAlong(Measurement):
    """Noise strength against loss at several weight vectors; see :func:`strength_along`."""

    strength: np.ndarray = quantity("point", units="loss^2", long_name="noise strength Tr C_0")
    strength_stderr: np.ndarray = quantity("point", units="loss^2", long_name="standard error over samples")
    loss: np.ndarray = quantity("point", units="loss", long_name="loss")
    loss_stderr: np.ndarray = quantity("point", units="loss", long_name="standard error over samples")
    gradient_square: np.ndarray = quantity("point", units="loss^2", long_name="|g|^2 of the mean gradient")
    exponent: float = quantity(long_name="exponent of strength against loss")
    exponent_stderr: float = quantity(long_name="its standard error over points")
    prefactor: float = quantity(long_name="strength at unit loss")
    correlation: float = quantity(long_name="correlation of the logarithms")

    _primary = "strength"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Strength against loss in logarithms, with the fitted power and one of slope 1."""
        ax = new_axes(ax)
        ax.errorbar(self.loss, self.strength, xerr=self.loss_stderr, yerr=self.strength_stderr, fmt="o", ms=4)
        x = np.array([self.loss.min(), self.loss.max()])
        label = f"exponent {self.exponent:.2f} ± {self.exponent_stderr:.2f}"
        ax.plot(x, self.prefactor * x**self.exponent, label=label)
        middle = np.exp(np.mean(np.log(self.strength)) - np.mean(np.log(self.loss)))
        ax.plot(x, middle * x, "--", color="gray", label="proportional")
        ax.set(xscale="log", yscale="log", xlabel="loss", ylabel="noise strength Tr C")
        ax.legend()
        return ax


def strength_along(problem: Problem, thetas: Any, index: Any = None) -> StrengthAlong:
    r"""Noise strength and loss at several weight vectors, and the exponent of their relation.

    The law of Mori et al. 2022 (section 4.3) is :math:`\operatorname{Tr} C_0 \propto L`, an exponent of 1. The
    exponent is that of least squares in logarithms; its error is the scatter of the points around the line.

    Args:
        problem: the problem.
        thetas: weights ``[m, P]``, at least three, along a training run for instance.
        index: the samples; default all N.

    Raises:
        InputError: wrong shape, or a loss or strength that is not positive; TooShortError: fewer than 3 points.

    >>> data = torch.tensor([[1.0], [3.0]])
    >>> problem = Problem.from_function(lambda w, a: 0.5 * (a * w).square().sum(), torch.ones(1), data)
    >>> round(strength_along(problem, [[1.0], [2.0], [4.0]]).exponent, 9)
    1.0
    """
    points = torch.as_tensor(thetas)
    if points.ndim != 2 or points.shape[1] != problem.P:
        raise InputError(f"thetas have shape {tuple(points.shape)}", expected=f"[m, {problem.P}], one point a row")
    if len(points) < 3:
        raise TooShortError(f"{len(points)} points for the relation of strength and loss", expected="at least 3")
    found, losses, errors = [], [], []
    try:
        for theta in track(
            list(points), "noise strength along the path", bytes=problem.gradient_chunk * points[0].nbytes
        ):
            here = strength(problem, theta, index)
            sample = problem.sample_losses(theta, index).double().cpu().numpy()
            found.append(here)
            losses.append(sample.mean())
            errors.append(sample.std() / math.sqrt(len(sample)))
    except KeyboardInterrupt:
        if len(errors) < 3:
            raise
        warnings.warn(f"interrupted: {len(errors)} of {len(points)} points are used", ThermogradWarning, stacklevel=2)
    found, losses = found[: len(errors)], losses[: len(errors)]
    values = np.array([s.value for s in found])
    if not (values > 0).all() or not (np.array(losses) > 0).all():
        raise InputError("a loss or a noise strength is zero", expected="positive ones, which have logarithms")
    fit = power_law(np.array(losses), values)
    return StrengthAlong(
        strength=values,
        strength_stderr=np.array([s.stderr for s in found]),
        loss=np.array(losses),
        loss_stderr=np.array(errors),
        gradient_square=np.array([s.gradient_square for s in found]),
        exponent=fit.exponent,
        exponent_stderr=fit.stderr,
        prefactor=fit.prefactor,
        correlation=fit.correlation,
    )
