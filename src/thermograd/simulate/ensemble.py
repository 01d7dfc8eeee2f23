"""What a simulation of minibatch SGD returns: the rows of all replicas, and their second moments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from ..errors import TooShortError
from ..measurement import Measurement, new_axes, quantity
from ..theory.arrays import Array, as_steps
from ..theory.moments import StationaryMoments

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Ensemble"]


@dataclass(frozen=True)
class Ensemble(Measurement):
    """Weights and velocities of all replicas at the recorded steps; row 0 is the state after the burn-in.

    ``partial`` says that an interrupt left replicas out.
    """

    step: Array = quantity("step", units="steps", long_name="optimizer steps since the start")
    position: Array = quantity("replica", "step", "weight", units="weight", long_name="weights")
    velocity: Array = quantity("replica", "step", "weight", units="gradient", long_name="(theta_k - theta_{k-1})/lr")
    partial: bool = False
    _primary = "position"

    def moments(self, mean: ArrayLike | None = None) -> StationaryMoments:
        """Variance of position and velocity and their covariance, pooled over replicas and steps, [n] each.

        Args:
            mean: the true mean position; by default the pooled one.
        """
        centre = self.position.mean(axis=(0, 1)) if mean is None else np.asarray(mean, dtype=float)
        offset = self.position - centre
        return StationaryMoments(
            (offset**2).mean(axis=(0, 1)), (self.velocity**2).mean(axis=(0, 1)), (offset * self.velocity).mean((0, 1))
        )

    def covariance(self, mean: ArrayLike | None = None) -> Array:
        """Covariance of the position, pooled over replicas and steps, [n, n]."""
        centre = self.position.mean(axis=(0, 1)) if mean is None else np.asarray(mean, dtype=float)
        flat = (self.position - centre).reshape(-1, self.position.shape[-1])
        return flat.T @ flat / len(flat)

    def mean_squared_displacement(self, lags: ArrayLike) -> Array:
        """Mean-squared displacement over lags counted in *rows*, all origins and replicas pooled, [t, n].

        Raises:
            TooShortError: a lag exceeds the record.
        """
        rows = as_steps(lags, "lags")
        if rows.max(initial=0) >= self.position.shape[1]:
            raise TooShortError(
                f"lag {rows.max()} exceeds the record of {self.position.shape[1]} rows", remedy="simulate more steps"
            )
        last = self.position.shape[1]
        return np.stack([((self.position[:, m:] - self.position[:, : last - m]) ** 2).mean(axis=(0, 1)) for m in rows])

    def window_variance(self, detrend: str = "mean") -> Array:
        """Variance along time of each replica, mean or line removed (divisor T), averaged over replicas, [n]."""
        rows = self.position - self.position.mean(axis=1, keepdims=True)
        if detrend == "linear":
            time = np.arange(rows.shape[1]) - (rows.shape[1] - 1) / 2
            slope = np.einsum("t,rtn->rn", time, rows) / (time @ time)
            rows = rows - time[:, None] * slope[:, None, :]
        return (rows**2).mean(axis=(0, 1))

    def plot(self, ax: Axes | None = None) -> Axes:
        """The first weight of the first replicas against the step."""
        axes = new_axes(ax)
        axes.plot(self.step, self.position[:10, :, 0].T, lw=0.8)
        axes.set(xlabel="step", ylabel="first weight")
        return axes
