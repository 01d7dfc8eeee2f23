r"""The loss along directions in weight space, and the flatness of Feng and Tu."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, NonFiniteError
from ..measurement import Measurement, new_axes, quantity
from ..problem import Problem
from ..progress import bar
from .displaced import DisplacedLosses, as_directions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Flatness", "LossProfile", "flatness", "loss_along"]

_GROWTH, _PATIENCE = 1.3, 20  # the bracket grows by this factor so many times, then doubles
_CEILING = 50.0  # stands for an infinite log-ratio of losses, so that interpolation stays finite


@dataclass(frozen=True)
class LossProfile(Measurement):
    """Losses along straight lines through a point; see :func:`loss_along`."""

    offsets: np.ndarray = quantity("direction", "offset", long_name="displacement along the direction")
    losses: np.ndarray = quantity("direction", "offset", units="loss", long_name="loss")

    _primary = "losses"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Loss against displacement, a line for each direction."""
        ax = new_axes(ax)
        for i, (offsets, losses) in enumerate(zip(self.offsets, self.losses)):
            ax.plot(offsets, losses, label=f"direction {i + 1}")
        ax.set(xlabel="displacement", ylabel="loss")
        if len(self.losses) <= 10:
            ax.legend()
        return ax


def loss_along(
    problem: Problem, directions: Any, offsets: Any, theta: Any = None, weight_decay: float = 0.0
) -> LossProfile:
    r"""Loss of the whole data set along directions, :math:`L_i(\delta) = L(\theta + \delta\, p_i)`.

    Args:
        problem: the problem.
        directions: ``[P, k]``, one direction a column (or ``[P]``, or eigenpairs).
        offsets: displacements :math:`\delta`, ``[m]`` for all directions or ``[k, m]``, in units of the directions.
        theta: centre ``[P]``; default: where the model stands now.
        weight_decay: adds :math:`\tfrac\lambda2|\theta|^2` to the loss.

    Returns:
        :class:`LossProfile` with ``.offsets`` and ``.losses``, both ``[k, m]``.

    Raises:
        InputError: shapes do not match.
        NonFiniteError: a loss is not finite; the message says where.

    >>> bowl = Problem.from_function(lambda w, a: (w - a).square().sum(), torch.zeros(2), torch.zeros(3, 2))
    >>> loss_along(bowl, torch.eye(2), [0.0, 1.0, 2.0]).losses
    array([[0., 1., 4.],
           [0., 1., 4.]])
    """
    centre, columns = problem.as_theta(theta), as_directions(problem, directions)  # [P], [P, k]
    grid = np.asarray(offsets.detach().cpu() if isinstance(offsets, Tensor) else offsets, dtype=np.float64)
    k = columns.shape[1]
    if grid.ndim == 1:
        grid = np.broadcast_to(grid, (k, len(grid))).copy()  # [k, m]
    if grid.ndim != 2 or grid.shape[0] != k or not grid.size or not np.isfinite(grid).all():
        raise InputError(f"offsets have shape {grid.shape}", expected=f"finite numbers, [m] or [{k}, m]")
    evaluate = DisplacedLosses(problem, weight_decay)
    losses = np.empty_like(grid)
    with bar("loss along directions", grid.size) as progress:
        for i in range(k):
            steps = torch.as_tensor(grid[i], device=problem.device).to(problem.dtype)
            losses[i] = evaluate(centre + steps[:, None] * columns[:, i]).double().cpu().numpy()
            progress.advance(grid.shape[1])
    if not np.isfinite(losses).all():
        i, j = np.argwhere(~np.isfinite(losses))[0]
        problem.loss(centre + float(grid[i, j]) * columns[:, i])  # names the sample
        raise NonFiniteError(f"the loss at offset {grid[i, j]:g} along direction {i} is {losses[i, j]}")
    return LossProfile(grid, losses)


@dataclass(frozen=True)
class Flatness(Measurement):
    """Widths over which the loss stays below a multiple of its value at the centre; see :func:`flatness`."""

    flatness: np.ndarray = quantity("direction", long_name="flatness F, right - left")
    left: np.ndarray = quantity("direction", long_name="nearest crossing at negative displacement")
    right: np.ndarray = quantity("direction", long_name="nearest crossing at positive displacement")
    crossed: np.ndarray = quantity("direction", long_name="whether the loss crosses on both sides")
    curvature: np.ndarray = quantity("direction", units="loss", long_name="second derivative at the centre, by probes")
    loss: float = quantity(units="loss", long_name="loss at the centre")
    rise: float = quantity(long_name="ratio of the loss at the crossings to that at the centre")

    _primary = "flatness"

    @property
    def quadratic(self) -> np.ndarray:
        r"""The flatness of the parabola with the same curvature, :math:`\sqrt{8(r-1)L_0/h}`; inf where h <= 0."""
        with np.errstate(divide="ignore"):
            return np.sqrt(8 * (self.rise - 1) * self.loss / np.maximum(self.curvature, 0))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Flatness against the rank of the direction, with the quadratic estimate."""
        ax = new_axes(ax)
        rank = np.arange(1, len(self.flatness) + 1)
        seen, bowl = np.isfinite(self.flatness), np.isfinite(self.quadratic)
        ax.semilogy(rank[seen], self.flatness[seen], "o", label="measured")
        ax.semilogy(rank[bowl], self.quadratic[bowl], "-", label="parabola of the same curvature")
        ax.set(xlabel="direction", ylabel="flatness F")
        ax.legend()
        return ax


def flatness(
    problem: Problem,
    directions: Any,
    theta: Any = None,
    rise: float = math.e,
    rtol: float = 1e-4,
    weight_decay: float = 0.0,
    max_width: float | None = None,
) -> Flatness:
    r"""Flatness of the loss along directions (Feng & Tu 2021).

    .. math::
        F_i = \theta_r - \theta_l, \qquad L(\theta + \theta_{l,r}\, p_i) = e\, L(\theta), \quad \theta_l < 0 < \theta_r

    with the nearest crossings on either side, over the whole data set. For a parabola
    :math:`F_i = \sqrt{8(e-1) L_0 / h_i}`. Two small probes give the curvature and with it a first step of a tenth
    of the parabola's half width; the step then grows geometrically until the loss crosses, and the crossing is
    narrowed by bracketed interpolation (Chandrupatla 1997) to ``rtol``. A bump that is narrower than 30 % of its
    distance can be stepped over.

    Args:
        problem: the problem; use float64.
        directions: ``[P, k]``, one direction a column, of unit length if F is to be in units of weights.
        theta: centre ``[P]``; default: where the model stands now.
        rise: ratio of losses that counts as crossing, e by default.
        rtol: relative tolerance of the crossings.
        weight_decay: adds :math:`\tfrac\lambda2|\theta|^2` to the loss.
        max_width: where to give up on either side, in units of the directions; default: a thousand times the
            length of theta (at least one) over that of the direction.

    Returns:
        :class:`Flatness` with ``.flatness`` [k], ``.left`` [k] (negative) and ``.right`` [k]. Where the loss does
        not cross within ``max_width``, that end is infinite, F is infinite and ``.crossed`` is False.

    Raises:
        InputError: the loss at the centre is not positive, so that no multiple of it can be reached; or a bad
            argument.
        NonFiniteError: the loss becomes NaN before it crosses.

    >>> bowl = Problem.from_function(lambda w, a: 1 + (w - a).square().sum(), torch.zeros(2), torch.zeros(3, 2))
    >>> f = flatness(bowl, torch.eye(2)[:, 0], rise=2.0)
    >>> f.left.round(3), f.right.round(3)
    (array([-1.]), array([1.]))
    """
    if not (math.isfinite(rise) and rise > 1):
        raise InputError(f"rise is {rise}", expected="a ratio of losses > 1")
    if not 0 < rtol < 1:
        raise InputError(f"rtol is {rtol}", expected="a number between 0 and 1")
    centre, columns = problem.as_theta(theta), as_directions(problem, directions)  # [P], [P, k]
    base = float(problem.loss(centre)) + 0.5 * weight_decay * float(centre.square().sum())
    if not base > 1e-290:
        raise InputError(
            f"the loss at the centre is {base:g}",
            expected="a positive loss: flatness is the width over which it grows by a ratio",
            remedy="measure before the loss vanishes, in float64, or add a weight_decay",
        )
    lengths = columns.norm(dim=0).double().cpu().numpy()  # [k]
    scale = max(float(centre.norm()), 1e-300)
    if max_width is not None and not max_width > 0:
        raise InputError(f"max_width is {max_width}", expected="a positive number")
    limit = 1e3 * max(scale, 1.0) / lengths if max_width is None else np.full_like(lengths, max_width)
    probe = np.minimum(1e-3 * (scale if scale > 1e-300 else 1.0) / lengths, limit / 4)

    evaluate = DisplacedLosses(problem, weight_decay)
    with bar("flatness", None) as progress:

        def log_ratio(which: np.ndarray, offsets: np.ndarray) -> np.ndarray:
            """Logarithm of loss over threshold at offsets along the directions ``which``; beyond reach: ceiling."""
            chosen = torch.as_tensor(which, device=columns.device)
            steps = torch.as_tensor(offsets, device=problem.device).to(problem.dtype)
            losses = evaluate(centre + steps[:, None] * columns.T[chosen]).double().cpu().numpy()
            progress.advance(len(which))
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = np.log(losses / base) - math.log(rise)
            return np.clip(np.nan_to_num(ratio, nan=_CEILING, posinf=_CEILING, neginf=-_CEILING), -_CEILING, _CEILING)

        k = len(lengths)
        both = np.tile(np.arange(k), 2)  # left sides, then right sides
        side = np.repeat([-1.0, 1.0], k)
        curvature = _curvature(log_ratio, base, rise, probe)
        with np.errstate(divide="ignore"):
            start = 0.1 * np.sqrt(2 * (rise - 1) * base / np.maximum(curvature, 0))
        start = np.where(np.isfinite(start), np.minimum(start, limit / 4), probe)
        signed = lambda which, r: log_ratio(both[which], side[which] * r)  # noqa: E731
        low, high, crossed = _bracket(signed, np.tile(start, 2), np.tile(limit, 2))
        ends = np.full(2 * k, np.inf)
        ends[crossed] = _narrow(signed, np.flatnonzero(crossed), low[crossed], high[crossed], rtol)
    _refuse_undefined(evaluate, centre, columns, both[crossed], (side * np.where(crossed, ends, 0))[crossed], rtol)
    left, right = -ends[:k], ends[k:]
    return Flatness(right - left, left, right, crossed[:k] & crossed[k:], curvature, base, float(rise))


_Function = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _curvature(log_ratio: _Function, base: float, rise: float, probe: np.ndarray) -> np.ndarray:
    """Second derivatives by a symmetric difference, taken again at a step where the loss changes by a percent."""
    which = np.arange(len(probe))
    step = probe
    for _ in range(3):
        right, left = (np.exp(log_ratio(which, s * step)) * rise * base for s in (1, -1))
        with np.errstate(over="ignore"):
            second = (right + left - 2 * base) / step**2
        change = np.abs(right + left - 2 * base) / base
        # too small a change drowns in rounding, too large a one is not the curvature at the centre
        factor = np.sqrt(1e-2 / np.clip(change, 1e-8, 1e8))
        step = np.where((change < 1e-4) | (change > 0.1), np.minimum(step * factor, 1e3 * probe), step)
    return second


def _bracket(f: _Function, start: np.ndarray, limit: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distances below and above the nearest crossing seen, by geometric steps outwards (inwards if too far)."""
    low, high = np.zeros_like(start), start.copy()
    value = f(np.arange(len(start)), start)
    outside = value >= 0
    inward = np.flatnonzero(outside)
    while len(inward):  # the first step was beyond the crossing already
        trial = high[inward] / 2
        above = f(inward, trial) >= 0
        high[inward[above]] = trial[above]
        low[inward[~above]] = trial[~above]
        inward = inward[above & (trial > 1e-12 * start[inward])]
    crossed = outside.copy()
    active, tries = np.flatnonzero(~outside), 0
    low[active] = start[active]
    while len(active):
        tries += 1
        trial = np.minimum(low[active] * (_GROWTH if tries <= _PATIENCE else 2.0), limit[active])
        above = f(active, trial) >= 0
        high[active[above]], crossed[active[above]] = trial[above], True
        low[active[~above]] = trial[~above]
        active = active[~above & (trial < limit[active])]
    return low, high, crossed


def _narrow(f: _Function, which: np.ndarray, low: np.ndarray, high: np.ndarray, rtol: float) -> np.ndarray:
    """Roots within brackets to a relative tolerance: Chandrupatla's method, all at once."""
    if not len(which):
        return np.empty(0)
    a, b = high.copy(), low.copy()
    fa, fb = f(which, a), f(which, b)
    c, fc = a.copy(), fa.copy()
    t = np.full(len(which), 0.5)
    root = np.where(np.abs(fa) < np.abs(fb), a, b)
    active = np.arange(len(which))
    for _ in range(200):
        x = a[active] + t[active] * (b[active] - a[active])
        fx = f(which[active], x)
        same = np.sign(fx) == np.sign(fa[active])
        keep, flip = active[same], active[~same]
        c[keep], fc[keep] = a[keep], fa[keep]
        c[flip], fc[flip] = b[flip], fb[flip]
        b[flip], fb[flip] = a[flip], fa[flip]
        a[active], fa[active] = x, fx
        better_a = np.abs(fa[active]) < np.abs(fb[active])
        root[active] = np.where(better_a, a[active], b[active])
        smallest = np.where(better_a, fa[active], fb[active])
        limit = 0.5 * rtol * np.abs(root[active]) / np.maximum(np.abs(b[active] - a[active]), 1e-300)
        running = (limit <= 0.5) & (smallest != 0)
        limit, active = limit[running], active[running]
        if not len(active):
            break
        t[active] = np.clip(_interpolated(a, b, c, fa, fb, fc, active), limit, 1 - limit)
    return root


def _interpolated(
    a: np.ndarray, b: np.ndarray, c: np.ndarray, fa: np.ndarray, fb: np.ndarray, fc: np.ndarray, at: np.ndarray
) -> np.ndarray:
    """Where between a and b to look next: inverse quadratic interpolation where it is safe, else the middle."""
    a, b, c, fa, fb, fc = (v[at] for v in (a, b, c, fa, fb, fc))
    with np.errstate(divide="ignore", invalid="ignore"):
        xi, phi = (a - b) / (c - b), (fa - fb) / (fc - fb)
        t = fa / (fb - fa) * fc / (fb - fc) + (c - a) / (b - a) * fa / (fc - fa) * fb / (fc - fb)
        safe = (phi**2 < xi) & ((1 - phi) ** 2 < 1 - xi) & np.isfinite(t)
    return np.where(safe, t, 0.5)


def _refuse_undefined(
    evaluate: DisplacedLosses, centre: Tensor, columns: Tensor, which: np.ndarray, ends: np.ndarray, rtol: float
) -> None:
    """A crossing must be one of finite losses: just beyond it the loss may be large, but not undefined."""
    if not len(which):
        return
    chosen = torch.as_tensor(which, device=columns.device)
    for factor in (1 - rtol, 1 + rtol):
        steps = torch.as_tensor(ends * factor, device=centre.device).to(centre.dtype)
        bad = torch.isnan(evaluate(centre + steps[:, None] * columns.T[chosen])).nonzero().flatten()
        if len(bad):
            raise NonFiniteError(
                f"the loss is NaN at offset {float(steps[bad[0]]):g} along direction {int(which[int(bad[0])])}",
                expected="a loss that crosses the threshold before it becomes undefined",
                remedy="lower rise, or check the model at such weights",
            )
