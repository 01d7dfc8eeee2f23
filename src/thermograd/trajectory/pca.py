"""Principal directions of a trajectory, with variances that are not measured where the directions were fitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.linalg
import torch

from ..errors import InputError, TooShortError
from ..hyperparameters import SGD
from ..measurement import Measurement, new_axes, quantity
from .detrend import Detrend, detrended
from .selection import Selection, Window, project, select_all

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PCA", "pca"]

_LARGEST = 20_000  # rows of the matrix that is diagonalised
_DIRECTION_BYTES = 2**30
_RANK = 1e-13  # relative eigenvalue below which a direction is rounding noise


@dataclass(frozen=True)
class PCA(Measurement):
    """Principal directions, their variances, and what a mere random walk would show.

    Held-out variances can exceed their left neighbour's: they are ordered by the variance in the sample that the
    directions come from.
    """

    directions: torch.Tensor = quantity("weight", "rank", long_name="principal directions, orthonormal")
    variance: np.ndarray = quantity("rank", units="weight^2", long_name="variance along each direction")
    variance_in_sample: np.ndarray = quantity(
        "rank", units="weight^2", long_name="variance in the rows that the directions were fitted to"
    )
    random_walk: np.ndarray = quantity(
        "rank", units="weight^2", long_name="in-sample variance of an isotropic random walk of equal total variance"
    )
    cosine_overlap: np.ndarray = quantity(
        "rank", long_name="share of each in-sample coordinate that is the cosine of a random walk"
    )
    total_variance: float = quantity(units="weight^2", long_name="variance summed over all weights")
    total_variance_in_sample: float = quantity(units="weight^2", long_name="in-sample variance summed over all weights")
    drift_index: float = quantity(long_name="drift of the first coordinate across the window; 1 is pure linear drift")
    n90: int = quantity(long_name="directions that hold 90 % of the in-sample variance")
    n90_without_first: int = quantity(long_name="directions after the first that hold 90 % of what it leaves")
    held_out: bool = True
    detrend: str = "linear"

    _primary = "variance"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Variance against rank, with the in-sample variance and the random-walk null."""
        ax = new_axes(ax)
        rank = np.arange(1, len(self.variance) + 1)
        ax.loglog(rank, self.variance, "o", ms=3, label="held out" if self.held_out else "in sample")
        if self.held_out:
            ax.loglog(rank, self.variance_in_sample, ".", ms=3, alpha=0.6, label="in sample")
        ax.loglog(rank, self.random_walk, "--", lw=1, label="random walk")
        ax.set(xlabel="rank", ylabel="variance")
        ax.legend()
        return ax


def pca(
    run: Any,
    window: Window = None,
    held_out: bool = True,
    detrend: Detrend = "linear",
    n: int | None = None,
    *,
    sgd: SGD | None = None,
) -> PCA:
    r"""Principal components of the weights along a trajectory.

    .. math:: \theta_k = \langle\theta\rangle + \sum_i a_i(k) p_i, \qquad \sigma_i^2 = \operatorname{Var} a_i

    (Feng & Tu 2021, "SGD dynamics": p_i and sigma_i^2 from one window.) Fitting directions to a window makes its large
    variances larger and its small ones smaller by orders of magnitude. So by default directions come from the first
    half of the window (whole epochs, when the epoch is known) and variances from the second, where the coordinates
    are freed of their linear trend; what the first half itself shows is reported beside it. An isotropic random walk
    has in-sample variances proportional to 1 / sin^2(pi i / 2T) (about i^-2) along cosines in time, which is no
    property of the loss (Antognini & Sohl-Dickstein 2018).

    Args:
        run: a run, an array [T, P], or replicas of either (deviations from each replica's mean are pooled).
        window: which rows, as in :func:`~thermograd.trajectory.select`.
        held_out: variances from other rows than the directions; False for the published in-sample recipe.
        detrend: what is taken out of held-out coordinates: "linear" or "constant".
        n: number of directions; default: as many as carry variance (and fit in 1 GiB).
        sgd: hyperparameters, for the length of an epoch.

    Raises:
        TooShortError: fewer than 8 rows (4 in sample); DivergedError: weights that are not finite.

    >>> rng = np.random.default_rng(0)
    >>> result = pca(rng.standard_normal((400, 3)) * [3.0, 2.0, 1.0])
    >>> result.directions.shape, np.sqrt(result.variance).round()
    (torch.Size([3, 3]), array([3., 2., 1.]))
    """
    from ..theory.flatness import random_walk_pca  # a recorder need not wait for the whole theory to be imported

    stretches = select_all(run, window, minimum=8 if held_out else 4, sgd=sgd)
    fit, test = zip(*[_halves(s) if held_out else (s, s) for s in stretches])
    directions, in_sample, total, scores = _decompose(list(fit), n)
    if held_out:
        parts = [detrended(project(s, directions), detrend) for s in test]
        freedom = sum(len(a) - (2 if detrend == "linear" else 1) for a in parts)
        variance = sum((a**2).sum(axis=0) for a in parts) / freedom  # [k]
        whole = sum(_scatter(s, detrend) for s in test) / freedom
    else:
        variance, whole = in_sample, total
    rows = fit[0].T
    null = np.zeros(len(in_sample))
    null[: rows - 1] = total * random_walk_pca(rows)[: len(null)]
    return PCA(
        directions=torch.from_numpy(directions),
        variance=variance,
        variance_in_sample=in_sample,
        random_walk=null,
        cosine_overlap=_cosine_overlap(scores, rows),
        total_variance=whole,
        total_variance_in_sample=total,
        drift_index=float(np.mean([_drift_index(s, directions[:, 0]) for s in stretches])),
        n90=_count(in_sample, 0.9 * total),
        n90_without_first=_count(in_sample[1:], 0.9 * (total - in_sample[0])),
        held_out=held_out,
        detrend=detrend,
    )


def _halves(stretch: Selection) -> tuple[Selection, Selection]:
    """Two halves, each a whole number of epochs when there are at least two."""
    half, epoch = stretch.T // 2, stretch.rows_per_epoch
    if epoch and half >= epoch:
        half = half // epoch * epoch
    return stretch.rows(stretch.T - 2 * half, stretch.T - half), stretch.rows(stretch.T - half, stretch.T)


def _scatter(stretch: Selection, detrend: Detrend) -> float:
    """Sum over rows and weights of the squared deviation from the mean, or from the line."""
    return float(sum((detrended(slab, detrend) ** 2).sum() for _, slab in stretch.slabs()))


def _decompose(parts: list[Selection], n: int | None) -> tuple[np.ndarray, np.ndarray, float, np.ndarray]:
    """Directions [P, k], variances [k], total variance, and unit coordinates in time [R T, k]."""
    rows, size = sum(s.T for s in parts), parts[0].P
    freedom = rows - len(parts)
    if min(rows, size) > _LARGEST:
        raise InputError(
            f"the window has {rows} rows of {size} weights",
            expected=f"at most {_LARGEST} of either",
            remedy="choose a shorter window, or select every tenth row",
        )
    if freedom < 2:
        raise TooShortError(f"{rows} rows are too few for principal directions", expected="at least 3")
    if n is not None and n < 1:
        raise InputError(f"n is {n}", expected="a number of directions >= 1")
    means = [s.mean() for s in parts]
    most = min(freedom, size, n or freedom, max(1, _DIRECTION_BYTES // (8 * size)))
    solve = _by_gram if rows < size else _by_covariance
    return solve(parts, means, most, freedom)


def _by_gram(
    parts: list[Selection], means: list[np.ndarray], most: int, freedom: int
) -> tuple[np.ndarray, np.ndarray, float, np.ndarray]:
    rows = sum(s.T for s in parts)
    gram = np.zeros((rows, rows))
    for _, slab in _pooled_slabs(parts, means):
        gram += slab @ slab.T
    values, vectors = _top(gram, most)
    vectors = vectors[:, : len(values)]
    directions = np.empty((parts[0].P, len(values)))
    for columns, slab in _pooled_slabs(parts, means):
        directions[columns] = slab.T @ (vectors / np.sqrt(values))
    if values[-1] < 1e-8 * values[0]:  # rounding in the Gram matrix has tilted the weakest directions
        directions, triangle = np.linalg.qr(directions)
        directions *= np.sign(np.diag(triangle))
    return directions, values / freedom, float(np.trace(gram)) / freedom, vectors


def _by_covariance(
    parts: list[Selection], means: list[np.ndarray], most: int, freedom: int
) -> tuple[np.ndarray, np.ndarray, float, np.ndarray]:
    size = parts[0].P
    scatter = np.zeros((size, size))
    for stretch, mean in zip(parts, means):
        for _, block in stretch.blocks():
            centred = block - mean
            scatter += centred.T @ centred
    values, directions = _top(scatter, most)
    scores = np.concatenate([project(s, directions, m) for s, m in zip(parts, means)]) / np.sqrt(values)
    return directions, values / freedom, float(np.trace(scatter)) / freedom, scores


def _pooled_slabs(parts: list[Selection], means: list[np.ndarray]) -> Any:
    """Columns of all replicas stacked in time, each replica centred: (which, [R T, c])."""
    for slabs in zip(*[s.slabs() for s in parts]):
        columns = slabs[0][0]
        yield columns, np.concatenate([slab - mean[columns] for (_, slab), mean in zip(slabs, means)])


def _top(matrix: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Leading eigenpairs, descending, those that are rounding noise left out."""
    size = len(matrix)
    values, vectors = scipy.linalg.eigh(matrix, subset_by_index=[size - most, size - 1])
    values, vectors = values[::-1], vectors[:, ::-1]
    if values[0] <= 0:
        raise InputError("the weights do not move in the window", expected="a trajectory that fluctuates")
    keep = int((values > _RANK * values[0]).sum())
    return values[:keep], np.ascontiguousarray(vectors[:, :keep])


def _cosine_overlap(scores: np.ndarray, rows: int) -> np.ndarray:
    """Share of each coordinate's motion along cos(pi i (t + 1/2) / T), summed over replicas. [k]"""
    share = np.zeros(scores.shape[1])
    count = min(scores.shape[1], rows - 1)
    time = (np.arange(rows)[:, None] + 0.5) * np.arange(1, count + 1) * np.pi / rows
    cosines = np.cos(time) * np.sqrt(2 / rows)  # [T, k], unit length
    for part in scores[:, :count].reshape(-1, rows, count):
        share[:count] += (part * cosines).sum(axis=0) ** 2
    return share


def _drift_index(stretch: Selection, direction: np.ndarray) -> float:
    """|last epoch's mean - first epoch's mean| / sqrt(12 Var); an epoch is a tenth of the window when unknown."""
    coordinate = project(stretch, direction)[:, 0]
    epoch = stretch.rows_per_epoch or 0
    part = epoch if 0 < epoch <= stretch.T // 4 else max(1, stretch.T // 10)
    moved = coordinate[-part:].mean() - coordinate[:part].mean()
    # between the middles of the two parts a pure drift covers the share 1 - part/T of the window
    return float(abs(moved) / (np.sqrt(12 * coordinate.var()) * (1 - part / stretch.T)))


def _count(variances: np.ndarray, enough: float) -> int:
    """How many leading variances sum up to ``enough``."""
    return min(len(variances), int(np.searchsorted(np.cumsum(variances), enough)) + 1)
