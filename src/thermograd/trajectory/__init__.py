"""What the weights do: recording a trajectory, and the statistics of its fluctuations."""

from __future__ import annotations

from .autocorrelation import Autocorrelation, autocorrelation
from .diffusion import Diffusion, diffusion
from .pca import PCA, pca
from .recorder import Recorder
from .run import open_run, write_group
from .selection import Selection, project, select
from .stationarity import Stationarity, stationarity
from .store import TrajectoryStore

__all__ = [
    "PCA",
    "Autocorrelation",
    "Diffusion",
    "Recorder",
    "Selection",
    "Stationarity",
    "TrajectoryStore",
    "autocorrelation",
    "diffusion",
    "open_run",
    "pca",
    "project",
    "select",
    "stationarity",
    "write_group",
]
