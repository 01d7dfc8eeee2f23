"""What the weights do: recording a trajectory, and the statistics of its fluctuations."""

from __future__ import annotations

from .autocorrelation import Autocorrelation, autocorrelation
from .diffusion import Diffusion, diffusion
from .equilibration import Equilibration
from .multitau import MultiTau, OnlineMSD
from .parts import Directions, Every, Full, Layer, LogSpaced, NoiseScale, Scalars, Sketch
from .pca import PCA, pca
from .recorder import Recorder
from .run import open_run, write_group
from .selection import Selection, project, select
from .stationarity import Stationarity, stationarity
from .store import TrajectoryStore
from .streaming import FrequentDirections, StreamedPCA
from .winding import Winding, winding

__all__ = [
    "PCA",
    "Autocorrelation",
    "Diffusion",
    "Directions",
    "Equilibration",
    "Every",
    "FrequentDirections",
    "Full",
    "Layer",
    "LogSpaced",
    "MultiTau",
    "NoiseScale",
    "OnlineMSD",
    "Recorder",
    "Scalars",
    "Selection",
    "Sketch",
    "Stationarity",
    "StreamedPCA",
    "TrajectoryStore",
    "Winding",
    "autocorrelation",
    "diffusion",
    "open_run",
    "pca",
    "project",
    "select",
    "stationarity",
    "winding",
    "write_group",
]
