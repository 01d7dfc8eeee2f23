r"""How many directions matter: effective dimensions of a spectrum, overlap of subspaces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, NonFiniteError
from ..measurement import Measurement, new_axes, quantity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["EffectiveDimension", "SubspaceOverlap", "effective_dimension", "subspace_overlap"]


@dataclass(frozen=True)
class EffectiveDimension(Measurement):
    """Several counts of the directions that carry a spectrum; see :func:`effective_dimension`."""

    participation_ratio: float = quantity(long_name="(sum a)^2 / sum a^2")
    entropy: float = quantity(long_name="exponential of the Shannon entropy of the positive spectrum")
    stable_rank: float = quantity(long_name="sum a^2 / max a^2")
    intrinsic: float = quantity(long_name="sum a / max a over the positive spectrum")
    positive: int = quantity(long_name="number of positive eigenvalues")
    negative: int = quantity(long_name="number of negative eigenvalues")

    _primary = "participation_ratio"

    def plot(self, ax: Axes | None = None) -> Axes:
        """The four dimensions as bars."""
        ax = new_axes(ax)
        names = ("participation_ratio", "entropy", "stable_rank", "intrinsic")
        ax.barh([name.replace("_", " ") for name in names], [getattr(self, name) for name in names])
        ax.set(xlabel="effective dimension")
        return ax


def effective_dimension(eigenvalues: Any) -> EffectiveDimension:
    r"""Effective dimensions of a spectrum :math:`a_1 \dots a_k`.

    .. math::
        n_\mathrm{participation} = \frac{(\sum a)^2}{\sum a^2}, \quad
        n_\mathrm{entropy} = e^{-\sum p \ln p},\ p = a/\sum a, \quad
        n_\mathrm{stable} = \frac{\operatorname{Tr} A^2}{a_\max^2}

    the two readings of Mori et al. 2022, Eqs. 44-45, and the stable rank. Entropy and ``intrinsic``
    (:math:`\sum a / a_\max`) take the positive eigenvalues alone. The counts of signs include only eigenvalues
    above rounding (1e-12 of the largest).

    Args:
        eigenvalues: ``[k]``, or the result of :func:`~thermograd.landscape.spectrum.eigenpairs`.

    Raises:
        InputError: empty, or no positive eigenvalue.
        NonFiniteError: not finite.

    >>> n = effective_dimension([1.0, 1.0, 1.0, 0.0])
    >>> n.participation_ratio, round(n.entropy, 12), n.stable_rank
    (3.0, 3.0, 3.0)
    """
    a = eigenvalues.detach().cpu().numpy() if isinstance(eigenvalues, Tensor) else np.asarray(eigenvalues)
    a = np.asarray(a, dtype=np.float64).ravel()  # [k]
    if not np.isfinite(a).all():
        raise NonFiniteError("an eigenvalue is not finite")
    if not len(a) or a.max() <= 0:
        raise InputError("there is no positive eigenvalue", expected="a spectrum with a positive part")
    a = a / np.abs(a).max()  # the dimensions do not depend on the scale; squares cannot overflow
    up = a[a > 0]
    p = up / up.sum()
    return EffectiveDimension(
        participation_ratio=float(a.sum() ** 2 / (a**2).sum()),
        entropy=float(np.exp(-(p * np.log(p)).sum())),
        stable_rank=float((a**2).sum() / (a**2).max()),
        intrinsic=float(up.sum() / up.max()),
        positive=int((a > 1e-12).sum()),
        negative=int((a < -1e-12).sum()),
    )


@dataclass(frozen=True)
class SubspaceOverlap(Measurement):
    """How two subspaces lie to each other; see :func:`subspace_overlap`."""

    cosines: np.ndarray = quantity("pair", long_name="cosine of the principal angle")
    angles: np.ndarray = quantity("pair", units="rad", long_name="principal angle")
    overlap: float = quantity(long_name="mean squared cosine")
    chance: float = quantity(long_name="expected overlap of random subspaces of these dimensions")

    _primary = "cosines"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Cosines of the principal angles, largest first."""
        ax = new_axes(ax)
        ax.plot(np.arange(1, len(self.cosines) + 1), self.cosines, "o-")
        ax.axhline(np.sqrt(self.chance), ls="--", color="gray", label="random subspaces (rms)")
        ax.set(xlabel="pair", ylabel="cosine of principal angle", ylim=(0, 1.05))
        ax.legend()
        return ax


def subspace_overlap(U: Any, V: Any) -> SubspaceOverlap:
    r"""Principal angles between the column spaces of two matrices.

    The cosines are the singular values of :math:`Q_U^\top Q_V` (Bjoerck & Golub 1973); small angles are taken from
    the sines, which keeps their precision. ``overlap`` is the mean squared cosine over the smaller subspace:
    1 when it lies within the other, 0 when they are orthogonal, max(j, k)/P by chance.

    Args:
        U: ``[P, j]`` (or ``[P]``), torch or numpy; columns need not be orthonormal but must be independent.
        V: ``[P, k]`` (or ``[P]``).

    Raises:
        InputError: shapes do not match, or columns are linearly dependent.

    >>> subspace_overlap(np.eye(3)[:, :2], np.eye(3)[:, 1:]).cosines.round(12)
    array([1., 0.])
    """
    left, right = _orthonormal(U, "U"), _orthonormal(V, "V")
    if left.shape[0] != right.shape[0]:
        raise InputError(f"U has {left.shape[0]} rows and V {right.shape[0]}", expected="equal numbers of rows")
    if left.shape[1] > right.shape[1]:
        left, right = right, left
    cosines = torch.linalg.svdvals(left.T @ right).clamp(0, 1)  # [min(j, k)]
    sines = torch.linalg.svdvals(left - right @ (right.T @ left)).flip(0).clamp(0, 1)
    angles = torch.where(cosines > 0.7, sines.asin(), cosines.acos())
    return SubspaceOverlap(
        cosines=cosines.numpy(),
        angles=angles.numpy(),
        overlap=float(cosines.square().mean()),
        chance=right.shape[1] / right.shape[0],
    )


def _orthonormal(columns: Any, name: str) -> Tensor:
    matrix = torch.as_tensor(columns).detach().cpu().to(torch.float64)
    matrix = matrix[:, None] if matrix.ndim == 1 else matrix
    if matrix.ndim != 2 or not 0 < matrix.shape[1] <= matrix.shape[0]:
        raise InputError(f"{name} has shape {tuple(matrix.shape)}", expected="[P, k] with k <= P")
    if not bool(torch.isfinite(matrix).all()):
        raise NonFiniteError(f"{name} is not finite")
    Q, R = torch.linalg.qr(matrix)
    size = R.diagonal().abs()
    if float(size.min()) <= 1e-12 * float(size.max()):
        raise InputError(f"the columns of {name} are linearly dependent", expected="independent columns")
    return Q
