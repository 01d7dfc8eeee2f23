r"""The gradient noise scale measured while training, from the gradients of microbatches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, NonFiniteError, TooShortError
from ..measurement import Measurement, new_axes, quantity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["OnlineNoiseScale", "OnlineScale"]

_BLOCKS = 20  # blocks of successive steps that the standard errors come from


@dataclass(frozen=True)
class OnlineScale(Measurement):
    """Noise scale over some steps of training; see :class:`OnlineNoiseScale`."""

    noise_scale: float = quantity(units="samples", long_name="simple noise scale Tr C / |g|^2")
    stderr: float = quantity(units="samples", long_name="its standard error")
    strength: float = quantity(units="loss^2", long_name="Tr C, mean over steps")
    strength_stderr: float = quantity(units="loss^2", long_name="its standard error")
    gradient_square: float = quantity(units="loss^2", long_name="|g|^2, mean over steps, free of the noise's bias")
    gradient_square_stderr: float = quantity(units="loss^2", long_name="its standard error")
    resolved: bool = quantity(long_name="whether |g|^2 exceeds zero by two standard errors")
    steps: int = quantity(long_name="number of steps")

    _primary = "noise_scale"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Noise strength and squared gradient with error bars."""
        ax = new_axes(ax)
        values, errors = [self.strength, self.gradient_square], [self.strength_stderr, self.gradient_square_stderr]
        ax.errorbar([0, 1], values, yerr=[e if math.isfinite(e) else 0 for e in errors], fmt="o", capsize=4)
        ax.set(xticks=[0, 1], xticklabels=["Tr C", "|g|²"], ylabel="squared gradient")
        return ax


class OnlineNoiseScale:
    r"""Unbiased estimates of :math:`|g|^2` and :math:`\operatorname{Tr} C` from two batch sizes, step by step.

    A batch of B samples, in m microbatches of b = B/m (by gradient accumulation or from as many workers), gives

    .. math::
        |g|^2 \approx \frac{B |g_B|^2 - b\, \overline{|g_b|^2}}{B - b}, \qquad
        \operatorname{Tr} C \approx \frac{\overline{|g_b|^2} - |g_B|^2}{1/b - 1/B}

    which are unbiased for samples drawn independently (McCandlish et al. 2018, Eqs. A.2-A.3); for unequal microbatches
    each deviation from the mean is weighted by its size. Drawn without replacement from N samples, as in an epoch,
    give ``dataset_size``: Tr C is then that of the data set, with its factor (N - 1)/N. The ratio is taken of means
    over steps, and standard errors from blocks of successive steps, so that correlation over a few steps is in them.

    Args:
        batch_size: samples in a microbatch, b; or give ``sizes`` with every step.
        dataset_size: N, where samples are drawn without replacement.

    >>> scale = OnlineNoiseScale(batch_size=1)
    >>> for _ in range(3):
    ...     _ = scale.update([torch.tensor([1.0]), torch.tensor([3.0])])
    >>> scale.result().strength, scale.result().gradient_square
    (2.0, 3.0)
    """

    def __init__(self, batch_size: int | None = None, dataset_size: int | None = None):
        for name, value in (("batch_size", batch_size), ("dataset_size", dataset_size)):
            if value is not None and int(value) < 1:
                raise InputError(f"{name} is {value}", expected="a whole number >= 1")
        self.batch_size, self.dataset_size = batch_size, dataset_size
        self._strength: list[float] = []
        self._square: list[float] = []
        self._open: list[tuple[Any, int]] = []

    def __len__(self) -> int:
        """Steps seen."""
        return len(self._strength)

    def add(self, parameters: Any, size: int | None = None) -> None:
        """Note the gradient of one microbatch of a step: call after each ``backward``, and :meth:`step` at the end.

        Args:
            parameters: a flat gradient ``[P]``, or tensors or parameters whose ``.grad`` holds the microbatch's own
                mean gradient (set it to None between microbatches, or keep a copy of what was there).
            size: samples in the microbatch.
        """
        self._open.append((_flat(parameters), self._size(size)))

    def step(self) -> tuple[float, float]:
        """Close the step whose microbatches were noted by :meth:`add`; returns the estimates of Tr C and |g|^2."""
        gradients, sizes = [g for g, _ in self._open], [n for _, n in self._open]
        self._open = []
        return self.update(gradients, sizes)

    def update(self, gradients: Iterable[Any], sizes: Sequence[int] | None = None) -> tuple[float, float]:
        """One step from all its microbatches' gradients.

        Args:
            gradients: mean gradients of the microbatches, flat ``[P]`` or as lists of tensors; at least two.
            sizes: samples in each; default ``batch_size`` for all.

        Returns:
            This step's estimates of Tr C and of |g|^2. Single estimates scatter widely and may be negative.

        Raises:
            InputError: fewer than two microbatches, or no sizes. NonFiniteError: a gradient is not finite.
        """
        rows = [_flat(gradient) for gradient in gradients]
        counts = [self._size(n) for n in (sizes if sizes is not None else [None] * len(rows))]
        if len(rows) < 2 or len(counts) != len(rows):
            raise InputError(
                f"{len(rows)} microbatches with {len(counts)} sizes",
                expected="at least two microbatches and the size of each",
                remedy="split the batch in two halves",
            )
        total = sum(counts)
        mean = sum((n / total) * row for n, row in zip(counts, rows))
        squares = [float((row - mean).square().sum()) for row in rows]
        bad = [i for i, value in enumerate(squares) if not math.isfinite(value)]
        if bad:
            raise NonFiniteError(f"the gradient of microbatch {bad[0]} at step {len(self)} is not finite")
        # each n |g_n - g|^2 has expectation Tr C (1 - n/B); all together (m - 1) Tr C
        strength = sum(n * value for n, value in zip(counts, squares)) / (len(rows) - 1)
        factor = 1.0
        if self.dataset_size is not None:
            if total > self.dataset_size:
                raise InputError(f"a batch of {total} samples", expected=f"at most dataset_size={self.dataset_size}")
            factor = 1 - total / self.dataset_size
        square = float(torch.as_tensor(mean).square().sum()) - factor * strength / total
        population = 1 if self.dataset_size is None else (self.dataset_size - 1) / self.dataset_size
        self._strength.append(strength * population)
        self._square.append(square)
        return self._strength[-1], square

    def result(self, last: int | None = None) -> OnlineScale:
        """The noise scale over all steps, or over the last few.

        Raises:
            TooShortError: no step yet.
        """
        strength, square = np.array(self._strength), np.array(self._square)
        if last is not None:
            if last < 1:
                raise InputError(f"last is {last}", expected="at least 1 step")
            strength, square = strength[-last:], square[-last:]
        if not len(strength):
            raise TooShortError("no step of training has been seen", expected="at least 1", remedy="call update()")
        means = float(strength.mean()), float(square.mean())
        errors, covariance = _block_errors(strength, square)
        resolved = means[1] > 0 and not means[1] < 2 * errors[1]
        scale, error = math.inf, math.inf
        if means[1] > 0:
            scale = means[0] / means[1]
            variance = errors[0] ** 2 - 2 * scale * covariance + (scale * errors[1]) ** 2
            error = math.sqrt(max(variance, 0.0)) / means[1] if math.isfinite(variance) else math.inf
        return OnlineScale(scale, error, means[0], errors[0], means[1], errors[1], bool(resolved), len(strength))

    def _size(self, size: int | None) -> int:
        size = self.batch_size if size is None else size
        if size is None or int(size) < 1:
            raise InputError(
                f"the size of a microbatch is {size}", expected="a whole number >= 1", remedy="give batch_size or sizes"
            )
        return int(size)


def _flat(gradient: Any) -> Tensor:
    """A gradient as one vector in float64, from a tensor, an array, parameters or a list of tensors."""
    if isinstance(gradient, Tensor):
        return gradient.detach().double().flatten()
    if isinstance(gradient, np.ndarray):
        return torch.as_tensor(gradient).double().flatten()
    grads = [p.grad if isinstance(p, torch.nn.Parameter) else torch.as_tensor(p) for p in gradient]
    parts = [grad for grad in grads if grad is not None]
    if not parts:
        raise InputError("no parameter has a gradient", expected="gradients: call this after backward()")
    return torch.cat([p.detach().double().flatten() for p in parts])


def _block_errors(a: np.ndarray, b: np.ndarray) -> tuple[tuple[float, float], float]:
    """Standard errors of both means and their covariance, from means over blocks of successive steps."""
    if len(a) < 2:
        return (math.inf, math.inf), math.inf
    blocks = min(_BLOCKS, len(a))
    means = np.array([[part.mean() for part in np.array_split(x, blocks)] for x in (a, b)])
    cov = np.cov(means) / blocks
    return (math.sqrt(cov[0, 0]), math.sqrt(cov[1, 1])), float(cov[0, 1])
