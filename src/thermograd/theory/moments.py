"""The record that stationary second moments come in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..measurement import Measurement, new_axes, quantity
from .arrays import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["StationaryMoments"]


@dataclass(frozen=True)
class StationaryMoments(Measurement):
    """Stationary second moments of position and velocity, per mode."""

    position: Array = quantity("mode", units="weight^2", long_name="variance of the position")
    velocity: Array = quantity("mode", units="gradient^2", long_name="variance of the velocity")
    cross: Array = quantity("mode", units="weight gradient", long_name="covariance of position and velocity")

    def plot(self, ax: Axes | None = None) -> Axes:
        """Position and velocity variance against the mode number."""
        axes = new_axes(ax)
        axes.semilogy(self.position, "o-", label="position")
        axes.semilogy(self.velocity, "s-", label="velocity")
        axes.set(xlabel="mode", ylabel="stationary variance")
        axes.legend()
        return axes
