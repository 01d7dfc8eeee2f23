r"""Traces and diagonals of symmetric operators from random probes, with standard errors.

After Ctrl-C an estimate from the probes made so far is returned, with a warning and its own standard error.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError, ThermogradWarning
from ..measurement import Measurement, new_axes, quantity
from ..progress import bar
from .operators import MatrixOperator, Operator, as_operator

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Diagonal", "Estimate", "diagonal", "trace", "trace_of_square", "xdiag", "xtrace"]

_BLOCK = 16  # probes multiplied at once


@dataclass(frozen=True)
class Estimate(Measurement):
    """A number with its standard error (zero when it is exact)."""

    value: float = quantity(long_name="value")
    stderr: float = quantity(long_name="standard error")

    _primary = "value"

    def plot(self, ax: Axes | None = None) -> Axes:
        """The value as a point with its error bar."""
        ax = new_axes(ax)
        ax.errorbar([0], [self.value], yerr=[self.stderr], fmt="o", capsize=4)
        ax.set(xticks=[], ylabel="value")
        return ax


@dataclass(frozen=True)
class Diagonal(Measurement):
    """The diagonal of an operator with its standard error (zero when it is exact)."""

    value: Tensor = quantity("weight", long_name="diagonal element")
    stderr: Tensor = quantity("weight", long_name="standard error")

    _primary = "value"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Diagonal elements in descending order."""
        ax = new_axes(ax)
        ax.plot(self.value.detach().cpu().sort(descending=True)[0].numpy())
        ax.set(xlabel="rank", ylabel="diagonal element")
        return ax


def trace(A: Any, probes: int = 60, seed: int = 0) -> Estimate:
    r"""Trace of a symmetric operator, by Hutch++ (Meyer, Musco, Musco & Woodruff 2021).

    A third of the products finds the range Q of the largest eigenvalues, a third gives the trace there exactly,
    and the last third estimates the rest with random signs:

    .. math::
        \operatorname{Tr} A \approx \operatorname{Tr} Q^\top A Q
            + \Big\langle g^\top (I-QQ^\top) A (I-QQ^\top) g \Big\rangle_g

    which is unbiased; the standard error is that of the last mean. Exact, by P products, when ``probes >= P``
    and for explicit matrices.

    Args:
        A: operator or matrix, (P, P).
        probes: products with single vectors, at least 9.
        seed: of the probes.

    Raises:
        InputError: too few probes.

    >>> trace(torch.diag(torch.tensor([1.0, 2.0, 3.0])))
    Estimate(value=6.0, stderr=0.0)
    """
    operator = as_operator(A)
    if isinstance(operator, MatrixOperator):
        return Estimate(float(operator.matrix.diagonal().sum()), 0.0)
    if _exact(operator, probes):
        return Estimate(float(operator.dense().diagonal().sum()), 0.0)
    try:
        Q, image, rest = _split(operator, probes, seed, "trace")
    except _Early as early:
        return _with_error(0.0, (early.probes * early.images).sum(0))
    known = float((Q * image).sum())
    samples = (rest.probes * rest.images).sum(0)  # [probes / 3]
    return _with_error(known, samples)


def trace_of_square(A: Any, probes: int = 60, seed: int = 0) -> Estimate:
    r"""Trace of the square, :math:`\operatorname{Tr} A^2 = \|A\|_F^2`, with the largest eigenvalues taken out exactly.

    .. math:: \operatorname{Tr} A^2 = \|A Q\|_F^2 + \Big\langle \|A (I-QQ^\top) g\|^2 \Big\rangle_g

    Args:
        A: operator or matrix, (P, P).
        probes: products with single vectors, at least 9.
        seed: of the probes.

    >>> trace_of_square(torch.diag(torch.tensor([1.0, 2.0, 3.0]))).value
    14.0
    """
    operator = as_operator(A)
    if isinstance(operator, MatrixOperator) or _exact(operator, probes):
        return Estimate(float(operator.dense().square().sum()), 0.0)
    try:
        _, image, rest = _split(operator, probes, seed, "trace of the square")
    except _Early as early:
        return _with_error(0.0, early.images.square().sum(0))
    return _with_error(float(image.square().sum()), rest.images.square().sum(0))


def diagonal(A: Any, probes: int = 60, seed: int = 0) -> Diagonal:
    r"""Diagonal of a symmetric operator (Bekas, Kokiopoulou & Saad 2007, after deflation as in Hutch++).

    .. math::
        \operatorname{diag} A = \operatorname{diag}(Q Q^\top A) + \big\langle g \circ (I-QQ^\top) A g \big\rangle_g

    Args:
        A: operator or matrix, (P, P).
        probes: products with single vectors, at least 9.
        seed: of the probes.

    >>> diagonal(torch.diag(torch.tensor([1.0, 2.0]))).value
    tensor([1., 2.])
    """
    operator = as_operator(A)
    if isinstance(operator, MatrixOperator) or _exact(operator, probes):
        exact = operator.dense().diagonal().clone()
        return Diagonal(exact, torch.zeros_like(exact))
    try:
        Q, image, rest = _split(operator, probes, seed, "diagonal", project=False)
    except _Early as early:
        return _mean_diagonal(early.probes * early.images)
    known = (Q * image).sum(1, keepdim=True)  # [P, 1]
    return _mean_diagonal(known + rest.signs * (rest.images - Q @ (Q.T @ rest.images)))


def _mean_diagonal(samples: Tensor) -> Diagonal:
    return Diagonal(samples.mean(1), samples.std(1) / math.sqrt(samples.shape[1]))


class _Stopped(Exception):
    """Ctrl-C came when the images of the first few vectors of a block were known."""

    def __init__(self, images: list[Tensor]):
        self.images = torch.cat(images, dim=1) if images else torch.empty(0, 0)


class _Early(Exception):
    """Ctrl-C came before the estimate was whole: what probes and images [P, j] there are serve a plain one."""

    def __init__(self, probes: Tensor, images: Tensor):
        count = images.shape[1]
        if count < 2:
            raise KeyboardInterrupt
        self.probes, self.images = probes[:, :count], images
        message = f"interrupted: the estimate is the plain mean over {count} probes, with its standard error"
        warnings.warn(message, ThermogradWarning, stacklevel=4)


@dataclass(frozen=True)
class _Rest:
    signs: Tensor  # [P, j] random signs g
    probes: Tensor  # [P, j] (I - Q Q^T) g, or g
    images: Tensor  # [P, j] A times that


def _bytes(vectors: Tensor) -> int:
    return vectors.numel() * vectors.element_size()


def _exact(operator: Operator, probes: int, least: int = 9) -> bool:
    if probes >= operator.shape[0]:
        return True
    if probes < least:
        raise InputError(f"probes is {probes}", expected=f"at least {least} (three for each part)")
    return False


def _split(operator: Operator, probes: int, seed: int, what: str, project: bool = True) -> tuple[Tensor, Tensor, _Rest]:
    """Range Q of the largest eigenvalues, A Q, and random signs outside of it with their images."""
    third = probes // 3
    random = torch.Generator().manual_seed(seed)
    signs = _signs(operator, third, random)
    first = _signs(operator, third, random)
    with bar(f"{what}, {3 * third} products", 3 * third, bytes=4 * _bytes(signs)) as progress:
        try:
            found = _multiply(operator, first, progress)
        except _Stopped as stop:
            raise _Early(first, stop.images) from None
        Q = torch.linalg.qr(found)[0]  # [P, third]
        outside = signs - Q @ (Q.T @ signs) if project else signs
        try:
            image = _multiply(operator, Q, progress)
            images = _multiply(operator, outside, progress, least=2)
        except _Stopped:
            raise _Early(first, found) from None
    count = images.shape[1]
    return Q, image, _Rest(signs[:, :count], outside[:, :count], images)


def _signs(operator: Operator, columns: int, random: torch.Generator) -> Tensor:
    bits = torch.randint(0, 2, (operator.shape[0], columns), generator=random)
    return (2 * bits - 1).to(operator.device, operator.dtype)


def _multiply(operator: Operator, block: Tensor, progress: bar, least: int = 0) -> Tensor:
    """The products with a block; after Ctrl-C what there is, where that is at least ``least`` > 0 columns."""
    parts: list[Tensor] = []
    for part in block.split(_BLOCK, dim=1):
        try:
            parts.append(operator @ part)
        except KeyboardInterrupt:
            done = sum(p.shape[1] for p in parts)
            if not 0 < least <= done:
                raise _Stopped(parts) from None
            message = f"interrupted: the estimate rests on {done} of {block.shape[1]} probes of its last part"
            warnings.warn(message, ThermogradWarning, stacklevel=4)
            break
        progress.advance(part.shape[1])
    return torch.cat(parts, dim=1)


def _with_error(known: float, samples: Tensor) -> Estimate:
    count = len(samples)
    return Estimate(known + float(samples.mean()), float(samples.std()) / math.sqrt(count))


# ---------------------------------------------------------------------- every probe both finds and tests the range


@dataclass(frozen=True)
class _Exchanged:
    """Probes, their images, and for each probe the range of the images of the others.

    With images Y = Q R, the range without the i-th is that of Q less the unit vector u_i = Q s_i orthogonal to all
    images but the i-th, where s_i is the i-th column of R^-T, normalised.
    """

    probes: Tensor  # [P, m]
    Q: Tensor  # [P, m]
    R: Tensor  # [m, m]
    image: Tensor  # [P, m] A Q
    left_out: Tensor  # [m, m] columns s_i


def _exchanged(operator: Operator, probes: Tensor, what: str) -> _Exchanged:
    m = probes.shape[1]
    with bar(f"{what}, {2 * m} products", 2 * m, bytes=3 * _bytes(probes)) as progress:
        try:
            images = _multiply(operator, probes, progress)
        except _Stopped as stop:
            raise _Early(probes, stop.images) from None
        Q, R = torch.linalg.qr(images)
        size = R.diagonal().abs()
        if float(size.min()) <= 100 * torch.finfo(R.dtype).eps * float(size.max()):
            raise InputError(
                f"the operator's rank is below the {m} probes of the range",
                expected="fewer probes than the rank",
                remedy="lower probes, or use trace and diagonal, which are then exact up to rounding",
            )
        inverse = torch.linalg.solve_triangular(R, torch.eye(m, dtype=R.dtype, device=R.device), upper=True).T
        try:
            return _Exchanged(probes, Q, R, _multiply(operator, Q, progress), inverse / inverse.norm(dim=0))
        except _Stopped:
            raise _Early(probes, images) from None


def xtrace(A: Any, probes: int = 60, seed: int = 0) -> Estimate:
    r"""Trace of a symmetric operator by the exchangeable estimator XTrace (Epperly, Tropp & Webber 2024).

    Each of m random vectors tests the trace outside of the range that the m - 1 others find:

    .. math::
        t_i = \operatorname{Tr} P_i A P_i + (P - m + 1)\,
              \frac{r_i^\top A\, r_i}{\|r_i\|^2}, \quad r_i = (I - P_i)\, \omega_i

    with the projector P_i onto the images of the others. Unbiased; the error falls faster with the number of products
    than that of Hutch++ where the spectrum decays. The standard error is that of the mean of the exchangeable t_i.

    Args:
        A: operator or matrix, (P, P).
        probes: products with single vectors, half of them with random ones; at least 6.
        seed: of the probes.

    Raises:
        InputError: too few probes, or more than the operator's rank.

    >>> xtrace(torch.diag(torch.tensor([1.0, 2.0, 3.0])))
    Estimate(value=6.0, stderr=0.0)
    """
    operator = as_operator(A)
    if isinstance(operator, MatrixOperator):
        return Estimate(float(operator.matrix.diagonal().sum()), 0.0)
    if _exact(operator, probes, least=6):
        return Estimate(float(operator.dense().diagonal().sum()), 0.0)
    m, size = probes // 2, operator.shape[0]
    sample = torch.randn(size, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    try:
        x = _exchanged(operator, sample.to(operator.device, operator.dtype), "XTrace")
    except _Early as early:
        return _with_error(0.0, (early.probes * early.images).sum(0))
    inner = x.Q.T @ x.image  # [m, m] A on the range
    W = x.Q.T @ x.probes  # [m, m]
    outside = W - x.left_out * (x.left_out * W).sum(0)  # coordinates of P_i w_i
    on_probe = (x.probes * (x.Q @ x.R)).sum(0)  # [m] w_i A w_i
    left = on_probe - 2 * (outside * x.R).sum(0) + (outside * (inner @ outside)).sum(0)  # r_i A r_i
    norm = x.probes.square().sum(0) - 2 * (outside * W).sum(0) + outside.square().sum(0)  # |r_i|^2
    within = inner.diagonal().sum() - (x.left_out * (inner @ x.left_out)).sum(0)
    return _with_error(0.0, (within + (size - m + 1) * left / norm).double())


def xdiag(A: Any, probes: int = 60, seed: int = 0) -> Diagonal:
    r"""Diagonal of a symmetric operator by the exchangeable estimator XDiag (Epperly, Tropp & Webber 2024).

    .. math:: d_i = \operatorname{diag}(P_i A) + \omega_i \circ (I - P_i) A\, \omega_i

    with random signs and the projector P_i onto the images of the others. Unbiased; the standard error of each
    element is that of the mean of the exchangeable d_i.

    Args:
        A: operator or matrix, (P, P).
        probes: products with single vectors, half of them with random signs; at least 6.
        seed: of the signs.

    Raises:
        InputError: too few probes, or more than the operator's rank.

    >>> xdiag(torch.diag(torch.tensor([1.0, 2.0]))).value
    tensor([1., 2.])
    """
    operator = as_operator(A)
    if isinstance(operator, MatrixOperator) or _exact(operator, probes, least=6):
        exact = operator.dense().diagonal().clone()
        return Diagonal(exact, torch.zeros_like(exact))
    signs = _signs(operator, probes // 2, torch.Generator().manual_seed(seed))
    try:
        x = _exchanged(operator, signs, "XDiag")
    except _Early as early:
        return _mean_diagonal(early.probes * early.images)
    u = x.Q @ x.left_out  # [P, m]
    weight = (x.left_out * x.R).sum(0)  # (I - P_i) A w_i = u_i (s_i . R_i), since A w_i = Q R_i
    samples = (x.Q * x.image).sum(1, keepdim=True) + u * (weight * x.probes - x.image @ x.left_out)  # [P, m]
    return _mean_diagonal(samples)
